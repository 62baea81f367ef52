// bfloat16 x by a weight of any format, transpose=True, with vdpbf16ps, by panels (panels-inl.h).
//
// What a code stands for, less a centre of 2**(bits-1) in mode affine, is exact in bfloat16: whole numbers below 256 in
// size, E2M1 and E4M3. So products are exact, sums are float32, and each group's sum is scaled in float32:
// y[m, n] = sum_g scale[n, g] * (sum_k x[m, k] * code[n, k]) + bias[n, g] * (sum_k x[m, k]).
//
// A panel is made of pairs, two codes of a row: pair p of a word of C codes has codes p and p+C/2, and so has x's.

#ifndef JAXQ_KERNELS_CPU_BF16_GEMM_INL_H_
#define JAXQ_KERNELS_CPU_BF16_GEMM_INL_H_

#include "digits-inl.h"
#include "panels-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kLeastPairRows = 48;  // of x: fewer are as fast or faster as integers of two digits

// sums + products of two pairs a lane. Through asm: see DotBytes.
JAXQ_INLINE __m512 DotPairs(__m512 sums, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
  return sums;
}

// Pairs: [K/2][height] of x, [depth/2][kPanelRows] of a panel.
class PairArithmetic {
 public:
  static constexpr int kTile = 12;  // 24 vectors of sums
  static constexpr int64_t kBytes = 2, kDepth = 512, kPanelBytes = kDepth * kPanelRows * 2;

  explicit PairArithmetic(const Format& format) : format_(format), unpack_(format.bits) {
    alignas(64) uint16_t table[128];
    for (uint32_t code = 0; code < 128; ++code) table[code] = Bf16OfFloat(Value(code));
    for (int i = 0; i < 4; ++i) table_[i] = _mm512_load_si512(table + 32 * i);
  }

  float centre() const { return format_.affine() ? static_cast<float>(1 << (format_.bits - 1)) : 0.0f; }

  void Fill(const Weight& weight, int64_t n, int64_t first, int64_t depth, uint8_t* codes) const {
    const auto fill = [&](auto width, auto spread, auto&& decode) {
      FillPairs<decltype(width)::value, decltype(spread)::value>(weight, n, first, depth, codes, decode);
    };
    const auto one = [&](__m512i halves) __attribute__((always_inline)) {
      return _mm512_permutexvar_epi16(halves, table_[0]);
    };
    const auto two = [&](__m512i halves) __attribute__((always_inline)) {
      return _mm512_permutex2var_epi16(table_[0], halves, table_[1]);
    };
    if (format_.mode == Mode::kMxfp8)
      return fill(Constant<8>{}, Constant<false>{}, [&](__m512i halves) { return DecodeE4m3(halves); });
    switch (format_.bits) {
      case 2:
        return fill(Constant<2>{}, Constant<false>{}, one);
      case 4:
        return fill(Constant<4>{}, Constant<false>{}, one);
      case 6:
        return fill(Constant<8>{}, Constant<true>{}, two);
      case 8:
        return fill(Constant<8>{}, Constant<false>{}, [&](__m512i halves) { return DecodeBytes(halves); });
      default:
        return fill(Constant<8>{}, Constant<true>{}, one);
    }
  }

