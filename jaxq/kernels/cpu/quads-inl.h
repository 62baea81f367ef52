// Panels of codes for the matrix products of panels-inl.h: kPanelRows rows of w by some hundreds of codes, transposed
// in units of 32 bits, so that a vector has one word of 16 rows each.
//
// A word has the codes as they are packed where it holds whole ones (2, 4 and 8 bits), and else four, unpacked to
// bytes. What one shift cuts out of it, every P-th of its codes, meets in a lane; x is put in that order.

#ifndef JAXQ_KERNELS_CPU_QUADS_INL_H_
#define JAXQ_KERNELS_CPU_QUADS_INL_H_

#include "scales-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kPanelRows = 32;
constexpr int64_t kMaxPanelGroups = 32;  // whose scales are taken together

// Fetches a rectangle of rows into the second-level cache, a few lines at a time, in the order in which they lie in
// memory: a block's codes are used a line of each row at a time, which neither the hardware foresees nor memory likes.
class Fetcher {
 public:
  Fetcher() = default;
  // `width` bytes of each of `rows` rows, `stride` bytes apart.
  Fetcher(const void* first, int64_t width, int64_t rows, int64_t stride)
      : row_(static_cast<const char*>(first)), width_(width), stride_(stride), rows_(rows) {
    if (width == stride) width_ *= rows, rows_ = rows > 0;  // whole rows are one
  }

  int64_t lines() const { return rows_ * Ceil(width_, 64); }  // at first

  JAXQ_INLINE void Next(int64_t lines) {
    if (rows_ > 0 && at_ + 64 * lines < width_) {
      for (int64_t i = 0; i < lines; ++i) _mm_prefetch(row_ + at_ + 64 * i, _MM_HINT_T1);
      at_ += 64 * lines;
      return;
    }
    for (; lines > 0 && rows_ > 0; --lines) {
      _mm_prefetch(row_ + at_, _MM_HINT_T1);
      at_ += 64;
      if (at_ >= width_) at_ = 0, row_ += stride_, --rows_;
    }
  }

 private:
  const char* row_ = nullptr;
  int64_t width_ = 0, stride_ = 0, rows_ = 0, at_ = 0;
};

// 16 rows of w, `row` and after, from src on: words[i] has word i of each. Rows past the end of w are zeros. load(src)
// gives a row's words.
template <typename Load>
JAXQ_INLINE void WordBlock(const Weight& weight, int64_t row, const uint8_t* src, Load&& load, __m512i* words) {
  const int64_t rows = Least(16, weight.rows - row);
  for (int64_t r = 0; r < 16; ++r, src += weight.row_bytes) words[r] = r < rows ? load(src) : _mm512_setzero_si512();
  TransposeWords(words);
}

// Calls put(k, r, words) for the words of codes first+k .. in rows n+r .. n+r+16, r = 0 and 16, up to `depth` codes.
// kWidth: bits of a code in a word. kSpread: it is packed in fewer.
template <int kWidth, bool kSpread, typename Put>
JAXQ_INLINE void ForWords(const Weight& weight, const Unpacker& unpack, int64_t n, int64_t first, int64_t depth,
                          Put&& put) {
  constexpr int64_t kCodes = 32 / kWidth, kLine = 16 * kCodes;
  const int64_t bits = kSpread ? weight.format.bits : kWidth;
  for (int64_t r = 0; r < kPanelRows; r += 16) {
    const uint8_t* src = weight.packed + (n + r) * weight.row_bytes + first / 8 * bits;
    for (int64_t k = 0; k < depth; k += kLine, src += kLine / 8 * bits) {
      const int64_t codes = Least(kLine, depth - k);
      const __mmask64 bytes = FirstBytes(codes / 8 * bits);
      __m512i words[16];
      WordBlock(weight, n + r, src,
                [&](const uint8_t* row) __attribute__((always_inline)) {
                  if constexpr (kSpread) return unpack(row, codes);
                  return _mm512_maskz_loadu_epi8(bytes, row);
                },
                words);
      JAXQ_UNROLL
      for (int64_t i = 0; i < 16; ++i)
        if (i * kCodes < codes) put(k + i * kCodes, r, words[i]);
    }
  }
}

// Scales and biases of some rows, transposed.
template <int64_t kRows>
struct PanelScales {
  float scales[kMaxPanelGroups][kRows], biases[kMaxPanelGroups][kRows];
};

// Those of rows n .. n+count, groups first .. first+groups. `centre` is what a panel subtracts from every code: it goes
// into the biases. load gives 16 scales and biases.
template <int64_t kRows, typename Load>
JAXQ_INLINE void TransposeScales(const Weight& weight, int64_t n, int64_t count, int64_t first, int64_t groups,
                                 float centre, PanelScales<kRows>* out, Load&& load) {
  for (int64_t r0 = 0; r0 < count; r0 += 16) {
    for (int64_t j0 = 0; j0 < groups; j0 += 16) {
      const int64_t wide = Least(16, groups - j0);
      const __mmask16 mask = FirstLanes(wide);
      F scales[16], biases[16];
      JAXQ_UNROLL
      for (int64_t r = 0; r < 16; ++r) {
        const int64_t at = (n + Least(r0 + r, count - 1)) * weight.groups + first + j0;
        load(at, mask, &scales[r], &biases[r]);
        biases[r] = Fma(scales[r], Set1(centre), biases[r]);
      }
      Transpose(scales);
      Transpose(biases);
      for (int64_t j = 0; j < wide; ++j) {
        Store(out->scales[j0 + j] + r0, scales[j]);
        Store(out->biases[j0 + j] + r0, biases[j]);
      }
    }
  }
}

// What the scales are is asked once for all rows.
template <int64_t kRows>
void FillScales(const Weight& weight, int64_t n, int64_t count, int64_t first, int64_t groups, float centre,
                PanelScales<kRows>* out) {
  const auto transpose = [&](auto&& load) __attribute__((always_inline)) {
    TransposeScales(weight, n, count, first, groups, centre, out, load);
  };
  if (weight.format.affine()) {
    WithDType(weight.scale_dtype, [&](auto dtype) {
      constexpr DType kDType = decltype(dtype)::value;
      transpose([&](int64_t at, __mmask16 mask, F* scales, F* biases) __attribute__((always_inline)) {
        *scales = LoadSome(kDType, weight.scales, at, mask), *biases = LoadSome(kDType, weight.biases, at, mask);
      });
    });
  } else {
    transpose([&](int64_t at, __mmask16 mask, F* scales, F* biases) __attribute__((always_inline)) {
      *scales = LoadScales(weight, at, mask), *biases = Zero();
    });
  }
}

// Words of up to 16 rows side by side: out[words][rows]. load(r, at) gives words at .. at+16 of row r; what it gives
// past the last one is not used.
template <typename Load>
JAXQ_INLINE void InterleaveWords(int64_t words, int64_t rows, int32_t* out, Load&& load) {
  const __mmask16 mask = FirstLanes(rows);
  for (int64_t at = 0; at < words; at += 16) {
    __m512i block[16];
    for (int64_t r = 0; r < 16; ++r) block[r] = r < rows ? load(r, at) : _mm512_setzero_si512();
    TransposeWords(block);
    for (int64_t i = 0; i < Least(16, words - at); ++i, out += rows) _mm512_mask_storeu_epi32(out, mask, block[i]);
  }
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_QUADS_INL_H_
