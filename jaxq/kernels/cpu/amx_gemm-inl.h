// More than 32 rows of x, where amx_dense-inl.h does not take them: 32 rows of w, bare codes, by 32 columns in the four
// result tiles; a group's products are scaled by the vector units while the tile unit multiplies the next.
//
// What a group leaves behind, 64 lines of products to be read, scaled and added to 64 lines of sums, takes as long as
// the products, and twice as long if the sums come out of the second-level cache: so all groups of a panel of w follow
// each other for a square of two by two result tiles' sums, which stay in the first level with the products and the
// group's operands, each used twice. The panel is unpacked while the first columns are multiplied, a group ahead.

#ifndef JAXQ_KERNELS_CPU_AMX_GEMM_INL_H_
#define JAXQ_KERNELS_CPU_AMX_GEMM_INL_H_

#include "amx_rows-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kPanelBlocks = 16;  // of 32 rows of w, at most
constexpr int64_t kPanelSteps = 16;
constexpr int64_t kSquare = 2;  // blocks of rows of w, and of columns, whose sums are in the first-level cache together
constexpr int64_t kPassColumns = 512;
constexpr int64_t kPassBytes16 = 8 << 20;  // of packed x at a time

struct TileScratch {
  alignas(64) uint16_t codes[kPanelBlocks][kPanelSteps][2][kHalves];
  float products[2][4][kFloats];
  TileScales scales[kPanelBlocks][2];  // of kScaleGroups groups, a multiple of a panel's
};

// A group's products, to be scaled while the next ones are multiplied.
struct Waiting {
  Products halves[2];
  const TileScales* scales;
  float* sums;  // null: nothing waits
};

class PanelProduct {
 public:
  // x: 32 columns each, one after another. sums: [32 columns][32 rows of w][4 tiles].
  PanelProduct(const Weight& weight, const StepUnpacker& unpacker, const PackedX* x, int64_t pairs,
               TileScratch* scratch, float* sums)
      : weight_(weight),
        unpacker_(unpacker),
        x_(x),
        pairs_(pairs),
        s_(scratch),
        sums_(sums),
        steps_(weight.format.group_size / kStep),
        panel_groups_(kPanelSteps / steps_) {}

  // Rows n .. n+32*blocks of w, by all columns.
  void Run(int64_t n, int64_t blocks) {
    n_ = n, blocks_ = blocks;
    std::memset(sums_, 0, static_cast<size_t>(pairs_ * blocks_ * 4 * kFloats) * sizeof(float));
    for (first_ = 0; first_ < weight_.groups; first_ += panel_groups_) {
      groups_ = Least(panel_groups_, weight_.groups - first_);
      if (first_ % kScaleGroups == 0) NextScales();
      for (int64_t pair = 0; pair < pairs_; pair += kSquare)
        for (int64_t block = 0; block < blocks_; block += kSquare) Square(pair, block);
    }
    Settle(waiting_, 0, 1);
  }

 private:
  void NextScales() {
    Settle(waiting_, 0, 1);  // what still waits needs the scales that are there
    waiting_.sums = nullptr;
    const int64_t count = Least(kScaleGroups, weight_.groups - first_);
    for (int64_t i = 0; i < 2 * blocks_; ++i)
      FillScales(weight_, n_ + i * kSide, first_, count, unpacker_.centre(), &s_->scales[i / 2][i % 2]);
  }

  void Square(int64_t pair0, int64_t block0) {
    const int64_t pairs = Least(pairs_, pair0 + kSquare), blocks = Least(blocks_, block0 + kSquare);
    if (pair0 == 0)
      for (int64_t block = block0; block < blocks; ++block)
        for (int64_t step = 0; step < steps_; ++step) Unpack(block, step);
    for (int64_t group = 0; group < groups_; ++group)
      for (int64_t block = block0; block < blocks; ++block)
        for (int64_t pair = pair0; pair < pairs; ++pair) Group(pair, block, group);
  }