  bool Pack(const MatmulArgs& args, int64_t m, int64_t height, const XTile& out) const {
    const int64_t K = args.K, g = format_.group_size;
    const auto* x = static_cast<const uint16_t*>(args.x) + m * K;
    const __m512i order = PairOrder();
    InterleaveWords(K / 2, height, out.words, [&](int64_t r, int64_t at) {
      const uint16_t* values = x + r * K + 2 * at;
      return _mm512_permutexvar_epi16(order, _mm512_maskz_loadu_epi16(FirstHalves(K - 2 * at), values));
    });
    for (int64_t r = 0; r < height; ++r)
      for (int64_t j = 0; j < K / g; ++j) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < g; i += 16) sum = _mm512_add_ps(sum, LoadBf16(x + r * K + j * g + i));
        out.sums[j * height + r] = _mm512_reduce_add_ps(sum);
      }
    return true;
  }

  template <int kM>
  JAXQ_INLINE static void Group(const uint8_t* codes, const XTile& x, int64_t g, const GroupScales& panel, float* y) {
    __m512 acc[kM][2];
    JAXQ_UNROLL
    for (int m = 0; m < kM; ++m) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
    const int32_t* word = x.words;
    for (int64_t p = 0; p < g / 2; ++p, codes += kPanelRows * 4, word += kM) {
      const __m512i left = _mm512_loadu_si512(codes), right = _mm512_loadu_si512(codes + 64);
      JAXQ_UNROLL
      for (int m = 0; m < kM; ++m) {
        const __m512i pair = _mm512_set1_epi32(word[m]);
        acc[m][0] = DotPairs(acc[m][0], left, pair);
        acc[m][1] = DotPairs(acc[m][1], right, pair);
      }
    }
    __m512 scales[2], biases[2];
    JAXQ_UNROLL
    for (int v = 0; v < 2; ++v)
      scales[v] = _mm512_loadu_ps(panel.scales + 16 * v), biases[v] = _mm512_loadu_ps(panel.biases + 16 * v);
    JAXQ_UNROLL
    for (int m = 0; m < kM; ++m) {
      const __m512 sum = _mm512_set1_ps(x.sums[m]);
      JAXQ_UNROLL
      for (int v = 0; v < 2; ++v) {
        float* out = y + m * kPanelRows + 16 * v;
        const __m512 biased = _mm512_fmadd_ps(biases[v], sum, _mm512_loadu_ps(out));
        _mm512_storeu_ps(out, _mm512_fmadd_ps(acc[m][v], scales[v], biased));
      }
    }
  }

 private:
  static __mmask32 FirstHalves(int64_t count) {
    return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
  }

  // In mode mxfp8 the table has the magnitudes; E2M1 stands as twice its value, since its scales are halved. Of up to 5
  // bits, a table of 32 repeats the values, so that bits above a code's do not matter.
  float Value(uint32_t code) const {
    if (format_.mode == Mode::kMxfp8) return FloatOfE4m3(code & 127);
    if (!format_.affine()) return 2.0f * FloatOfE2m1(code & 15);
    return static_cast<float>(code & ((1u << format_.bits) - 1)) - centre();
  }

  // decode gives what the codes at the bottom of 16-bit lanes stand for, whatever lies above them.
  template <int kWidth, bool kSpread, typename Decode>
  void FillPairs(const Weight& weight, int64_t n, int64_t first, int64_t depth, uint8_t* out,
                 Decode&& decode) const {
    ForWords<kWidth, kSpread>(weight, unpack_, n, first, depth,
                              [&](int64_t k, int64_t r, __m512i words) __attribute__((always_inline)) {
                                uint8_t* at = out + k / 2 * kPanelRows * 4 + r * 4;
                                JAXQ_UNROLL
                                for (int p = 0; p < 16 / kWidth; ++p, at += kPanelRows * 4)
                                  _mm512_storeu_si512(at, decode(p ? _mm512_srli_epi16(words, p * kWidth) : words));
                              });
  }

  JAXQ_INLINE __m512i DecodeE4m3(__m512i halves) const {
    const __mmask32 upper = _mm512_test_epi16_mask(halves, _mm512_set1_epi16(64));
    const __m512i low = _mm512_permutex2var_epi16(table_[0], halves, table_[1]);
    const __m512i high = _mm512_permutex2var_epi16(table_[2], halves, table_[3]);
    const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(halves, _mm512_set1_epi16(0x80)), 8);
    return _mm512_or_si512(_mm512_mask_mov_epi16(low, upper, high), sign);
  }

  JAXQ_INLINE static __m512i DecodeBytes(__m512i halves) {
    // 0x4b000000 is 2**23, whose last bit counts ones: 2**23 + code, less 2**23 + 128.
    const __m512i magic = _mm512_set1_epi32(0x4b000000), byte = _mm512_set1_epi32(0xff);
    const __m512 centre = _mm512_set1_ps(8388608.0f + 128.0f);
    const __m512i even = _mm512_or_si512(_mm512_and_si512(halves, byte), magic);
    const __m512i odd = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(halves, 16), byte), magic);
    const __m512i low = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(even), centre));
    const __m512i high = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(odd), centre));
    return _mm512_or_si512(_mm512_srli_epi32(low, 16), high);  // both have at most 8 bits of mantissa
  }

  // 32 values into the order of the pairs of 32 codes.
  __m512i PairOrder() const {
    const int codes = 8 % format_.bits == 0 ? 32 / format_.bits : 4;
    alignas(64) uint16_t from[32];
    for (int i = 0; i < 32; ++i) from[i] = static_cast<uint16_t>(i / codes * codes + i % codes / 2 + i % 2 * codes / 2);
    return _mm512_load_si512(from);
  }

  const Format format_;
  const Unpacker unpack_;
  __m512i table_[4];
};

Outcome MatmulBf16(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  if (!args.transpose || args.x_dtype != DType::kBF16) return Outcome::kDeclined;
  const bool integers = args.format.mode != Mode::kMxfp8 && DigitsFor(args.x_dtype, args.K) == 2;
  if (args.M < (integers ? kLeastPairRows : FewRows(args.format) + 1)) return Outcome::kDeclined;
  return PanelProduct<PairArithmetic>(args, weight, parallel).Run();
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_BF16_GEMM_INL_H_
