// The two operands of vnni_plain-inl.h's products, for blocks of kBlockRows rows of w.
//
//   codes   four rows interleaved, so that a 32-bit lane has one column's codes of four rows: unsigned bytes.
//   x       times the rows' scales, a group of columns at a time, as integers of two or three balanced base-256 digits
//           (see digits-inl.h): four rows' digits to a 32-bit lane, for all columns of the group. One unit for each
//           row of x, group and block: what is lost is half a unit, 2**-24 of the block's largest magnitude with three
//           digits, 2**-16 with two.

#ifndef JAXQ_KERNELS_CPU_VNNI_PLAIN_PACK_INL_H_
#define JAXQ_KERNELS_CPU_VNNI_PLAIN_PACK_INL_H_

#include "digits-inl.h"
#include "quads-inl.h"
#include "runs-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kSpan = 128;  // columns at a time: one cache line of nibbles
constexpr int kSpanVectors = 8;
constexpr int64_t kBlockRows = 128;  // of w, that share a unit of x

// a[4] -> vector u has, for every 128-bit lane, the four bytes of dword u of a[0] to a[3], interleaved.
JAXQ_INLINE void Interleave(const __m512i* a, __m512i* out) {
  const __m512i low01 = _mm512_unpacklo_epi8(a[0], a[1]), high01 = _mm512_unpackhi_epi8(a[0], a[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(a[2], a[3]), high23 = _mm512_unpackhi_epi8(a[2], a[3]);
  out[0] = _mm512_unpacklo_epi16(low01, low23), out[1] = _mm512_unpackhi_epi16(low01, low23);
  out[2] = _mm512_unpacklo_epi16(high01, high23), out[3] = _mm512_unpackhi_epi16(high01, high23);
}

struct SpanBytes {
  __mmask64 half[2];
};

// kSpan columns of four rows as 8 vectors of 16 columns, made in two steps: few registers are free where sums fill most.
//
// Nibbles in groups of 32 and more: vectors 2u and 2u+1 have the even and the odd ones of columns 32u .. 32u+31, which
// takes half as many instructions as to keep them in order. All else: in order.
template <bool kNibbles>
class ColumnQuads {
 public:
  static constexpr bool kInPairs = kNibbles;
  static constexpr int kQuads = kNibbles ? kSpanVectors / 2 : kSpanVectors;

  explicit ColumnQuads(int bits) : bits_(bits) {
    alignas(64) uint8_t from[64], shift[64];
    alignas(64) int32_t words[16];
    for (int i = 0; i < 64; ++i) {
      // Byte i goes to vector i/4%4, and there to the four columns of lane i/16. Two lots of four codes share a qword:
      // each takes at most 4 bytes, even where it begins with half a byte.
      const int bit = (i / 4 % 4 * 16 + i / 16 * 4) * bits;
      from[i] = static_cast<uint8_t>((bit / 8 + i % 4) & 63);
      shift[i] = static_cast<uint8_t>(i / 4 % 2 * 32 + bit % 8 + i % 4 * bits);
    }
    for (int i = 0; i < 16; ++i) words[i] = i % 4 * 4 + i / 4;
    spread_ = _mm512_load_si512(from), shifts_ = _mm512_load_si512(shift), words_ = _mm512_load_si512(words);
    mask_ = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
  }

  JAXQ_INLINE int bits() const { return kNibbles ? 4 : bits_; }

  // Which bytes of a row hold codes of the first `columns` of a span: in vectors of nibbles, or of 64 codes.
  JAXQ_INLINE SpanBytes Bytes(int64_t columns) const {
    if constexpr (kNibbles) return {{FirstBytes(columns / 2), 0}};
    return {{FirstBytes(Least(64, columns) / 8 * bits_), FirstBytes(Most(0, columns - 64) / 8 * bits_)}};
  }

  // Four rows from `w` on, which are `row_bytes` apart; only `count` of them exist, and the last is repeated. Columns that
  // `mask` has not are zeros. out: kQuads, for Vector.
  JAXQ_INLINE void operator()(const uint8_t* w, int64_t row_bytes, int64_t count, SpanBytes mask, __m512i* out) const {
    const uint8_t* row[4] = {w};
    for (int i = 1; i < 4; ++i) row[i] = row[i - 1] + (i < count ? row_bytes : 0);
    __m512i bytes[4];
    if constexpr (kNibbles) {
      JAXQ_UNROLL
      for (int r = 0; r < 4; ++r) {
        const __m512i line = _mm512_maskz_loadu_epi8(mask.half[0], row[r]);
        bytes[r] = _mm512_permutexvar_epi32(words_, line);
      }
      Interleave(bytes, out);
    } else {
      JAXQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        JAXQ_UNROLL
        for (int r = 0; r < 4; ++r) {
          const __m512i line = _mm512_maskz_loadu_epi8(mask.half[half], row[r] + half * 8 * bits_);
          const __m512i lots = _mm512_permutexvar_epi8(spread_, line);
          bytes[r] = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts_, lots), mask_);
        }
        Interleave(bytes, out + 4 * half);
      }
    }
  }

  // Vector v of the span, out of the above.
  JAXQ_INLINE __m512i Vector(const __m512i* quads, int v) const {
    if constexpr (!kNibbles) return quads[v];
    return _mm512_and_si512(v % 2 ? _mm512_srli_epi16(quads[v / 2], 4) : quads[v / 2], mask_);
  }

 private:
  const int bits_;
  __m512i spread_, shifts_, words_, mask_;
};

