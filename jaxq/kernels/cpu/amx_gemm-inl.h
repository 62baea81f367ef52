// transpose=True: 16 rows of w by 16 rows of x in a result tile, bare codes, one group of them at a time; the vector
// units scale what a group leaves behind while the tile unit multiplies the next ones.
//
// Measured on an Emerald Rapids, in cycles of a core whose other thread is idle: a product of two tiles takes 16, loading
// a tile out of the first-level cache 8 to 10, out of the second one 20, storing one 16 to 18, and what the vector units
// load passes the same ports. (If the core's other thread is busy, a product that needs newly loaded tiles takes 60, so
// as few of them as there can be count more than anything.) So all is laid out for the first level, half of it if can be:
// a strip of a few blocks of 16 rows of w by a short block of K is unpacked into it and multiplied by all of x, whose
// tiles come from the second level once for the strip. Sums stay in registers over a block of K. Products go through
// memory, a few KiB: they are stored when the next group has been begun, since that is how long they take, and scaled
// while the next block is multiplied, so that nothing waits for anything.

#ifndef JAXQ_KERNELS_CPU_AMX_GEMM_INL_H_
#define JAXQ_KERNELS_CPU_AMX_GEMM_INL_H_

#include "amx_pack-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kBlockTerms = 128;      // of K in a block, at most, but two groups at least
constexpr int64_t kMaxBlockSteps = 8;
constexpr int64_t kMaxStrip = 8;          // blocks of 16 rows of w whose tiles are in the first-level cache
constexpr int64_t kTaskBlocks = 16;       // of 16 rows of w in a task, at most
constexpr int64_t kSlabBytes = 1 << 20;   // of packed x, which is to stay in the second-level cache
constexpr int64_t kPassBytes = 8 << 20;   // of packed x at a time

struct TileScratch {
  alignas(64) float products[2][kMaxBlockSteps][kFloats];  // [turn][group]
  float nowhere[kFloats];
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
        strip_blocks_(x.blocks() == 1 ? 2 : x.parts == 3 ? kMaxStrip : 4),
        stride_(block_groups_ * steps_ * kHalves + 32),
        late_(scratch->nowhere) {}

  // Rows n .. n + 16*blocks of w, by all of x.
  void Run(int64_t n, int64_t blocks) {
    n_ = n, blocks_ = blocks;
    for (int64_t slab = 0; slab < x_.groups; slab += slab_groups_)
      for (strip_ = 0; strip_ < blocks; strip_ += strip_blocks_) Strip(slab, Least(x_.groups, slab + slab_groups_));
    Settle();
  }

 private:
  // Products of a block of x by a block of w that wait to be scaled: [group][16][16], and what they are scaled with,
  // [group][16] each.
  struct Waiting {
    const float *products, *scales, *biases, *x_sums;
    float* sums;      // null: nothing waits
    __mmask16 begun;  // no bits: sums begin with these
    bool ends;
    int64_t groups, m, block;
  };

  // Groups of K that are multiplied by all of the task's w before the next ones: as many as x's tiles of them fit into
  // the second-level cache.
  int64_t SlabGroups() const {
    const int64_t group = x_.blocks() * x_.parts * steps_ * kHalves * 2;
    return RoundUp(Most(1, kSlabBytes / group), block_groups_);
  }

