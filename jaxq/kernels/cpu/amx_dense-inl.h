// More than 32 rows of x in bfloat16: w with its scales inside (amx_parts-inl.h), 32 rows of it by 32 rows of x in the
// four result tiles.
//
// Twice as many products as with bare codes (amx_gemm-inl.h), but none of them has to be stored and scaled, which takes
// the vector units longer than the tile unit takes for a product. Measured on a Sapphire Rapids, products run at the
// tile unit's full speed even if all their tiles come out of the second-level cache; so for a slab of steps the tiles
// of all rows of x stay there while the rows of w pass by, and sums are read and written once per slab. The next 32
// rows of w are dequantized between the products of these, a row at a time, which hides the time that memory takes.

#ifndef JAXQ_KERNELS_CPU_AMX_DENSE_INL_H_
#define JAXQ_KERNELS_CPU_AMX_DENSE_INL_H_

#include "amx_parts-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kPair = 2 * kSide;  // rows of w, and of x, that two tiles hold
constexpr int64_t kMaxPanels = 8;        // of 32 rows of w, that share a slab of x
constexpr int64_t kPassRows = 512;       // of x, whose slab and sums are in the second-level cache
constexpr int64_t kPassBytes = 8 << 20;  // of packed x at a time
constexpr int64_t kLeastTerms = 120;     // below, the bound of a result is too tight for two parts of w

// Rows of x as tiles, [slab][pair of blocks of 16 rows][step][2]: a slab's are side by side.
struct DenseX {
  int64_t steps, slab, pairs;
  uint16_t* tiles;

  static constexpr int64_t kStepHalves = 2 * kHalves + 32;  // for the line, see PartsUnpacker::step_halves
  JAXQ_INLINE uint16_t* Tiles(int64_t pair, int64_t step) const {
    const int64_t first = step / slab * slab, wide = Least(slab, steps - first);
    return tiles + (first * pairs + pair * wide + step - first) * kStepHalves;
  }
};

// 16 rows of x and one step, of which `rows` exist; the rest are zeros.
void PackDense(const MatmulArgs& args, __m512i order, int64_t m, int64_t rows, int64_t step, uint16_t* out) {
  const auto* x = static_cast<const uint16_t*>(args.x) + m * args.K + step * kStep;
  __m512i tile[kSide];
  for (int64_t r = 0; r < kSide; ++r)
    tile[r] = r < rows ? _mm512_permutexvar_epi16(order, _mm512_loadu_si512(x + r * args.K)) : _mm512_setzero_si512();
  TransposeWords(tile);
  for (int64_t i = 0; i < kSide; ++i) _mm512_store_si512(out + 32 * i, tile[i]);
}

class DenseProduct {
 public:
  // rooms: 2 slabs of 32 rows of w. sums: [panel][pair][4 tiles].
  DenseProduct(const Weight& weight, const PartsUnpacker& unpacker, const DenseX& x, uint16_t* const* rooms,
               float* sums)
      : weight_(weight), unpacker_(unpacker), x_(x), rooms_{rooms[0], rooms[1]}, sums_(sums) {}

  // Rows n .. n+32*panels of w, by all of x; `wide`: the last pair has a second block.
  void Run(int64_t n, int64_t panels, bool wide) {
    next_ = {n, 0, 0, Least(x_.slab, x_.steps), rooms_[0]};
    for (int64_t r = 0; r < kPair; ++r) UnpackRow(r);
    for (int64_t first = 0; first < x_.steps; first += x_.slab)
      for (int64_t panel = 0; panel < panels; ++panel) {
        const Slab slab = next_;
        const bool last = panel + 1 == panels;
        next_.panel = last ? 0 : panel + 1, next_.n = n + next_.panel * kPair;
        next_.first = first + (last ? x_.slab : 0), next_.steps = Least(x_.slab, x_.steps - next_.first);
        next_.room = slab.room == rooms_[0] ? rooms_[1] : rooms_[0];
        begun_ = next_.steps > 0 ? 0 : kPair, credit_ = 0;
        for (int64_t pair = 0; pair < x_.pairs; ++pair) {
          float* sums = sums_ + (panel * x_.pairs + pair) * 4 * kFloats;
          if (pair + 1 < x_.pairs || wide)
            Multiply<true>(slab, pair, sums);
          else
            Multiply<false>(slab, pair, sums);
        }
        while (begun_ < kPair) UnpackRow(begun_++);
      }
  }

 private:
  struct Slab {
    int64_t n, panel, first, steps;
    uint16_t* room;
  };

  // One row of the next slab; what comes after that is asked for.
  JAXQ_INLINE void UnpackRow(int64_t r) const {
    const int64_t row = Least(next_.n + r, weight_.rows - 1), after = next_.first + x_.slab;
    if (after < x_.steps) unpacker_.Prefetch(row, after, Least(x_.slab, x_.steps - after));
    unpacker_.Row(row, next_.first, next_.steps, next_.room + r / kSide * kHalves + r % kSide * 32);
  }

