// Octets of codes on x86 with BMI2, for simd-inl.h. Included inside the namespace of an instruction set.

// The bits of 8 bytes that an octet of codes fills.
JAXQ_INLINE uint64_t SpreadMask(int bits) { return 0x0101010101010101u * ((1u << bits) - 1u); }

[[maybe_unused]] void PackOctets(const uint8_t* codes, int64_t octets, int bits, uint8_t* dst) {
  if (bits == 8) {
    std::memcpy(dst, codes, static_cast<size_t>(octets) * 8);
    return;
  }
  if (bits == 4 && octets % 2 == 0) {  // code + 16 * next, of 16 at a time
    for (int64_t i = 0; i < octets; i += 2, codes += 16, dst += 8) {
      const __m128i pairs = _mm_maddubs_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)),
                                              _mm_set1_epi16(0x1001));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(dst), _mm_packus_epi16(pairs, pairs));
    }
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
