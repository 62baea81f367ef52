// GGUF's block types: for each, where its fp16 numbers stand, its codes, and its scales and biases.
//
// Layouts: ggml's `ggml-common.h` and `dequantize_row_*` of `ggml-quants.c`. The same map as, in NumPy,
// jaxq/checkpoints/gguf_blocks.py, which has a table of it.

#ifndef JAXQ_KERNELS_CPU_REPACK_BLOCKS_INL_H_
#define JAXQ_KERNELS_CPU_REPACK_BLOCKS_INL_H_

#include <cstring>

#include "kernels.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

// `value` in each of the eight bytes.
constexpr uint64_t Bytes(uint64_t value) { return value * 0x0101010101010101u; }

JAXQ_INLINE uint64_t Load64(const uint8_t* at) {
  uint64_t value;
  std::memcpy(&value, at, 8);
  return value;
}
JAXQ_INLINE void Store64(uint8_t* at, uint64_t value) { std::memcpy(at, &value, 8); }

// Codes 32 at a time. GCC's and Clang's vectors: two of them where the instruction set has only 16 bytes.
typedef uint64_t Codes32 __attribute__((vector_size(32)));

// Where codes [at, at + 32) stand in planes of kBits: in each chunk of kWidth bytes, the lowest kBits of all bytes come
// first, then the next kBits of all bytes.
template <int kWidth, int kBits>
constexpr JAXQ_INLINE int PlaneByte(int at) {
  return at / (kWidth * 8 / kBits) * kWidth + at % kWidth;
}
template <int kWidth, int kBits>
constexpr JAXQ_INLINE int PlaneShift(int at) {
  return at % (kWidth * 8 / kBits) / kWidth * kBits;
}

// 256 codes from planes of their low bits and, where kHighBits is not 0, of their high bits.
template <int kLowWidth, int kLowBits, int kHighWidth = 32, int kHighBits = 0>
JAXQ_INLINE void Planes(const uint8_t* low, const uint8_t* high, uint8_t* codes) {
  constexpr int kOr1 = kHighBits == 0 ? 1 : kHighBits;
  JAXQ_UNROLL
  for (int at = 0; at < 256; at += 32) {
    Codes32 code, upper;
    std::memcpy(&code, low + PlaneByte<kLowWidth, kLowBits>(at), 32);
    code = code >> PlaneShift<kLowWidth, kLowBits>(at) & Bytes((1 << kLowBits) - 1);
    if (kHighBits != 0) {
      std::memcpy(&upper, high + PlaneByte<kHighWidth, kOr1>(at), 32);
      upper = upper >> PlaneShift<kHighWidth, kOr1>(at) & Bytes((1 << kHighBits) - 1);
      code |= upper << kLowBits;
    }
    std::memcpy(codes + at, &code, 32);
  }
}

// Whether a type has Words(block, out), which makes packed words at once, where the instruction set has what it needs.
template <typename T>
constexpr bool kHasWords = false;

#ifdef __AVX2__
// The bits of `mask` change places with those kShift above them, in each 32-bit word.
template <int kShift>
JAXQ_INLINE __m256i ExchangePairs(__m256i words, int mask) {
  const __m256i other = _mm256_srli_epi32(words, kShift);
  const __m256i differ = _mm256_and_si256(_mm256_xor_si256(words, other), _mm256_set1_epi32(mask));
  return _mm256_xor_si256(words, _mm256_xor_si256(differ, _mm256_slli_epi32(differ, kShift)));
}

// In each 32-bit word, byte r's pair of bits c changes places with byte c's pair r: first within squares of two by two,
// then the squares.
JAXQ_INLINE __m256i TransposePairs(__m256i words) {
  return ExchangePairs<12>(ExchangePairs<6>(words, 0x00cc00cc), 0x0000f0f0);
}

// A shuffle of 16 bytes: byte c of word r changes places with byte r of word c.
JAXQ_INLINE __m128i TransposedBytes() { return _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); }

