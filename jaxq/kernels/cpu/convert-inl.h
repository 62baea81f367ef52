// quantize and dequantize over the vector type of simd-inl.h.

#ifndef JAXQ_KERNELS_CPU_CONVERT_INL_H_
#define JAXQ_KERNELS_CPU_CONVERT_INL_H_

#include "quantize-inl.h"
#include "simd-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kCodesPerTask = 1 << 16;

// One row's groups [first, last), decoded and written.
template <Kind kKind>
void DequantizeGroups(const Weight& weight, const DequantizeArgs& args, int64_t row, int64_t first, int64_t last) {
  constexpr int64_t kBlock = 1024;  // codes at a time: what is unpacked stays in the first-level cache
  const int64_t g = weight.format.group_size, per_block = kBlock / g;
  uint8_t codes[kBlock + 64];
  float scales[kBlock / 16], biases[kBlock / 16], values[kBlock];
  for (int64_t group = first; group < last; group += per_block) {
    const int64_t groups = Least(per_block, last - group), count = groups * g;
    weight.Codes(row, group * g, count, codes);
    weight.Scales(row, group, groups, scales, 1.0f);
    weight.Biases(row, group, groups, biases);
    const int64_t at = row * weight.length + group * g;
    float* out = args.out_dtype == DType::kF32 ? static_cast<float*>(args.out) + at : values;
    for (int64_t j = 0; j < groups; ++j) {
      const F scale = Set1(scales[j]), bias = Set1(biases[j]);
      for (int64_t i = j * g; i < (j + 1) * g; i += kLanes) {
        F value = Values<kKind>(codes + i);
        if constexpr (kKind == Kind::kTwiceE2m1) value = Mul(value, Set1(0.5f));
        Store(out + i, Add(Mul(value, scale), bias));
      }
    }
    if (out == values) FromFloats(args.out_dtype, values, count, args.out, at);
  }
}

Outcome Dequantize(const DequantizeArgs& args, const Parallel& parallel) {
  const Weight weight(args, args.rows, args.length);
  const int64_t total = args.rows * weight.groups, per_task = kCodesPerTask / weight.format.group_size;
  parallel.For(Ceil(total, per_task), [&](int64_t task, int) {
    const int64_t end = Least(total, (task + 1) * per_task);
    for (int64_t at = task * per_task; at < end;) {
      const int64_t row = at / weight.groups, first = at % weight.groups;
      const int64_t last = Least(weight.groups, first + end - at);
      WithKind(weight.kind,
               [&](auto kind) { DequantizeGroups<decltype(kind)::value>(weight, args, row, first, last); });
      at += last - first;
    }
  });
  return Outcome::kDone;
}

