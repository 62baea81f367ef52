// Weights of any codes by x in bfloat16 parts (amx_pack-inl.h), for amx_gemm-inl.h: E4M3, whose values are no small
// integers, and x that has no digits, since it is not finite or too small.

#ifndef JAXQ_KERNELS_CPU_AMX_CODES_INL_H_
#define JAXQ_KERNELS_CPU_AMX_CODES_INL_H_

#include "amx_gemm-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

class CodeArithmetic {
 public:
  static constexpr int kResults = 1, kLeft = 4, kRight = 6;
  static constexpr int64_t kStrip = 8, kBlockTerms = 128, kStepBytes = 2;
  const int64_t parts;
  const StepUnpacker unpacker;

  explicit CodeArithmetic(const MatmulArgs& args)
      : parts(PartsOf(args.x_dtype)), unpacker(args.format), splitter_(args.x_dtype, unpacker, Depth(args.format)) {}

  static int64_t Depth(const Format& format) { return DepthOf(format); }

  bool Pack(const MatmulArgs& args, int64_t m, int64_t block, int64_t group, const PackedX& out) const {
    PackGroup(args, splitter_, m, block, group, out);
    return true;
  }

  template <int kTurn, typename Between>
  JAXQ_INLINE void Multiply(const uint16_t* x, const uint16_t* w, int64_t steps, Between&& between) const {
    constexpr int kA = kLeft + kTurn, kB = kRight + kTurn;
    for (int64_t step = 0; step < steps; ++step, w += kHalves) {
      LoadTile<kA>(w);
      for (int64_t part = 0; part < parts; ++part, x += kHalves) {
        LoadTile<kB>(x);
        if (step + part == 0) between(Constant<0>());
        DotTiles<kTurn, kA, kB>();
      }
    }
  }

  JAXQ_INLINE static __m512 Total(const float* products, const float*) { return _mm512_load_ps(products); }

 private:
  const StepSplitter splitter_;
};

Outcome MatmulCodes(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  return args.format.affine() ? MatmulStrips<CodeArithmetic, true>(args, weight, parallel)
                              : MatmulStrips<CodeArithmetic, false>(args, weight, parallel);
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_AMX_CODES_INL_H_