// 128 codes in planes of two bits over 32 bytes -> the 32 bytes of a stream. Of four codes that share a byte there, one
// stands in each plane here, so a word holds four such bytes, each for another plane.
JAXQ_INLINE void StorePairs(__m256i planes, uint8_t* out) {
  const __m256i order = _mm256_broadcastsi128_si256(TransposedBytes());
  const __m256i halves = _mm256_shuffle_epi8(TransposePairs(planes), order);  // of each plane
  const __m256i stream = _mm256_permutevar8x32_epi32(halves, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), stream);
}

// The same of `planes[64]`: two such, one after the other.
JAXQ_INLINE void StorePairs64(const uint8_t* planes, uint8_t* out) {
  for (int i = 0; i < 64; i += 32)
    StorePairs(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(planes + i)), out + i);
}
#endif

// integers[8] * scale -> out[8]; of a byte each, the first one lowest.
JAXQ_INLINE void Scale8(uint64_t integers, float scale, float* out) {
#ifdef __AVX2__
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(integers)));
  _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(scale)));
#else
  for (int i = 0; i < 8; ++i) out[i] = scale * static_cast<float>(integers >> 8 * i & 255);
#endif
}

// The same of signed bytes.
JAXQ_INLINE void ScaleSigned8(uint64_t integers, float scale, float* out) {
#ifdef __AVX2__
  const __m256i wide = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(integers)));
  _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(scale)));
#else
  for (int i = 0; i < 8; ++i) out[i] = scale * static_cast<float>(static_cast<int8_t>(integers >> 8 * i));
#endif
}

// Four bits a code, or five, in blocks of 32 with one scale. The fifth bit of code i is bit i of four bytes.
template <int kBytesPerBlock, int kCodesAt, int kBitsPerCode, int kHighAt>
struct Legacy {
  static constexpr int kBlock = 32, kBytes = kBytesPerBlock, kBits = kBitsPerCode, kGroup = 32;
  static JAXQ_INLINE void Codes(const uint8_t* block, uint8_t* codes) {
#ifdef __AVX2__
    const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + kCodesAt));
    __m256i code = _mm256_inserti128_si256(_mm256_castsi128_si256(pairs), _mm_srli_epi16(pairs, 4), 1);
    code = _mm256_and_si256(code, _mm256_set1_epi8(15));
    if (kBits == 5) {
      int32_t high;
      std::memcpy(&high, block + kHighAt, 4);
      const __m256i byte_of_code = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
      const __m256i bit_of_code = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
      const __m256i bit = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(high), byte_of_code), bit_of_code);
      const __m256i is_set = _mm256_cmpeq_epi8(bit, bit_of_code);
      code = _mm256_or_si256(code, _mm256_and_si256(is_set, _mm256_set1_epi8(16)));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), code);
#else
    for (int i = 0; i < 4; ++i) {
      uint64_t code = Load64(block + kCodesAt + i % 2 * 8) >> i / 2 * 4 & Bytes(15);
      if (kBits == 5) {
        const uint64_t bit = Bytes(block[kHighAt + i]) & 0x8040201008040201u;  // byte j has its bit j alone
        code |= (bit + Bytes(0x7f)) >> 3 & Bytes(0x10);
      }
      Store64(codes + 8 * i, code);
    }
#endif
  }
};

// d: the block's fp16 numbers, as `kHalvesAt` has them.
template <int kBytesPerBlock, int kCodesAt, int kBitsPerCode, int kHighAt>
struct LegacySymmetric : Legacy<kBytesPerBlock, kCodesAt, kBitsPerCode, kHighAt> {
  static constexpr int kHalves = 1, kHalvesAt[] = {0};
  static JAXQ_INLINE void Floats(const uint8_t*, const float* d, float* scales, float* biases) {
    scales[0] = d[0];
    biases[0] = -static_cast<float>(1 << (kBitsPerCode - 1)) * d[0];
  }
};

