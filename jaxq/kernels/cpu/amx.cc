// Intel's AMX with bfloat16 (Sapphire Rapids and later): matrix products of more than a few rows. The rest, and
// transpose=True with groups of 16, goes to the AVX-512 kernels.

#include <immintrin.h>

#include <cstring>

#include "isas.h"
#include "numbers.h"

#define JAXQ_ISA amx

namespace jaxq::cpu::amx {
namespace {

#include "amx_tiles-inl.h"
#include "avx512-inl.h"
#include "vbmi-inl.h"
#include "x86-inl.h"

}  // namespace
}  // namespace jaxq::cpu::amx

#include "amx_gemm-inl.h"
#include "amx_plain-inl.h"

namespace jaxq::cpu {
namespace amx {
namespace {

constexpr int64_t kLeastRows = 4, kLeastPlainRows = 5;

Outcome Matmul(const MatmulArgs& args, const Parallel& parallel) {
  if (args.M < (args.transpose ? kLeastRows : kLeastPlainRows)) return Outcome::kDeclined;
  if (args.transpose && args.format.group_size % kStep != 0) return Outcome::kDeclined;
  const Weight weight(args, args.N, args.K);
  if (!args.transpose) return MatmulPlain(args, weight, parallel);
  return args.M <= kFewColumns ? MatmulRows(args, weight, parallel) : MatmulTiles(args, weight, parallel);
}

}  // namespace
}  // namespace amx

const Isa kAmx = {"amx", MissingAmx, nullptr, nullptr, amx::Matmul};

}  // namespace jaxq::cpu
