// Intel's AMX with bfloat16 (Sapphire Rapids and later): matrix products of more than a few rows, and attention of many
// queries. The rest goes to the AVX-512 kernels.

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

#include "amx_codes-inl.h"
#include "amx_digits-inl.h"
#include "amx_parts-inl.h"
#include "amx_plain-inl.h"

namespace jaxq::cpu {
namespace amx {
namespace {

// For attention_tiles-inl.h, which says what it does.
struct TileProducts {
  template <bool kAdd>
  static void Run(const uint16_t* a, int64_t a_next, const uint16_t* b, int64_t b_next, int64_t steps, float* c,
                  int64_t c_next) {
    if constexpr (kAdd) {
      LoadTile<0>(c), LoadTile<1>(c + kFloats), LoadTile<2>(c + c_next), LoadTile<3>(c + c_next + kFloats);
    } else {
      ZeroTile<0>(), ZeroTile<1>(), ZeroTile<2>(), ZeroTile<3>();
    }
    for (int64_t step = 0; step < steps; ++step, a += kHalves, b += kHalves) {
      LoadTile<4>(a), LoadTile<6>(b);
      DotTiles<0, 4, 6>();
      LoadTile<7>(b + b_next);
      DotTiles<1, 4, 7>();
      LoadTile<5>(a + a_next);
      DotTiles<2, 5, 6>(), DotTiles<3, 5, 7>();
    }
    StoreTile<0>(c), StoreTile<1>(c + kFloats), StoreTile<2>(c + c_next), StoreTile<3>(c + c_next + kFloats);
  }

  const TileScope tiles_configured;
};

}  // namespace
}  // namespace amx
}  // namespace jaxq::cpu

#include "attention_tiles-inl.h"

namespace jaxq::cpu {
namespace amx {
namespace {

// Below, the kernels of avx512_bf16 and avx512_vnni were as fast or faster where the two were measured side by side.
constexpr int64_t kLeastBf16Rows = 6, kLeastRows = 7;
constexpr int64_t kLeastPlainBf16Rows = 32, kLeastPlainRows = 96;  // transpose=False
constexpr int64_t kLeastPartsRows = 17;  // of bfloat16: below, amx_gemm-inl.h was as fast or faster

Outcome Matmul(const MatmulArgs& args, const Parallel& parallel) {
  const bool bf16 = args.x_dtype == DType::kBF16;
  const int64_t least = bf16 ? kLeastBf16Rows : kLeastRows;
  const int64_t least_plain = bf16 ? kLeastPlainBf16Rows : kLeastPlainRows;
  if (args.M < (args.transpose ? least : least_plain)) return Outcome::kDeclined;
  const Weight weight(args, args.N, args.K);
  if (!args.transpose) return MatmulPlain(args, weight, parallel);
  if (bf16 && args.M >= kLeastPartsRows && WeightParts(args.format, args.scale_dtype) > 0)
    return MatmulParts(args, weight, parallel);
  const bool integers = args.format.mode != Mode::kMxfp8;
  const Outcome outcome = integers ? MatmulDigits(args, weight, parallel) : Outcome::kDeclined;
  return outcome == Outcome::kDeclined ? MatmulCodes(args, weight, parallel) : outcome;
}

}  // namespace
}  // namespace amx

const Isa kAmx = {"amx", MissingAmx, nullptr, nullptr, amx::Matmul, amx::Attention};

}  // namespace jaxq::cpu
