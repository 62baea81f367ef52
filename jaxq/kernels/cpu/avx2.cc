// AVX2 with FMA, F16C and BMI2.

#include <immintrin.h>

#include <cstring>

#include "isas.h"
#include "numbers.h"

#define JAXQ_ISA avx2

namespace jaxq::cpu::avx2 {
namespace {

constexpr int64_t kLanes = 8, kTileRows = 6, kTileVectors = 2;
using F = __m256;

JAXQ_INLINE F Zero() { return _mm256_setzero_ps(); }
JAXQ_INLINE F Set1(float v) { return _mm256_set1_ps(v); }
JAXQ_INLINE F Load(const float* p) { return _mm256_loadu_ps(p); }
JAXQ_INLINE void Store(float* p, F v) { _mm256_storeu_ps(p, v); }
JAXQ_INLINE F Add(F a, F b) { return _mm256_add_ps(a, b); }
JAXQ_INLINE F Sub(F a, F b) { return _mm256_sub_ps(a, b); }
JAXQ_INLINE F Mul(F a, F b) { return _mm256_mul_ps(a, b); }
JAXQ_INLINE F Div(F a, F b) { return _mm256_div_ps(a, b); }
JAXQ_INLINE F Min(F a, F b) { return _mm256_min_ps(a, b); }
JAXQ_INLINE F Max(F a, F b) { return _mm256_max_ps(a, b); }
JAXQ_INLINE F IfMore(F a, F b, F x, F y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
JAXQ_INLINE F Round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
JAXQ_INLINE F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

JAXQ_INLINE __m128i LoadHalves(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
JAXQ_INLINE F LoadF16(const uint16_t* p) { return _mm256_cvtph_ps(LoadHalves(p)); }
JAXQ_INLINE F LoadBf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(LoadHalves(p)), 16));
}
JAXQ_INLINE void LoadBf16Pairs(const uint16_t* p, F* even, F* odd) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  *even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  *odd = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
JAXQ_INLINE void StoreF16(uint16_t* p, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
JAXQ_INLINE void StoreBf16(uint16_t* p, F v) {
  const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
  const __m256i half = _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i words = _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

JAXQ_INLINE __m128i LoadBytes(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
JAXQ_INLINE F FromU8(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(LoadBytes(p))); }
JAXQ_INLINE F FromS8(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(LoadBytes(p))); }
// E4M3 is float16 with 7 bits less of mantissa and a bias that is 8 smaller.
JAXQ_INLINE F FromE4m3(const uint8_t* p) {
  const __m128i codes = _mm_cvtepu8_epi16(LoadBytes(p)), magnitude = _mm_and_si128(codes, _mm_set1_epi16(0x7f));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(codes, _mm_set1_epi16(0x80)), 8);
  const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7e00));
  const __m128i half = _mm_or_si128(_mm_or_si128(sign, nan), _mm_slli_epi16(magnitude, 7));
  return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}
