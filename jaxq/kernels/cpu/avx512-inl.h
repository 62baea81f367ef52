// The vector type of simd-inl.h for AVX-512. Included inside the namespace of an instruction set.

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
JAXQ_INLINE F IfMore(F a, F b, F x, F y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}
JAXQ_INLINE F Round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
JAXQ_INLINE F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

JAXQ_INLINE __m256i LoadHalves(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
JAXQ_INLINE F LoadF16(const uint16_t* p) { return _mm512_cvtph_ps(LoadHalves(p)); }
JAXQ_INLINE F LoadBf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(LoadHalves(p)), 16));
}
JAXQ_INLINE void LoadBf16Pairs(const uint16_t* p, F* even, F* odd) {
  const __m512i words = _mm512_loadu_si512(p);
  *even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  *odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
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
// E4M3 is float16 with 7 bits less of mantissa and a bias that is 8 smaller.
JAXQ_INLINE F E4m3Floats(__m128i bytes) {
  const __m256i codes = _mm256_cvtepu8_epi16(bytes), magnitude = _mm256_and_si256(codes, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(0x80)), 8);
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f));
  const __m256i half = _mm256_or_si256(sign, _mm256_slli_epi16(magnitude, 7));
  const F values = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
  return _mm512_mask_mov_ps(values, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
}
JAXQ_INLINE F E8m0Floats(__m128i bytes) {
  const __m512i codes = _mm512_cvtepu8_epi32(bytes);
  const __mmask16 zero = _mm512_testn_epi32_mask(codes, codes);
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(codes, _mm512_set1_epi32(255));
  const __m512i bits = _mm512_mask_mov_epi32(_mm512_slli_epi32(codes, 23), zero, _mm512_set1_epi32(0x400000));
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc00000)));
}
JAXQ_INLINE F FromE4m3(const uint8_t* p) { return E4m3Floats(LoadBytes(p)); }
JAXQ_INLINE F FromE8m0(const uint8_t* p) { return E8m0Floats(LoadBytes(p)); }
// 16 codes of kBits bits in the lanes' low bits; what lies above them is left there.
template <int kBits>
JAXQ_INLINE __m512i PackedCodes(const uint8_t* p) {
  static_assert(kBits < 8);
  alignas(64) int32_t shift[16];
  if constexpr (kBits <= 4) {  // every lane gets the first 4 bytes of the 16 codes, or the last ones
    int32_t first, last;
    std::memcpy(&first, p, 4), std::memcpy(&last, p + 2 * kBits - 4, 4);
    for (int i = 0; i < 16; ++i) shift[i] = i * kBits - (i < 8 ? 0 : 16 * kBits - 32);
    const __m512i words = _mm512_mask_set1_epi32(_mm512_set1_epi32(first), 0xff00, last);
    return _mm512_srlv_epi32(words, _mm512_load_si512(shift));
  } else {  // or the 4 bytes that its code begins in
    alignas(64) uint8_t from[64];
    for (int i = 0; i < 64; ++i) from[i] = static_cast<uint8_t>(i / 4 * kBits / 8 + i % 4);
    for (int i = 0; i < 16; ++i) shift[i] = i * kBits % 8;
    const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1 << 2 * kBits) - 1), p);
    const __m512i words = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), _mm512_load_si512(from));
    return _mm512_srlv_epi32(words, _mm512_load_si512(shift));
  }
}
template <int kBits>
JAXQ_INLINE void FromPacked(const uint8_t* p, F* out) {
  if constexpr (kBits <= 4) {  // a table takes 4 bits
    alignas(64) float values[16];
    for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(i % (1 << kBits));
    *out = _mm512_permutexvar_ps(PackedCodes<kBits>(p), _mm512_load_ps(values));
  } else {
    *out = _mm512_cvtepi32_ps(_mm512_and_si512(PackedCodes<kBits>(p), _mm512_set1_epi32((1 << kBits) - 1)));
  }
}
JAXQ_INLINE void FromPackedE2m1(const uint8_t* p, F* out) {
  const F values = _mm512_setr_ps(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  *out = _mm512_permutexvar_ps(PackedCodes<4>(p), values);
}
JAXQ_INLINE void ToU8(uint8_t* p, const F* v, int most) {
  const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(v[0]), _mm512_cvtps_epi32(v[1]));
  const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(v[2]), _mm512_cvtps_epi32(v[3]));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
  _mm512_storeu_si512(p, _mm512_min_epu8(bytes, _mm512_set1_epi8(static_cast<char>(most))));
}

// For digits-inl.h.
using I = __m512i;
JAXQ_INLINE I LookUp(const uint8_t* table, I codes) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), codes);
}
template <int kDigits>
JAXQ_INLINE void StoreDigits(F v, int8_t* const* digit, int64_t at) {
  __m512i q = _mm512_cvtps_epi32(v);
  for (int d = kDigits - 1; d >= 0; --d) {
    const __m128i low = _mm512_cvtepi32_epi8(q);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(digit[d] + at), low);
    q = _mm512_srai_epi32(_mm512_sub_epi32(q, _mm512_cvtepi8_epi32(low)), 8);
  }
}

JAXQ_INLINE float Sum(F v) { return _mm512_reduce_add_ps(v); }
JAXQ_INLINE float MaxOf(F v) { return _mm512_reduce_max_ps(v); }

template <typename Op>
JAXQ_INLINE F Across(const F* rows, Op&& op) {
  F quads[4];
  JAXQ_UNROLL
  for (int i = 0; i < 4; ++i) {
    const F* row = rows + 4 * i;
    const F a = op(_mm512_unpacklo_ps(row[0], row[1]), _mm512_unpackhi_ps(row[0], row[1]));
    const F b = op(_mm512_unpacklo_ps(row[2], row[3]), _mm512_unpackhi_ps(row[2], row[3]));
    quads[i] = op(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  const auto halve = [&](F a, F b) __attribute__((always_inline)) {
    return op(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return halve(halve(quads[0], quads[1]), halve(quads[2], quads[3]));
}

#include "transpose_words-inl.h"

JAXQ_INLINE void Transpose(F r[16]) {
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_castps_si512(r[i]);
  TransposeWords(rows);
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castsi512_ps(rows[i]);
}