  template <bool kWide>
  void Multiply(const Slab& slab, int64_t pair, float* sums) {
    if (slab.first == 0) {
      ZeroTile<0>(), ZeroTile<1>(), ZeroTile<2>(), ZeroTile<3>();
    } else {
      LoadTile<0>(sums);
      LoadTile<2>(sums + 2 * kFloats);
      if constexpr (kWide) LoadTile<1>(sums + kFloats), LoadTile<3>(sums + 3 * kFloats);
    }
    const uint16_t *w = slab.room, *x = x_.Tiles(pair, slab.first);
    const int64_t turns = x_.pairs * slab.steps;
    for (int64_t step = 0; step < slab.steps; ++step, w += unpacker_.step_halves(), x += DenseX::kStepHalves) {
      MultiplyStep<kWide>(w, x);
      for (credit_ += kPair; begun_ < kPair && credit_ >= turns; credit_ -= turns) UnpackRow(begun_++);
    }
    StoreTile<0>(sums);
    StoreTile<2>(sums + 2 * kFloats);
    if constexpr (kWide) StoreTile<1>(sums + kFloats), StoreTile<3>(sums + 3 * kFloats);
  }

  // Tiles 0 to 3, [half of the rows of w][half of the rows of x], += one step.
  template <bool kWide>
  JAXQ_INLINE void MultiplyStep(const uint16_t* w, const uint16_t* x) const {
    LoadTile<6>(x);
    if constexpr (kWide) LoadTile<7>(x + kHalves);
    for (int64_t part = 0; part < unpacker_.parts(); ++part, w += 2 * kHalves) {
      LoadTile<4>(w);
      DotTiles<0, 4, 6>();
      if constexpr (kWide) DotTiles<1, 4, 7>();
      LoadTile<5>(w + kHalves);
      DotTiles<2, 5, 6>();
      if constexpr (kWide) DotTiles<3, 5, 7>();
    }
  }

  const Weight& weight_;
  const PartsUnpacker& unpacker_;
  const DenseX& x_;
  uint16_t* const rooms_[2];
  float* const sums_;
  Slab next_ = {};
  int64_t begun_ = 0, credit_ = 0;  // rows of the next slab; steps since the last one, times 32
};

// More panels per task read x's slab less often, but every worker should have a few tasks.
JAXQ_INLINE int64_t PanelsPerTask(int64_t N, int slots) {
  return Most(1, Least(kMaxPanels, N / (int64_t{4} * slots * kPair)));
}

Outcome MatmulDense(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  const PartsUnpacker unpacker(weight);
  DenseX x = {args.K / kStep, unpacker.MaxSteps(), 0, nullptr};
  const int64_t tiles = x.steps * DenseX::kStepHalves, fit = Most(1, kPassBytes / (tiles * 2));
  const int64_t most = Least(Ceil(args.M, kPair), Least(fit, kPassRows / kPair));
  const int64_t panels = PanelsPerTask(args.N, parallel.slots());
  const int64_t room = x.slab * unpacker.step_halves(), sums = panels * most * 4 * kFloats;
  const int64_t slot_room = 2 * Room<uint16_t>(room) + Room<float>(sums);
  const Scratch scratch(Room<uint16_t>(most * tiles) + parallel.slots() * slot_room);
  if (!scratch.ok()) return Outcome::kNoMemory;
  char* cursor = scratch.data();
  x.tiles = Take<uint16_t>(&cursor, most * tiles);
  alignas(64) uint16_t places[32];
  for (int i = 0; i < 32; ++i) places[i] = static_cast<uint16_t>(unpacker.Order(i));
  const __m512i order = _mm512_load_si512(places);
  for (int64_t m0 = 0; m0 < args.M; m0 += most * kPair) {
    const int64_t rows = Least(most * kPair, args.M - m0), blocks = Ceil(rows, kSide);
    x.pairs = Ceil(rows, kPair);
    constexpr int64_t kPackSteps = 16;
    const int64_t chunks = Ceil(x.steps, kPackSteps);
    parallel.For(blocks * chunks, [&](int64_t task, int) {
      const int64_t block = task / chunks, first = task % chunks * kPackSteps, m = block * kSide;
      for (int64_t step = first; step < Least(x.steps, first + kPackSteps); ++step)
        PackDense(args, order, m0 + m, rows - m, step, x.Tiles(block / 2, step) + block % 2 * kHalves);
    });
    parallel.For(Ceil(args.N, panels * kPair), [&](int64_t task, int slot) {
      const TileScope tiles_configured;
      char* mine = cursor + slot * slot_room;
      uint16_t* w[2] = {Take<uint16_t>(&mine, room), nullptr};
      w[1] = Take<uint16_t>(&mine, room);
      auto* y = Take<float>(&mine, sums);
      const int64_t n = task * panels * kPair, count = Least(panels, Ceil(args.N - n, kPair));
      DenseProduct(weight, unpacker, x, w, y).Run(n, count, blocks % 2 == 0);
      PackedX of_pass;
      of_pass.rows = rows;
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t half = 0; half < 2 * count && n + half * kSide < args.N; ++half)
          WriteTile(args, of_pass, m0, block, n + half * kSide,
                    y + ((half / 2 * x.pairs + block / 2) * 4 + half % 2 * 2 + block % 2) * kFloats);
    });
  }
  return Outcome::kDone;
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_AMX_DENSE_INL_H_