template <int kBytesPerBlock, int kCodesAt, int kBitsPerCode, int kHighAt>
struct LegacyAffine : Legacy<kBytesPerBlock, kCodesAt, kBitsPerCode, kHighAt> {
  static constexpr int kHalves = 2, kHalvesAt[] = {0, 2};
  static JAXQ_INLINE void Floats(const uint8_t*, const float* d, float* scales, float* biases) {
    scales[0] = d[0];
    biases[0] = d[1];
  }
};

using Q4_0 = LegacySymmetric<18, 2, 4, 0>;
using Q4_1 = LegacyAffine<20, 4, 4, 0>;
using Q5_0 = LegacySymmetric<22, 6, 5, 2>;
using Q5_1 = LegacyAffine<24, 8, 5, 4>;

struct Q8_0 {
  static constexpr int kBlock = 32, kBytes = 34, kBits = 8, kGroup = 32, kHalves = 1, kHalvesAt[] = {0};
  static JAXQ_INLINE void Codes(const uint8_t* block, uint8_t* codes) {
    for (int i = 0; i < 32; i += 8) Store64(codes + i, Load64(block + 2 + i) ^ Bytes(0x80));  // int8 + 128
  }
  static JAXQ_INLINE void Floats(const uint8_t*, const float* d, float* scales, float* biases) {
    scales[0] = d[0];
    biases[0] = -128.0f * d[0];
  }
};

struct Q2K {
  static constexpr int kBlock = 256, kBytes = 84, kBits = 2, kGroup = 16, kHalves = 2, kHalvesAt[] = {80, 82};
  static JAXQ_INLINE void Codes(const uint8_t* block, uint8_t* codes) { Planes<32, 2>(block + 16, nullptr, codes); }
#ifdef __AVX2__
  static JAXQ_INLINE void Words(const uint8_t* block, uint8_t* out) { StorePairs64(block + 16, out); }
#endif
  static JAXQ_INLINE void Floats(const uint8_t* block, const float* d, float* scales, float* biases) {
    for (int i = 0; i < 16; i += 8) {
      const uint64_t pairs = Load64(block + i);
      Scale8(pairs & Bytes(15), d[0], scales + i);
      Scale8(pairs >> 4 & Bytes(15), -d[1], biases + i);
    }
  }
};

struct Q3K {
  static constexpr int kBlock = 256, kBytes = 110, kBits = 3, kGroup = 16, kHalves = 1, kHalvesAt[] = {108};
  static JAXQ_INLINE void Codes(const uint8_t* block, uint8_t* codes) {
    Planes<32, 2, 32, 1>(block + 32, block, codes);
  }
  // Sixteen 6-bit scales: the low halves in the nibbles of 8 bytes, the high quarters in the pairs of 4.
  static JAXQ_INLINE void Floats(const uint8_t* block, const float* d, float* scales, float* biases) {
    const uint64_t low = Load64(block + 96), pairs = Load64(block + 100) >> 32;  // bytes 104 to 107, and none beyond
    const uint64_t tops = (pairs & 0x03030303u) << 4 | (pairs & 0x0c0c0c0cu) << 34;
    const uint64_t other_tops = (pairs & 0x30303030u) | (pairs & 0xc0c0c0c0u) << 30;
    ScaleSigned8(Minus32((low & Bytes(15)) | tops), d[0], scales);
    ScaleSigned8(Minus32((low >> 4 & Bytes(15)) | other_tops), d[0], scales + 8);
    for (int i = 0; i < 16; ++i) biases[i] = -4.0f * scales[i];
  }
  // Of each byte below 64, as a signed one; nothing is borrowed from the next.
  static JAXQ_INLINE uint64_t Minus32(uint64_t bytes) { return ((bytes | Bytes(0x80)) - Bytes(0x20)) ^ Bytes(0x80); }
};

