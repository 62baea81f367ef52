// transpose=True: 16 rows of w by 16 rows of x in a result tile, bare codes, one group of them at a time; the vector
// units scale what a group leaves behind while the tile unit multiplies the next ones.
//
// Measured on an Emerald Rapids, in cycles: a product of two tiles takes 16, loading a tile out of the first-level cache
// 8 to 10, out of the second one 20, storing one 16 to 18, or 62 if its lines are not in the first level, and what the
// vector units load passes the same ports. (On some of its cores, for minutes, a product takes 60 to 80.) So as little
// is loaded as can be, from as near as can be:
//   - a strip of a few blocks of 16 rows of w by a short block of K is unpacked into the first-level cache and
//     multiplied by all of x, whose tiles come from the second level once for the strip;
//   - two blocks of w are multiplied together, which loads a tile of x once for both;
//   - sums stay in registers over a block of K;
//   - products go through memory, a few KiB: they are stored when the next group has been begun, since that is how long
//     they take, and scaled while the next two blocks are multiplied, so that nothing waits for anything.
// amx_parts-inl.h has the other way, with twice as many products and no other work between them: .7 to .85 of this one's
// time for 32 rows of bfloat16 and more, but more below, and 1.5 times as much with float32 and its three parts.

#ifndef JAXQ_KERNELS_CPU_AMX_GEMM_INL_H_
#define JAXQ_KERNELS_CPU_AMX_GEMM_INL_H_

#include "amx_pack-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kBlockTerms = 128;       // of K in a block, at most, but two groups at least
constexpr int64_t kMaxBlockSteps = 8;
constexpr int64_t kMaxStrip = 8;           // blocks of 16 rows of w whose tiles are in the first-level cache
constexpr int64_t kSlabBytes = 1 << 20;    // of packed x, which is to stay in the second-level cache

struct TileScratch {
  alignas(64) float products[2][kMaxBlockSteps][2][kFloats];  // [turn][group][block of a pair]
  float nowhere[2][kFloats];                                   // products of a pair that nobody wants
  float spare[kFloats];                                        // sums of a block that is not there
  alignas(64) uint16_t strip[kMaxStrip * (kMaxBlockSteps * kHalves + 32)];
  TileScales scales[kMaxStrip];
};

template <bool kAffine>
class StripProduct {
 public:
  // sums: [block of x][block of w][16 rows of w][16 rows of x].
  StripProduct(const MatmulArgs& args, const Weight& weight, const StepUnpacker& unpacker, const PackedX& x, int64_t m0,
               TileScratch* scratch, float* sums)
      : args_(args),
        weight_(weight),
        unpacker_(unpacker),
        x_(x),
        m0_(m0),
        s_(scratch),
        sums_(sums),
        steps_(x.steps / x.groups),
        block_groups_(Most(2, kBlockTerms / weight.format.group_size)),
        slab_groups_(SlabGroups()),
        stride_(block_groups_ * steps_ * kHalves + 32),
        late_(scratch->nowhere[0]) {}

  // Blocks of w in a strip: more of them load x's tiles less often, which pays where these are many.
  static int64_t StripBlocks(const PackedX& x) { return x.blocks() == 1 ? 2 : x.parts == 3 ? 8 : 4; }

  // Rows n .. n + 16*blocks of w, by all of x.
  void Run(int64_t n, int64_t blocks) {
    n_ = n, blocks_ = blocks;
    for (int64_t slab = 0; slab < x_.groups; slab += slab_groups_)
      for (strip_ = 0; strip_ < blocks; strip_ += StripBlocks(x_)) Strip(slab, Least(x_.groups, slab + slab_groups_));
    Settle();
  }

 private:
  // Products of a block of x by a pair of blocks of w that wait to be scaled, [group][2][16][16], and what they are
  // scaled with, [group][16] each.
  struct Waiting {
    const float *products, *scales[2], *biases[2], *x_sums;
    float* sums[2];
    __mmask16 begun;  // no bits: sums begin with these
    bool ends, whole;  // whole: there is a second block
    int64_t groups, m, block;  // groups: none if nothing waits
  };

