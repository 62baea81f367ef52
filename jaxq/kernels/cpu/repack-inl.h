// Everything of repack.h, in the namespace JAXQ_ISA, as the table JAXQ_REPACK.

#ifndef JAXQ_KERNELS_CPU_REPACK_INL_H_
#define JAXQ_KERNELS_CPU_REPACK_INL_H_

#include "numbers.h"
#include "repack.h"
#include "repack_blocks-inl.h"
#include "repack_words-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

// Weights at a time: what is unpacked stays in the first-level cache, and no loop is short.
constexpr int kStrip = 2048;
constexpr int kMostGroups = kStrip / 16;

// ---- codes

// Not the kernels' PackOctets, which packs single groups, eight codes an instruction: on a Zen 4 that is 13 to 29 GB of
// codes a second where this is 43 to 144, and packing would be most of what a strip takes.
//
// Codes, a byte each, `lanes` times eight of them -> a little-endian stream of kBits each. Eight in one 64-bit lane move
// together, by bytes, then by pairs, then by fours:
//   bytes  [ 0 c3 | 0 c2 | 0 c1 | 0 c0 ]  ->  pairs  [ 0 0 c3 c2 | 0 0 c1 c0 ]  ->  fours  [ 0 0 0 0 c3 c2 c1 c0 ]
template <int kShift>
JAXQ_INLINE uint64_t JoinPairs(uint64_t lane, uint64_t high) {
  return (lane & ~high) | (lane & high) >> kShift;
}

template <int kBits>
JAXQ_INLINE uint64_t Join(uint64_t lane) {
  lane = JoinPairs<8 - kBits>(lane, 0xff00ff00ff00ff00u);
  lane = JoinPairs<2 * (8 - kBits)>(lane, 0xffff0000ffff0000u);
  return JoinPairs<4 * (8 - kBits)>(lane, 0xffffffff00000000u);
}

template <typename Word, int kBits>
JAXQ_INLINE void PackAs(const uint8_t* codes, int lanes, uint8_t* out) {
  for (int i = 0; i < lanes; ++i) {
    const Word word = static_cast<Word>(Join<kBits>(Load64(codes + 8 * i)));
    std::memcpy(out + i * sizeof word, &word, sizeof word);
  }
}

#ifdef __AVX2__

// 32 codes: by pairs, then, where kBits is not 4, by fours. Fields of 16 or 32 bits.
template <int kBits>
JAXQ_INLINE __m256i JoinedAt(const uint8_t* codes) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i twos = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(1 | 1 << (8 + kBits)));
  return kBits == 4 ? twos : _mm256_madd_epi16(twos, _mm256_set1_epi32(1 | 1 << (16 + 2 * kBits)));
}

// 3, 5 or 6 bits: in each half of the vector, 16 codes in 2 * kBits bytes, and zeros.
template <int kBits>
JAXQ_INLINE __m256i Squeezed(__m256i fours) {
  if (kBits == 6)
    return _mm256_shuffle_epi8(
        fours, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1)));
  // Up to where the next four begin, and all eight down again.
  constexpr int kGap = 32 - 4 * kBits;
  const __m256i up = _mm256_sllv_epi32(fours, _mm256_set1_epi64x(kGap));
  const __m256i eights = _mm256_srli_epi64(up, kGap);
  const __m128i order = kBits == 3 ? _mm_setr_epi8(0, 1, 2, 8, 9, 10, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1)
                                   : _mm_setr_epi8(0, 1, 2, 3, 4, 8, 9, 10, 11, 12, -1, -1, -1, -1, -1, -1);
  return _mm256_shuffle_epi8(eights, _mm256_broadcastsi128_si256(order));
}