// kLanes affine groups, values[kLanes][kGroup] -> packed, scales and biases from number `first` on. The bits are those
// of QuantizeAffineGroup, which is left what is not finite, and scales whose reciprocals are subnormal.
//
// Quotients are products with the reciprocal, each corrected once by its remainder. A product is less than 3/2 units of
// its last place off, and then the corrected one is what a division rounds to (after P. Markstein, 1990), but perhaps
// just below a power of two. No code changes there: 1/2 is the only power among the halves between codes, and rounds as
// what is below it. Scales are 2**-25 at least, so nothing underflows that matters.
template <int64_t kGroup>
void QuantizeGroups(const QuantizeArgs& args, int64_t first, const float* values, uint8_t* packed) {
  constexpr int64_t kStep = 4 * kLanes, kCount = kLanes * kGroup;
  const int max_code = (1 << args.format.bits) - 1;
  F lows[kLanes], highs[kLanes], poison = Zero();
  for (int64_t j = 0; j < kLanes; ++j) {
    const float* group = values + j * kGroup;
    F low = Load(group), high = low;
    poison = Fma(low, Zero(), poison);  // 0, or NaN after a NaN or an infinity
    for (int64_t i = kLanes; i < kGroup; i += kLanes) {
      const F v = Load(group + i);
      low = Min(low, v), high = Max(high, v);
      poison = Fma(v, Zero(), poison);
    }
    lows[j] = low, highs[j] = high;
  }
  // AffineOfRange, in every lane.
  const F low = Across(lows, [](F a, F b) __attribute__((always_inline)) { return Min(a, b); });
  const F high = Across(highs, [](F a, F b) __attribute__((always_inline)) { return Max(a, b); });
  const F depth = Sub(Zero(), low), height = Max(high, Sub(Zero(), high));
  const F step = Max(Div(Sub(high, low), Set1(static_cast<float>(max_code))), Set1(1e-7f));
  const F signed_step = IfMore(depth, height, step, Sub(Zero(), step)), edge = IfMore(depth, height, low, high);
  const F code = Round(Div(edge, signed_step)), steps = Max(code, Sub(Zero(), code));
  const F scale = Add(IfMore(steps, Zero(), Div(edge, code), signed_step), Set1(Sum(poison)));
  float scales[kLanes], minus_scales[kLanes], reciprocals[kLanes], biases[kLanes];
  Store(scales, scale), Store(minus_scales, Sub(Zero(), scale)), Store(reciprocals, Div(Set1(1.0f), scale));
  Store(biases, IfMore(steps, Zero(), edge, Zero()));
  uint8_t codes[kCount];
  for (int64_t i = 0; i < kCount; i += kStep) {
    F quotients[4];
    JAXQ_UNROLL
    for (int64_t v = 0; v < 4; ++v) {
      const int64_t j = i / kGroup + v * kLanes / kGroup;
      const F reciprocal = Set1(reciprocals[j]), value = Sub(Load(values + i + v * kLanes), Set1(biases[j]));
      const F near = Mul(value, reciprocal);
      quotients[v] = Fma(Fma(near, Set1(minus_scales[j]), value), reciprocal, near);
    }
    ToU8(codes + i, quotients, max_code);
  }
  PackOctets(codes, kCount / 8, args.format.bits, packed);
  FromFloats(args.w_dtype, scales, kLanes, args.scales, first);
  FromFloats(args.w_dtype, biases, kLanes, args.biases, first);
  for (int64_t j = 0; j < kLanes; ++j)
    if (!(std::fabs(scales[j]) <= 0x1p126f))
      QuantizeAffineGroup(args, first + j, values + j * kGroup, packed + j * kGroup / 8 * args.format.bits);
}

void QuantizeGroups(const QuantizeArgs& args, int64_t first, const float* values, uint8_t* packed) {
  switch (args.format.group_size) {
    case 16:
      return QuantizeGroups<16>(args, first, values, packed);
    case 32:
      return QuantizeGroups<32>(args, first, values, packed);
    case 64:
      return QuantizeGroups<64>(args, first, values, packed);
    default:
      return QuantizeGroups<128>(args, first, values, packed);
  }
}

Outcome Quantize(const QuantizeArgs& args, const Parallel& parallel) {
  const int64_t g = args.format.group_size, total = args.rows * args.length / g, per_task = kCodesPerTask / g;
  const int64_t group_bytes = g / 8 * args.format.bits, read_bytes = g * SizeOf(args.w_dtype);
  parallel.For(Ceil(total, per_task), [&](int64_t task, int) {
    const int64_t end = Least(total, (task + 1) * per_task);
    float converted[kLanes * kMaxGroup];
    for (int64_t group = task * per_task; group < end; group += kLanes) {
      const int64_t count = Least(kLanes, end - group);
      // The next groups arrive while these are at work. (An address past the end does nothing.)
      const char* const next = static_cast<const char*>(args.w) + (group + kLanes) * read_bytes;
      for (int64_t i = 0; i < count * read_bytes; i += 64) __builtin_prefetch(next + i);
      const float* values = converted;
      if (args.w_dtype == DType::kF32)
        values = static_cast<const float*>(args.w) + group * g;
      else
        ToFloats(args.w_dtype, args.w, group * g, count * g, converted);
      uint8_t* packed = args.packed + group * group_bytes;
      if (args.format.affine() && count == kLanes) {
        QuantizeGroups(args, group, values, packed);
        continue;
      }
      for (int64_t j = 0; j < count; ++j, values += g, packed += group_bytes)
        if (args.format.affine())
          QuantizeAffineGroup(args, group + j, values, packed);
        else
          QuantizeFloatGroup(args, group + j, values, packed);
    }
  });
  return Outcome::kDone;
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_CONVERT_INL_H_
