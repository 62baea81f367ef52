// Unpacking with AVX2 and BMI2. Included inside the namespace of an instruction set, after x86-inl.h.

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
