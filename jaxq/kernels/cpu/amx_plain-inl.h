// transpose=False, y[M, K] = x[M, N] @ w, whose scales lie across the sum: w is dequantized into bfloat16 parts.
//
// x has as many parts as hold all of it; w has 1 in the float modes, whose values bfloat16 holds, and else 2 where x
// has 16 bits (an error of 2**-17, far below the rounding of the result) or 3. Part i is below 2**-8i, and products of
// parts i and j with i+j > 2 are left out: they are below 2**-24. Sums stay in tiles for a block of rows of w.

#ifndef JAXQ_KERNELS_CPU_AMX_PLAIN_INL_H_
#define JAXQ_KERNELS_CPU_AMX_PLAIN_INL_H_

#include "amx_pack-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kPlainRows = 256;     // of w at a time: 8 steps
constexpr int64_t kPlainColumns = 128;  // of w per task; a multiple of every group
constexpr int64_t kPlainPassBytes = 8 << 20;
constexpr int64_t kPlainPassRows = 512;
constexpr int64_t kPlainLeastTerms = 120;  // below, the result's bound is so tight that w needs 3 parts

struct PlainScratch {
  // [step][part][block of 16 columns][16 pairs of rows][16 columns][2]
  alignas(64) uint16_t panel[kPlainRows / kStep][3][kPlainColumns / kSide][kHalves];
  uint8_t codes[kPlainRows][kPlainColumns + 64];
  float scales[kPlainRows][kPlainColumns / 16], biases[kPlainRows][kPlainColumns / 16];
};

// x as tiles [pair of 16 rows][step][part][2][512]. Rows and terms past the end are zeros.
struct PlainX {
  uint16_t* tiles;
  int64_t steps, parts;

  uint16_t* Tile(int64_t pair, int64_t step, int64_t part) const {
    return tiles + ((pair * steps + step) * parts + part) * 2 * kHalves;
  }
};

JAXQ_INLINE __m512 CutHalf(__m512 v) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(-65536)));
}

// 16 rows of one step.
void PackPlain(const MatmulArgs& args, int64_t m, int64_t rows, int64_t step, const PlainX& x, uint16_t* tile) {
  const int64_t first = step * kStep, count = Least(kStep, args.N - first);
  alignas(64) uint16_t upper[32];
  for (int i = 0; i < 32; ++i) upper[i] = static_cast<uint16_t>(2 * i + 1);
  const __m512i index = _mm512_load_si512(upper);
  for (int64_t r = 0; r < kSide; ++r) {
    alignas(64) float values[kStep] = {};
    if (r < rows) ToFloats(args.x_dtype, args.x, (m + r) * args.N + first, count, values);
    __m512 a = _mm512_load_ps(values), b = _mm512_load_ps(values + 16);
    for (int64_t part = 0; part < x.parts; ++part) {
      const __m512i halves = _mm512_permutex2var_epi16(_mm512_castps_si512(a), index, _mm512_castps_si512(b));
      _mm512_store_si512(tile + part * 2 * kHalves + 32 * r, halves);
      a = _mm512_sub_ps(a, CutHalf(a)), b = _mm512_sub_ps(b, CutHalf(b));
    }
  }
}

class PlainProduct {
 public:
  // sums: [pair of 16 rows of x][pair of blocks of columns][4 tiles]
  PlainProduct(const MatmulArgs& args, const Weight& weight, const PlainX& x, int64_t w_parts, int64_t rows,
               PlainScratch* scratch, float* sums)
      : args_(args),
        weight_(weight),
        x_(x),
        w_parts_(w_parts),
        pairs_(Ceil(rows, 2 * kSide)),
        lone_(rows <= kSide),
        s_(scratch),
        sums_(sums) {}

