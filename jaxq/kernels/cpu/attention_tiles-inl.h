// Attention of many queries in bfloat16 over a cache in bfloat16, in products of tiles: a prompt's.
//
// A task takes up to kTaskRows rows of queries (those of one head of keys) and goes over the keys that they see,
// kKeyBlock at a time. The keys and values of a block are laid out once for all rows, as the right factors of products;
// then, 32 rows at a time, the scores, their exponentials relative to the largest so far, and the sums of values, which
// are scaled anew whenever a larger score turns up: FlashAttention (Dao et al., 2022, arXiv:2205.14135, algorithm 1).
// Keys that none of the 32 rows sees are left out. Scores and sums are float32; the exponentials are rounded to
// bfloat16 before they meet the values, their sum is taken unrounded.
//
// Tiles are of 64-byte rows, as Intel's AMX has them. A left one has 16 rows of 32 numbers, [row][depth]; a right one 16
// columns, [depth/2][column][2]; a product 16 rows of 16 floats. The including file defines, in its namespace,
//
//   struct TileProducts { ... }, alive while a task runs, with
//   template <bool kAdd> static void Run(const uint16_t* a, int64_t a_next, const uint16_t* b, int64_t b_next,
//                                        int64_t steps, float* c, int64_t c_next)
//     for two left tiles' rows, a and a + a_next, and two right ones', b and b + b_next, each of `steps` tiles one after
//     the other: the four products to c, c + 256 and so on c_next after them; kAdd: added to what is there.

#ifndef JAXQ_KERNELS_CPU_ATTENTION_TILES_INL_H_
#define JAXQ_KERNELS_CPU_ATTENTION_TILES_INL_H_

#include "attention_cache-inl.h"
#include "scales-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kEdge = 16, kDepth = 32;              // of a tile
constexpr int64_t kTileHalves = 512, kTileFloats = 256;
constexpr int64_t kPairRows = 2 * kEdge;
constexpr int64_t kKeyBlock = 128, kKeySteps = kKeyBlock / kDepth, kKeyTiles = kKeyBlock / kEdge;
constexpr int64_t kTaskRows = 128;    // one layout of keys and values serves so many
constexpr int64_t kEnoughTasks = 64;  // where there are fewer, they get smaller
constexpr int64_t kLeastTasks = 8;    // fewer could not keep a machine busy: then keys must be shared out too

JAXQ_INLINE __mmask32 HalvesLeft(int64_t count) {
  return count >= 32 ? ~__mmask32{0} : count <= 0 ? __mmask32{0} : (__mmask32{1} << count) - 1;
}

// 2**x for x <= 0, to 2.4 units of float32's roundoff; 0 for -inf; a NaN stays one. 2**f for 0 <= f < 1 by the
// polynomial of degree 5 with p(0) = 1 whose largest relative error, 8.3e-8, is least.
JAXQ_INLINE __m512 Exp2Lanes(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 y = _mm512_set1_ps(1.86713145e-3f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.01702512e-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.57999201e-2f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.40164444e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.93151295e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, x);
}

// 32 floats as bfloat16, rounded to nearest even.
JAXQ_INLINE void StorePairBf16(uint16_t* out, __m512 low, __m512 high) {
#if defined(__AVX512BF16__)
  const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
  std::memcpy(out, &rounded, sizeof rounded);
#else
  StoreBf16(out, low);
  StoreBf16(out + 16, high);
#endif
}

class TiledAttention {
 public:
  TiledAttention(const AttentionArgs& args, int64_t task_rows)
      : args_(args),
        steps_(Ceil(args.dim, kDepth)),
        width_(steps_ * kDepth),
        row_tiles_(Ceil(task_rows, kPairRows) * 2),
        factor_(args.scale * kLog2e) {}

  int64_t ScratchBytes() const {
    return Room<uint16_t>(row_tiles_ * kEdge * width_) + 2 * Room<uint16_t>(kKeyBlock * width_) +
           Room<float>(2 * kKeyTiles * kTileFloats) + Room<uint16_t>(2 * kKeySteps * kTileHalves) +
           Room<float>(row_tiles_ * kEdge * width_) + Room<float>(row_tiles_ * kEdge) +
           Room<float>(row_tiles_ * kEdge * 16);
  }