  // The vector units' work is dealt out between the steps, so that the loads of the next steps are never far behind it:
  // the CPU looks ahead some 500 instructions, and a tile's load is a dozen.
  void Group(int64_t pair, int64_t block, int64_t group) {
    auto* products = s_->products[turn_ ^= 1];
    ZeroTile<0>(), ZeroTile<1>(), ZeroTile<2>(), ZeroTile<3>();
    for (int64_t i = 0; i < steps_; ++i) {
      const int64_t step = group * steps_ + i;
      MultiplyStep(x_[pair], s_->codes[block][step], first_ * steps_ + step);
      if (pair == 0 && group + 1 < groups_) Unpack(block, step + steps_);
      Settle(waiting_, i, steps_);
    }
    StoreTile<0>(products[0]);
    StoreTile<1>(products[1]);
    StoreTile<2>(products[2]);
    StoreTile<3>(products[3]);
    const float* x_sums = x_[pair].sums + (first_ + group) * kFewColumns;
    const int64_t at = (first_ + group) % kScaleGroups;
    waiting_ = {{{products[0], x_sums, at}, {products[2], x_sums, at}}, s_->scales[block],
                sums_ + (pair * blocks_ + block) * 4 * kFloats};
  }

  // One step into tiles 0 to 3: rows of w by columns.
  void MultiplyStep(const PackedX& x, const uint16_t (*codes)[kHalves], int64_t step) const {
    LoadTile<4>(codes[0]);
    LoadTile<5>(codes[1]);
    for (int64_t part = 0; part < x.parts; ++part) {
      const uint16_t* tile = x.Tile(step, part);
      LoadTile<6>(tile);
      DotTiles<0, 4, 6>();
      LoadTile<7>(tile + kHalves);
      DotTiles<1, 4, 7>();
      DotTiles<2, 5, 6>();
      DotTiles<3, 5, 7>();
    }
  }

  // One step of 32 rows of the panel.
  void Unpack(int64_t block, int64_t step) const {
    const int64_t n = n_ + block * kRowBlock, rows = Least(kRowBlock, weight_.rows - n);
    const int64_t bytes = unpacker_.step_bytes(), begin = (first_ * steps_ + step) * bytes;
    const uint8_t* w = weight_.packed + n * weight_.row_bytes + begin;
    const int64_t ahead = panel_groups_ * steps_ * bytes;  // the next panel, into the second-level cache
    if (begin / 64 != (begin - bytes) / 64 && begin + ahead < weight_.row_bytes)
      for (int64_t r = 0; r < rows; ++r)
        _mm_prefetch(reinterpret_cast<const char*>(w + r * weight_.row_bytes + ahead), _MM_HINT_T1);
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t row = Least(half * kSide, rows - 1), count = Most(1, Least(kSide, rows - row));
      unpacker_.Tile(w + row * weight_.row_bytes, weight_.row_bytes, count, s_->codes[block][step][half]);
    }
  }

  // Scales one of 1, 2 or 4 pieces of the rows of what waits.
  void Settle(const Waiting& waiting, int64_t piece, int64_t pieces) const {
    if (waiting.sums == nullptr) return;
    const int64_t first = kRowBlock * piece / pieces, last = kRowBlock * (piece + 1) / pieces;
    for (int64_t r = first; r < last; r += kSide) {
      const int64_t half = r / kSide;
      AddGroups<2>(weight_.format.affine(), 1, &waiting.halves[half], waiting.scales[half], r % kSide,
                   Least(kSide, r % kSide + last - r), waiting.sums + 2 * half * kFloats);
    }
  }

  const Weight& weight_;
  const StepUnpacker& unpacker_;
  const PackedX* const x_;
  const int64_t pairs_;
  TileScratch* const s_;
  float* const sums_;
  const int64_t steps_, panel_groups_;
  int64_t n_ = 0, blocks_ = 0, first_ = 0, groups_ = 0;
  int turn_ = 0;
  Waiting waiting_ = {};
};

