// Up to 32 rows of x: 32 rows of w at a time over the whole of K.
//
// A round is as many groups as the four result tiles hold: two with one block of columns, one with two blocks. While
// the tile unit works on a round, the vector units unpack the next one into the other half of a buffer in the
// first-level cache, and scale what the round before has left.

#ifndef JAXQ_KERNELS_CPU_AMX_ROWS_INL_H_
#define JAXQ_KERNELS_CPU_AMX_ROWS_INL_H_

#include "amx_pack-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kFewColumns = 2 * kSide;
constexpr int64_t kRowBlock = 2 * kSide;  // rows of w
constexpr int64_t kMaxRoundSteps = 4;

struct RowsScratch {
  alignas(64) uint16_t codes[2][kMaxRoundSteps][2][kHalves];  // [round % 2][step][half of the rows]
  float products[2][4][kFloats];
  float sums[4][kFloats];  // [half of the rows][block of columns]
  TileScales scales[2];
};

template <int kBlocks>
class RowsProduct {
 public:
  RowsProduct(const MatmulArgs& args, const Weight& weight, const StepUnpacker& unpacker, const PackedX& x,
              RowsScratch* scratch)
      : args_(args),
        weight_(weight),
        unpacker_(unpacker),
        x_(x),
        s_(scratch),
        steps_(args.format.group_size / kStep),
        round_(kBlocks == 1 && 2 * steps_ <= kMaxRoundSteps ? 2 : 1) {}

  // Rows n .. n+32 of w.
  void Run(int64_t n, int64_t m0) {
    n_ = n;
    std::memset(s_->sums, 0, sizeof s_->sums);
    Unpack(0);
    for (int64_t first = 0; first < weight_.groups; first += kScaleGroups) {
      const int64_t last = Least(weight_.groups, first + kScaleGroups);
      for (int half = 0; half < 2; ++half)
        FillScales(weight_, n + half * kSide, first, last - first, unpacker_.centre(), &s_->scales[half]);
      int64_t waiting = first;
      for (int64_t group = first; group < last; group += round_) {
        Multiply(group, last);
        Unpack(group + round_);
        for (; waiting < group; waiting += round_) Scale(waiting, first, last);
        StoreProducts(group);
      }
      for (; waiting < last; waiting += round_) Scale(waiting, first, last);
    }
    for (int half = 0; half < 2 && n + half * kSide < args_.N; ++half)
      for (int block = 0; block < kBlocks; ++block)
        WriteTile(args_, x_, m0, block, n + half * kSide, s_->sums[half * kBlocks + block]);
  }

 private:
  int Parity(int64_t group) const { return static_cast<int>(group / round_ % 2); }

