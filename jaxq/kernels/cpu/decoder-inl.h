// What a decoder computes between its products (kernels.h), over the vector type of simd-inl.h. Widths of no whole
// vectors are declined.

#ifndef JAXQ_KERNELS_CPU_DECODER_INL_H_
#define JAXQ_KERNELS_CPU_DECODER_INL_H_

#include "attention-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kTaskValues = 1 << 14;  // that a task of whole rows has, or somewhat more
constexpr int64_t kGateBlock = 1024;      // gates at a time, which stay in the first-level cache

template <DType kT>
JAXQ_INLINE void StoreValues(void* base, int64_t at, F v) {
  if constexpr (kT == DType::kF32) return Store(static_cast<float*>(base) + at, v);
  uint16_t* halves = static_cast<uint16_t*>(base) + at;
  if constexpr (kT == DType::kF16) StoreF16(halves, v);
  if constexpr (kT == DType::kBF16) StoreBf16(halves, v);
}

template <DType kT>
struct FloatConstant {
  static constexpr DType value = kT;
};

// Calls body with the dtype as a compile-time constant.
template <typename Body>
JAXQ_INLINE void WithFloat(DType dtype, Body&& body) {
  if (dtype == DType::kF32) return body(FloatConstant<DType::kF32>{});
  if (dtype == DType::kF16) return body(FloatConstant<DType::kF16>{});
  return body(FloatConstant<DType::kBF16>{});
}

// 1 / sqrt(mean of squares + eps) of `count` values, a multiple of kLanes; value(i) gives those from i on. The order of
// the sums depends on the count alone.
template <typename Value>
JAXQ_INLINE float InverseRms(int64_t count, float eps, Value&& value) {
  F sums[4] = {Zero(), Zero(), Zero(), Zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    JAXQ_UNROLL
    for (int j = 0; j < 4; ++j) {
      const F v = value(i + j * kLanes);
      sums[j] = Fma(v, v, sums[j]);
    }
  }
  for (; i < count; i += kLanes) {
    const F v = value(i);
    sums[0] = Fma(v, v, sums[0]);
  }
  const float total = Sum(Add(Add(sums[0], sums[1]), Add(sums[2], sums[3])));
  return 1.0f / __builtin_sqrtf(total / static_cast<float>(count) + eps);
}

template <DType kT>
void AddNormRow(const AddNormArgs& args, int64_t row) {
  const int64_t width = args.width, first = row * width;
  const F scale = Set1(InverseRms(width, args.eps, [&](int64_t i) __attribute__((always_inline)) {
    const F sum = Add(LoadValues<kT>(args.x, first + i), LoadValues<kT>(args.y, first + i));
    StoreValues<kT>(args.sum, first + i, sum);
    return kT == DType::kF32 ? sum : LoadValues<kT>(args.sum, first + i);  // rounded
  }));
  for (int64_t i = 0; i < width; i += kLanes)
    StoreValues<kT>(args.out, first + i, Mul(Mul(LoadValues<kT>(args.sum, first + i), scale), Load(args.weight + i)));
}

Outcome AddNorm(const AddNormArgs& args, const Parallel& parallel) {
  if (args.width % kLanes != 0) return Outcome::kDeclined;
  const int64_t step = Ceil(kTaskValues, args.width);
  parallel.For(Ceil(args.rows, step), [&](int64_t task, int) {
    WithFloat(args.dtype, [&](auto dtype) {
      for (int64_t row = task * step; row < Least(args.rows, (task + 1) * step); ++row)
        AddNormRow<decltype(dtype)::value>(args, row);
    });
  });
  return Outcome::kDone;
}

// g / (1 + exp(-g)) * u, to u. Of exp(-|g|) nothing overflows, and where it is below 2**-125 it counts as none.
void Gate(const float* __restrict g, float* __restrict u, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = -kLog2e * __builtin_fabsf(g[i]), power = x > -125.0f ? Exp2Bounded(x) : 0.0f;
    u[i] *= g[i] * ((g[i] < 0.0f ? power : 1.0f) / (1.0f + power));
  }
}

