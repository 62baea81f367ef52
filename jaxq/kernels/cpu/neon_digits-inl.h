// Floats as integers of three balanced base-256 digits, on NEON, for products in exact integer arithmetic.
//
// In each group, x = unit * (65536*d0 + 256*d1 + d2) with digits in [-128, 127] and unit = max|x| / 8355000: the sum of
// digit times code is exact in 32 bits, and what is lost of x is half a unit, 2**-24 of the group's largest magnitude.
// (8355711 = 127*65536 + 127*256 + 127 is the largest that fits; the rest is room for rounding.)

#ifndef JAXQ_KERNELS_CPU_NEON_DIGITS_INL_H_
#define JAXQ_KERNELS_CPU_NEON_DIGITS_INL_H_

#include "simd-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr float kDigitRange = 8355000.0f;

// One group of x.
struct DigitGroup {
  int8_t digit[3][kMaxGroup];
  float unit, sum;
};

// Four integers of at most 24 bits: takes the low digit off.
JAXQ_INLINE int32x4_t LowDigit(int32x4_t* q) {
  const int32x4_t low = vshrq_n_s32(vshlq_n_s32(*q, 24), 24);
  *q = vshrq_n_s32(vsubq_s32(*q, low), 8);
  return low;
}

// False where the group has a NaN or an infinity, or nothing above 2**-96 but not only zeros (its unit would be
// subnormal).
bool SplitGroup(const float* x, int64_t g, DigitGroup* out) {
  F largest = Zero(), sum = Zero(), poison = Zero();
  for (int64_t i = 0; i < g; i += kLanes) {
    const F v = Load(x + i);
    largest = Max(largest, vabsq_f32(v)), sum = Add(sum, v), poison = Add(poison, Sub(v, v));
  }
  const float top = MaxOf(largest);
  if (Sum(poison) != 0.0f || (top != 0.0f && top < 0x1p-96f)) return false;
  out->sum = Sum(sum), out->unit = top / kDigitRange;
  const F per_unit = Set1(top == 0.0f ? 0.0f : kDigitRange / top);
  for (int64_t i = 0; i < g; i += 8) {
    int32x4_t first = vcvtnq_s32_f32(Mul(Load(x + i), per_unit));
    int32x4_t second = vcvtnq_s32_f32(Mul(Load(x + i + 4), per_unit));
    for (int d = 2; d >= 0; --d) {
      const int32x4_t a = LowDigit(&first), b = LowDigit(&second);
      vst1_s8(out->digit[d] + i, vmovn_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b))));
    }
  }
  return true;
}

// Three digits' integer sums as one float, of the size of the codes times x over its unit. The sums are below 2**21, so
// the upper two join in an integer.
JAXQ_INLINE F JoinDigits(int32x4_t d0, int32x4_t d1, int32x4_t d2) {
  return Fma(vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(d0, 8), d1)), Set1(256.0f), vcvtq_f32_s32(d2));
}

// Codes are taken as signed bytes: of 8 bits, half the range is subtracted, which the biases make good.
JAXQ_INLINE float CodeCentre(const Weight& weight) {
  return weight.kind == Kind::kUnsigned && weight.format.bits == 8 ? 128.0f : 0.0f;
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_NEON_DIGITS_INL_H_