JAXQ_INLINE F FromE8m0(const uint8_t* p) {
  const __m256i codes = _mm256_cvtepu8_epi32(LoadBytes(p)), bits = _mm256_slli_epi32(codes, 23);
  const __m256i zero = _mm256_and_si256(_mm256_cmpeq_epi32(codes, _mm256_setzero_si256()), _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_cmpeq_epi32(codes, _mm256_set1_epi32(255));
  const __m256i quiet = _mm256_and_si256(nan, _mm256_set1_epi32(0x7fc00000));
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_or_si256(bits, zero), quiet));
}
// 16 codes of kBits bits in the lanes' low bits; what lies above them is left there. Every lane gets 4 bytes that hold
// its code: the first or the last ones of the 16 codes, or, where those are too few, of an octet of codes.
template <int kBits>
JAXQ_INLINE void PackedCodes(const uint8_t* p, __m256i out[2]) {
  static_assert(kBits < 8);
  const auto word = [](const uint8_t* from) __attribute__((always_inline)) {
    int32_t bits;
    std::memcpy(&bits, from, 4);
    return _mm256_set1_epi32(bits);
  };
  constexpr int b = kBits;
  if constexpr (kBits <= 4) {
    constexpr int first = 32 - 8 * b;
    const __m256i low = _mm256_setr_epi32(0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b);
    out[0] = _mm256_srlv_epi32(word(p), low);
    out[1] = _mm256_srlv_epi32(word(p + 2 * b - 4), _mm256_add_epi32(low, _mm256_set1_epi32(first)));
  } else {
    constexpr int first = 32 - 4 * b;
    const __m256i shifts = _mm256_setr_epi32(0, b, 2 * b, 3 * b, first, first + b, first + 2 * b, first + 3 * b);
    for (int i = 0; i < 2; ++i, p += b)
      out[i] = _mm256_srlv_epi32(_mm256_blend_epi32(word(p), word(p + b - 4), 0xf0), shifts);
  }
}
template <int kBits>
JAXQ_INLINE void FromPacked(const uint8_t* p, F out[2]) {
  __m256i codes[2];
  PackedCodes<kBits>(p, codes);
  for (int i = 0; i < 2; ++i)
    out[i] = _mm256_cvtepi32_ps(_mm256_and_si256(codes[i], _mm256_set1_epi32((1 << kBits) - 1)));
}
JAXQ_INLINE void FromPackedE2m1(const uint8_t* p, F out[2]) {
  const F sizes = _mm256_setr_ps(0, 1, 2, 3, 4, 6, 8, 12);
  __m256i codes[2];
  PackedCodes<4>(p, codes);
  for (int i = 0; i < 2; ++i) {
    const F size = _mm256_permutevar8x32_ps(sizes, codes[i]), sign = _mm256_castsi256_ps(_mm256_slli_epi32(codes[i], 28));
    out[i] = _mm256_or_ps(size, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
  }
}
JAXQ_INLINE void ToU8(uint8_t* p, const F* v, int most) {
  const __m256i low = _mm256_packs_epi32(_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
  const __m256i high = _mm256_packs_epi32(_mm256_cvtps_epi32(v[2]), _mm256_cvtps_epi32(v[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
  const __m256i top = _mm256_set1_epi8(static_cast<char>(most));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_min_epu8(bytes, top));
}

// For digits-inl.h and madd_dot-inl.h.
using I = __m256i;
JAXQ_INLINE I LookUp(const uint8_t* table, I codes) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), codes);
}
template <int kDigits>
JAXQ_INLINE void StoreDigits(F v, int8_t* const* digit, int64_t at) {
  __m256i q = _mm256_cvtps_epi32(v);
  for (int d = kDigits - 1; d >= 0; --d) {
    const __m256i low = _mm256_srai_epi32(_mm256_slli_epi32(q, 24), 24);
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(digit[d] + at), _mm_packs_epi16(halves, halves));
    q = _mm256_srai_epi32(_mm256_sub_epi32(q, low), 8);
  }
}
JAXQ_INLINE I LoadInts(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
JAXQ_INLINE I SetBytes(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
JAXQ_INLINE I SetHalves(int v) { return _mm256_set1_epi16(static_cast<int16_t>(v)); }
JAXQ_INLINE I And(I a, I b) { return _mm256_and_si256(a, b); }
JAXQ_INLINE I ShiftHalves(I a, int right) { return _mm256_srli_epi16(a, right); }
JAXQ_INLINE I AddHalves(I a, I b) { return _mm256_add_epi16(a, b); }
JAXQ_INLINE I MultiplyBytes(I codes, I digits) { return _mm256_maddubs_epi16(codes, digits); }
JAXQ_INLINE I MultiplyHalves(I a, I b) { return _mm256_madd_epi16(a, b); }
JAXQ_INLINE I AddWords(I a, I b) { return _mm256_add_epi32(a, b); }
JAXQ_INLINE I ShiftWords(I a, int left) { return _mm256_slli_epi32(a, left); }
JAXQ_INLINE F Floats(I a) { return _mm256_cvtepi32_ps(a); }
JAXQ_INLINE F Deal(F v, I lanes) { return _mm256_permutevar8x32_ps(v, lanes); }

JAXQ_INLINE float Sum(F v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
}
JAXQ_INLINE float MinOf(F v) {
  __m128 a = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_min_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_min_ss(a, _mm_shuffle_ps(a, a, 1)));
}
JAXQ_INLINE float MaxOf(F v) { return -MinOf(_mm256_sub_ps(_mm256_setzero_ps(), v)); }

template <typename Op>
JAXQ_INLINE F Across(const F* rows, Op&& op) {
  F quads[2];
  JAXQ_UNROLL
  for (int i = 0; i < 2; ++i) {
    const F* row = rows + 4 * i;
    const F a = op(_mm256_unpacklo_ps(row[0], row[1]), _mm256_unpackhi_ps(row[0], row[1]));
    const F b = op(_mm256_unpacklo_ps(row[2], row[3]), _mm256_unpackhi_ps(row[2], row[3]));
    quads[i] = op(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  }
  return op(_mm256_permute2f128_ps(quads[0], quads[1], 0x20), _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
}

JAXQ_INLINE void Transpose(F r[8]) {
  F t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

#include "x86-inl.h"

#include "bmi2-inl.h"

}  // namespace
}  // namespace jaxq::cpu::avx2

#include "attention-inl.h"
#include "convert-inl.h"
#include "madd_dot-inl.h"
#include "matmul-inl.h"

namespace jaxq::cpu {

const Isa kAvx2 = {"avx2", MissingAvx2, avx2::Quantize, avx2::Dequantize, avx2::MatmulMadd, avx2::Attention};

}  // namespace jaxq::cpu
