// Floats as integers of three balanced base-256 digits, for products in exact integer arithmetic.
//
// In each group, x = unit * (65536*d0 + 256*d1 + d2) with digits in [-128, 127] and unit = max|x| / 8355000: the sum of
// digit times code is exact in 32 bits, and what is lost of x is half a unit, 2**-24 of the group's largest magnitude.
// (8355711 = 127*65536 + 127*256 + 127 is the largest that fits; the rest is room for rounding.)

#ifndef JAXQ_KERNELS_CPU_DIGITS_INL_H_
#define JAXQ_KERNELS_CPU_DIGITS_INL_H_

#include "simd-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr float kDigitRange = 8355000.0f;

// One row of x in groups.
struct Digits {
  int8_t* digit[3];  // [K] each
  float* unit;       // [G]
  float* sum;        // [G], of x over the group
};

// False where a group has a NaN, an infinity, or nothing above 2**-96 but not only zeros (its unit would be subnormal).
bool SplitGroup(const float* x, int64_t g, int64_t group, const Digits& out) {
  const __m512 sign = _mm512_castsi512_ps(_mm512_set1_epi32(INT32_MIN));
  __m512 largest = _mm512_setzero_ps(), sum = _mm512_setzero_ps(), poison = _mm512_setzero_ps();
  for (int64_t i = 0; i < g; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    largest = _mm512_max_ps(largest, _mm512_andnot_ps(sign, v));
    sum = _mm512_add_ps(sum, v);
    poison = _mm512_add_ps(poison, _mm512_sub_ps(v, v));
  }
  const float top = _mm512_reduce_max_ps(largest);
  if (_mm512_reduce_add_ps(poison) != 0.0f || (top != 0.0f && top < 0x1p-96f)) return false;
  out.sum[group] = _mm512_reduce_add_ps(sum);
  out.unit[group] = top / kDigitRange;
  const __m512 per_unit = _mm512_set1_ps(top == 0.0f ? 0.0f : kDigitRange / top);
  for (int64_t i = 0; i < g; i += 16) {
    __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), per_unit));
    for (int d = 2; d >= 0; --d) {
      const __m128i low = _mm512_cvtepi32_epi8(q);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out.digit[d] + group * g + i), low);
      q = _mm512_srai_epi32(_mm512_sub_epi32(q, _mm512_cvtepi8_epi32(low)), 8);
    }
  }
  return true;
}

bool SplitRow(const MatmulArgs& args, int64_t m, const Digits& out) {
  const int64_t g = args.format.group_size;
  for (int64_t group = 0; group < args.groups(); ++group) {
    float x[kMaxGroup];
    ToFloats(args.x_dtype, args.x, m * args.K + group * g, g, x);
    if (!SplitGroup(x, g, group, out)) return false;
  }
  return true;
}

// E2M1 codes as unsigned integers, twice the value plus 12: the scale is halved and the bias is -6 scales.
constexpr uint8_t kShiftedE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

JAXQ_INLINE __m512i ShiftedE2m1(__m512i codes) {
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kShiftedE2m1));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes);
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_DIGITS_INL_H_