  // Groups of K that are multiplied by all of the task's w before the next ones: as many as x's tiles of them fit into
  // the second-level cache.
  int64_t SlabGroups() const {
    const int64_t group = x_.blocks() * x_.parts * steps_ * kHalves * 2;
    return RoundUp(Most(1, kSlabBytes / group), block_groups_);
  }

  // Groups first .. last of a few blocks of w.
  void Strip(int64_t first, int64_t last) {
    const int64_t end = Least(blocks_, strip_ + StripBlocks(x_));
    for (first_ = first; first_ < last; first_ += groups_) {
      groups_ = Least(block_groups_, last - first_);
      if ((first_ - first) % kScaleGroups == 0) FillStrip(end, Least(kScaleGroups, last - first_));
      at_ = (first_ - first) % kScaleGroups;
      for (int64_t block = strip_; block < end; ++block) Unpack(block);
      for (int64_t m = 0; m < x_.blocks(); ++m)
        for (int64_t block = strip_; block < end; block += 2) Multiply(m, block, block + 1 < end);
    }
  }

  void FillStrip(int64_t end, int64_t count) {
    Settle();  // what still waits needs the scales that are there
    for (int64_t block = strip_; block < end; ++block)
      FillScales(weight_, n_ + block * kSide, first_, count, unpacker_.centre(), &s_->scales[block - strip_]);
  }

  // The block of K of one block of w as tiles.
  void Unpack(int64_t block) const {
    const int64_t n = n_ + block * kSide, begin = first_ * weight_.format.group_size / 8 * weight_.format.bits;
    unpacker_.Tiles(weight_.packed + n * weight_.row_bytes + begin, weight_.row_bytes, Least(kSide, weight_.rows - n),
                    groups_ * steps_, s_->strip + (block - strip_) * stride_);
  }

  // A pair of blocks of w by a block of x. If the second one is not there, the first stands in for it.
  void Multiply(int64_t m, int64_t block, bool whole) {
    if (waiting_.groups != groups_) Settle();
    float* products = s_->products[turn_ ^= 1][0][0];
    const uint16_t *x = x_.Tile(m, first_ * steps_), *w = s_->strip + (block - strip_) * stride_;
    const int64_t next = whole ? stride_ : 0;
    switch (groups_) {
      case 2:
        Overlap<2>(x, w, next, products);
        break;
      case 4:
        Overlap<4>(x, w, next, products);
        break;
      case 8:
        Overlap<8>(x, w, next, products);
        break;
      default:  // what is left of K
        Settle();
        for (int64_t group = 0; group < groups_; ++group) {
          Group<0>(&x, &w, next);
          StoreTile<0>(products + 2 * group * kFloats), StoreTile<1>(products + (2 * group + 1) * kFloats);
        }
    }
    const auto &first = s_->scales[block - strip_].values, &second = s_->scales[block - strip_ + whole].values;
    float* sums = sums_ + (m * blocks_ + block) * kFloats;
    waiting_ = {products,
                {first[0][at_], second[0][at_]},
                {first[1][at_], second[1][at_]},
                x_.Sums(m, first_),
                {sums, whole ? sums + kFloats : s_->spare},
                static_cast<__mmask16>(first_ == 0 ? 0 : 0xffff),
                first_ + groups_ == x_.groups,
                whole,
                groups_,
                m,
                block};
  }

  // The groups of a block of K take turns in tiles 0 and 1, and 2 and 3: each one's go to memory when the next one has
  // been begun. Between them, what waits is scaled.
  template <int kGroups>
  void Overlap(const uint16_t* x, const uint16_t* w, int64_t next, float* products) {
    waiting_.groups == 0 ? Overlap<kGroups, false>(x, w, next, products) : Overlap<kGroups, true>(x, w, next, products);
  }

