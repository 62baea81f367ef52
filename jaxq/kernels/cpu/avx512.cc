// AVX-512 F, BW, VL and DQ: what every AVX-512 server CPU has.

#include <immintrin.h>

#include <cstring>

#include "isas.h"
#include "numbers.h"

#define JAXQ_ISA avx512

namespace jaxq::cpu::avx512 {
namespace {

#include "avx512-inl.h"
#include "x86-inl.h"

#include "bmi2-inl.h"

}  // namespace
}  // namespace jaxq::cpu::avx512

#include "attention-inl.h"
#include "convert-inl.h"
#include "matmul-inl.h"

namespace jaxq::cpu {

const Isa kAvx512 = {"avx512", MissingAvx512, avx512::Quantize, avx512::Dequantize, avx512::Matmul,
                      avx512::Attention};

}  // namespace jaxq::cpu
