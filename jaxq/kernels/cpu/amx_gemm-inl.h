// transpose=True: 16 rows of w by 16 rows of x in a result tile, bare codes, one group of them at a time; the vector
// units scale what a group leaves behind while the tile unit multiplies the next ones.
//
// Measured on an Emerald Rapids, in cycles: a product of two tiles takes 16, loading a tile out of the first-level cache
// 8 to 10, out of the second one 20, storing one 16 to 18, or 62 if its lines are not in the first level, and what the
// vector units load passes the same ports. (On some of its cores, for minutes, a product takes 60 to 80.) So as little
// is loaded as can be, from as near as can be:
//   - a strip of a few blocks of 16 rows of w by a short block of K is unpacked into the first-level cache and
//     multiplied by all of x, whose tiles come from the second level once for the strip;
//   - sums stay in registers over a block of K;
//   - products go through memory, a few KiB: they are stored when the next group has been begun, since that is how long
//     they take, and scaled while the next block is multiplied, so that nothing waits for anything;
//   - a few rows are scaled, and a tile is stored, before each product, when its operands have been loaded: the CPU looks
//     ahead no further than about a group's worth of all this.
// amx_parts-inl.h has the other way, sums that stay in tiles: for bfloat16 twice as many products, and yet .65 to .8 of
// the time from 32 rows on, since nothing is stored or scaled between them.
//
// What is multiplied is an Arithmetic's, amx_digits-inl.h's or amx_codes-inl.h's:
//
//   kResults                  tiles that a group's products leave
//   kLeft, kRight             the first tile of w's, behind two turns of results, and the first of x's
//   kStrip                    blocks of w in a strip, at most kMaxStrip: more of them load x's tiles less often
//   kBlockTerms               of K in a block, which has 2 to kMaxRun groups though
//   Depth(format)             codes of a step, whose tiles hold kStepBytes of w to each
//   parts                     tiles of x to a step
//   unpacker                  its Tiles() makes tiles of steps of 16 rows of w; centre() is taken from the codes
//   Pack(args, m, block, group, x)   the same for x; false: this arithmetic can't hold it
//   Multiply<turn>(x, w, steps, between)   products of a group into tiles turn*kResults and on; before the first ones,
//                                    between(Constant<i>()) for each i < kResults
//   Total(products, units)           a row of these as floats; units: x.units of the group

#ifndef JAXQ_KERNELS_CPU_AMX_GEMM_INL_H_
#define JAXQ_KERNELS_CPU_AMX_GEMM_INL_H_

#include <atomic>

#include "amx_pack-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kMaxRun = 8;           // groups in a block of K
constexpr int64_t kMaxBlockSteps = 8;    // steps in it
constexpr int64_t kMaxStrip = 8;         // blocks of 16 rows of w whose tiles are in the first-level cache
constexpr int64_t kMaxResults = 3;
constexpr int64_t kSlabBytes = 1 << 20;  // of packed x, which is to stay in the second-level cache

struct TileScratch {
  alignas(64) float products[2][kMaxRun * kMaxResults * kFloats];  // [turn][group][result]
  float nowhere[kMaxResults * kFloats];                            // products that nobody wants
  alignas(64) uint16_t strip[kMaxStrip * (kMaxBlockSteps * kHalves + 32)];
  TileScales scales[kMaxStrip];
};

template <typename Arithmetic, bool kAffine>
class StripProduct {
 public:
  // sums: [block of x][block of w][16 rows of w][16 rows of x].
  StripProduct(const MatmulArgs& args, const Weight& weight, const Arithmetic& arithmetic, const PackedX& x, int64_t m0,
               TileScratch* scratch, float* sums)
      : args_(args),
        weight_(weight),
        arithmetic_(arithmetic),
        x_(x),
        m0_(m0),
        s_(scratch),
        sums_(sums),
        steps_(x.steps / x.groups),
        run_(Least(kMaxRun, Most(2, Arithmetic::kBlockTerms / weight.format.group_size))),
        slab_groups_(SlabGroups()),
        stride_(run_ * steps_ * kHalves + 32),
        late_(scratch->nowhere) {}