// Eight 6-bit scales and mins. Of the 12 bytes from 4 on, the first four hold scales 0 to 3 and, in their top pairs, the
// tops of scales 4 to 7; the next four the mins likewise; the last four the bottoms of 4 to 7, a scale's in the low
// nibble and a min's in the high one.
struct SixBitScales {
  static constexpr int kBlock = 256, kGroup = 32, kHalves = 2, kHalvesAt[] = {0, 2};
  static JAXQ_INLINE void Floats(const uint8_t* block, const float* d, float* scales, float* biases) {
    uint32_t low, high, rest;
    std::memcpy(&low, block + 4, 4);
    std::memcpy(&high, block + 8, 4);
    std::memcpy(&rest, block + 12, 4);
    const uint32_t six = 0x3f3f3f3fu, four = 0x0f0f0f0fu, top = 0x30303030u;
    const uint32_t last_scales = (rest & four) | (low >> 2 & top), last_mins = (rest >> 4 & four) | (high >> 2 & top);
    Scale8((low & six) | uint64_t{last_scales} << 32, d[0], scales);
    Scale8((high & six) | uint64_t{last_mins} << 32, -d[1], biases);
  }
};

struct Q4K : SixBitScales {
  static constexpr int kBytes = 144, kBits = 4;
  static JAXQ_INLINE void Codes(const uint8_t* block, uint8_t* codes) { Planes<32, 4>(block + 16, nullptr, codes); }
};

struct Q5K : SixBitScales {
  static constexpr int kBytes = 176, kBits = 5;
  static JAXQ_INLINE void Codes(const uint8_t* block, uint8_t* codes) {
    Planes<32, 4, 32, 1>(block + 48, block + 16, codes);
  }
};

struct Q6K {
  static constexpr int kBlock = 256, kBytes = 210, kBits = 6, kGroup = 16, kHalves = 1, kHalvesAt[] = {208};
  static JAXQ_INLINE void Codes(const uint8_t* block, uint8_t* codes) {
    Planes<64, 4, 32, 2>(block, block + 128, codes);
  }
  static JAXQ_INLINE void Floats(const uint8_t* block, const float* d, float* scales, float* biases) {
    for (int i = 0; i < 16; i += 8) ScaleSigned8(Load64(block + 192 + i), d[0], scales + i);
    for (int i = 0; i < 16; ++i) biases[i] = -32.0f * scales[i];
  }
};

// One scale for two of the widest groups.
struct TernaryScales {
  static constexpr int kBlock = 256, kBits = 2, kGroup = 128, kHalves = 1;
  static JAXQ_INLINE void Floats(const uint8_t*, const float* d, float* scales, float* biases) {
    scales[0] = scales[1] = d[0];
    biases[0] = biases[1] = -d[0];
  }
};

// Digits in base 3, the highest one first. A byte is a fraction of 256, rounded up: multiplying by 3 modulo 256 drops a
// digit, and the integer part of that product is it: 1 from 86 on, 2 from 171 on.
#if defined(__AVX512VBMI__)
// What a byte holds: four digits in pairs of bits, the first one lowest, and a fifth one.
struct TernaryTables {
  uint8_t fours[256], fifth[256];
};

constexpr TernaryTables MakeTernaryTables() {
  TernaryTables tables = {};
  for (int byte = 0; byte < 256; ++byte) {
    int left = byte;
    for (int digit = 0; digit < 5; ++digit, left = left * 3 & 255) {
      const int value = left * 3 >> 8;
      if (digit < 4)
        tables.fours[byte] = static_cast<uint8_t>(tables.fours[byte] | value << 2 * digit);
      else
        tables.fifth[byte] = static_cast<uint8_t>(value);
    }
  }
  return tables;
}

alignas(64) constexpr TernaryTables kTernary = MakeTernaryTables();

// table[256] at each of 64 bytes.
JAXQ_INLINE __m512i LookUp(const uint8_t* table, __m512i bytes) {
  const auto at = [table](int i) { return _mm512_load_si512(table + i); };
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(bytes), _mm512_permutex2var_epi8(at(0), bytes, at(64)),
                                _mm512_permutex2var_epi8(at(128), bytes, at(192)));
}

