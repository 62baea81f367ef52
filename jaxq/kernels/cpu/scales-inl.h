// Scales, biases and results in AVX-512 registers, up to 16 at a time; and what the products of x agree on.

#ifndef JAXQ_KERNELS_CPU_SCALES_INL_H_
#define JAXQ_KERNELS_CPU_SCALES_INL_H_

#include "simd-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

// Up to so many rows of x are multiplied row by row (vnni_dot-inl.h), for what panels cost is not made up for before.
// The more codes come to a byte, the less they cost there.
JAXQ_INLINE int64_t FewRows(const Format& format) {
  if (format.mode == Mode::kMxfp8) return 4;
  return format.bits < 4 ? 8 : format.bits == 4 ? 6 : 4;
}

// Calls body with the dtype of scales as a compile-time constant.
template <typename Body>
JAXQ_INLINE void WithDType(DType dtype, Body&& body) {
  if (dtype == DType::kBF16) return body(Constant<DType::kBF16>{});
  if (dtype == DType::kF16) return body(Constant<DType::kF16>{});
  return body(Constant<DType::kF32>{});
}

JAXQ_INLINE __mmask16 FirstLanes(int64_t count) { return static_cast<__mmask16>((1 << Least(count, 16)) - 1); }

// The first of 16 values from `at` on that `mask` has, as floats; zeros in the other lanes.
JAXQ_INLINE __m512 LoadSome(DType dtype, const void* base, int64_t at, __mmask16 mask) {
  if (dtype == DType::kF32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(base) + at);
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(base) + at);
  if (dtype == DType::kF16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Scales of E2M1 codes are halved, for codes that stand as twice their value.
JAXQ_INLINE __m512 LoadScales(const Weight& weight, int64_t at, __mmask16 mask) {
  if (weight.format.affine()) return LoadSome(weight.scale_dtype, weight.scales, at, mask);
  const __m128i bytes = _mm_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(weight.scales) + at);
  const __m512 scales = weight.format.mode == Mode::kNvfp4 ? E4m3Floats(bytes) : E8m0Floats(bytes);
  return weight.kind == Kind::kTwiceE2m1 ? _mm512_mul_ps(scales, _mm512_set1_ps(0.5f)) : scales;
}

// The first `count` of 4 values, rounded once, to an array of any of the three dtypes.
JAXQ_INLINE void StoreSome(DType dtype, void* base, int64_t at, int64_t count, __m128 values) {
  alignas(32) uint16_t halves[16];
  const __m512 wide = _mm512_zextps128_ps512(values);
  if (dtype == DType::kF32) return _mm_mask_storeu_ps(static_cast<float*>(base) + at, FirstLanes(count), values);
  if (dtype == DType::kF16)
    StoreF16(halves, wide);
  else
    StoreBf16(halves, wide);
  std::memcpy(static_cast<uint16_t*>(base) + at, halves, static_cast<size_t>(count) * 2);
}

// The sums of four vectors' lanes.
JAXQ_INLINE __m128 SumFour(const __m512* v) {
  const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512 quads = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xee));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quads), _mm512_extractf32x8_ps(quads, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_SCALES_INL_H_
