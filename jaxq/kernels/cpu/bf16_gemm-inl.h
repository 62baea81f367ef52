// bfloat16 x by a weight of any format, transpose=True, with vdpbf16ps.
//
// What a code stands for, less a centre of 2**(bits-1) in mode affine, is exact in bfloat16: whole numbers below 256 in
// size, E2M1 and E4M3. So products are exact, sums are float32, and each group's sum is scaled in float32:
// y[m, n] = sum_g scale[n, g] * (sum_k x[m, k] * code[n, k]) + bias[n, g] * (sum_k x[m, k]).

#ifndef JAXQ_KERNELS_CPU_BF16_GEMM_INL_H_
#define JAXQ_KERNELS_CPU_BF16_GEMM_INL_H_

#include "digits-inl.h"
#include "quads-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kLeastPairRows = 33;  // of x: fewer are as fast or faster as integers of two digits
constexpr int64_t kPairTile = 6;  // rows of x in registers: 6 x 2 vectors of a group's sums, and as many of results
// Pairs of bfloat16 from bytes of codes: the low and the high two of each quad.
class PairDecoder {
 public:
  explicit PairDecoder(const Format& format) : format_(format) {
    alignas(64) uint16_t table[128];
    for (uint32_t code = 0; code < 128; ++code) table[code] = Bf16OfFloat(Value(code));
    for (int i = 0; i < 4; ++i) table_[i] = _mm512_load_si512(table + 32 * i);
    alignas(64) uint8_t low[64], high[64];
    for (int i = 0; i < 64; ++i) {
      low[i] = static_cast<uint8_t>(i & 1 ? 0x80 : (i & 12) + (i >> 1 & 1));
      high[i] = static_cast<uint8_t>(i & 1 ? 0x80 : (i & 12) + (i >> 1 & 1) + 2);
    }
    low_ = _mm512_load_si512(low), high_ = _mm512_load_si512(high);
  }

  float centre() const { return format_.affine() ? static_cast<float>(1 << (format_.bits - 1)) : 0.0f; }

  JAXQ_INLINE __m512i Low(__m512i quads) const { return Decode(_mm512_shuffle_epi8(quads, low_)); }
  JAXQ_INLINE __m512i High(__m512i quads) const { return Decode(_mm512_shuffle_epi8(quads, high_)); }

 private:
  // In mode mxfp8 the table has the magnitudes; E2M1 stands as twice its value, since its scales are halved.
  float Value(uint32_t code) const {
    if (format_.affine()) return static_cast<float>(code) - centre();
    return format_.mode == Mode::kMxfp8 ? FloatOfE4m3(code & 127) : 2.0f * FloatOfE2m1(code & 15);
  }

  // 32 codes, 16 bits each.
  JAXQ_INLINE __m512i Decode(__m512i codes) const {
    if (format_.bits <= 5) return _mm512_permutexvar_epi16(codes, table_[0]);
    if (format_.bits == 6) return _mm512_permutex2var_epi16(table_[0], codes, table_[1]);
    if (format_.mode == Mode::kMxfp8) {
      const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(64));
      const __m512i low = _mm512_permutex2var_epi16(table_[0], codes, table_[1]);
      const __m512i high = _mm512_permutex2var_epi16(table_[2], codes, table_[3]);
      const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0x80)), 8);
      return _mm512_or_si512(_mm512_mask_mov_epi16(low, upper, high), sign);
    }
    // 0x4b000000 is 2**23, whose last bit counts ones: 2**23 + code, less 2**23 + 128.
    const __m512i magic = _mm512_set1_epi32(0x4b000000);
    const __m512 centre = _mm512_set1_ps(8388608.0f + 128.0f);
    const __m512i even = _mm512_or_si512(_mm512_and_si512(codes, _mm512_set1_epi32(0xffff)), magic);
    const __m512i odd = _mm512_or_si512(_mm512_srli_epi32(codes, 16), magic);
    const __m512i low = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(even), centre));
    const __m512i high = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(odd), centre));
    return _mm512_or_si512(_mm512_srli_epi32(low, 16), high);  // both have at most 8 bits of mantissa
  }

  Format format_;
  __m512i table_[4], low_, high_;
};

struct PairPanel {
  alignas(64) uint16_t pairs[kPanelRows * kPanelDepth];  // [tile of 32 rows][K/2][32][2]
  PanelScales scales;
};

