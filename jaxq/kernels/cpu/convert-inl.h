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

// Up to kLanes affine groups, values[count][g] -> packed, scales and biases from number `first` on. The arithmetic is
// AffineOfRange's and QuantizeAffineGroup's.
void QuantizeGroups(const QuantizeArgs& args, int64_t first, int64_t count, const float* values, uint8_t* packed) {
  const int64_t g = args.format.group_size;
  const float max_code = static_cast<float>((1 << args.format.bits) - 1);
  F lows[kLanes], highs[kLanes], poisons[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) {
    const float* group = values + Least(j, count - 1) * g;
    F low = Load(group), high = low, poison = Sub(low, low);
    for (int64_t i = kLanes; i < g; i += kLanes) {
      const F v = Load(group + i);
      low = Min(low, v), high = Max(high, v);
      poison = Add(poison, Sub(v, v));  // 0, or NaN after a NaN or an infinity
    }
    lows[j] = low, highs[j] = high, poisons[j] = poison;
  }
  // One transposition brings the groups side by side, which is less than as many reductions.
  Transpose(lows), Transpose(highs), Transpose(poisons);
  for (int64_t j = 1; j < kLanes; ++j) {
    lows[0] = Min(lows[0], lows[j]), highs[0] = Max(highs[0], highs[j]);
    poisons[0] = Add(poisons[0], poisons[j]);
  }
  float low[kLanes], high[kLanes], poison[kLanes];
  Store(low, lows[0]), Store(high, highs[0]), Store(poison, poisons[0]);
  uint8_t codes[kMaxGroup + 64];
  for (int64_t j = 0; j < count; ++j, values += g, packed += g / 8 * args.format.bits) {
    Affine affine = {FloatOfBits(0x7fc00000u), FloatOfBits(0x7fc00000u)};
    if (poison[j] == 0.0f) affine = AffineOfRange(low[j], high[j], max_code);
    const F scale = Set1(affine.scale), bias = Set1(affine.bias), top = Set1(max_code);
    for (int64_t i = 0; i < g; i += kLanes) {
      const F code = Round(Div(Sub(Load(values + i), bias), scale));
      ToU8(codes + i, Min(Max(code, Zero()), top));  // a NaN becomes 0: Max gives its second operand then
    }
    PackOctets(codes, g / 8, args.format.bits, packed);
    StoreAs(args.w_dtype, args.scales, first + j, affine.scale);
    StoreAs(args.w_dtype, args.biases, first + j, affine.bias);
  }
}

Outcome Quantize(const QuantizeArgs& args, const Parallel& parallel) {
  const int64_t g = args.format.group_size, total = args.rows * args.length / g, per_task = kCodesPerTask / g;
  const int64_t group_bytes = g / 8 * args.format.bits;
  parallel.For(Ceil(total, per_task), [&](int64_t task, int) {
    const int64_t end = Least(total, (task + 1) * per_task);
    float converted[kLanes * kMaxGroup];
    for (int64_t group = task * per_task; group < end; group += kLanes) {
      const int64_t count = Least(kLanes, end - group);
      const float* values = converted;
      if (args.w_dtype == DType::kF32)
        values = static_cast<const float*>(args.w) + group * g;
      else
        ToFloats(args.w_dtype, args.w, group * g, count * g, converted);
      uint8_t* packed = args.packed + group * group_bytes;
      if (args.format.affine())
        QuantizeGroups(args, group, count, values, packed);
      else
        for (int64_t j = 0; j < count; ++j)
          QuantizeFloatGroup(args, group + j, values + j * g, packed + j * group_bytes);
    }
  });
  return Outcome::kDone;
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_CONVERT_INL_H_