  void Unpack(int64_t group) const {
    const int64_t last = Least(weight_.groups, group + round_);
    const int64_t rows = Least(kRowBlock, weight_.rows - n_), bytes = unpacker_.step_bytes();
    const uint8_t* w = weight_.packed + n_ * weight_.row_bytes;
    if (n_ + kRowBlock < weight_.rows) Prefetch(w + kRowBlock * weight_.row_bytes, group, last);
    auto* codes = s_->codes[Parity(group)];
    for (int64_t step = group * steps_; step < last * steps_; ++step, ++codes)
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t first = Least(half * kSide, rows - 1), count = Most(1, Least(kSide, rows - first));
        unpacker_.Tile(w + first * weight_.row_bytes + step * bytes, weight_.row_bytes, count, (*codes)[half]);
      }
  }

  // The same columns of the next rows, into the second-level cache.
  void Prefetch(const uint8_t* w, int64_t group, int64_t last) const {
    const int64_t bytes = unpacker_.step_bytes() * steps_, rows = Least(kRowBlock, weight_.rows - n_ - kRowBlock);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t at = group * bytes; at < last * bytes; at += 64)
        _mm_prefetch(reinterpret_cast<const char*>(w + r * weight_.row_bytes + at), _MM_HINT_T1);
  }

  void Multiply(int64_t group, int64_t last) const {
    ZeroTile<0>(), ZeroTile<1>(), ZeroTile<2>(), ZeroTile<3>();
    const auto* codes = s_->codes[Parity(group)];
    if constexpr (kBlocks == 2) {
      for (int64_t step = 0; step < steps_; ++step) MultiplyStep<0, 2, 1, 3>(codes[step], group * steps_ + step);
    } else if (round_ == 1 || group + 1 == last) {
      for (int64_t step = 0; step < steps_; ++step) MultiplyStep<0, 1, 0, 1>(codes[step], group * steps_ + step);
    } else {  // in turn, since a product takes as long as 4 others until the next can add to it
      for (int64_t step = 0; step < steps_; ++step) {
        MultiplyStep<0, 1, 0, 1>(codes[step], group * steps_ + step);
        MultiplyStep<2, 3, 2, 3>(codes[steps_ + step], (group + 1) * steps_ + step);
      }
    }
  }

  // Result tiles: kTop and kBottom for the halves of the rows; with two blocks of columns kTop2 and kBottom2 as well.
  template <int kTop, int kBottom, int kTop2, int kBottom2>
  JAXQ_INLINE void MultiplyStep(const uint16_t (*codes)[kHalves], int64_t step) const {
    LoadTile<4>(codes[0]);
    LoadTile<5>(codes[1]);
    for (int64_t part = 0; part < x_.parts; ++part) {
      const uint16_t* tile = x_.Tile(step, part);
      LoadTile<6>(tile);
      DotTiles<kTop, 4, 6>();
      DotTiles<kBottom, 5, 6>();
      if constexpr (kBlocks == 2) {
        LoadTile<7>(tile + kHalves);
        DotTiles<kTop2, 4, 7>();
        DotTiles<kBottom2, 5, 7>();
      }
    }
  }

  void StoreProducts(int64_t group) const {
    auto* products = s_->products[Parity(group)];
    StoreTile<0>(products[0]);
    StoreTile<1>(products[1]);
    if (kBlocks == 1 && round_ == 1) return;
    StoreTile<2>(products[2]);
    StoreTile<3>(products[3]);
  }

  // A round's products; `first` is the group that the scales begin with.
  void Scale(int64_t group, int64_t first, int64_t last) const {
    const auto* tiles = s_->products[Parity(group)];
    const float* x = x_.sums + group * kBlocks * kSide;
    for (int64_t half = 0; half < 2; ++half) {
      const Products round[2] = {{tiles[kBlocks * half], x, group - first},
                                 {tiles[2 + half], x + kSide, group - first + 1}};  // of one block of columns only
      AddGroups<kBlocks>(weight_.format.affine(), Least(round_, last - group), round, s_->scales[half], 0, kSide,
                         s_->sums[half * kBlocks]);
    }
  }

  const MatmulArgs& args_;
  const Weight& weight_;
  const StepUnpacker& unpacker_;
  const PackedX& x_;
  RowsScratch* const s_;
  const int64_t steps_, round_;
  int64_t n_ = 0;
};

// The rows of x that fit in two blocks of columns.
Outcome MatmulRows(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  constexpr int64_t kTaskBlocks = 2;  // row blocks per task
  const StepUnpacker unpacker(args.format);
  const StepSplitter splitter(args, unpacker);
  const int64_t parts = PartsOf(args.x_dtype), steps = args.K / kStep;
  PackedX x;
  x.rows = args.M, x.blocks = Ceil(args.M, kSide), x.parts = parts;
  const int64_t tiles = steps * x.parts * x.blocks * kHalves, sums = weight.groups * x.blocks * kSide;
  const Scratch scratch(Room<uint16_t>(tiles) + Room<float>(sums) + parallel.slots() * Room<RowsScratch>(1));
  if (!scratch.ok()) return Outcome::kNoMemory;
  char* cursor = scratch.data();
  x.tiles = Take<uint16_t>(&cursor, tiles), x.sums = Take<float>(&cursor, sums);
  constexpr int64_t kPackGroups = 16;
  parallel.For(Ceil(weight.groups, kPackGroups), [&](int64_t task, int) {
    const int64_t last = Least(weight.groups, (task + 1) * kPackGroups);
    for (int64_t group = task * kPackGroups; group < last; ++group)
      for (int64_t block = 0; block < x.blocks; ++block) PackGroup(args, splitter, 0, block, group, x);
  });
  parallel.For(Ceil(args.N, kTaskBlocks * kRowBlock), [&](int64_t task, int slot) {
    const TileScope tiles_configured;
    auto* mine = reinterpret_cast<RowsScratch*>(cursor + slot * Room<RowsScratch>(1));
    const int64_t last = Least(args.N, (task + 1) * kTaskBlocks * kRowBlock);
    for (int64_t n = task * kTaskBlocks * kRowBlock; n < last; n += kRowBlock) {
      if (x.blocks == 1)
        RowsProduct<1>(args, weight, unpacker, x, mine).Run(n, 0);
      else
        RowsProduct<2>(args, weight, unpacker, x, mine).Run(n, 0);
    }
  });
  return Outcome::kDone;
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_AMX_ROWS_INL_H_