// Where the bytes of a block's words come from: below 64 the fours, whose pairs were exchanged as by TransposePairs;
// from 64 on the fifths, of which each 32-bit word has four in its lowest byte.
struct TernaryOrder {
  uint8_t from[64];
};

constexpr TernaryOrder MakeTernaryOrder() {
  TernaryOrder order = {};
  constexpr struct {
    int first, width, digits;
  } kParts[] = {{0, 32, 5}, {32, 16, 5}, {48, 4, 4}};  // the first byte, how many, and digits of each
  for (const auto& part : kParts)
    for (int digit = 0; digit < part.digits; ++digit)
      for (int word = 0; word < part.width / 4; ++word)
        order.from[(5 * part.first + part.width * digit) / 4 + word] =
            static_cast<uint8_t>(digit < 4 ? part.first + 4 * word + digit : 64 + part.first + 4 * word);
  return order;
}

alignas(64) constexpr TernaryOrder kTernaryOrder = MakeTernaryOrder();

// As for TransposePairs, of a longer vector.
template <int kShift>
JAXQ_INLINE __m512i ExchangePairs(__m512i words, int mask) {
  const __m512i other = _mm512_srli_epi32(words, kShift);
  const __m512i differ = _mm512_and_si512(_mm512_xor_si512(words, other), _mm512_set1_epi32(mask));
  return _mm512_xor_si512(words, _mm512_xor_si512(differ, _mm512_slli_epi32(differ, kShift)));
}
#elif defined(__AVX2__)
// Of 32 bytes. Every other one is the high half of a 16-bit number: then products have their integer parts apart.
struct Digits32 {
  __m256i even, odd;
  explicit JAXQ_INLINE Digits32(__m256i bytes)
      : even(_mm256_slli_epi16(bytes, 8)), odd(_mm256_and_si256(bytes, _mm256_set1_epi16(-256))) {}

  // The integer part of each byte times 3 or 9: a digit, or two as a number below 9.
  JAXQ_INLINE __m256i Next(short factor) {
    const __m256i by = _mm256_set1_epi16(factor);
    const __m256i low = _mm256_mulhi_epu16(even, by), high = _mm256_mulhi_epu16(odd, by);
    even = _mm256_mullo_epi16(even, by);
    odd = _mm256_mullo_epi16(odd, by);
    return _mm256_or_si256(low, _mm256_slli_epi16(high, 8));
  }

  // Four digits of each byte, in pairs of bits.
  JAXQ_INLINE __m256i NextFour() {
    const __m128i two = _mm_setr_epi8(0, 4, 8, 1, 5, 9, 2, 6, 10, 0, 0, 0, 0, 0, 0, 0);  // 3 a + b: a | b << 2
    const __m256i pairs = _mm256_broadcastsi128_si256(two);
    const __m256i high_pairs = _mm256_slli_epi16(pairs, 4);
    const __m256i first = _mm256_shuffle_epi8(pairs, Next(9));
    return _mm256_or_si256(first, _mm256_shuffle_epi8(high_pairs, Next(9)));
  }
};

// Codes of a byte each -> four in the lowest byte of each 32-bit word.
JAXQ_INLINE __m256i FoursOfPairs(__m256i codes) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0401)), _mm256_set1_epi32(0x00100001));
}
#else
struct Digits32 {
  typedef uint8_t Bytes32 __attribute__((vector_size(32)));
  Bytes32 left;
  JAXQ_INLINE void Next(uint8_t* digits) {
    const Bytes32 digit = reinterpret_cast<Bytes32>(-(left >= 86) - (left >= 171));  // a comparison makes -1
    std::memcpy(digits, &digit, 32);
    left = left + left + left;
  }
};
#endif

