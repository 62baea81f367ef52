// The words of GPTQ and AWQ, transposed, and their scales and zero points as scales and biases. What they make is the
// same as, in NumPy, of jaxq/checkpoints/awq.py and zero_points.py.

#ifndef JAXQ_KERNELS_CPU_REPACK_WORDS_INL_H_
#define JAXQ_KERNELS_CPU_REPACK_WORDS_INL_H_

#include <cstring>

#include "numbers.h"
#include "repack.h"
#include "repack_blocks-inl.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

// ---- transposed words

// A cache line of words: what is written at a time to each row of the output. Tiles are taken down the columns: the
// next one continues those rows, and memory takes several lines of a row faster than as many of different rows.
constexpr int kTile = 16;

JAXQ_INLINE int Least(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

#if defined(__AVX512F__)
#include "transpose_words-inl.h"

// Writes from[kTile, kTile] to `to`, transposed. A row of `to` is a cache line, written past the caches where it begins
// as one: the line is not fetched first, and nothing else is put out of the caches for it.
JAXQ_INLINE void TransposeFullTile(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  const bool whole_lines = ((reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(to_stride) * 4) & 63) == 0;
  __m512i rows[16];
  JAXQ_UNROLL
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(from + i * from_stride);
  TransposeWords(rows);
  JAXQ_UNROLL
  for (int i = 0; i < 16; ++i) {
    if (whole_lines)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i * to_stride), rows[i]);
    else
      _mm512_storeu_si512(to + i * to_stride, rows[i]);
  }
}
#elif defined(__AVX2__)
// The rows of from[8, 8], transposed; rows `stride` words apart.
JAXQ_INLINE void Transpose8(const uint32_t* from, int64_t stride, __m256i* out) {
  // Rows by pairs, then by fours, within the halves of the vectors; then the halves.
  __m256i a[8], b[8];
  JAXQ_UNROLL
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * stride));
  JAXQ_UNROLL
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  JAXQ_UNROLL
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm256_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm256_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  JAXQ_UNROLL
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
    out[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
  }
}

// As with AVX-512: from[kTile, kTile] -> to, transposed, past the caches where that is possible.
JAXQ_INLINE void TransposeFullTile(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  const bool whole_lines = ((reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(to_stride) * 4) & 63) == 0;
  for (int j = 0; j < kTile; j += 8) {
    __m256i left[8], right[8];
    Transpose8(from + j, from_stride, left);
    Transpose8(from + 8 * from_stride + j, from_stride, right);
    JAXQ_UNROLL
    for (int i = 0; i < 8; ++i) {
      __m256i* row = reinterpret_cast<__m256i*>(to + (j + i) * to_stride);
      if (whole_lines) {
        _mm256_stream_si256(row, left[i]);
        _mm256_stream_si256(row + 1, right[i]);
      } else {
        _mm256_storeu_si256(row, left[i]);
        _mm256_storeu_si256(row + 1, right[i]);
      }
    }
  }
}
#endif

// Whoever is told that a function has returned sees what it wrote past the caches.
JAXQ_INLINE void EndOfStreams() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

// from[height, width] -> to[width, height], both at most kTile.
JAXQ_INLINE void TransposeTile(const uint32_t* from, int64_t from_stride, int height, int width, uint32_t* to,
                               int64_t to_stride) {
#ifdef __AVX2__
  if (height == kTile && width == kTile) {
    TransposeFullTile(from, from_stride, to, to_stride);
    return;
  }
#endif
  for (int j = 0; j < width; ++j)
    for (int i = 0; i < height; ++i) to[j * to_stride + i] = from[i * from_stride + j];
}

void Transpose(const uint32_t* words, int64_t rows, int64_t columns, uint32_t* out, int64_t stride) {
  for (int64_t column = 0; column < columns; column += kTile)
    for (int64_t row = 0; row < rows; row += kTile)
      TransposeTile(words + row * columns + column, columns, Least(kTile, rows - row), Least(kTile, columns - column),
                    out + column * stride + row, stride);
  EndOfStreams();
}

// Exchanges the fields of `kMask`, shifted up by kShift, of one word with the ones in place of the other.
template <int kShift, uint32_t kMask>
JAXQ_INLINE void Exchange(uint32_t* a, uint32_t* b) {
  for (int j = 0; j < kTile; ++j) {
    const uint32_t low = (a[j] & kMask) | (b[j] & kMask) << kShift;
    b[j] = (a[j] >> kShift & kMask) | (b[j] & ~kMask);
    a[j] = low;
  }
}

// words[8 inputs][kTile] of eight nibbles each -> words[8 nibbles][kTile] of eight inputs each.
JAXQ_INLINE void TransposeNibbles(uint32_t (*words)[kTile]) {
  for (int i = 0; i < 4; ++i) Exchange<16, 0x0000ffffu>(words[i], words[i + 4]);
  for (int i = 0; i < 2; ++i) Exchange<8, 0x00ff00ffu>(words[i], words[i + 2]);
  for (int i = 4; i < 6; ++i) Exchange<8, 0x00ff00ffu>(words[i], words[i + 2]);
  for (int i = 0; i < 8; i += 2) Exchange<4, 0x0f0f0f0fu>(words[i], words[i + 1]);
}