  // Rows first .. first+rows of the queries that head kv of batch member b serves.
  void Run(int64_t b, int64_t kv, int64_t first, int64_t rows, char* scratch) {
    const TileProducts products;
    b_ = b, kv_ = kv, first_ = first, rows_ = rows;
    queries_ = Take<uint16_t>(&scratch, row_tiles_ * kEdge * width_);
    keys_ = Take<uint16_t>(&scratch, kKeyBlock * width_);
    values_ = Take<uint16_t>(&scratch, kKeyBlock * width_);
    scores_ = Take<float>(&scratch, 2 * kKeyTiles * kTileFloats);
    weights_ = Take<uint16_t>(&scratch, 2 * kKeySteps * kTileHalves);
    totals_ = Take<float>(&scratch, row_tiles_ * kEdge * width_);
    largest_ = Take<float>(&scratch, row_tiles_ * kEdge);
    sums_ = Take<float>(&scratch, row_tiles_ * kEdge * 16);
    Begin();
    const int64_t last = Seen(rows - 1);
    for (int64_t t = 0; t < last; t += kKeyBlock) {
      const int64_t count = Least(kKeyBlock, last - t);
      LayOutKeys(t, count);
      LayOutValues(t, count);
      for (int64_t row = 0; row < rows; row += kPairRows) {
        const int64_t seen = Least(count, Seen(row + kPairRows - 1) - t);
        if (seen > 0) Attend(products, row, t, Ceil(seen, kDepth));
      }
    }
    for (int64_t row = 0; row < rows; ++row) Finish(row);
  }

 private:
  // How many keys a row of the task sees; rows past the end see what the last one does.
  int64_t Seen(int64_t row) const { return Visible(args_, first_ + Least(row, rows_ - 1)); }

  int64_t OffsetOf(int64_t row) const { return OffsetOfRow(args_, b_, kv_, first_ + row); }

  // 32 numbers of a row that has `dim`, from number d on; zeros past its end.
  __m512i LoadStep(const uint16_t* row, int64_t d) const {
    return _mm512_maskz_loadu_epi16(HalvesLeft(args_.dim - d), row + d);
  }

  // Of the cache of keys or values: the row of position t.
  const uint16_t* CacheRow(const void* cache, int64_t t) const {
    return static_cast<const uint16_t*>(cache) + ((b_ * args_.kv_heads + kv_) * args_.length + t) * args_.dim;
  }

  void Begin() {
    const __m512i zero = _mm512_setzero_si512();
    for (int64_t row = 0; row < row_tiles_ * kEdge; ++row) {
      uint16_t* tile = queries_ + row / kEdge * steps_ * kTileHalves + row % kEdge * kDepth;
      for (int64_t step = 0; step < steps_; ++step) {
        const auto* q = static_cast<const uint16_t*>(args_.q);
        const __m512i part = row < rows_ ? LoadStep(q + OffsetOf(row), step * kDepth) : zero;
        _mm512_store_si512(tile + step * kTileHalves, part);
      }
      largest_[row] = FloatOfBits(0xff800000u);
      _mm512_store_ps(sums_ + row * 16, _mm512_setzero_ps());
    }
    std::memset(totals_, 0, sizeof(float) * static_cast<size_t>(row_tiles_ * kEdge * width_));
  }

  // keys_[tile of 16 keys][step] of `count` keys from t on, then zeros up to a multiple of 32.
  void LayOutKeys(int64_t t, int64_t count) {
    for (int64_t tile = 0; tile < Ceil(count, kDepth) * 2; ++tile)
      for (int64_t step = 0; step < steps_; ++step) {
        __m512i words[kEdge];
        for (int64_t i = 0; i < kEdge; ++i) {
          const int64_t key = tile * kEdge + i;
          words[i] = key < count ? LoadStep(CacheRow(args_.cache_k, t + key), step * kDepth) : _mm512_setzero_si512();
        }
        TransposeWords(words);
        uint16_t* out = keys_ + (tile * steps_ + step) * kTileHalves;
        for (int64_t i = 0; i < kEdge; ++i) _mm512_store_si512(out + 32 * i, words[i]);
      }
  }