  // Columns k .. k+count of w.
  void Run(int64_t k, int64_t count) {
    k_ = k, count_ = count, blocks_ = Ceil(count, 2 * kSide);
    std::memset(sums_, 0, static_cast<size_t>(pairs_ * blocks_ * 4 * kFloats) * sizeof(float));
    for (first_ = 0; first_ < args_.N; first_ += kPlainRows) {
      const int64_t rows = Least(kPlainRows, args_.N - first_);
      steps_ = Ceil(rows, kStep);
      Unpack(rows);
      for (int64_t step = 0; step < steps_; ++step) Dequantize(step, 0);
      for (int64_t pair = 0; pair < pairs_; ++pair)
        for (int64_t block = 0; block < blocks_; ++block) Multiply(pair, block);
    }
  }

 private:
  // Codes, scales and biases of a block of rows; rows past the end get zeros.
  void Unpack(int64_t rows) const {
    const int64_t g = weight_.format.group_size, groups = count_ / g;
    for (int64_t r = 0; r < steps_ * kStep; ++r) {
      if (r >= rows) {
        std::memset(s_->codes[r], 0, sizeof s_->codes[r]);
        std::memset(s_->scales[r], 0, sizeof s_->scales[r]);
        std::memset(s_->biases[r], 0, sizeof s_->biases[r]);
        continue;
      }
      weight_.Codes(first_ + r, k_, count_, s_->codes[r]);
      weight_.Scales(first_ + r, k_ / g, groups, s_->scales[r]);
      weight_.Biases(first_ + r, k_ / g, groups, s_->biases[r]);
    }
  }

  // One step of a pair of blocks of columns.
  void Dequantize(int64_t step, int64_t pair) const {
    WithKind(weight_.kind, [&](auto kind) {
      for (int64_t block = 2 * pair; block < 2 * pair + 2; ++block) DequantizeBlock<decltype(kind)::value>(step, block);
    });
  }

  template <Kind kKind>
  void DequantizeBlock(int64_t step, int64_t block) const {
    if (block * kSide >= count_) {  // only where K is an odd number of blocks
      for (int64_t part = 0; part < w_parts_; ++part) std::memset(s_->panel[step][part][block], 0, 2 * kHalves);
      return;
    }
    const int64_t group = block * kSide / weight_.format.group_size;
    for (int64_t r = 0; r < kSide; ++r) {
      __m512 v[2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t row = step * kStep + 2 * r + i;
        v[i] = Fma(Values<kKind>(s_->codes[row] + block * kSide), Set1(s_->scales[row][group]),
                   Set1(s_->biases[row][group]));
      }
      for (int64_t part = 0; part < w_parts_; ++part) {
        const __m512 high[2] = {CutHalf(v[0]), CutHalf(v[1])};
        const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(v[0]), 16);
        _mm512_store_si512(s_->panel[step][part][block] + 32 * r, _mm512_or_si512(low, _mm512_castps_si512(high[1])));
        for (int i = 0; i < 2; ++i) v[i] = _mm512_sub_ps(v[i], high[i]);
      }
    }
  }

  // 32 rows of x by 32 columns, all steps of the block of rows.
  void Multiply(int64_t pair, int64_t block) const {
    float* sums = sums_ + (pair * blocks_ + block) * 4 * kFloats;
    LoadTile<0>(sums);
    LoadTile<1>(sums + kFloats);
    LoadTile<2>(sums + 2 * kFloats);
    LoadTile<3>(sums + 3 * kFloats);
    for (int64_t step = 0; step < steps_; ++step) {
      for (int64_t j = 0; j < w_parts_; ++j) {
        const auto* w = s_->panel[step][j] + 2 * block;
        LoadTile<6>(w[0]);
        LoadTile<7>(w[1]);
        for (int64_t i = 0; i < Least(x_.parts, 3 - j); ++i) {
          const uint16_t* x = x_.Tile(pair, first_ / kStep + step, i);
          LoadTile<4>(x);
          DotTiles<0, 4, 6>();
          DotTiles<1, 4, 7>();
          if (lone_) continue;
          LoadTile<5>(x + kHalves);
          DotTiles<2, 5, 6>();
          DotTiles<3, 5, 7>();
        }
      }
      if (pair == 0 && block + 1 < blocks_) Dequantize(step, block + 1);
    }
    StoreTile<0>(sums);
    StoreTile<1>(sums + kFloats);
    StoreTile<2>(sums + 2 * kFloats);
    StoreTile<3>(sums + 3 * kFloats);
  }

  const MatmulArgs& args_;
  const Weight& weight_;
  const PlainX& x_;
  const int64_t w_parts_, pairs_;
  const bool lone_;  // no second tile of rows
  PlainScratch* const s_;
  float* const sums_;
  int64_t k_ = 0, count_ = 0, blocks_ = 0, first_ = 0, steps_ = 0;
};

