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

// For attention_tiles-inl.h, which says what it does.
struct TileProducts {
  template <bool kAdd>
  static void Run(const uint16_t* a, int64_t a_next, const uint16_t* b, int64_t b_next, int64_t steps, float* c,
                  int64_t c_next) {
    for (int64_t half = 0; half < 2; ++half, a += a_next, c += c_next) {
      EightRows<kAdd>(a, b, b_next, steps, c);
      EightRows<kAdd>(a + 8 * 32, b, b_next, steps, c + 8 * 16);
    }
  }

 private:
  // 8 rows of a left tile by the 32 columns of two right ones: 16 sums in registers.
  template <bool kAdd>
  static void EightRows(const uint16_t* a, const uint16_t* b, int64_t b_next, int64_t steps, float* c) {
    __m512 sums[8][2];
    JAXQ_UNROLL
    for (int r = 0; r < 8; ++r)
      JAXQ_UNROLL
      for (int i = 0; i < 2; ++i) sums[r][i] = kAdd ? _mm512_load_ps(c + i * 256 + r * 16) : _mm512_setzero_ps();
    for (int64_t step = 0; step < steps; ++step, a += 512, b += 512)
      for (int64_t pair = 0; pair < 16; ++pair) {
        const __m512i left = _mm512_load_si512(b + pair * 32), right = _mm512_load_si512(b + b_next + pair * 32);
        JAXQ_UNROLL
        for (int r = 0; r < 8; ++r) {
          int32_t word;
          std::memcpy(&word, a + r * 32 + pair * 2, 4);
          sums[r][0] = DotPairs(sums[r][0], left, _mm512_set1_epi32(word));
          sums[r][1] = DotPairs(sums[r][1], right, _mm512_set1_epi32(word));
        }
      }
    JAXQ_UNROLL
    for (int r = 0; r < 8; ++r)
      JAXQ_UNROLL
      for (int i = 0; i < 2; ++i) _mm512_store_ps(c + i * 256 + r * 16, sums[r][i]);
  }
};

}  // namespace
}  // namespace avx512_bf16
}  // namespace jaxq::cpu

#include "attention_tiles-inl.h"

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

// Everything else is left to avx512_vnni and avx512.
const Isa kAvx512Bf16 = {"avx512_bf16", MissingAvx512Bf16, nullptr, nullptr, avx512_bf16::Matmul,
                          avx512_bf16::Attention};

}  // namespace jaxq::cpu