Outcome Gated(const GatedArgs& args, const Parallel& parallel) {
  const int64_t width = args.width, blocks = Ceil(width, kGateBlock), step = kTaskValues / kGateBlock;
  if (width % kLanes != 0) return Outcome::kDeclined;
  parallel.For(Ceil(args.rows * blocks, step), [&](int64_t task, int) {
    float gates[kGateBlock], values[kGateBlock];
    for (int64_t at = task * step; at < Least(args.rows * blocks, (task + 1) * step); ++at) {
      const int64_t row = at / blocks, first = at % blocks * kGateBlock, count = Least(kGateBlock, width - first);
      ToFloats(args.dtype, args.x, row * 2 * width + first, count, gates);
      ToFloats(args.dtype, args.x, (row * 2 + 1) * width + first, count, values);
      Gate(gates, values, count);
      FromFloats(args.dtype, values, count, args.out, row * width + first);
    }
  });
  return Outcome::kDone;
}

// x[from : from+dim], normalized if there is a weight, and turned, to out[to : to+dim].
template <DType kT>
JAXQ_INLINE void TurnHead(const SplitHeadsArgs& args, int64_t from, const float* weight, int64_t angles, void* out,
                          int64_t to) {
  const int64_t half = args.dim / 2;
  F scale = Set1(1.0f);
  if (weight != nullptr)
    scale = Set1(InverseRms(args.dim, args.eps, [&](int64_t i) __attribute__((always_inline)) {
      return LoadValues<kT>(args.x, from + i);
    }));
  for (int64_t i = 0; i < half; i += kLanes) {
    F a = LoadValues<kT>(args.x, from + i), b = LoadValues<kT>(args.x, from + half + i);
    if (weight != nullptr) {
      a = Mul(Mul(a, scale), Load(weight + i));
      b = Mul(Mul(b, scale), Load(weight + half + i));
    }
    const F cos = Load(args.cos + angles + i), sin = Load(args.sin + angles + i);
    StoreValues<kT>(out, to + i, Sub(Mul(a, cos), Mul(b, sin)));
    StoreValues<kT>(out, to + half + i, Add(Mul(b, cos), Mul(a, sin)));
  }
}

// Token `token` of all members of the batch, one after the other.
template <DType kT>
void SplitToken(const SplitHeadsArgs& args, int64_t token) {
  const int64_t dim = args.dim, all = args.heads + 2 * args.kv_heads, angles = token % args.tokens * (dim / 2);
  for (int64_t h = 0; h < args.heads; ++h)
    TurnHead<kT>(args, (token * all + h) * dim, args.q_weight, angles, args.q, (token * args.heads + h) * dim);
  for (int64_t h = 0; h < args.kv_heads; ++h)
    TurnHead<kT>(args, (token * all + args.heads + h) * dim, args.k_weight, angles, args.k,
                 (token * args.kv_heads + h) * dim);
  const int64_t size = dim * SizeOf(kT), values = args.kv_heads * size;
  const char* from = static_cast<const char*>(args.x) + (token * all + args.heads + args.kv_heads) * size;
  std::memcpy(static_cast<char*>(args.v) + token * values, from, static_cast<size_t>(values));
}

Outcome SplitHeads(const SplitHeadsArgs& args, const Parallel& parallel) {
  if (args.dim % (2 * kLanes) != 0) return Outcome::kDeclined;
  const int64_t tokens = args.batch * args.tokens;
  const int64_t step = Ceil(kTaskValues, (args.heads + 2 * args.kv_heads) * args.dim);
  parallel.For(Ceil(tokens, step), [&](int64_t task, int) {
    WithFloat(args.dtype, [&](auto dtype) {
      for (int64_t token = task * step; token < Least(tokens, (task + 1) * step); ++token)
        SplitToken<decltype(dtype)::value>(args, token);
    });
  });
  return Outcome::kDone;
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_DECODER_INL_H_
