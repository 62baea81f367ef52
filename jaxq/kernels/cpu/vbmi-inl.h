// Unpacking with AVX-512 VBMI. Included inside the namespace of an instruction set, after avx512-inl.h.

JAXQ_INLINE __mmask64 FirstBytes(int64_t count) { return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1; }

// How 64 codes of one width come out of 8*bits bytes: an octet of codes to each group of 8 bytes, then 8 bits from
// every multiple of `bits` on.
struct Unpacker {
  __m512i spread, shifts, mask;
  int bits;

  explicit Unpacker(int bits_) : bits(bits_) {
    alignas(64) uint8_t from[64], shift[64];
    for (int i = 0; i < 64; ++i) {
      from[i] = static_cast<uint8_t>((i / 8 * bits + i % 8) & 63);
      shift[i] = static_cast<uint8_t>(i % 8 * bits);
    }
    spread = _mm512_load_si512(from), shifts = _mm512_load_si512(shift);
    mask = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
  }

  // `count` codes, at most 64 and a multiple of 8, as bytes; zeros after them. Reads no byte past them.
  JAXQ_INLINE __m512i operator()(const uint8_t* src, int64_t count) const {
    const __m512i bytes = _mm512_maskz_loadu_epi8(FirstBytes(count / 8 * bits), src);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, bytes)), mask);
  }
};

void UnpackOctets(const uint8_t* src, int64_t octets, int bits, int64_t, uint8_t* dst) {
  if (bits == 8) {
    std::memcpy(dst, src, static_cast<size_t>(octets) * 8);
    return;
  }
  const Unpacker unpack(bits);
  for (int64_t i = 0; i < octets; i += 8, src += 8 * bits, dst += 64) {
    const int64_t count = (octets - i < 8 ? octets - i : 8) * 8;
    _mm512_mask_storeu_epi8(dst, FirstBytes(count), unpack(src, count));
  }
}

// sums + dot products of 4 unsigned by 4 signed bytes a lane. Through asm, since gcc 12 keeps an array of sums that goes
// through the intrinsic in memory, and copies it at every step.
JAXQ_INLINE __m512i DotBytes(__m512i sums, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
  return sums;
}

// Sums of each digit (digits-inl.h), the highest first, as floats; of two, the last is not looked at.
template <int kDigits>
JAXQ_INLINE __m512 JoinDigits(__m512i d0, __m512i d1, __m512i d2) {
  const __m512 high = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(d0, 8), d1));
  if constexpr (kDigits == 2) return high;
  return _mm512_fmadd_ps(high, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(d2));
}
