// Floats as integers of three balanced base-256 digits, for products in exact integer arithmetic. Beside simd-inl.h's,
// the instruction set's file defines:
//
//   I                                a vector of integers
//   LookUp(table, codes)             table[code] for each byte, whose upper half is zero
//   StoreDigits<n>(v, digit, at)     kLanes floats, rounded, as n digits each, at digit[0..n-1] + at, the highest first
//
// In each group, x = unit * (65536*d0 + 256*d1 + d2) with digits in [-128, 127] and unit = max|x| / 8355000: the sum of
// digit times code is exact in 32 bits, and what is lost of x is half a unit, 2**-24 of the group's largest magnitude.
// (8355711 = 127*65536 + 127*256 + 127 is the largest that fits; the rest is room for rounding.) Where two digits are
// enough, the unit is max|x| / 32600.

#ifndef JAXQ_KERNELS_CPU_DIGITS_INL_H_
#define JAXQ_KERNELS_CPU_DIGITS_INL_H_

#include "simd-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr float kDigitRange = 8355000.0f, kTwoDigitRange = 32600.0f;
constexpr float DigitRange(int digits) { return digits == 3 ? kDigitRange : kTwoDigitRange; }
constexpr int64_t kTwoDigitTerms = 256;  // from here on, bfloat16 x has two digits

// Rounding x to 2**-16 of its group's largest adds up to far less than the 2**-9 by which the result is rounded to
// bfloat16, and with this many terms to less than a float32 sum's own bound of 2**-24 a term. `terms`: of one sum.
JAXQ_INLINE int DigitsFor(DType x_dtype, int64_t terms) {
  return x_dtype == DType::kBF16 && terms >= kTwoDigitTerms ? 2 : 3;
}

// One row of x in groups.
struct Digits {
  int8_t* digit[3];  // [K] each
  float* unit;       // [G]
  float* sum;        // [G], of x over the group
};

// False where a group has a NaN, an infinity, or nothing above 2**-96 but not only zeros (its unit would be subnormal).
template <int kDigits>
bool SplitGroup(const float* x, int64_t g, int64_t group, const Digits& out) {
  constexpr float kRange = DigitRange(kDigits);
  F largest = Zero(), sum = Zero(), poison = Zero();
  for (int64_t i = 0; i < g; i += kLanes) {
    const F v = Load(x + i);
    largest = Max(largest, Max(v, Sub(Zero(), v)));
    sum = Add(sum, v);
    poison = Add(poison, Sub(v, v));
  }
  const float top = MaxOf(largest);
  if (Sum(poison) != 0.0f || (top != 0.0f && top < 0x1p-96f)) return false;
  out.sum[group] = Sum(sum);
  out.unit[group] = top / kRange;
  const F per_unit = Set1(top == 0.0f ? 0.0f : kRange / top);
  for (int64_t i = 0; i < g; i += kLanes) StoreDigits<kDigits>(Mul(Load(x + i), per_unit), out.digit, group * g + i);
  return true;
}

template <int kDigits>
bool SplitRow(const MatmulArgs& args, int64_t m, const Digits& out) {
  const int64_t g = args.format.group_size;
  for (int64_t group = 0; group < args.groups(); ++group) {
    float x[kMaxGroup];
    ToFloats(args.x_dtype, args.x, m * args.K + group * g, g, x);
    if (!SplitGroup<kDigits>(x, g, group, out)) return false;
  }
  return true;
}

// E2M1 codes as unsigned integers, twice the value plus 12: the scale is halved and the bias is -6 scales.
constexpr uint8_t kShiftedE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

JAXQ_INLINE I ShiftedE2m1(I codes) { return LookUp(kShiftedE2m1, codes); }

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_DIGITS_INL_H_
