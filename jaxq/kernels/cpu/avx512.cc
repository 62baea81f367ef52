// AVX-512 F, BW, VL and DQ: what every AVX-512 server CPU has.

#include <immintrin.h>

#include <cstring>

#include "isas.h"
#include "numbers.h"

#define JAXQ_ISA avx512

namespace jaxq::cpu::avx512 {
namespace {

constexpr int64_t kLanes = 16, kTileRows = 12, kTileVectors = 2;
using F = __m512;

JAXQ_INLINE F Zero() { return _mm512_setzero_ps(); }
JAXQ_INLINE F Set1(float v) { return _mm512_set1_ps(v); }
JAXQ_INLINE F Load(const float* p) { return _mm512_loadu_ps(p); }
JAXQ_INLINE void Store(float* p, F v) { _mm512_storeu_ps(p, v); }
JAXQ_INLINE F Add(F a, F b) { return _mm512_add_ps(a, b); }
JAXQ_INLINE F Sub(F a, F b) { return _mm512_sub_ps(a, b); }
JAXQ_INLINE F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
JAXQ_INLINE F Div(F a, F b) { return _mm512_div_ps(a, b); }
JAXQ_INLINE F Min(F a, F b) { return _mm512_min_ps(a, b); }
JAXQ_INLINE F Max(F a, F b) { return _mm512_max_ps(a, b); }
JAXQ_INLINE F Round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
JAXQ_INLINE F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

JAXQ_INLINE __m256i LoadHalves(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
JAXQ_INLINE F LoadF16(const uint16_t* p) { return _mm512_cvtph_ps(LoadHalves(p)); }
JAXQ_INLINE F LoadBf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(LoadHalves(p)), 16));
}
JAXQ_INLINE void StoreF16(uint16_t* p, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
JAXQ_INLINE void StoreBf16(uint16_t* p, F v) {
  const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
  const __m512i half = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __m512i words = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(words));
}

JAXQ_INLINE __m128i LoadBytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
JAXQ_INLINE F FromU8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(LoadBytes(p))); }
JAXQ_INLINE F FromS8(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(LoadBytes(p))); }
JAXQ_INLINE void ToU8(uint8_t* p, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

JAXQ_INLINE float Sum(F v) { return _mm512_reduce_add_ps(v); }
JAXQ_INLINE float MinOf(F v) { return _mm512_reduce_min_ps(v); }
JAXQ_INLINE float MaxOf(F v) { return _mm512_reduce_max_ps(v); }

#include "transpose16-inl.h"

JAXQ_INLINE void Transpose(F r[16]) {
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_castps_si512(r[i]);
  TransposeWords(rows);
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castsi512_ps(rows[i]);
}

#include "x86-inl.h"

}  // namespace
}  // namespace jaxq::cpu::avx512

#include "convert-inl.h"
#include "matmul-inl.h"

namespace jaxq::cpu {

const Isa kAvx512 = {"avx512", MissingAvx512, avx512::Quantize, avx512::Dequantize, avx512::Matmul};

}  // namespace jaxq::cpu