  // Rows n .. n + 16*blocks of w, by all of x.
  void Run(int64_t n, int64_t blocks) {
    n_ = n, blocks_ = blocks;
    const int64_t strip = x_.blocks() == 1 ? 2 : Arithmetic::kStrip;
    for (int64_t slab = 0; slab < x_.groups; slab += slab_groups_)
      for (strip_ = 0; strip_ < blocks; strip_ += strip)
        Strip(slab, Least(x_.groups, slab + slab_groups_), Least(blocks_, strip_ + strip));
    Settle();
  }

 private:
  static constexpr int kResults = Arithmetic::kResults;

  // Products of a block of x by a block of w that wait to be scaled, [group][result][16][16], and what they are scaled
  // with, [group][16] each.
  struct Waiting {
    const float* products;
    const float *scales, *biases, *units, *x_sums;
    float* sums;
    __mmask16 begun;    // no bits: sums begin with these
    bool ends;
    int64_t groups, m, block;  // groups: none if nothing waits
  };

  // Groups of K that are multiplied by all of the task's w before the next ones: as many as x's tiles of them fit into
  // the second-level cache.
  int64_t SlabGroups() const {
    const int64_t group = x_.blocks() * x_.parts * steps_ * kHalves * 2;
    return RoundUp(Most(1, kSlabBytes / group), run_);
  }