void FillPairs(const Weight& weight, const Unpacker& unpack, const PairDecoder& decoder, int64_t n, int64_t count,
               int64_t first, int64_t depth, PairPanel* out) {
  for (int64_t r = 0; r < RoundUp(count, kQuadTile); r += 16) {
    uint16_t* tile = out->pairs + r / kQuadTile * kQuadTile * depth + r % kQuadTile * 2;
    for (int64_t k = 0; k < depth; k += 64) {
      const int64_t codes = Least(64, depth - k);
      QuadBlock(weight, unpack, n + r, first + k, codes, [&](int64_t i, __m512i quads) {
        if (i * 4 >= codes) return;
        uint16_t* at = tile + (k / 2 + 2 * i) * kQuadTile * 2;
        _mm512_storeu_si512(at, decoder.Low(quads));
        _mm512_storeu_si512(at + kQuadTile * 2, decoder.High(quads));
      });
    }
  }
}

// sums + products of two pairs a lane. Through asm: see DotBytes.
JAXQ_INLINE __m512 DotPairs(__m512 sums, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
  return sums;
}

// kM rows of x by 32 rows of w over `groups` groups; adds to y[kM][kPanelRows apart]. x: pairs[K/2][kM], sums[G][kM].
template <int kM>
JAXQ_INLINE void MultiplyGroups(const uint16_t* w, const int32_t* x, const float* sums, int64_t groups, int64_t g,
                                const PanelScales& scales, int64_t column, float* y) {
  __m512 total[kM][2];
  JAXQ_UNROLL
  for (int m = 0; m < kM; ++m) {
    total[m][0] = _mm512_loadu_ps(y + m * kPanelRows);
    total[m][1] = _mm512_loadu_ps(y + m * kPanelRows + 16);
  }
  for (int64_t j = 0; j < groups; ++j, sums += kM) {
    __m512 acc[kM][2];
    JAXQ_UNROLL
    for (int m = 0; m < kM; ++m) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
    for (int64_t p = 0; p < g / 2; ++p, w += kQuadTile * 2, x += kM) {
      const __m512i left = _mm512_loadu_si512(w), right = _mm512_loadu_si512(w + 32);
      JAXQ_UNROLL
      for (int m = 0; m < kM; ++m) {
        const __m512i pair = _mm512_set1_epi32(x[m]);
        acc[m][0] = DotPairs(acc[m][0], left, pair);
        acc[m][1] = DotPairs(acc[m][1], right, pair);
      }
    }
    JAXQ_UNROLL
    for (int v = 0; v < 2; ++v) {
      const __m512 scale = _mm512_loadu_ps(scales.scales[j] + column + 16 * v);
      const __m512 bias = _mm512_loadu_ps(scales.biases[j] + column + 16 * v);
      JAXQ_UNROLL
      for (int m = 0; m < kM; ++m)
        total[m][v] = _mm512_fmadd_ps(bias, _mm512_set1_ps(sums[m]), _mm512_fmadd_ps(acc[m][v], scale, total[m][v]));
    }
  }
  JAXQ_UNROLL
  for (int m = 0; m < kM; ++m) {
    _mm512_storeu_ps(y + m * kPanelRows, total[m][0]);
    _mm512_storeu_ps(y + m * kPanelRows + 16, total[m][1]);
  }
}

template <int kM>
void MultiplyTileRows(int64_t height, const uint16_t* w, const int32_t* x, const float* sums, int64_t groups, int64_t g,
                      const PanelScales& scales, int64_t column, float* y) {
  if (height == kM) return MultiplyGroups<kM>(w, x, sums, groups, g, scales, column, y);
  if constexpr (kM > 1) MultiplyTileRows<kM - 1>(height, w, x, sums, groups, g, scales, column, y);
}

class Bf16Product {
 public:
  Bf16Product(const MatmulArgs& args, const Weight& weight, const Parallel& parallel)
      : args_(args),
        weight_(weight),
        parallel_(parallel),
        unpack_(args.format.bits),
        decoder_(args.format),
        pass_(PassRows(args, 2)) {}

