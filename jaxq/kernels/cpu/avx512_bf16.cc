// AVX-512 with BF16 (and VNNI and VBMI: Cooper Lake, which has BF16 without VBMI, runs avx512): bfloat16 x by codes that
// are exact in bfloat16, two products a lane, summed in float32.

#include <immintrin.h>

#include <cstring>

#include "isas.h"
#include "numbers.h"

#define JAXQ_ISA avx512_bf16

namespace jaxq::cpu::avx512_bf16 {
namespace {

#include "avx512-inl.h"
#include "vbmi-inl.h"
#include "x86-inl.h"

}  // namespace
}  // namespace jaxq::cpu::avx512_bf16

#include "bf16_gemm-inl.h"
#include "mxfp8_dot-inl.h"

namespace jaxq::cpu {
namespace avx512_bf16 {
namespace {

Outcome Matmul(const MatmulArgs& args, const Parallel& parallel) {
  const Weight weight(args, args.N, args.K);
  const Outcome outcome = MatmulMxfp8Dot(args, weight, parallel);
  return outcome == Outcome::kDeclined ? MatmulBf16(args, weight, parallel) : outcome;
}

}  // namespace
}  // namespace avx512_bf16

// Everything else is avx512_vnni's.
const Isa kAvx512Bf16 = {"avx512_bf16", MissingAvx512Bf16, nullptr, nullptr, avx512_bf16::Matmul, nullptr};

}  // namespace jaxq::cpu
