// Octets of codes on x86 with BMI2, for simd-inl.h. Included inside the namespace of an instruction set.

// The bits of 8 bytes that an octet of codes fills.
JAXQ_INLINE uint64_t SpreadMask(int bits) { return 0x0101010101010101u * ((1u << bits) - 1u); }

[[maybe_unused]] void PackOctets(const uint8_t* codes, int64_t octets, int bits, uint8_t* dst) {
  if (bits == 8) {
    std::memcpy(dst, codes, static_cast<size_t>(octets) * 8);
    return;
  }
  if (bits == 4 && octets % 8 == 0) {
    const auto pairs = [](const uint8_t* from) __attribute__((always_inline)) {  // code + 16 * next
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      return _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x1001));
    };
    for (int64_t i = 0; i < octets; i += 8, codes += 64, dst += 32) {
      const __m256i bytes = _mm256_packus_epi16(pairs(codes), pairs(codes + 32));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm256_permute4x64_epi64(bytes, 0xd8));
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
