// Octets of codes on x86 with BMI2 and AVX2, for simd-inl.h. Included inside the namespace of an instruction set.

// One octet of codes to 8 bytes and back.
JAXQ_INLINE uint64_t SpreadMask(int bits) { return 0x0101010101010101u * ((1u << bits) - 1u); }

// 16 bytes of nibbles to 32 bytes of codes.
JAXQ_INLINE __m256i SpreadNibbles(__m128i bytes) {
  const __m128i mask = _mm_set1_epi8(15), low = _mm_and_si128(bytes, mask);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  return _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
}

void UnpackOctets(const uint8_t* src, int64_t octets, int bits, int64_t readable, uint8_t* dst) {
  if (bits == 8) {
    std::memcpy(dst, src, static_cast<size_t>(octets) * 8);
    return;
  }
  int64_t i = 0;
  if (bits == 4) {
    for (; i + 4 <= octets; i += 4, src += 16, dst += 32) {
      const __m256i codes = SpreadNibbles(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), codes);
    }
  }
  const uint64_t mask = SpreadMask(bits);
  readable -= i * bits;
  for (; i < octets; ++i, src += bits, dst += 8, readable -= bits) {
    uint64_t word = 0;
    if (readable >= 8)
      std::memcpy(&word, src, 8);
    else
      std::memcpy(&word, src, static_cast<size_t>(bits));
    word = _pdep_u64(word, mask);
    std::memcpy(dst, &word, 8);
  }
}

void PackOctets(const uint8_t* codes, int64_t octets, int bits, uint8_t* dst) {
  if (bits == 8) {
    std::memcpy(dst, codes, static_cast<size_t>(octets) * 8);
    return;
  }
  const uint64_t mask = SpreadMask(bits);
  for (int64_t i = 0; i < octets; ++i, codes += 8, dst += bits) {
    uint64_t word;
    std::memcpy(&word, codes, 8);
    word = _pext_u64(word, mask);
    if (i + 1 < octets)
      std::memcpy(dst, &word, bits < 4 ? 4 : 8);  // the next octet overwrites what is too much
    else
      std::memcpy(dst, &word, static_cast<size_t>(bits));
  }
}

void MapE2m1(uint8_t* codes, int64_t count) {
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kTwiceE2m1));
  for (int64_t i = 0; i < count; i += 16) {
    __m128i* at = reinterpret_cast<__m128i*>(codes + i);
    _mm_storeu_si128(at, _mm_shuffle_epi8(table, _mm_loadu_si128(at)));
  }
}