// Output i of a word stands in this nibble. Source: AutoAWQ's `WQLinear_GEMM`.
constexpr int kNibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};

// Tiles of 8 * height inputs and `width` words of outputs. A constant kWidth makes copies of a line plain loads.
template <int kWidth>
JAXQ_INLINE void AwqTile(const uint32_t* words, int64_t columns, int height, int width, uint32_t* out, int64_t stride) {
  uint32_t tile[8][kTile][kTile], inputs[8][kTile] = {};
  if (kWidth != 0) width = kWidth;
  for (int i = 0; i < height; ++i) {
    for (int k = 0; k < 8; ++k)
      std::memcpy(inputs[k], words + (i * 8 + k) * columns, static_cast<size_t>(width) * sizeof(uint32_t));
    TransposeNibbles(inputs);
    for (int n = 0; n < 8; ++n) std::memcpy(tile[n][i], inputs[kNibble[n]], sizeof inputs[0]);
  }
  for (int n = 0; n < 8; ++n) TransposeTile(tile[n][0], kTile, height, width, out + n * stride, 8 * stride);
}

void Awq(const uint32_t* words, int64_t rows, int64_t columns, uint32_t* out, int64_t stride) {
  for (int64_t column = 0; column < columns; column += kTile)
    for (int64_t row = 0; row < rows; row += kTile) {
      const int height = Least(kTile, rows - row), width = Least(kTile, columns - column);
      const uint32_t* from = words + row * 8 * columns + column;
      uint32_t* to = out + column * 8 * stride + row;
      if (width == kTile)
        AwqTile<kTile>(from, columns, height, width, to, stride);
      else
        AwqTile<0>(from, columns, height, width, to, stride);
    }
  EndOfStreams();
}

// ---- floats