// y[m0 : m0+rows, k : k+count] out of PlainProduct's sums.
void WritePlain(const MatmulArgs& args, int64_t m0, int64_t rows, int64_t k, int64_t count, const float* sums) {
  const int64_t blocks = Ceil(count, 2 * kSide);
  for (int64_t m = 0; m < rows; ++m) {
    float out[kPlainColumns + kSide];
    for (int64_t block = 0; block < Ceil(count, kSide); ++block) {
      const int64_t tile = (m / (2 * kSide) * blocks + block / 2) * 4 + m / kSide % 2 * 2 + block % 2;
      Store(out + block * kSide, Load(sums + tile * kFloats + m % kSide * kSide));
    }
    FromFloats(args.x_dtype, out, count, args.y, (m0 + m) * args.K + k);
  }
}

Outcome MatmulPlain(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  const bool tight = args.x_dtype == DType::kF32 || args.N < kPlainLeastTerms;
  const int64_t w_parts = !args.format.affine() ? 1 : tight ? 3 : 2;
  PlainX x = {nullptr, Ceil(args.N, kStep), PartsOf(args.x_dtype)};
  const int64_t tiles = x.steps * x.parts * 2 * kHalves;  // of a pair
  const int64_t fit = Least(Most(1, kPlainPassBytes / (2 * tiles)), kPlainPassRows / (2 * kSide));
  const int64_t pairs = Least(fit, Ceil(args.M, 2 * kSide)), pass = pairs * 2 * kSide;
  const int64_t sums = pairs * kPlainColumns / (2 * kSide) * 4 * kFloats;
  const int64_t slot_room = Room<PlainScratch>(1) + Room<float>(sums);
  const Scratch scratch(Room<uint16_t>(pairs * tiles) + parallel.slots() * slot_room);
  if (!scratch.ok()) return Outcome::kNoMemory;
  char* cursor = scratch.data();
  x.tiles = Take<uint16_t>(&cursor, pairs * tiles);
  for (int64_t m0 = 0; m0 < args.M; m0 += pass) {
    const int64_t rows = Least(pass, args.M - m0);
    parallel.For(x.steps, [&](int64_t step, int) {
      for (int64_t m = 0; m < RoundUp(rows, 2 * kSide); m += kSide)
        PackPlain(args, m0 + m, rows - m, step, x, x.Tile(m / (2 * kSide), step, 0) + m / kSide % 2 * kHalves);
    });
    parallel.For(Ceil(args.K, kPlainColumns), [&](int64_t task, int slot) {
      const TileScope tiles_configured;
      char* mine = cursor + slot * slot_room;
      auto* s = Take<PlainScratch>(&mine, 1);
      float* y = reinterpret_cast<float*>(mine);
      const int64_t k = task * kPlainColumns, count = Least(kPlainColumns, args.K - k);
      PlainProduct(args, weight, x, w_parts, rows, s, y).Run(k, count);
      WritePlain(args, m0, rows, k, count, y);
    });
  }
  return Outcome::kDone;
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_AMX_PLAIN_INL_H_