  // values_[tile of 16 coordinates][step of 32 keys], likewise: the numbers of two keys alternate.
  void LayOutValues(int64_t t, int64_t count) {
    alignas(64) uint16_t places[32];
    for (int i = 0; i < 32; ++i) places[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    const __m512i low = _mm512_load_si512(places), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const auto row = [&](int64_t key, int64_t d) {
      return key < count ? LoadStep(CacheRow(args_.cache_v, t + key), d) : _mm512_setzero_si512();
    };
    for (int64_t key = 0; key < RoundUp(count, kDepth); key += 2) {
      uint16_t* out = values_ + key / kDepth * kTileHalves + key % kDepth / 2 * 32;
      for (int64_t d = 0; d < args_.dim; d += 32) {
        const __m512i even = row(key, d), odd = row(key + 1, d);
        uint16_t* tile = out + d / kEdge * kKeySteps * kTileHalves;
        _mm512_store_si512(tile, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_store_si512(tile + kKeySteps * kTileHalves, _mm512_permutex2var_epi16(even, high, odd));
      }
    }
  }

  // 32 rows of queries over `steps` times 32 keys of the block that begins with key t.
  void Attend(const TileProducts& products, int64_t row, int64_t t, int64_t steps) {
    const uint16_t* q = queries_ + row / kEdge * steps_ * kTileHalves;
    for (int64_t tile = 0; tile < 2 * steps; tile += 2)
      products.Run<false>(q, steps_ * kTileHalves, keys_ + tile * steps_ * kTileHalves, steps_ * kTileHalves, steps_,
                          scores_ + tile * kTileFloats, kKeyTiles * kTileFloats);
    for (int64_t r = 0; r < kPairRows; ++r) Weigh(row + r, Seen(row + r) - t, steps);
    float* total = totals_ + row / kEdge * (width_ / kEdge) * kTileFloats;
    for (int64_t tile = 0; tile < width_ / kEdge; tile += 2)
      products.Run<true>(weights_, kKeySteps * kTileHalves, values_ + tile * kKeySteps * kTileHalves,
                         kKeySteps * kTileHalves, steps, total + tile * kTileFloats, width_ / kEdge * kTileFloats);
  }

  // A row's scores over a block, of which it sees `seen` keys, to weights; what was summed before is brought to the
  // new largest score.
  void Weigh(int64_t row, int64_t seen, int64_t steps) {
    const int64_t at = row % kPairRows, tiles = 2 * steps;
    float* scores = scores_ + at / kEdge * kKeyTiles * kTileFloats + at % kEdge * kEdge;
    uint16_t* weights = weights_ + at / kEdge * kKeySteps * kTileHalves + at % kEdge * kDepth;
    const float before = largest_[row], largest = Scale(scores, seen, tiles, before);
    const __m512 base = _mm512_set1_ps(BitsOfFloat(largest) == 0xff800000u ? 0.0f : largest);  // -inf - -inf is a NaN
    __m512 sum = _mm512_load_ps(sums_ + row * 16);
    if (!(largest == before)) {
      const __m512 fade = Exp2Lanes(_mm512_sub_ps(_mm512_set1_ps(before), base));
      float* total = totals_ + row / kEdge * (width_ / kEdge) * kTileFloats + row % kEdge * kEdge;
      for (int64_t tile = 0; tile < width_ / kEdge; ++tile, total += kTileFloats)
        _mm512_store_ps(total, _mm512_mul_ps(_mm512_load_ps(total), fade));
      sum = _mm512_mul_ps(sum, fade);
      largest_[row] = largest;
    }
    for (int64_t tile = 0; tile < tiles; tile += 2, weights += kTileHalves) {
      const __m512 low = Exp2Lanes(_mm512_sub_ps(_mm512_load_ps(scores + tile * kTileFloats), base));
      const __m512 high = Exp2Lanes(_mm512_sub_ps(_mm512_load_ps(scores + (tile + 1) * kTileFloats), base));
      sum = _mm512_add_ps(_mm512_add_ps(sum, low), high);
      StorePairBf16(weights, low, high);
    }
    _mm512_store_ps(sums_ + row * 16, sum);
  }

  // Brings a row's scores to exponents of 2 in place, -inf where it does not see the key; the largest of them and
  // `before`.
  float Scale(float* scores, int64_t seen, int64_t tiles, float before) const {
    const __m512 factor = _mm512_set1_ps(factor_), none = _mm512_set1_ps(FloatOfBits(0xff800000u));
    __m512 top = _mm512_set1_ps(before);
    for (int64_t tile = 0; tile < tiles; ++tile, scores += kTileFloats) {
      __m512 scaled = _mm512_mul_ps(_mm512_load_ps(scores), factor);
      if (const int64_t left = seen - tile * kEdge; left < kEdge)
        scaled = _mm512_mask_mov_ps(none, FirstLanes(Most(0, left)), scaled);
      _mm512_store_ps(scores, scaled);
      top = _mm512_max_ps(top, scaled);
    }
    return _mm512_reduce_max_ps(top);
  }

  void Finish(int64_t row) {
    const __m512 weight = _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_load_ps(sums_ + row * 16)));
    const float* total = totals_ + row / kEdge * (width_ / kEdge) * kTileFloats + row % kEdge * kEdge;
    uint16_t* y = static_cast<uint16_t*>(args_.y) + OffsetOf(row);
    for (int64_t d = 0; d < args_.dim; d += kEdge, total += kTileFloats) {
      alignas(32) uint16_t rounded[kEdge];
      StoreBf16(rounded, _mm512_div_ps(_mm512_load_ps(total), weight));
      std::memcpy(y + d, rounded, sizeof(uint16_t) * static_cast<size_t>(Least(kEdge, args_.dim - d)));
    }
  }