// One pass: rows m0 .. of x as pairs of column blocks.
struct Pass {
  PackedX pairs[kPassColumns / kFewColumns];
  int64_t m0, count;
};

void PackPass(const MatmulArgs& args, const StepSplitter& splitter, const Parallel& parallel, const Pass& pass) {
  constexpr int64_t kPackGroups = 16;
  const int64_t groups = args.groups(), chunks = Ceil(groups, kPackGroups);
  parallel.For(pass.count * chunks, [&](int64_t task, int) {
    const PackedX& x = pass.pairs[task / chunks];
    const int64_t m0 = pass.m0 + task / chunks * kFewColumns, first = task % chunks * kPackGroups;
    for (int64_t group = first; group < Least(groups, first + kPackGroups); ++group)
      for (int64_t block = 0; block < 2; ++block) PackGroup(args, splitter, m0, block, group, x);
  });
}

// Rows of w per task: large panels pass over x less often, but every worker should have a few tasks.
JAXQ_INLINE int64_t PanelBlocks(int64_t N, int slots) {
  return Most(2, Least(kPanelBlocks, Ceil(N, int64_t{3} * slots * kRowBlock)));
}

Outcome MatmulTiles(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  const StepUnpacker unpacker(args.format);
  const StepSplitter splitter(args, unpacker);
  const int64_t parts = PartsOf(args.x_dtype), blocks = PanelBlocks(args.N, parallel.slots());
  const int64_t tiles = args.K / kStep * parts * 2 * kHalves, sums = weight.groups * kFewColumns;
  const int64_t fit = Most(2, kPassBytes16 / (tiles * 2));
  const int64_t most = Least(Ceil(args.M, kFewColumns), Least(fit, kPassColumns / kFewColumns));
  const int64_t y_room = Room<float>(most * blocks * 4 * kFloats), slot_room = Room<TileScratch>(1) + y_room;
  const Scratch scratch(most * (Room<uint16_t>(tiles) + Room<float>(sums)) + parallel.slots() * slot_room);
  if (!scratch.ok()) return Outcome::kNoMemory;
  Pass pass;
  char* cursor = scratch.data();
  for (int64_t i = 0; i < most; ++i)
    pass.pairs[i] = {0, 2, parts, Take<uint16_t>(&cursor, tiles), Take<float>(&cursor, sums)};
  for (pass.m0 = 0; pass.m0 < args.M; pass.m0 += most * kFewColumns) {
    const int64_t rows = Least(most * kFewColumns, args.M - pass.m0);
    pass.count = Ceil(rows, kFewColumns);
    for (int64_t i = 0; i < pass.count; ++i) pass.pairs[i].rows = Least(kFewColumns, rows - i * kFewColumns);
    PackPass(args, splitter, parallel, pass);
    parallel.For(Ceil(args.N, blocks * kRowBlock), [&](int64_t task, int slot) {
      const TileScope tiles_configured;
      char* mine = cursor + slot * slot_room;
      auto* s = Take<TileScratch>(&mine, 1);
      float* y = reinterpret_cast<float*>(mine);
      const int64_t n = task * blocks * kRowBlock, count = Least(blocks, Ceil(args.N - n, kRowBlock));
      PanelProduct(weight, unpacker, pass.pairs, pass.count, s, y).Run(n, count);
      for (int64_t i = 0; i < pass.count * count * 4; ++i) {
        const int64_t pair = i / (4 * count), row = n + i / 4 % count * kRowBlock + i / 2 % 2 * kSide;
        if (row < args.N) WriteTile(args, pass.pairs[pair], pass.m0 + pair * kFewColumns, i % 2, row, y + i * kFloats);
      }
    });
  }
  return Outcome::kDone;
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_AMX_GEMM_INL_H_