  Outcome Run() {
    const int64_t K = args_.K, groups = args_.groups(), slot_room = Room<PairPanel>(1) + Room<float>(pass_ * kPanelRows);
    const Scratch scratch(Room<int32_t>(pass_ * K / 2) + Room<float>(pass_ * groups) + parallel_.slots() * slot_room);
    if (!scratch.ok()) return Outcome::kNoMemory;
    char* cursor = scratch.data();
    pairs_ = Take<int32_t>(&cursor, pass_ * K / 2);
    sums_ = Take<float>(&cursor, pass_ * groups);
    for (int64_t m0 = 0; m0 < args_.M; m0 += pass_) {
      rows_ = Least(pass_, args_.M - m0);
      tiles_ = Ceil(rows_, kPairTile);
      parallel_.For(tiles_, [&](int64_t tile, int) { Pack(m0, First(tile), First(tile + 1)); });
      parallel_.For(Ceil(args_.N, kPanelRows), [&](int64_t task, int slot) {
        char* mine = cursor + slot * slot_room;
        auto* panel = Take<PairPanel>(&mine, 1);
        Columns(task * kPanelRows, m0, panel, reinterpret_cast<float*>(mine));
      });
    }
    return Outcome::kDone;
  }

 private:
  // The rows are shared out evenly, so that no tile is much lower than the others.
  int64_t First(int64_t tile) const { return tile * rows_ / tiles_; }

  // Rows first .. last of the pass, as pairs[K/2][height], and their sums over the groups.
  void Pack(int64_t m0, int64_t first, int64_t last) const {
    const int64_t K = args_.K, g = args_.format.group_size, height = last - first;
    int32_t* pairs = pairs_ + first * K / 2;
    float* sums = sums_ + first * args_.groups();
    for (int64_t m = 0; m < height; ++m) {
      const auto* row = static_cast<const uint16_t*>(args_.x) + (m0 + first + m) * K;
      for (int64_t p = 0; p < K / 2; ++p) std::memcpy(pairs + p * height + m, row + 2 * p, 4);
      for (int64_t j = 0; j < args_.groups(); ++j) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < g; i += 16) sum = _mm512_add_ps(sum, LoadBf16(row + j * g + i));
        sums[j * height + m] = _mm512_reduce_add_ps(sum);
      }
    }
  }

  void Columns(int64_t n, int64_t m0, PairPanel* panel, float* y) const {
    const int64_t K = args_.K, g = args_.format.group_size, groups = args_.groups();
    const int64_t count = Least(kPanelRows, args_.N - n);
    std::memset(y, 0, static_cast<size_t>(rows_ * kPanelRows) * sizeof(float));
    for (int64_t k = 0; k < K; k += kPanelDepth) {
      const int64_t depth = Least(kPanelDepth, K - k);
      FillPairs(weight_, unpack_, decoder_, n, count, k, depth, panel);
      FillScales(weight_, n, count, k / g, depth / g, decoder_.centre(), &panel->scales);
      for (int64_t column = 0; column < count; column += kQuadTile) {
        for (int64_t tile = 0; tile < tiles_; ++tile) {
          const int64_t m = First(tile), height = First(tile + 1) - m;
          MultiplyTileRows<kPairTile>(height, panel->pairs + column * depth, pairs_ + m * K / 2 + k / 2 * height,
                                      sums_ + m * groups + k / g * height, depth / g, g, panel->scales, column,
                                      y + m * kPanelRows + column);
        }
      }
    }
    for (int64_t m = 0; m < rows_; ++m)
      FromFloats(args_.x_dtype, y + m * kPanelRows, count, args_.y, (m0 + m) * args_.N + n);
  }

  const MatmulArgs& args_;
  const Weight& weight_;
  const Parallel& parallel_;
  const Unpacker unpack_;
  const PairDecoder decoder_;
  const int64_t pass_;
  int64_t rows_ = 0, tiles_ = 0;
  int32_t* pairs_ = nullptr;
  float* sums_ = nullptr;
};

Outcome MatmulBf16(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  if (!args.transpose || args.x_dtype != DType::kBF16) return Outcome::kDeclined;
  const bool integers = args.format.mode != Mode::kMxfp8 && DigitsFor(args.x_dtype, args.K) == 2;
  if (args.M < (integers ? kLeastPairRows : FewRows(args.format) + 1)) return Outcome::kDeclined;
  return Bf16Product(args, weight, parallel).Run();
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_BF16_GEMM_INL_H_