// codes[count], and more that may be read, up to a multiple of 128 -> out[kStrip / 8 * kBits + 16].
template <int kBits>
JAXQ_INLINE void Pack(const uint8_t* codes, int count, uint8_t* out) {
  if constexpr (kBits == 8) {
    std::memcpy(out, codes, count);
  } else if constexpr (kBits == 4) {
    for (int i = 0; i < count; i += 64) {
      const __m256i halves = _mm256_packus_epi16(JoinedAt<4>(codes + i), JoinedAt<4>(codes + i + 32));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i / 2), _mm256_permute4x64_epi64(halves, 0xd8));
    }
  } else if constexpr (kBits == 2) {
    for (int i = 0; i < count; i += 128) {
      const __m256i low = _mm256_packus_epi32(JoinedAt<2>(codes + i), JoinedAt<2>(codes + i + 32));
      const __m256i high = _mm256_packus_epi32(JoinedAt<2>(codes + i + 64), JoinedAt<2>(codes + i + 96));
      const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i / 4),
                          _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
    }
  } else {
    for (int i = 0; i < count; i += 32, out += 4 * kBits) {
      const __m256i squeezed = Squeezed<kBits>(JoinedAt<kBits>(codes + i));
      // The second half over the zeros of the first, its own zeros over what comes next.
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(squeezed));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * kBits), _mm256_extracti128_si256(squeezed, 1));
    }
  }
}

#else

template <int kBits>
JAXQ_INLINE void Pack(const uint8_t* codes, int count, uint8_t* out) {
  if (kBits == 8) {
    std::memcpy(out, codes, count);
  } else if (kBits == 4) {
    PackAs<uint32_t, 4>(codes, count / 8, out);
  } else if (kBits == 2) {
    PackAs<uint16_t, 2>(codes, count / 8, out);
  } else {  // whole lanes, each over the empty end of the one before
    for (int i = 0; i < count; i += 8) Store64(out + i / 8 * kBits, Join<kBits>(Load64(codes + i)));
  }
}

#endif

// ---- floats

// Whole cache lines, where they are such, are written past the caches: lines are not fetched first.
JAXQ_INLINE void CopyOut(void* to, const void* from, size_t size) {
#ifdef __AVX2__
  if (((reinterpret_cast<uintptr_t>(to) | size) & 63) == 0) {
    for (size_t i = 0; i < size; i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(static_cast<char*>(to) + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(from) + i)));
    return;
  }
#endif
  std::memcpy(to, from, size);
}

// values[count] -> out[at:], in dtype. Returns whether every finite one stayed finite in float16.
JAXQ_INLINE bool StoreFloats(const float* values, int count, DType dtype, void* out, int64_t at) {
  if (dtype == DType::kF32) {
    CopyOut(static_cast<float*>(out) + at, values, static_cast<size_t>(count) * sizeof(float));
    return true;
  }
  uint16_t narrow[kMostGroups];
  uint32_t beyond = 0;
  if (dtype == DType::kF16) {
    HalvesOfFloats(values, count, narrow);
    for (int i = 0; i < count; ++i) {
      const uint32_t magnitude = BitsOfFloat(values[i]) & 0x7fffffffu;
      beyond |= (magnitude >= 0x477ff000u) & (magnitude < 0x7f800000u);  // 65520 and above round to infinity
    }
  } else {
    for (int i = 0; i < count; ++i) narrow[i] = Bf16OfFloat(values[i]);
  }
  CopyOut(static_cast<uint16_t*>(out) + at, narrow, static_cast<size_t>(count) * sizeof(uint16_t));
  return beyond == 0;
}

// ---- blocks