  template <int kGroups, bool kSettles>
  JAXQ_INLINE void Overlap(const uint16_t* x, const uint16_t* w, int64_t next, float* products) {
    const Waiting& waiting = waiting_;  // a copy would read at once what has been written piece by piece, and so wait
    float* late = late_;
    __m512 sums[kSide];
    JAXQ_UNROLL
    for (int group = 0; group < kGroups; group += 2, products += 4 * kFloats) {
      Group<0>(&x, &w, next);
      StoreTile<2>(late), StoreTile<3>(late + kFloats);
      if constexpr (kSettles) ScaleTwo<kGroups>(waiting, 2 * group, sums);
      Group<2>(&x, &w, next);
      StoreTile<0>(products), StoreTile<1>(products + kFloats);
      late = products + 2 * kFloats;
      if constexpr (kSettles) ScaleTwo<kGroups>(waiting, 2 * group + 2, sums);
    }
    late_ = late;
    if (kSettles && waiting.ends) WriteResults(waiting);
  }

  // A group of a block of x by the same of two blocks of w, into tiles kFirst and kFirst + 1.
  template <int kFirst>
  JAXQ_INLINE void Group(const uint16_t** x, const uint16_t** w, int64_t next) const {
    const uint16_t *right = *x, *left = *w;
    constexpr int kB = 6 + kFirst / 2;
    ZeroTile<kFirst>(), ZeroTile<kFirst + 1>();
    for (int64_t step = 0; step < steps_; ++step, left += kHalves) {
      LoadTile<4>(left);
      LoadTile<5>(left + next);
      for (int64_t part = 0; part < x_.parts; ++part, right += kHalves) {
        LoadTile<kB>(right);
        DotTiles<kFirst, 4, kB>();
        DotTiles<kFirst + 1, 5, kB>();
      }
    }
    *x = right, *w = left;
  }

  // Numbers i and i+1 of what waits, the first block's groups before the second's.
  template <int kGroups>
  JAXQ_INLINE static void ScaleTwo(const Waiting& waiting, int i, __m512* sums) {
    const int half = i / kGroups, group = i % kGroups;
    if (group == 0) Begin(waiting, half, sums);
    Scale(waiting, half, group, sums);
    Scale(waiting, half, group + 1, sums);
    if (group + 2 == kGroups) End(waiting, half, sums);
  }

  // The sums of what waits into registers, a group's products into these, and back.
  JAXQ_INLINE static void Begin(const Waiting& waiting, int half, __m512* sums) {
    JAXQ_UNROLL
    for (int r = 0; r < kSide; ++r) sums[r] = _mm512_maskz_load_ps(waiting.begun, waiting.sums[half] + r * kSide);
  }
  JAXQ_INLINE static void Scale(const Waiting& waiting, int half, int64_t group, __m512* sums) {
    const float* products = waiting.products + (2 * group + half) * kFloats;
    const float* scales = waiting.scales[half] + group * kSide;
    JAXQ_UNROLL
    for (int r = 0; r < kSide; ++r)
      sums[r] = _mm512_fmadd_ps(_mm512_load_ps(products + r * kSide), _mm512_set1_ps(scales[r]), sums[r]);
    if constexpr (kAffine) {
      const __m512 x_sums = _mm512_load_ps(waiting.x_sums + group * kSide);
      const float* biases = waiting.biases[half] + group * kSide;
      JAXQ_UNROLL
      for (int r = 0; r < kSide; ++r) sums[r] = _mm512_fmadd_ps(x_sums, _mm512_set1_ps(biases[r]), sums[r]);
    }
  }
  JAXQ_INLINE static void End(const Waiting& waiting, int half, const __m512* sums) {
    JAXQ_UNROLL
    for (int r = 0; r < kSide; ++r) _mm512_store_ps(waiting.sums[half] + r * kSide, sums[r]);
  }