  // Groups first .. last of a few blocks of w.
  void Strip(int64_t first, int64_t last) {
    const int64_t end = Least(blocks_, strip_ + strip_blocks_);
    for (first_ = first; first_ < last; first_ += groups_) {
      groups_ = Least(block_groups_, last - first_);
      if ((first_ - first) % kScaleGroups == 0) FillStrip(end, Least(kScaleGroups, last - first_));
      at_ = (first_ - first) % kScaleGroups;
      for (int64_t block = strip_; block < end; ++block) Unpack(block);
      for (int64_t m = 0; m < x_.blocks(); ++m)
        for (int64_t block = strip_; block < end; ++block) Multiply(m, block);
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

  // One block of w by a block of x; between its groups, what waits is scaled.
  void Multiply(int64_t m, int64_t block) {
    if (waiting_.groups != groups_) Settle();
    float* products = s_->products[turn_ ^= 1][0];
    waiting_.sums != nullptr ? Multiply<true>(m, block, products) : Multiply<false>(m, block, products);
    const auto& scales = s_->scales[block - strip_].values;
    waiting_ = {products,
                scales[0][at_],
                scales[1][at_],
                x_.Sums(m, first_),
                sums_ + (m * blocks_ + block) * kFloats,
                static_cast<__mmask16>(first_ == 0 ? 0 : 0xffff),
                first_ + groups_ == x_.groups,
                groups_,
                m,
                block};
    if (groups_ % 2 == 1) Settle();  // the next one begins in tile 0
  }

  // Groups take turns in two result tiles: each one's goes to memory when the next one has been begun.
  template <bool kSettles>
  JAXQ_INLINE void Multiply(int64_t m, int64_t block, float* products) {
    const uint16_t *x = x_.Tile(m, first_ * steps_), *w = s_->strip + (block - strip_) * stride_;
    const Waiting waiting = waiting_;
    const int64_t steps = steps_, parts = x_.parts;
    float* late = late_;
    __m512 sums[kSide];
    if constexpr (kSettles) Begin(waiting, sums);
    int64_t group = 0;
    for (; group + 1 < groups_; group += 2, products += 2 * kFloats) {
      Group<0>(steps, parts, &x, &w);
      StoreTile<1>(late);
      if constexpr (kSettles) Scale(waiting, group, sums);
      Group<1>(steps, parts, &x, &w);
      StoreTile<0>(products);
      late = products + kFloats;
      if constexpr (kSettles) Scale(waiting, group + 1, sums);
    }
    if (group < groups_) {
      Group<0>(steps, parts, &x, &w);
      StoreTile<1>(late);
      StoreTile<0>(products);
      late = s_->nowhere;
      if constexpr (kSettles) Scale(waiting, group, sums);
    }
    late_ = late;
    if constexpr (kSettles) {
      End(waiting, sums);
      if (waiting.ends) WriteResults(waiting);
    }
  }

  template <int kTile>
  JAXQ_INLINE static void Group(int64_t steps, int64_t parts, const uint16_t** x, const uint16_t** w) {
    const uint16_t *right = *x, *left = *w;
    constexpr int kA = 4 + kTile, kB = 6 + kTile;
    ZeroTile<kTile>();
    for (int64_t step = 0; step < steps; ++step, left += kHalves) {
      LoadTile<kA>(left);
      for (int64_t part = 0; part < parts; ++part, right += kHalves) {
        LoadTile<kB>(right);
        DotTiles<kTile, kA, kB>();
      }
    }
    *x = right, *w = left;
  }

  // The sums of what waits into registers, a group's products into these, and back.
  JAXQ_INLINE static void Begin(const Waiting& waiting, __m512* sums) {
    JAXQ_UNROLL
    for (int r = 0; r < kSide; ++r) sums[r] = _mm512_maskz_load_ps(waiting.begun, waiting.sums + r * kSide);
  }
  JAXQ_INLINE static void Scale(const Waiting& waiting, int64_t group, __m512* sums) {
    const float *products = waiting.products + group * kFloats, *scales = waiting.scales + group * kSide;
    JAXQ_UNROLL
    for (int r = 0; r < kSide; ++r)
      sums[r] = _mm512_fmadd_ps(_mm512_load_ps(products + r * kSide), _mm512_set1_ps(scales[r]), sums[r]);
    if constexpr (kAffine) {
      const __m512 x_sums = _mm512_load_ps(waiting.x_sums + group * kSide);
      const float* biases = waiting.biases + group * kSide;
      JAXQ_UNROLL
      for (int r = 0; r < kSide; ++r) sums[r] = _mm512_fmadd_ps(x_sums, _mm512_set1_ps(biases[r]), sums[r]);
    }
  }
  JAXQ_INLINE static void End(const Waiting& waiting, const __m512* sums) {
    JAXQ_UNROLL
    for (int r = 0; r < kSide; ++r) _mm512_store_ps(waiting.sums + r * kSide, sums[r]);
  }

  // Finishes what waits.
  __attribute__((noinline)) void Settle() {
    if (waiting_.sums == nullptr) return;
    StoreTile<1>(late_);
    late_ = s_->nowhere;
    const Waiting waiting = waiting_;
    __m512 sums[kSide];
    Begin(waiting, sums);
    for (int64_t group = 0; group < waiting.groups; ++group) Scale(waiting, group, sums);
    End(waiting, sums);
    if (waiting.ends) WriteResults(waiting);
    waiting_.sums = nullptr;
  }

  __attribute__((noinline)) void WriteResults(const Waiting& waiting) const {
    const int64_t m = waiting.m * kSide;
    WriteTile(args_, m0_ + m, Least(kSide, x_.rows - m), n_ + waiting.block * kSide, waiting.sums);
  }

  const MatmulArgs& args_;
  const Weight& weight_;
  const StepUnpacker& unpacker_;
  const PackedX& x_;
  const int64_t m0_;
  TileScratch* const s_;
  float* const sums_;
  const int64_t steps_, block_groups_, slab_groups_;
  const int64_t strip_blocks_;  // of w: more of them load x's tiles less often, which pays where these are many
  const int64_t stride_;  // from one block of w's tiles to the next, and a line: at a distance of whole pages, stores
                          // look to the CPU like ones to what is about to be loaded
  int64_t n_ = 0, blocks_ = 0, strip_ = 0, first_ = 0, groups_ = 0, at_ = 0;
  int turn_ = 0;
  float* late_;  // where the last group's products belong, which are in tile 1
  Waiting waiting_ = {};
};

// Blocks of 16 rows of w in a task: large tasks read x less often, but every worker should have a few of them.
JAXQ_INLINE int64_t TaskBlocks(int64_t N, int slots) {
  const int64_t fair = N / (int64_t{4} * slots * kSide);
  return fair < kMaxStrip ? Most(1, fair) : Least(kTaskBlocks, fair / kMaxStrip * kMaxStrip);
}

void PackPass(const MatmulArgs& args, const StepSplitter& splitter, const Parallel& parallel, int64_t m0,
              const PackedX& x) {
  const int64_t together = Most(1, 1024 / args.format.group_size), chunks = Ceil(x.groups, together);
  parallel.For(x.blocks() * chunks, [&](int64_t task, int) {
    const int64_t block = task / chunks, first = task % chunks * together;
    for (int64_t group = first; group < Least(x.groups, first + together); ++group)
      PackGroup(args, splitter, m0 + block * kSide, block, group, x);
  });
}

template <bool kAffine>
Outcome MatmulTiles(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  const StepUnpacker unpacker(args.format);
  const int64_t depth = DepthOf(args.format), blocks = TaskBlocks(args.N, parallel.slots());
  const StepSplitter splitter(args.x_dtype, unpacker, depth);
  PackedX x = {0, args.K / depth, weight.groups, PartsOf(args.x_dtype), nullptr, nullptr};
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