// A block's row of x times the scales of one group.
struct ScaledRow {
  int8_t* digits;  // [kDigits][kBlockRows], the highest first
  float* unit;
  float* bias;  // the sum of x times the rows' biases
};

// x, scales, biases: float[kBlockRows]. False as SplitGroup.
template <int kDigits>
JAXQ_INLINE bool SplitScaled(const float* x, const float* scales, const float* biases, const ScaledRow& out) {
  constexpr int kVectors = kBlockRows / 16;
  // The digits below the highest are taken after their middle, 128, is added to each, so that a shift cuts them off.
  constexpr float kRange = DigitRange(kDigits), kMiddle = kDigits == 3 ? 32896.0f : 128.0f;
  __m512 products[kVectors], bias = _mm512_setzero_ps();
  __m512i largest = _mm512_setzero_si512();
  JAXQ_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const __m512 v = _mm512_loadu_ps(x + 16 * i);
    products[i] = _mm512_mul_ps(v, _mm512_loadu_ps(scales + 16 * i));
    bias = _mm512_fmadd_ps(v, _mm512_loadu_ps(biases + 16 * i), bias);
    // As integers: a NaN is more than anything else.
    const __m512i size = _mm512_and_si512(_mm512_castps_si512(products[i]), _mm512_set1_epi32(INT32_MAX));
    largest = _mm512_max_epi32(largest, size);
  }
  const float top = FloatOfBits(static_cast<uint32_t>(_mm512_reduce_max_epi32(largest)));
  if (!(top < 0x1p127f) || (top != 0.0f && top < 0x1p-96f)) return false;
  *out.unit = top / kRange, *out.bias = _mm512_reduce_add_ps(bias);
  const __m512 per_unit = _mm512_set1_ps(top == 0.0f ? 0.0f : kRange / top), middle = _mm512_set1_ps(kMiddle);
  // In each 128-bit lane: the four lowest bytes, then the next four, ... of four numbers.
  const __m512i planes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i sign = _mm512_set1_epi8(INT8_MIN);
  JAXQ_UNROLL
  for (int half = 0; half < kVectors / 4; ++half) {
    __m512i q[4];
    JAXQ_UNROLL
    for (int i = 0; i < 4; ++i)
      q[i] = _mm512_shuffle_epi8(_mm512_cvtps_epi32(_mm512_fmadd_ps(products[4 * half + i], per_unit, middle)), planes);
    const __m512i low01 = _mm512_unpacklo_epi32(q[0], q[1]), low23 = _mm512_unpacklo_epi32(q[2], q[3]);
    __m512i digits[3] = {_mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23), low01};
    digits[0] = _mm512_xor_si512(digits[0], sign);
    if constexpr (kDigits == 3) {
      const __m512i high01 = _mm512_unpackhi_epi32(q[0], q[1]), high23 = _mm512_unpackhi_epi32(q[2], q[3]);
      digits[1] = _mm512_xor_si512(digits[1], sign), digits[2] = _mm512_unpacklo_epi64(high01, high23);
    }
    JAXQ_UNROLL
    for (int d = 0; d < kDigits; ++d)
      _mm512_storeu_si512(out.digits + (kDigits - 1 - d) * kBlockRows + 64 * half,
                          _mm512_permutexvar_epi32(order, digits[d]));
  }
  return true;
}

