// AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later): sums of codes in exact integers, and any width of codes
// unpacked in three instructions.

#include <immintrin.h>

#include <cstring>

#include "isas.h"
#include "numbers.h"

#define JAXQ_ISA avx512_vnni

namespace jaxq::cpu::avx512_vnni {
namespace {

#include "avx512-inl.h"
#include "vbmi-inl.h"
#include "x86-inl.h"

}  // namespace
}  // namespace jaxq::cpu::avx512_vnni

#include "convert-inl.h"
#include "matmul-inl.h"
#include "vnni_dot-inl.h"
#include "vnni_gemm-inl.h"
#include "vnni_plain-inl.h"

namespace jaxq::cpu {
namespace avx512_vnni {
namespace {

Outcome MatmulVnni(const MatmulArgs& args, const Parallel& parallel) {
  const Weight weight(args, args.N, args.K);
  Outcome outcome = MatmulVnniPlain(args, weight, parallel);
  if (outcome == Outcome::kDeclined) outcome = MatmulVnniDot(args, weight, parallel);
  if (outcome == Outcome::kDeclined) outcome = MatmulVnniPanels(args, weight, parallel);
  return outcome == Outcome::kDeclined ? Matmul(args, parallel) : outcome;
}

}  // namespace
}  // namespace avx512_vnni

const Isa kAvx512Vnni = {"avx512_vnni", MissingAvx512Vnni, avx512_vnni::Quantize, avx512_vnni::Dequantize,
                         avx512_vnni::MatmulVnni, nullptr};

}  // namespace jaxq::cpu
