// Few rows of x by a weight in mode mxfp8, transpose=True, with BF16: E4M3 codes are looked up as bfloat16, which holds
// them exactly, 64 at a time, and multiplied by x as bfloat16. Where x is no bfloat16 it stands as the sum of three.
//
// A vector of 64 codes becomes two of 32: of each 16 bytes, the first 8 go to the first. A 32-bit lane of either then
// has two of 16 neighbouring codes, which lie in one group.

#ifndef JAXQ_KERNELS_CPU_MXFP8_DOT_INL_H_
#define JAXQ_KERNELS_CPU_MXFP8_DOT_INL_H_

#include "runs-inl.h"
#include "scales-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kE4m3Rows = 4;        // of w at a time
constexpr int64_t kE4m3Block = 64;      // codes
constexpr int64_t kE4m3PerChunk = 8;    // blocks whose 16 scales are in a register
constexpr int64_t kE4m3GroupSize = 32;  // mxfp8 has no other

// The upper and the lower byte of every code's magnitude in bfloat16.
struct E4m3Table {
  __m512i upper[2], lower[2];

  E4m3Table() {
    alignas(64) uint8_t high[128], low[128];
    for (int i = 0; i < 128; i += 16) {
      alignas(16) uint8_t codes[16];
      for (int j = 0; j < 16; ++j) codes[j] = static_cast<uint8_t>(i + j);
      const __m512i bits = _mm512_castps_si512(E4m3Floats(LoadBytes(codes)));
      _mm_store_si128(reinterpret_cast<__m128i*>(high + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 24)));
      _mm_store_si128(reinterpret_cast<__m128i*>(low + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 16)));
    }
    for (int i = 0; i < 2; ++i)
      upper[i] = _mm512_load_si512(high + 64 * i), lower[i] = _mm512_load_si512(low + 64 * i);
  }

  JAXQ_INLINE void operator()(__m512i codes, __m512i* pairs) const {
    const __m512i low = _mm512_permutex2var_epi8(lower[0], codes, lower[1]);  // the sign is ignored
    const __m512i magnitude = _mm512_permutex2var_epi8(upper[0], codes, upper[1]);
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i high = _mm512_ternarylogic_epi64(magnitude, codes, sign, 0xf8);  // magnitude | (codes & sign)
    pairs[0] = _mm512_unpacklo_epi8(low, high), pairs[1] = _mm512_unpackhi_epi8(low, high);
  }
};

// 16 floats rounded to bfloat16, as floats.
JAXQ_INLINE __m512 RoundToBf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// 64 floats as kParts times 64 bfloat16, in the order of a block; the parts' sum is the float, as each holds 8 of its
// 24 bits. False where one is not finite, or so large or small that a part would not be a normal number.
template <int kParts>
bool SplitBlock(const float* x, uint16_t* out) {
  __mmask16 bad = 0;
  for (int quarter = 0; quarter < 4; ++quarter) {
    __m512 v = _mm512_loadu_ps(x + 16 * quarter);
    if constexpr (kParts > 1) {
      const __m512 size = _mm512_abs_ps(v);
      const __mmask16 small = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0x1p-96f), _CMP_LT_OQ);
      bad |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(0x1p126f), _CMP_NLT_UQ);
      bad |= _mm512_mask_cmp_ps_mask(small, size, _mm512_setzero_ps(), _CMP_NEQ_OQ);
    }
    for (int part = 0; part < kParts; ++part) {
      const __m512 rounded = kParts > 1 ? RoundToBf16(v) : v;
      const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(rounded), 16));
      auto* at = reinterpret_cast<__m128i*>(out + part * kE4m3Block + 8 * quarter);
      _mm_storeu_si128(at, _mm256_castsi256_si128(halves));
      _mm_storeu_si128(at + 4, _mm256_extracti128_si256(halves, 1));
      v = _mm512_sub_ps(v, rounded);
    }
  }
  return bad == 0;
}

template <int kParts>
class Mxfp8Dot {
 public:
  Mxfp8Dot(const MatmulArgs& args, const Weight& weight)
      : args_(args), weight_(weight), blocks_(Ceil(args.K, kE4m3Block)) {}

  Outcome Run(const Parallel& parallel) {
    const Scratch scratch(Room<uint16_t>(args_.M * Values()) + Runs::RoomFor(parallel));
    if (!scratch.ok()) return Outcome::kNoMemory;
    char* cursor = scratch.data();
    x_ = Take<uint16_t>(&cursor, args_.M * Values());
    int64_t* next = Take<int64_t>(&cursor, 8 * parallel.slots());
    for (int64_t m = 0; m < args_.M; ++m)
      if (!Prepare(m)) return Outcome::kDeclined;
    ForRuns(args_.N, parallel, next, [&](int64_t first, int64_t last, int) {
      // What is read more than once is still in the second-level cache when its turn comes again.
      const int64_t step = args_.M > 2 ? kRunTask : last - first;
      for (int64_t n = first; n < last; n += step) {
        int64_t m = 0;
        for (; m + 2 <= args_.M; m += 2) Range<2>(n, Least(last, n + step), m);
        if (m < args_.M) Range<1>(n, Least(last, n + step), m);
      }
    });
    return Outcome::kDone;
  }

 private:
  int64_t Values() const { return blocks_ * kParts * kE4m3Block; }  // of one row of x

