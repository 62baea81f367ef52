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

// For madd_dot-inl.h.
JAXQ_INLINE I LoadInts(const void* p) { return _mm512_loadu_si512(p); }
JAXQ_INLINE I SetBytes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
JAXQ_INLINE I SetHalves(int v) { return _mm512_set1_epi16(static_cast<int16_t>(v)); }
JAXQ_INLINE I And(I a, I b) { return _mm512_and_si512(a, b); }
JAXQ_INLINE I ShiftHalves(I a, int right) { return _mm512_srli_epi16(a, static_cast<unsigned>(right)); }
JAXQ_INLINE I AddHalves(I a, I b) { return _mm512_add_epi16(a, b); }
JAXQ_INLINE I MultiplyBytes(I codes, I digits) { return _mm512_maddubs_epi16(codes, digits); }
JAXQ_INLINE I MultiplyHalves(I a, I b) { return _mm512_madd_epi16(a, b); }
JAXQ_INLINE I AddWords(I a, I b) { return _mm512_add_epi32(a, b); }
JAXQ_INLINE I ShiftWords(I a, int left) { return _mm512_slli_epi32(a, static_cast<unsigned>(left)); }
JAXQ_INLINE F Floats(I a) { return _mm512_cvtepi32_ps(a); }
JAXQ_INLINE F Deal(F v, I lanes) { return _mm512_permutexvar_ps(lanes, v); }

}  // namespace
}  // namespace jaxq::cpu::avx512

#include "attention-inl.h"
#include "convert-inl.h"
#include "madd_dot-inl.h"
#include "matmul-inl.h"

namespace jaxq::cpu {

const Isa kAvx512 = {"avx512", MissingAvx512, avx512::Quantize, avx512::Dequantize, avx512::MatmulMadd,
                      avx512::Attention};

}  // namespace jaxq::cpu