  // Groups first .. last of blocks strip_ .. end of w.
  void Strip(int64_t first, int64_t last, int64_t end) {
    for (first_ = first; first_ < last; first_ += groups_) {
      groups_ = Least(run_, last - first_);
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
      FillScales(weight_, n_ + block * kSide, first_, count, arithmetic_.unpacker.centre(), &s_->scales[block - strip_]);
  }

  // The block of K of one block of w as tiles.
  void Unpack(int64_t block) const {
    const int64_t n = n_ + block * kSide, begin = first_ * weight_.format.group_size / 8 * weight_.format.bits;
    arithmetic_.unpacker.Tiles(weight_.packed + n * weight_.row_bytes + begin, weight_.row_bytes,
                               Least(kSide, weight_.rows - n), groups_ * steps_,
                               s_->strip + (block - strip_) * stride_);
  }

  // A block of w by a block of x.
  void Multiply(int64_t m, int64_t block) {
    if (waiting_.groups != groups_) Settle();
    float* products = s_->products[turn_ ^= 1];
    const uint16_t *x = x_.Tile(m, first_ * steps_), *w = s_->strip + (block - strip_) * stride_;
    switch (groups_) {
      case 2:
        Overlap<2>(x, w, products);
        break;
      case 4:
        Overlap<4>(x, w, products);
        break;
      case 8:
        Overlap<8>(x, w, products);
        break;
      default:  // what is left of K
        Settle();
        for (int64_t group = 0; group < groups_; ++group) {
          Group<0>(&x, &w, [](auto) {});
          StoreTurn<0>(products + group * kResults * kFloats);
        }
    }
    const auto& scales = s_->scales[block - strip_].values;
    waiting_ = {products,
                scales[0][at_],
                scales[1][at_],
                x_.Units(m, first_),
                x_.Sums(m, first_),
                sums_ + (m * blocks_ + block) * kFloats,
                static_cast<__mmask16>(first_ == 0 ? 0 : 0xffff),
                first_ + groups_ == x_.groups,
                groups_,
                m,
                block};
  }

  // The groups of a block of K take turns in two sets of tiles: each one's go to memory when the next one has been
  // begun. Between them, what waits is scaled.
  template <int kGroups>
  void Overlap(const uint16_t* x, const uint16_t* w, float* products) {
    waiting_.groups == 0 ? Overlap<kGroups, false>(x, w, products) : Overlap<kGroups, true>(x, w, products);
  }

  template <int kGroups, bool kSettles>
  JAXQ_INLINE void Overlap(const uint16_t* x, const uint16_t* w, float* products) {
    const Waiting& waiting = waiting_;  // a copy would read at once what has been written piece by piece, and so wait
    float* late = late_;
    __m512 sums[kSide];
    if constexpr (kSettles) Begin(waiting, sums);
    JAXQ_UNROLL
    for (int group = 0; group < kGroups; group += 2, products += 2 * kResults * kFloats) {
      Group<0>(&x, &w, [&](auto i) __attribute__((always_inline)) {
        constexpr int kI = decltype(i)::value;
        StoreTile<kResults + kI>(late + kI * kFloats);
        if constexpr (kSettles) Scale<kI, kResults>(waiting, group, sums);
      });
      Group<1>(&x, &w, [&](auto i) __attribute__((always_inline)) {
        constexpr int kI = decltype(i)::value;
        StoreTile<kI>(products + kI * kFloats);
        if constexpr (kSettles) Scale<kI, kResults>(waiting, group + 1, sums);
      });
      late = products + kResults * kFloats;
    }
    if constexpr (kSettles) End(waiting, sums);
    late_ = late;
    if (kSettles && waiting.ends) WriteResults(waiting);
  }

  // A group of a block of x by the same of a block of w, into a turn's tiles.
  template <int kTurn, typename Between>
  JAXQ_INLINE void Group(const uint16_t** x, const uint16_t** w, Between&& between) const {
    constexpr int kFirst = kTurn * kResults;
    ZeroTile<kFirst>();
    if constexpr (kResults > 1) ZeroTile<kFirst + 1>();
    if constexpr (kResults > 2) ZeroTile<kFirst + 2>();
    arithmetic_.template Multiply<kTurn>(*x, *w, steps_, between);
    *x += steps_ * x_.parts * kHalves, *w += steps_ * kHalves;
  }

  template <int kTurn>
  JAXQ_INLINE static void StoreTurn(float* out) {
    constexpr int kFirst = kTurn * kResults;
    StoreTile<kFirst>(out);
    if constexpr (kResults > 1) StoreTile<kFirst + 1>(out + kFloats);
    if constexpr (kResults > 2) StoreTile<kFirst + 2>(out + 2 * kFloats);
  }

  // The sums of what waits into registers, a group's products into these, and back.
  JAXQ_INLINE static void Begin(const Waiting& waiting, __m512* sums) {
    JAXQ_UNROLL
    for (int r = 0; r < kSide; ++r) sums[r] = _mm512_maskz_load_ps(waiting.begun, waiting.sums + r * kSide);
  }
  // Of kOf parts of the rows, number kPart.
  template <int kPart, int kOf>
  JAXQ_INLINE static void Scale(const Waiting& waiting, int64_t group, __m512* sums) {
    const float* products = waiting.products + group * kResults * kFloats;
    const float *scales = waiting.scales + group * kSide, *biases = waiting.biases + group * kSide;
    const float* units = waiting.units + group * kSide;
    const __m512 x_sums = _mm512_load_ps(waiting.x_sums + group * kSide);
    JAXQ_UNROLL
    for (int r = kSide * kPart / kOf; r < kSide * (kPart + 1) / kOf; ++r) {
      if constexpr (kAffine) sums[r] = _mm512_fmadd_ps(x_sums, _mm512_set1_ps(biases[r]), sums[r]);
      const __m512 total = Arithmetic::Total(products + r * kSide, units);
      sums[r] = _mm512_fmadd_ps(total, _mm512_set1_ps(scales[r]), sums[r]);
    }
  }
  JAXQ_INLINE static void End(const Waiting& waiting, const __m512* sums) {
    JAXQ_UNROLL
    for (int r = 0; r < kSide; ++r) _mm512_store_ps(waiting.sums + r * kSide, sums[r]);
  }

  // Finishes what waits.
  __attribute__((noinline)) void Settle() {
    if (waiting_.groups == 0) return;
    StoreTurn<1>(late_);
    late_ = s_->nowhere;
    const Waiting& waiting = waiting_;
    __m512 sums[kSide];
    Begin(waiting, sums);
    for (int64_t group = 0; group < waiting.groups; ++group) Scale<0, 1>(waiting, group, sums);
    End(waiting, sums);
    if (waiting.ends) WriteResults(waiting);
    waiting_.groups = 0;
  }

  __attribute__((noinline)) void WriteResults(const Waiting& waiting) const {
    const int64_t m = waiting.m * kSide;
    WriteTile(args_, m0_ + m, Least(kSide, x_.rows - m), n_ + waiting.block * kSide, waiting.sums);
  }

  const MatmulArgs& args_;
  const Weight& weight_;
  const Arithmetic& arithmetic_;
  const PackedX& x_;
  const int64_t m0_;
  TileScratch* const s_;
  float* const sums_;
  const int64_t steps_, run_, slab_groups_;
  const int64_t stride_;  // from one block of w's tiles to the next, and a line: at a distance of whole pages, stores
                          // look to the CPU like ones to what is about to be loaded
  int64_t n_ = 0, blocks_ = 0, strip_ = 0, first_ = 0, groups_ = 0, at_ = 0;
  int turn_ = 0;
  float* late_;  // where the last group's products belong, which are in the second turn's tiles
  Waiting waiting_ = {};
};

// Blocks of 16 rows of w in a task: large tasks read x less often, but every worker should have a few of them.
JAXQ_INLINE int64_t TaskBlocks(int64_t N, int slots) {
  const int64_t fair = N / (int64_t{4} * slots * kSide);
  return fair < kMaxStrip ? Most(1, fair) : Least(kTaskBlocks, fair / kMaxStrip * kMaxStrip);
}

// Declines x that the arithmetic can't hold.
template <typename Arithmetic, bool kAffine>
Outcome MatmulStrips(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  const Arithmetic arithmetic(args);
  const int64_t depth = Arithmetic::Depth(args.format), blocks = TaskBlocks(args.N, parallel.slots());
  PackedX x = {0, args.K / depth, weight.groups, arithmetic.parts, 1, nullptr, nullptr, nullptr};
  const int64_t block_tiles = x.steps * x.parts * kHalves, block_floats = weight.groups * kSide;
  // The rows of x are dealt out evenly to as few passes as can be.
  const int64_t passes = Ceil(Ceil(args.M, kSide), Most(1, kPassBytes / (2 * block_tiles)));
  const int64_t most = Ceil(Ceil(args.M, kSide), passes), slot_sums = most * blocks * kFloats;
  const int64_t slot_room = Room<TileScratch>(1) + Room<float>(slot_sums);
  const Scratch scratch(Room<uint16_t>(most * block_tiles) + 2 * Room<float>(most * block_floats) +
                        parallel.slots() * slot_room);
  if (!scratch.ok()) return Outcome::kNoMemory;
  char* cursor = scratch.data();
  x.tiles = Take<uint16_t>(&cursor, most * block_tiles);
  x.sums = Take<float>(&cursor, most * block_floats), x.units = Take<float>(&cursor, most * block_floats);
  for (int64_t m0 = 0; m0 < args.M; m0 += most * kSide) {
    x.rows = Least(most * kSide, args.M - m0);
    std::atomic<bool> fits{true};
    ForGroups(args, parallel, x, [&](int64_t block, int64_t group) {
      if (!arithmetic.Pack(args, m0 + block * kSide, block, group, x)) fits = false;
    });
    if (!fits) return Outcome::kDeclined;
    parallel.For(Ceil(args.N, blocks * kSide), [&](int64_t task, int slot) {
      const TileScope tiles_configured(depth * Arithmetic::kStepBytes, Arithmetic::kLeft, Arithmetic::kRight);
      char* mine = cursor + slot * slot_room;
      auto* s = Take<TileScratch>(&mine, 1);
      const int64_t n = task * blocks * kSide, count = Least(blocks, Ceil(args.N - n, kSide));
      StripProduct<Arithmetic, kAffine>(args, weight, arithmetic, x, m0, s, reinterpret_cast<float*>(mine))
          .Run(n, count);
    });
  }
  return Outcome::kDone;
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_AMX_GEMM_INL_H_