// The same of up to 16 groups side by side: a word has a digit of four rows.
struct ScaledStrip {
  alignas(64) int32_t words[kBlockRows / 4][4][4][4];  // [four rows][group % 4][group / 4][digit, the lowest first]
  alignas(64) float units[16], biases[16];

  // One group's of the first four rows; the next four rows' lie kNext on.
  static constexpr int64_t kNext = 64;
  const int32_t* Group(int64_t group) const { return words[0][group % 4][group / 4]; }
};

// SplitScaled of rows n .. n+count and `groups` groups from number `first` on, which reads scales and biases as they lie.
// x: zeros from `count` on.
template <int kDigits>
JAXQ_INLINE bool SplitStrip(const Weight& weight, int64_t n, int64_t count, int64_t first, int64_t groups,
                            const float* x, ScaledStrip* out) {
  constexpr float kRange = DigitRange(kDigits), kMiddle = kDigits == 3 ? 32896.0f : 128.0f;
  alignas(64) float products[kBlockRows][16];
  const __mmask16 mask = FirstLanes(groups);
  const int64_t quads = Ceil(count, 4);
  __m512 biases[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  __m512i largest = _mm512_setzero_si512();
  for (int64_t q = 0; q < quads; ++q) {
    JAXQ_UNROLL
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t r = 4 * q + i, at = (n + Least(r, count - 1)) * weight.groups + first;
      const __m512 v = _mm512_set1_ps(x[r]);
      const __m512 product = _mm512_mul_ps(v, LoadSome(weight.scale_dtype, weight.scales, at, mask));
      biases[i] = _mm512_fmadd_ps(v, LoadSome(weight.scale_dtype, weight.biases, at, mask), biases[i]);
      const __m512i size = _mm512_and_si512(_mm512_castps_si512(product), _mm512_set1_epi32(INT32_MAX));
      largest = _mm512_max_epi32(largest, size);
      _mm512_store_ps(products[r], product);
    }
  }
  const __m512 top = _mm512_castsi512_ps(largest), range = _mm512_set1_ps(kRange);
  const __mmask16 some = _mm512_cmp_ps_mask(top, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  if (_mm512_cmp_ps_mask(top, _mm512_set1_ps(0x1p127f), _CMP_NLT_UQ) != 0 ||
      _mm512_mask_cmp_ps_mask(some, top, _mm512_set1_ps(0x1p-96f), _CMP_LT_OQ) != 0)
    return false;
  _mm512_store_ps(out->units, _mm512_div_ps(top, range));
  _mm512_store_ps(out->biases, _mm512_add_ps(_mm512_add_ps(biases[0], biases[1]), _mm512_add_ps(biases[2], biases[3])));
  const __m512 per_unit = _mm512_maskz_div_ps(some, range, top), middle = _mm512_set1_ps(kMiddle);
  constexpr int32_t kSigns = -0x7f7f7f80;  // 0x80 in every byte, which takes the middle off again
  const __m512i signs = _mm512_broadcast_i32x4(_mm_setr_epi32(kSigns, kDigits == 3 ? kSigns : 0, 0, 0));
  for (int64_t q = 0; q < quads; ++q) {
    __m512i rows[4], words[4];
    JAXQ_UNROLL
    for (int i = 0; i < 4; ++i)
      rows[i] = _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_load_ps(products[4 * q + i]), per_unit, middle));
    Interleave(rows, words);
    JAXQ_UNROLL
    for (int i = 0; i < 4; ++i) _mm512_store_si512(out->words[q][i], _mm512_xor_si512(words[i], signs));
  }
  return true;
}

// A sum of each digit, times the digits' unit, plus the bias.
template <int kDigits>
JAXQ_INLINE __m512 FloatOfDigits(const __m512i* sums, float unit, float bias) {
  const __m512 total = JoinDigits<kDigits>(sums[0], sums[1], sums[kDigits - 1]);
  return _mm512_fmadd_ps(total, _mm512_set1_ps(unit), _mm512_set1_ps(bias));
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_VNNI_PLAIN_PACK_INL_H_