  const AttentionArgs& args_;
  const int64_t steps_, width_, row_tiles_;  // of 32 coordinates, padded; all of them; tiles of 16 rows
  const float factor_;                       // of scores, to be exponents of 2
  int64_t b_ = 0, kv_ = 0, first_ = 0, rows_ = 0;
  uint16_t* queries_ = nullptr;  // left tiles [tile of rows][step]
  uint16_t* keys_ = nullptr;
  uint16_t* values_ = nullptr;
  float* scores_ = nullptr;      // products [2][tile of keys]
  uint16_t* weights_ = nullptr;  // left tiles [2][step of keys]
  float* totals_ = nullptr;      // products [tile of rows][tile of coordinates]: values by weights
  float* largest_ = nullptr;     // [row], scores
  float* sums_ = nullptr;        // [row][16], weights
};

Outcome Attention(const AttentionArgs& args, const Parallel& parallel) {
  const int64_t heads = args.batch * args.kv_heads, rows = args.tokens * args.repeat();
  if (args.dtype != DType::kBF16 || args.cache_dtype != DType::kBF16 || rows < kPairRows) return Outcome::kDeclined;
  int64_t most = kTaskRows;
  while (most > kPairRows && heads * Ceil(rows, most) < kEnoughTasks) most /= 2;
  const int64_t blocks = Ceil(rows, most);
  if (heads * blocks < kLeastTasks) return Outcome::kDeclined;
  const int64_t slot_bytes = TiledAttention(args, most).ScratchBytes();
  const Scratch scratch(parallel.slots() * slot_bytes);
  if (!scratch.ok()) return Outcome::kNoMemory;
  AppendAll(args, parallel);
  parallel.For(heads * blocks, [&](int64_t task, int slot) {
    const int64_t head = task % heads, first = (blocks - 1 - task / heads) * most;  // those that see most come first
    TiledAttention(args, most).Run(head / args.kv_heads, head % args.kv_heads, first, Least(most, rows - first),
                                   scratch.data() + slot * slot_bytes);
  });
  return Outcome::kDone;
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_ATTENTION_TILES_INL_H_
