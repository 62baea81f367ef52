// Arm's products of matrices of bytes (FEAT_I8MM: Neoverse V1 and N2, Apple M2 and later): 4 rows of x and more, split
// into three digits. Three instructions multiply 32 pairs each, exactly; a float32 one multiplies 4.

#include <arm_neon.h>

#include <cstring>

#include "isas.h"
#include "numbers.h"

#define JAXQ_ISA neon_i8mm

namespace jaxq::cpu::neon_i8mm {
namespace {

#include "neon-inl.h"

}  // namespace
}  // namespace jaxq::cpu::neon_i8mm

#include "neon_digits-inl.h"

namespace jaxq::cpu::neon_i8mm {
namespace {

struct Block {
  static constexpr int64_t kDepth = 8, kParts = 3, kPairs = 2;
  using Sums = int32x4_t;

  JAXQ_INLINE static Sums Start() { return vdupq_n_s32(0); }
  JAXQ_INLINE static Sums Multiply(Sums sums, uint8x16_t w, uint8x16_t x) {
    return vmmlaq_s32(sums, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x));
  }
  JAXQ_INLINE static F Join(const Sums* parts) { return JoinDigits(parts[0], parts[1], parts[2]); }
  JAXQ_INLINE static float Centre(const Weight& weight) { return CodeCentre(weight); }

  static void FillPair(const Weight& weight, const uint8_t* codes0, const uint8_t* codes1, int64_t depth,
                       uint8_t* out) {
    const uint8x16_t flip = vdupq_n_u8(CodeCentre(weight) != 0.0f ? 0x80 : 0);
    for (int64_t k = 0; k < depth; k += 8, out += 64)
      vst1q_u8(out, veorq_u8(vcombine_u8(vld1_u8(codes0 + k), vld1_u8(codes1 + k)), flip));
  }

  static bool SplitX(const MatmulArgs& args, int64_t m, int64_t group, uint8_t* out, float* unit, float* sum) {
    const int64_t g = args.format.group_size;
    float x[kMaxGroup];
    DigitGroup split;
    ToFloats(args.x_dtype, args.x, m * args.K + group * g, g, x);
    if (!SplitGroup(x, g, &split)) return false;
    *unit = split.unit, *sum = split.sum;
    for (int64_t k = 0; k < g; k += 8)
      for (int d = 0; d < 3; ++d, out += 32) std::memcpy(out, split.digit[d] + k, 8);
    return true;
  }
};

}  // namespace
}  // namespace jaxq::cpu::neon_i8mm

#include "neon_mmla-inl.h"

namespace jaxq::cpu {
namespace neon_i8mm {
namespace {

Outcome Matmul(const MatmulArgs& args, const Parallel& parallel) {
  if (!args.transpose || args.M < kMmlaLeastRows || args.format.mode == Mode::kMxfp8) return Outcome::kDeclined;
  const Weight weight(args, args.N, args.K);
  return MmlaProduct(args, weight, parallel).Run();
}

}  // namespace
}  // namespace neon_i8mm

const Isa kNeonI8mm = {"neon_i8mm", MissingNeonI8mm, nullptr, nullptr, neon_i8mm::Matmul, nullptr};

}  // namespace jaxq::cpu