// Five digits of each of 32 bytes, five of 16, four of 4; all of the first digits stand before the second ones.
struct TQ1 : TernaryScales {
  static constexpr int kBytes = 54, kHalvesAt[] = {52};
#if defined(__AVX512VBMI__)
  static JAXQ_INLINE void Words(const uint8_t* block, uint8_t* out) {
    const __m512i bytes = _mm512_maskz_loadu_epi8((uint64_t{1} << 52) - 1, block);
    const __m512i fours = ExchangePairs<12>(ExchangePairs<6>(LookUp(kTernary.fours, bytes), 0x00cc00cc), 0x0000f0f0);
    const __m512i twos = _mm512_maddubs_epi16(LookUp(kTernary.fifth, bytes), _mm512_set1_epi16(0x0401));
    const __m512i fifths = _mm512_madd_epi16(twos, _mm512_set1_epi32(0x00100001));
    const __m512i order = _mm512_load_si512(kTernaryOrder.from);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi8(fours, order, fifths));
  }
#elif defined(__AVX2__)
  static JAXQ_INLINE void Words(const uint8_t* block, uint8_t* out) {
    // The 20 bytes of the rest, behind 12 of the first ones, not to read beyond the block: the 16 to the low half.
    const __m256i end = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 20));
    Digits32 first(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(block)));
    Digits32 rest(_mm256_permutevar8x32_epi32(end, _mm256_setr_epi32(3, 4, 5, 6, 7, 7, 7, 7)));
    StorePairs(first.NextFour(), out);
    const __m256i words = TransposePairs(rest.NextFour());
    const __m128i sixteen = _mm_shuffle_epi8(_mm256_castsi256_si128(words), TransposedBytes());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 40), sixteen);
    const int last = _mm_cvtsi128_si32(_mm256_extracti128_si256(words, 1));
    std::memcpy(out + 60, &last, 4);
    const __m256i fifth = _mm256_packus_epi32(FoursOfPairs(first.Next(3)), FoursOfPairs(rest.Next(3)));
    const __m256i bytes = _mm256_packus_epi16(fifth, fifth);  // in each half, four of the first and four of the rest
    const int64_t low = _mm_cvtsi128_si64(_mm256_castsi256_si128(bytes));
    const int high = _mm_cvtsi128_si32(_mm256_extracti128_si256(bytes, 1));
    std::memcpy(out + 32, &low, 4);
    std::memcpy(out + 36, &high, 4);
    const int fifth_of_rest = static_cast<int>(low >> 32);
    std::memcpy(out + 56, &fifth_of_rest, 4);
  }
#else
  static JAXQ_INLINE void Codes(const uint8_t* block, uint8_t* codes) {
    Digits32 first, rest;  // the 20 bytes of the rest, and 12 of the first ones, not to read beyond the block
    std::memcpy(&first.left, block, 32);
    std::memcpy(&rest.left, block + 20, 32);
    JAXQ_UNROLL
    for (int digit = 0; digit < 5; ++digit) {
      uint8_t digits[32];
      first.Next(codes + 32 * digit);
      rest.Next(digits);
      std::memcpy(codes + 160 + 16 * digit, digits + 12, 16);
      if (digit < 4) std::memcpy(codes + 240 + 4 * digit, digits + 28, 4);
    }
  }
#endif
};

struct TQ2 : TernaryScales {
  static constexpr int kBytes = 66, kHalvesAt[] = {64};
  static JAXQ_INLINE void Codes(const uint8_t* block, uint8_t* codes) { Planes<32, 2>(block, nullptr, codes); }
#ifdef __AVX2__
  static JAXQ_INLINE void Words(const uint8_t* block, uint8_t* out) { StorePairs64(block, out); }
#endif
};

// Its scale is the byte itself.
struct Mxfp4 : Legacy<17, 1, 4, 0> {
  static constexpr int kHalves = 0, kHalvesAt[] = {0};
};

#ifdef __AVX2__
template <>
constexpr bool kHasWords<Q2K> = true;
template <>
constexpr bool kHasWords<TQ1> = true;
template <>
constexpr bool kHasWords<TQ2> = true;
#endif

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_REPACK_BLOCKS_INL_H_
