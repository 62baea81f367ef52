// Arm's products of matrices of bfloat16 (FEAT_BF16: Neoverse V1 and N2, Apple M2 and later): 4 rows of bfloat16 x and
// more. The codes, less the middle of their range, are exact in bfloat16, so every product is; scales wait until a
// group has been summed in float32. (The instruction takes subnormal numbers for zeros.)

#include <arm_neon.h>

#include <cstring>

#include "isas.h"
#include "numbers.h"

#define JAXQ_ISA neon_bf16

namespace jaxq::cpu::neon_bf16 {
namespace {

#include "neon-inl.h"

}  // namespace
}  // namespace jaxq::cpu::neon_bf16

#include "simd-inl.h"

namespace jaxq::cpu::neon_bf16 {
namespace {

struct Block {
  static constexpr int64_t kDepth = 4, kParts = 1, kPairs = 4;
  using Sums = float32x4_t;

  JAXQ_INLINE static Sums Start() { return Zero(); }
  JAXQ_INLINE static Sums Multiply(Sums sums, uint8x16_t w, uint8x16_t x) {
    return vbfmmlaq_f32(sums, vreinterpretq_bf16_u8(w), vreinterpretq_bf16_u8(x));
  }
  JAXQ_INLINE static F Join(const Sums* parts) { return parts[0]; }
  JAXQ_INLINE static float Centre(const Weight& weight) {
    return weight.kind == Kind::kUnsigned ? static_cast<float>(1 << (weight.format.bits - 1)) : 0.0f;
  }

  // 4 codes as bfloat16, which holds them: what is cut off is zeros.
  template <Kind kKind>
  JAXQ_INLINE static uint16x4_t Halves(const uint8_t* codes, F centre) {
    return vshrn_n_u32(vreinterpretq_u32_f32(Sub(Values<kKind>(codes), centre)), 16);
  }
  static void FillPair(const Weight& weight, const uint8_t* codes0, const uint8_t* codes1, int64_t depth,
                       uint8_t* out) {
    const F centre = Set1(Centre(weight));
    WithKind(weight.kind, [&](auto kind) {
      constexpr Kind kKind = decltype(kind)::value;
      for (int64_t k = 0; k < depth; k += 4, out += 64)
        vst1q_u8(out, vreinterpretq_u8_u16(vcombine_u16(Halves<kKind>(codes0 + k, centre),
                                                        Halves<kKind>(codes1 + k, centre))));
    });
  }

  static bool SplitX(const MatmulArgs& args, int64_t m, int64_t group, uint8_t* out, float* unit, float* sum) {
    const int64_t g = args.format.group_size;
    const uint16_t* x = static_cast<const uint16_t*>(args.x) + m * args.K + group * g;
    F total = Zero();
    for (int64_t k = 0; k < g; k += 4, out += 64) {
      std::memcpy(out, x + k, 8);
      total = Add(total, LoadBf16(x + k));
    }
    *unit = 1.0f, *sum = Sum(total);
    return true;
  }
};

}  // namespace
}  // namespace jaxq::cpu::neon_bf16

#include "neon_mmla-inl.h"

namespace jaxq::cpu {
namespace neon_bf16 {
namespace {

Outcome Matmul(const MatmulArgs& args, const Parallel& parallel) {
  if (!args.transpose || args.M < kMmlaLeastRows || args.x_dtype != DType::kBF16) return Outcome::kDeclined;
  const Weight weight(args, args.N, args.K);
  return MmlaProduct(args, weight, parallel).Run();
}

}  // namespace
}  // namespace neon_bf16

const Isa kNeonBf16 = {"neon_bf16", MissingNeonBf16, nullptr, nullptr, neon_bf16::Matmul, nullptr};

}  // namespace jaxq::cpu