// `count` is rounded up to a multiple of 8: the arrays are long enough.
JAXQ_INLINE void FloatsOfHalves(const uint16_t* halves, int count, float* out) {
#ifdef __F16C__
  for (int i = 0; i < count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
#else
  for (int i = 0; i < count; ++i) out[i] = FloatOfF16(halves[i]);
#endif
}

JAXQ_INLINE void HalvesOfFloats(const float* values, int count, uint16_t* out) {
#ifdef __F16C__
  for (int i = 0; i < count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < count; ++i) out[i] = F16OfFloat(values[i]);
#endif
}

// ---- groups of GPTQ and AWQ

// Groups, and outputs of each, at a time: of float16, a cache line of what is read; of float32, one of what is written.
constexpr int kSomeGroups = 16, kSomeOutputs = 32;

// Where the eight codes of `bits` stand that share `bits` bytes.
JAXQ_INLINE void FindCodes(const ZeroPoints& zeros, int* shifts) {
  for (int i = 0; i < 8; ++i) shifts[i] = zeros.awq ? 4 * kNibble[i] : zeros.bits * i;
}

// The zero points of `count` outputs, a multiple of what fills a word, which begin at `words`.
JAXQ_INLINE void LoadZeros(const ZeroPoints& zeros, const int* shifts, const uint8_t* words, int count, float* out) {
  const uint64_t mask = (1u << zeros.bits) - 1u;
  uint8_t bytes[kSomeOutputs + 8] = {};  // eight are read for any number of bits
  std::memcpy(bytes, words, static_cast<size_t>(count) * zeros.bits / 8);
  for (int octet = 0; octet < kSomeOutputs / 8; ++octet) {
    const uint64_t codes = Load64(bytes + octet * zeros.bits);
    for (int i = 0; i < 8; ++i)
      out[octet * 8 + i] = static_cast<float>(static_cast<int>(((codes >> shifts[i]) + zeros.less) & mask));
  }
}

// kSomeOutputs floats, or fewer and zeros.
JAXQ_INLINE void LoadFloats(const uint8_t* values, DType dtype, int count, float* out) {
  uint16_t halves[kSomeOutputs] = {};
  if (dtype == DType::kF32) {
    std::memset(out, 0, kSomeOutputs * sizeof(float));
    std::memcpy(out, values, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  std::memcpy(halves, values, static_cast<size_t>(count) * sizeof(uint16_t));
  if (dtype == DType::kF16)
    FloatsOfHalves(halves, kSomeOutputs, out);
  else
    for (int i = 0; i < kSomeOutputs; ++i) out[i] = FloatOfBf16(halves[i]);
}

// To float32 itself, float16 or bfloat16. Returns what became of finite values, of kBeyond and kRounded.
JAXQ_INLINE int CastFloats(const float* values, DType, uint32_t* out) {
  std::memcpy(out, values, kSomeOutputs * sizeof(float));
  return 0;
}

JAXQ_INLINE int CastFloats(const float* values, DType dtype, uint16_t* out) {
  float back[kSomeOutputs];
  if (dtype == DType::kF16) {
    HalvesOfFloats(values, kSomeOutputs, out);
    FloatsOfHalves(out, kSomeOutputs, back);
  } else {
    for (int i = 0; i < kSomeOutputs; ++i) out[i] = Bf16OfFloat(values[i]);
    for (int i = 0; i < kSomeOutputs; ++i) back[i] = FloatOfBf16(out[i]);
  }
  uint32_t beyond = 0, rounded = 0;
  for (int i = 0; i < kSomeOutputs; ++i) {
    const bool was_finite = (BitsOfFloat(values[i]) & 0x7f800000u) != 0x7f800000u;
    const bool is_finite = (BitsOfFloat(back[i]) & 0x7f800000u) != 0x7f800000u;
    beyond |= was_finite & !is_finite;
    rounded |= was_finite & (back[i] != values[i]);
  }
  return (beyond ? kBeyond : 0) | (rounded ? kRounded : 0);
}

// tile[groups][kSomeOutputs] -> out[outputs, groups], whose rows begin `row` apart.
JAXQ_INLINE void StoreOnce(const uint32_t (*tile)[kSomeOutputs], int groups, int outputs, uint32_t* out, int64_t row) {
  for (int j = 0; j < outputs; j += kTile)
    TransposeTile(tile[0] + j, kSomeOutputs, groups, Least(kTile, outputs - j), out + j * row, row);
}

JAXQ_INLINE void StoreOnce(const uint16_t (*tile)[kSomeOutputs], int groups, int outputs, uint16_t* out, int64_t row) {
  for (int j = 0; j < outputs; ++j)
    for (int g = 0; g < groups; ++g) out[j * row + g] = tile[g][j];
}

// tile[groups][kSomeOutputs] -> out[outputs, row], each group `repeats` times from group `first` on; the last may be
// cut.
template <typename Word>
JAXQ_INLINE void StoreGroups(const Word (*tile)[kSomeOutputs], int groups, int outputs, int64_t first, int64_t repeats,
                             Word* out, int64_t row) {
  if (repeats == 1) {
    StoreOnce(tile, groups, outputs, out + first, row);
    return;
  }
  for (int j = 0; j < outputs; ++j) {
    Word* to = out + j * row;
    for (int g = 0; g < groups; ++g)
      for (int64_t at = (first + g) * repeats; at < (first + g + 1) * repeats && at < row; ++at) to[at] = tile[g][j];
  }
}

template <typename Word>
int GroupsAs(const uint8_t* scales, DType from, const ZeroPoints& zeros, int64_t groups, int64_t outputs,
             int64_t repeats, Word* out_scales, Word* out_biases, int64_t row, DType dtype) {
  int shifts[8], lost = 0;
  FindCodes(zeros, shifts);
  for (int64_t output = 0; output < outputs; output += kSomeOutputs)
    for (int64_t group = 0; group < groups; group += kSomeGroups) {
      Word scale[kSomeGroups][kSomeOutputs], bias[kSomeGroups][kSomeOutputs];
      const int height = Least(kSomeGroups, groups - group), width = Least(kSomeOutputs, outputs - output);
      for (int g = 0; g < height; ++g) {
        const int64_t at = (group + g) * outputs + output;
        float values[kSomeOutputs], zero[kSomeOutputs];
        LoadFloats(scales + at * SizeOf(from), from, width, values);
        LoadZeros(zeros, shifts, zeros.words + at * zeros.bits / 8, width, zero);
        if (from == dtype)  // bit by bit, also a NaN's
          std::memcpy(scale[g], scales + at * SizeOf(from), static_cast<size_t>(width) * sizeof(Word));
        else
          lost |= CastFloats(values, dtype, scale[g]);
        // Subtracting from zero leaves one zero, of the sign that MLX's have.
        for (int i = 0; i < kSomeOutputs; ++i) values[i] = 0.0f - values[i] * zero[i];
        lost |= CastFloats(values, dtype, bias[g]);
      }
      StoreGroups(scale, height, width, group, repeats, out_scales + output * row, row);
      StoreGroups(bias, height, width, group, repeats, out_biases + output * row, row);
    }
  EndOfStreams();
  return lost;
}

int Groups(const void* scales, DType from, const ZeroPoints& zeros, int64_t groups, int64_t outputs, int64_t repeats,
           void* out_scales, void* out_biases, int64_t row, DType dtype) {
  const auto* bytes = static_cast<const uint8_t*>(scales);
  if (dtype == DType::kF32)
    return GroupsAs(bytes, from, zeros, groups, outputs, repeats, static_cast<uint32_t*>(out_scales),
                    static_cast<uint32_t*>(out_biases), row, dtype);
  return GroupsAs(bytes, from, zeros, groups, outputs, repeats, static_cast<uint16_t*>(out_scales),
                  static_cast<uint16_t*>(out_biases), row, dtype);
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_REPACK_WORDS_INL_H_