// A strip is whole but for a last one. Its size is a constant then, and nothing need be zero beyond it.
template <typename T, bool kWhole>
JAXQ_INLINE bool StripFloats(const uint8_t* blocks, int count, int64_t at, void* scales, void* biases, DType dtype) {
  constexpr int kGroups = T::kBlock / T::kGroup, kMost = kStrip / T::kBlock, kSlots = kMost < 8 ? 8 : kMost;
  if constexpr (T::kHalves == 0) {
    for (int i = 0; i < count; ++i) static_cast<uint8_t*>(scales)[at + i] = blocks[i * T::kBytes];
    return true;
  } else {
    float d[T::kHalves][kSlots], scale[kMostGroups], bias[kMostGroups];
    if (!kWhole) {
      std::memset(scale, 0, sizeof scale);
      std::memset(bias, 0, sizeof bias);
    }
    for (int half = 0; half < T::kHalves; ++half) {
      uint16_t halves[kSlots] = {};
      for (int i = 0; i < count; ++i) std::memcpy(&halves[i], blocks + i * T::kBytes + T::kHalvesAt[half], 2);
      FloatsOfHalves(halves, count, d[half]);
    }
    for (int i = 0; i < count; ++i) {
      const float own[2] = {d[0][i], d[T::kHalves - 1][i]};
      T::Floats(blocks + i * T::kBytes, own, scale + i * kGroups, bias + i * kGroups);
    }
    const bool scales_fit = StoreFloats(scale, count * kGroups, dtype, scales, at * kGroups);
    return StoreFloats(bias, count * kGroups, dtype, biases, at * kGroups) && scales_fit;
  }
}

// `codes` and `words` are longer than what is packed: see Pack.
template <typename T, bool kWhole>
JAXQ_INLINE bool RepackStrip(const uint8_t* blocks, int count, int64_t at, uint8_t* codes, uint8_t* words,
                             uint8_t* packed, void* scales, void* biases, DType dtype) {
  if (kWhole) count = kStrip / T::kBlock;
  const int weights = count * T::kBlock;
  if constexpr (kHasWords<T>) {
    for (int i = 0; i < count; ++i) T::Words(blocks + i * T::kBytes, words + i * T::kBlock / 8 * T::kBits);
  } else {
    for (int i = 0; i < count; ++i) T::Codes(blocks + i * T::kBytes, codes + i * T::kBlock);
    Pack<T::kBits>(codes, weights, words);
  }
  CopyOut(packed + at * T::kBlock / 8 * T::kBits, words, static_cast<size_t>(weights) / 8 * T::kBits);
  return StripFloats<T, kWhole>(blocks, count, at, scales, biases, dtype);
}

template <typename T>
bool RepackBlocks(const uint8_t* blocks, int64_t count, uint8_t* packed, void* scales, void* biases, DType dtype) {
  constexpr int kMost = kStrip / T::kBlock;
  alignas(64) uint8_t codes[kStrip] = {}, words[kStrip + 64];
  bool fit = true;
  int64_t at = 0;
  for (; at + kMost <= count; at += kMost)
    fit &= RepackStrip<T, true>(blocks + at * T::kBytes, kMost, at, codes, words, packed, scales, biases, dtype);
  if (at < count) {
    const int rest = static_cast<int>(count - at);
    fit &= RepackStrip<T, false>(blocks + at * T::kBytes, rest, at, codes, words, packed, scales, biases, dtype);
  }
  EndOfStreams();
  return fit;
}

template <typename T>
constexpr BlockType Row(const char* name) {
  return {name, T::kBytes, T::kBlock, T::kBits, T::kGroup, RepackBlocks<T>};
}

constexpr BlockType kTypes[] = {
    Row<Q4_0>("Q4_0"), Row<Q4_1>("Q4_1"), Row<Q5_0>("Q5_0"), Row<Q5_1>("Q5_1"), Row<Q8_0>("Q8_0"),
    Row<Q2K>("Q2_K"),  Row<Q3K>("Q3_K"),  Row<Q4K>("Q4_K"),  Row<Q5K>("Q5_K"),  Row<Q6K>("Q6_K"),
    Row<TQ1>("TQ1_0"), Row<TQ2>("TQ2_0"), Row<Mxfp4>("MXFP4"),
};

}  // namespace
}  // namespace JAXQ_ISA

const Repack JAXQ_REPACK = {JAXQ_ISA::kTypes, sizeof(JAXQ_ISA::kTypes) / sizeof(BlockType), JAXQ_ISA::Transpose,
                            JAXQ_ISA::Awq, JAXQ_ISA::Groups};

}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_REPACK_INL_H_