  // Finishes what waits.
  __attribute__((noinline)) void Settle() {
    if (waiting_.groups == 0) return;
    StoreTile<2>(late_), StoreTile<3>(late_ + kFloats);
    late_ = s_->nowhere[0];
    const Waiting& waiting = waiting_;
    for (int half = 0; half < 2; ++half) {
      __m512 sums[kSide];
      Begin(waiting, half, sums);
      for (int64_t group = 0; group < waiting.groups; ++group) Scale(waiting, half, group, sums);
      End(waiting, half, sums);
    }
    if (waiting.ends) WriteResults(waiting);
    waiting_.groups = 0;
  }

  __attribute__((noinline)) void WriteResults(const Waiting& waiting) const {
    const int64_t m = waiting.m * kSide, rows = Least(kSide, x_.rows - m), n = n_ + waiting.block * kSide;
    WriteTile(args_, m0_ + m, rows, n, waiting.sums[0]);
    if (waiting.whole) WriteTile(args_, m0_ + m, rows, n + kSide, waiting.sums[1]);
  }

  const MatmulArgs& args_;
  const Weight& weight_;
  const StepUnpacker& unpacker_;
  const PackedX& x_;
  const int64_t m0_;
  TileScratch* const s_;
  float* const sums_;
  const int64_t steps_, block_groups_, slab_groups_;
  const int64_t stride_;  // from one block of w's tiles to the next, and a line: at a distance of whole pages, stores
                          // look to the CPU like ones to what is about to be loaded
  int64_t n_ = 0, blocks_ = 0, strip_ = 0, first_ = 0, groups_ = 0, at_ = 0;
  int turn_ = 0;
  float* late_;  // where the last group's products belong, which are in tiles 2 and 3
  Waiting waiting_ = {};
};

// Blocks of 16 rows of w in a task: large tasks read x less often, but every worker should have a few of them.
JAXQ_INLINE int64_t TaskBlocks(int64_t N, int slots) {
  const int64_t fair = N / (int64_t{4} * slots * kSide);
  return fair < kMaxStrip ? Most(1, fair) : Least(kTaskBlocks, fair / kMaxStrip * kMaxStrip);
}

template <bool kAffine>
Outcome MatmulTiles(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  const StepUnpacker unpacker(args.format);
  const int64_t depth = DepthOf(args.format), blocks = TaskBlocks(args.N, parallel.slots());
  const StepSplitter splitter(args.x_dtype, unpacker, depth);
  PackedX x = {0, args.K / depth, weight.groups, PartsOf(args.x_dtype), 1, nullptr, nullptr};
  const int64_t block_tiles = x.steps * x.parts * kHalves, block_sums = weight.groups * kSide;
  // The rows of x are dealt out evenly to as few passes as can be.
  const int64_t passes = Ceil(Ceil(args.M, kSide), Most(1, kPassBytes / (2 * block_tiles)));
  const int64_t most = Ceil(Ceil(args.M, kSide), passes), slot_sums = most * blocks * kFloats;
  const int64_t slot_room = Room<TileScratch>(1) + Room<float>(slot_sums);
  const Scratch scratch(Room<uint16_t>(most * block_tiles) + Room<float>(most * block_sums) +
                        parallel.slots() * slot_room);
  if (!scratch.ok()) return Outcome::kNoMemory;
  char* cursor = scratch.data();
  x.tiles = Take<uint16_t>(&cursor, most * block_tiles), x.sums = Take<float>(&cursor, most * block_sums);
  for (int64_t m0 = 0; m0 < args.M; m0 += most * kSide) {
    x.rows = Least(most * kSide, args.M - m0);
    PackPass(args, splitter, parallel, m0, x);
    parallel.For(Ceil(args.N, blocks * kSide), [&](int64_t task, int slot) {
      const TileScope tiles_configured(depth);
      char* mine = cursor + slot * slot_room;
      auto* s = Take<TileScratch>(&mine, 1);
      const int64_t n = task * blocks * kSide, count = Least(blocks, Ceil(args.N - n, kSide));
      StripProduct<kAffine>(args, weight, unpacker, x, m0, s, reinterpret_cast<float*>(mine)).Run(n, count);
    });
  }
  return Outcome::kDone;
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_AMX_GEMM_INL_H_