  bool Prepare(int64_t m) {
    for (int64_t b = 0; b < blocks_; ++b) {
      float x[kE4m3Block] = {};
      const int64_t first = b * kE4m3Block;
      ToFloats(args_.x_dtype, args_.x, m * args_.K + first, Least(kE4m3Block, args_.K - first), x);
      if (!SplitBlock<kParts>(x, x_ + m * Values() + b * kParts * kE4m3Block)) return false;
    }
    return true;
  }

  template <int kM>
  struct State {
    const uint8_t* w[kE4m3Rows];
    __m512 scales[kE4m3Rows];
    __m512 totals[kE4m3Rows][kM];
  };

  // One block. `lanes`: the group of each lane, from the chunk's first on.
  template <int kM>
  JAXQ_INLINE void Step(int64_t block, __mmask64 bytes, __m512i lanes, const uint16_t* x, State<kM>* state) const {
    __m512i codes[kE4m3Rows][2];
    JAXQ_UNROLL
    for (int r = 0; r < kE4m3Rows; ++r) {
      const uint8_t* w = state->w[r] + block * kE4m3Block;
      _mm_prefetch(reinterpret_cast<const char*>(w + kAhead), _MM_HINT_T1);
      table_(_mm512_maskz_loadu_epi8(bytes, w), codes[r]);
    }
    JAXQ_UNROLL
    for (int m = 0; m < kM; ++m) {
      const uint16_t* parts = x + m * Values() + block * kParts * kE4m3Block;
      __m512 sums[kE4m3Rows];
      JAXQ_UNROLL
      for (int r = 0; r < kE4m3Rows; ++r) sums[r] = _mm512_setzero_ps();
      JAXQ_UNROLL
      for (int i = 2 * kParts - 1; i >= 0; --i) {  // the smallest parts first
        const __m512i pairs = _mm512_loadu_si512(parts + 32 * i);
        JAXQ_UNROLL
        for (int r = 0; r < kE4m3Rows; ++r) sums[r] = DotPairs(sums[r], codes[r][i % 2], pairs);
      }
      JAXQ_UNROLL
      for (int r = 0; r < kE4m3Rows; ++r) {
        const __m512 scales = _mm512_permutexvar_ps(lanes, state->scales[r]);
        state->totals[r][m] = _mm512_fmadd_ps(sums[r], scales, state->totals[r][m]);
      }
    }
  }

  // Rows first .. last of w by rows m0 .. m0+kM of x.
  template <int kM>
  void Range(int64_t first, int64_t last, int64_t m0) const {
    for (int64_t n = first; n < last; n += kE4m3Rows) Rows<kM>(n, Least(kE4m3Rows, last - n), m0);
  }

  // Rows n .. n+count of w, kE4m3Rows at most.
  template <int kM>
  JAXQ_INLINE void Rows(int64_t n, int64_t count, int64_t m0) const {
    const __m512i lane_groups = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const int64_t whole = args_.K / kE4m3Block, rest = args_.K % kE4m3Block;
    const uint16_t* x = x_ + m0 * Values();
    State<kM> state;
    JAXQ_UNROLL
    for (int r = 0; r < kE4m3Rows; ++r) {
      state.w[r] = weight_.packed + (n + Least(r, count - 1)) * weight_.row_bytes;
      JAXQ_UNROLL
      for (int m = 0; m < kM; ++m) state.totals[r][m] = _mm512_setzero_ps();
    }
    for (int64_t first = 0; first < blocks_; first += kE4m3PerChunk) {
      const int64_t group = first * kE4m3Block / kE4m3GroupSize, last = Least(whole, first + kE4m3PerChunk);
      JAXQ_UNROLL
      for (int r = 0; r < kE4m3Rows; ++r) {
        const int64_t at = (n + Least(r, count - 1)) * weight_.groups + group;
        const auto* scales = static_cast<const uint8_t*>(weight_.scales) + at;
        _mm_prefetch(reinterpret_cast<const char*>(scales + kAhead / kE4m3GroupSize), _MM_HINT_T0);
        state.scales[r] = E8m0Floats(_mm_maskz_loadu_epi8(FirstLanes(weight_.groups - group), scales));
      }
      __m512i lanes = lane_groups;
      for (int64_t b = first; b < last; ++b, lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(2)))
        Step<kM>(b, FirstBytes(kE4m3Block), lanes, x, &state);
      if (rest && whole < first + kE4m3PerChunk) Step<kM>(whole, FirstBytes(rest), lanes, x, &state);
    }
    JAXQ_UNROLL
    for (int m = 0; m < kM; ++m) {
      __m512 totals[kE4m3Rows];
      JAXQ_UNROLL
      for (int r = 0; r < kE4m3Rows; ++r) totals[r] = state.totals[r][m];
      StoreSome(args_.x_dtype, args_.y, (m0 + m) * args_.N + n, count, SumFour(totals));
    }
  }

  const MatmulArgs& args_;
  const Weight& weight_;
  const int64_t blocks_;
  const E4m3Table table_;
  uint16_t* x_ = nullptr;
};

Outcome MatmulMxfp8Dot(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  if (!args.transpose || args.M > FewRows(args.format) || args.format.mode != Mode::kMxfp8) return Outcome::kDeclined;
  if (args.x_dtype == DType::kBF16) return Mxfp8Dot<1>(args, weight).Run(parallel);
  return Mxfp8Dot<3>(args, weight).Run(parallel);
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_MXFP8_DOT_INL_H_
