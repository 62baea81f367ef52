// transpose=True for x of bfloat16 whose rows fill more than one tile: w is dequantized into 1 or 2 bfloat16 parts,
// which hold its scaled codes exactly, and sums stay in tiles for the whole of K.
//
// A chunk of up to 4 blocks of 16 rows of x leaves room for one block of 16 rows of w at a time. Its rows are dequantized
// a few groups ahead, into a ring, one after each product or two of tiles: so the vector units work while the tile unit
// does. What all depends on is the first-level cache: on an Emerald Rapids a line that is stored costs 4 cycles if it is
// not there, and x, which comes from the second level, drives out all that is not used soon. A ring of twice as many
// groups took a quarter longer.
//
//   A, the weight: 16 rows of scaled codes, less the middle of their range, so that bias and code do not cancel. 2 parts
//   of 8 bits hold the product of a code and a scale of 8 bits, or 11; 1 part holds those of the float modes. Biases meet
//   the sums of x over groups at the end, both in 3 parts, of which products below 2**-24 are left out.
//   B, the rows of x: see amx_pack-inl.h.
//
// (The tile unit takes subnormal numbers for zeros: of w, what is below 2**-126, or the second parts of what is below
// 2**-118.)

#ifndef JAXQ_KERNELS_CPU_AMX_PARTS_INL_H_
#define JAXQ_KERNELS_CPU_AMX_PARTS_INL_H_

#include "amx_pack-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kRing = 3;         // groups of w: one is multiplied, one is ready, one is written
constexpr int64_t kMaxSteps = 4;     // of a group
constexpr int64_t kBiasParts = 3;    // of biases and of the sums of x
constexpr int64_t kChunkBlocks = 4;  // of x, whose sums are in tiles

struct PartsScratch {
  alignas(64) uint16_t ring[kRing * kMaxSteps * 2 * kHalves];
  float sums[kFloats];
  float scales[kSide * kScaleGroups];
};

// Parts of w that hold its scaled codes exactly; 0 if more than 2 are needed.
JAXQ_INLINE int WeightParts(const Format& format, DType scale_dtype) {
  if (!format.affine()) return 1;
  const int scale_bits = scale_dtype == DType::kF32 ? 24 : scale_dtype == DType::kF16 ? 11 : 8;
  return scale_bits + format.bits - 1 <= 16 ? 2 : 0;  // less the centre, a code has a bit less
}

// Stores kParts parts of two vectors, interleaved, a tile apart.
template <int kParts>
JAXQ_INLINE void StoreParts(__m512 even, __m512 odd, uint16_t* out) {
  JAXQ_UNROLL
  for (int part = 0; part < kParts; ++part) {
    _mm512_store_si512(out + part * kHalves, UpperHalves(even, odd));
    even = _mm512_sub_ps(even, Cut(even)), odd = _mm512_sub_ps(odd, Cut(odd));
  }
}

// ---- w

// Rows of one group: `left` of them follow each other `row_bytes` apart from `src` on, and the last one is repeated.
struct GroupRows {
  const uint8_t* src;
  int64_t row_bytes, left;
  const float* scale;  // of the first row; kScaleGroups apart
  uint16_t* out;       // A tiles, [step][part][16][32], from the first row on

  JAXQ_INLINE void Next() {
    _mm_prefetch(reinterpret_cast<const char*>(src + kAheadBytes), _MM_HINT_T0);
    src += --left > 0 ? row_bytes : 0;
    scale += kScaleGroups, out += 32;
  }
};

// Group after group of the rows n .. end of w, 16 rows at a time. At the end, the last 16 rows come again.
class GroupReader {
 public:
  GroupReader(const Weight& weight, int64_t n, int64_t end, float* scales)
      : weight_(weight), bytes_(weight.format.group_size / 8 * weight.format.bits), n_(n), end_(end), scales_(scales) {
    FillScales();
  }

  JAXQ_INLINE GroupRows Rows(uint16_t* out) const {
    return {weight_.packed + n_ * weight_.row_bytes + group_ * bytes_, weight_.row_bytes, weight_.rows - n_,
            scales_ + group_ % kScaleGroups, out};
  }

  void Next() {
    if (++group_ == weight_.groups) group_ = 0, n_ += n_ + kSide < end_ ? kSide : 0;
    if (group_ % kScaleGroups == 0) FillScales();
  }

 private:
  void FillScales() {
    const int64_t count = Least(kScaleGroups, weight_.groups - group_);
    for (int64_t r = 0; r < kSide; ++r)
      for (int64_t i = 0; i < count; i += kSide) {
        const int64_t at = Least(n_ + r, weight_.rows - 1) * weight_.groups + group_ + i;
        _mm512_store_ps(scales_ + r * kScaleGroups + i, LoadScales(weight_, at, FirstLanes(count - i)));
      }
  }

  const Weight& weight_;
  const int64_t bytes_;  // of a group
  int64_t n_, group_ = 0;
  const int64_t end_;
  float* const scales_;
};

// One row after another of groups of kSteps steps of nibbles, through tables of what each code stands for in its group:
// that costs less than to scale and to cut all codes.
template <int kParts, int kSteps>
class NibbleRows {
 public:
  JAXQ_INLINE explicit NibbleRows(const StepUnpacker& unpacker) : shifts_(unpacker.shifts()) {
    alignas(64) float values[16];
    alignas(64) uint16_t upper[32];
    for (int i = 0; i < 16; ++i) values[i] = unpacker.Value(i);
    for (int i = 0; i < 32; ++i) upper[i] = static_cast<uint16_t>(i % 16 * 2 + 1);
    values_ = _mm512_load_ps(values), upper_ = _mm512_load_si512(upper);
  }

  JAXQ_INLINE void Next(GroupRows* rows) const {
    __m512i tables[kParts];
    __m512 v = _mm512_mul_ps(values_, _mm512_set1_ps(*rows->scale));
    JAXQ_UNROLL
    for (int part = 0; part < kParts; ++part) {
      tables[part] = _mm512_permutexvar_epi16(upper_, _mm512_castps_si512(v));
      if (part + 1 < kParts) v = _mm512_sub_ps(v, Cut(v));
    }
    JAXQ_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const __m512i codes = StepUnpacker::Nibbles(rows->src + 16 * step, shifts_);  // of which 5 bits are looked at
      JAXQ_UNROLL
      for (int part = 0; part < kParts; ++part)
        _mm512_store_si512(rows->out + (step * kParts + part) * kHalves,
                           _mm512_permutexvar_epi16(codes, tables[part]));
    }
    rows->Next();
  }

 private:
  __m512i shifts_, upper_;
  __m512 values_;
};

// `count` rows of a group of any format.
template <int kParts>
__attribute__((noinline)) void ReadRows(const StepUnpacker& unpacker, int64_t steps, int64_t count, GroupRows* rows) {
  const int64_t bytes = unpacker.step_bytes();
  GroupRows at = *rows;
  unpacker.With([&](auto&& values) __attribute__((always_inline)) {
    for (int64_t r = 0; r < count; ++r, at.Next())
      for (int64_t i = 0; i < steps; ++i) {
        const __m512i v = values(at.src + i * bytes);
        const __m512 scale = _mm512_set1_ps(*at.scale);
        StoreParts<kParts>(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), scale),
                           _mm512_mul_ps(Cut(_mm512_castsi512_ps(v)), scale), at.out + i * kParts * kHalves);
      }
  });
  *rows = at;
}

// ---- biases

// Biases of 16 rows of w from n on, for codes less their centre, as A tiles of kBiasParts parts, of as many groups as a
// step has codes: groups i and i + half of these stand beside each other. This is row `row` % 16 of tile `row` / 16.
JAXQ_INLINE void BiasRow(const Weight& weight, float centre, int64_t depth, int64_t n, int64_t row, uint16_t* out) {
  const int64_t half = depth / 2, r = row % kSide, first = row / kSide * depth;
  const int64_t at = Least(n + r, weight.rows - 1) * weight.groups;
  const auto biases = [&](int64_t group) __attribute__((always_inline)) {
    const __mmask16 there = FirstLanes(Most(0, Least(half, weight.groups - group)));
    return Fma(LoadScales(weight, at + group, there), Set1(centre),
               LoadSome(weight.scale_dtype, weight.biases, at + group, there));
  };
  StoreParts<kBiasParts>(biases(first), biases(first + half), out + row / kSide * kBiasParts * kHalves + 32 * r);
}

// The sums of a block of x as B tiles in the same order, [step][kBiasParts][512].
void SumTiles(const PackedX& x, int64_t depth, int64_t block, uint16_t* out) {
  const int64_t half = depth / 2;
  for (int64_t first = 0; first < x.groups; first += depth, out += kBiasParts * kHalves)
    for (int64_t i = 0; i < half; ++i) {
      const auto sums = [&](int64_t group) {
        return group < x.groups ? _mm512_load_ps(x.Sums(block, group)) : _mm512_setzero_ps();
      };
      StoreParts<kBiasParts>(sums(first + i), sums(first + half + i), out + 32 * i);
    }
}

// ---- products

// Blocks kBlock .. kBlocks of x, whose sums are in tiles of those numbers, by the parts of w in tiles 4 and 5. x's
// tiles, kHalves apart, take turns in 7 and 6. Before each product `between` is called with its number.
template <int kParts, int kBlocks, int kBlock, typename Between>
JAXQ_INLINE void MultiplyBlocks(const uint16_t* x, Between&& between) {
  if constexpr (kBlock < kBlocks) {
    constexpr int kX = kBlock % 2 == 0 ? 7 : 6;
    between(Constant<kBlock * kParts>());
    DotTiles<kBlock, 4, kX>();
    if constexpr (kParts == 2) {
      between(Constant<kBlock * kParts + 1>());
      DotTiles<kBlock, 5, kX>();
    }
    if constexpr (kBlock + 2 < kBlocks) LoadTile<kX>(x + (kBlock + 2) * kHalves);
    MultiplyBlocks<kParts, kBlocks, kBlock + 1>(x, between);
  }
}

template <int kParts, int kBlocks, typename Between>
JAXQ_INLINE void MultiplyStep(const uint16_t* w, const uint16_t* x, Between&& between) {
  LoadTile<4>(w);
  if constexpr (kParts == 2) LoadTile<5>(w + kHalves);
  LoadTile<7>(x);
  if constexpr (kBlocks > 1) LoadTile<6>(x + kHalves);
  MultiplyBlocks<kParts, kBlocks, 0>(x, between);
}

// Some blocks of 16 rows of x, a chunk of them, by rows of w from a multiple of 16 on.
struct PartsProduct {
  const MatmulArgs& args;
  const Weight& weight;
  const StepUnpacker& unpacker;
  const PackedX& x;
  const uint16_t* sum_tiles;  // [block][step][kBiasParts][512]
  int64_t sum_steps;
  int64_t m0, block;  // the first row of `x` in args.x, and the first block in `x`
  PartsScratch* s;
  uint16_t* biases;  // scratch: [sum_steps][kBiasParts][512]

  // kSteps: of a group whose codes are nibbles; 0 for all others.
  template <int kParts, int kBlocks, int kSteps>
  void Run(int64_t n, int64_t end) const {
    const NibbleRows<kParts, kSteps> nibbles(unpacker);
    const int64_t steps = x.steps / x.groups, length = steps * kParts * kHalves, depth = DepthOf(weight.format);
    const float centre = unpacker.centre();
    GroupReader reader(weight, n, end, s->scales);
    for (int64_t i = 0; i + 1 < kRing; ++i, reader.Next()) {
      GroupRows rows = reader.Rows(s->ring + i * length);
      ReadRows<kParts>(unpacker, steps, kSide, &rows);
    }
    for (int64_t slot = 0; n < end; n += kSide) {
      Zero<kBlocks>();
      const uint16_t* right = x.Tile(block, 0);
      const int64_t bias_rows = sum_steps * kSide;
      for (int64_t group = 0; group < x.groups; ++group, reader.Next()) {
        if (group < bias_rows) BiasRow(weight, centre, depth, n, group, biases);
        const uint16_t* left = s->ring + slot * length;
        GroupRows rows = reader.Rows(s->ring + (slot == 0 ? kRing - 1 : slot - 1) * length);
        if constexpr (kSteps > 0) {
          Group<kParts, kBlocks, kSteps, 0>(left, right, nibbles, &rows);
        } else {
          for (int64_t i = 0; i < steps; ++i)
            MultiplyStep<kParts, kBlocks>(left + i * kParts * kHalves, right + i * kBlocks * kHalves, [&](auto number) {
              if constexpr (number.value == 0) ReadRows<kParts>(unpacker, steps, kSide / steps, &rows);
            });
        }
        right += steps * kBlocks * kHalves;
        slot = slot + 1 == kRing ? 0 : slot + 1;
      }
      for (int64_t row = x.groups; row < bias_rows; ++row) BiasRow(weight, centre, depth, n, row, biases);
      AddBiases<kBlocks>();
      Finish<kBlocks, 0>(n);
    }
  }

 private:
  template <int kBlocks>
  JAXQ_INLINE static void Zero() {
    ZeroTile<0>();
    if constexpr (kBlocks > 1) ZeroTile<1>();
    if constexpr (kBlocks > 2) ZeroTile<2>();
    if constexpr (kBlocks > 3) ZeroTile<3>();
  }

  // The steps of a group, with the 16 rows of a later one spread evenly between its products.
  template <int kParts, int kBlocks, int kSteps, int kStep>
  JAXQ_INLINE static void Group(const uint16_t* left, const uint16_t* right, const NibbleRows<kParts, kSteps>& nibbles,
                                GroupRows* rows) {
    if constexpr (kStep < kSteps) {
      MultiplyStep<kParts, kBlocks>(left, right, [&](auto number) __attribute__((always_inline)) {
        constexpr int kProducts = kParts * kBlocks, kAt = kStep * kProducts + number.value, kAll = kSteps * kProducts;
        JAXQ_UNROLL
        for (int row = kSide * kAt / kAll; row < kSide * (kAt + 1) / kAll; ++row) nibbles.Next(rows);
      });
      Group<kParts, kBlocks, kSteps, kStep + 1>(left + kParts * kHalves, right + kBlocks * kHalves, nibbles, rows);
    }
  }

  // Parts i of biases and j of sums for i + j < kBiasParts.
  template <int kBlocks>
  void AddBiases() const {
    for (int64_t step = 0; step < sum_steps; ++step) {
      const uint16_t* sums = sum_tiles + (block * sum_steps + step) * kBiasParts * kHalves;
      const uint16_t* left = biases + step * kBiasParts * kHalves;
      LoadTile<4>(left), LoadTile<5>(left + kHalves);
      AddBias<3, 2, kBlocks, 0>(sums);
      LoadTile<4>(left + 2 * kHalves);
      AddBias<1, 1, kBlocks, 0>(sums);
    }
  }
  template <int kSumParts, int kParts, int kBlocks, int kBlock>
  JAXQ_INLINE void AddBias(const uint16_t* sums) const {
    if constexpr (kBlock < kBlocks) {
      LoadTile<7>(sums);
      DotTiles<kBlock, 4, 7>();
      if constexpr (kParts == 2) DotTiles<kBlock, 5, 7>();
      if constexpr (kSumParts == 3) {
        LoadTile<7>(sums + kHalves);
        DotTiles<kBlock, 4, 7>(), DotTiles<kBlock, 5, 7>();
        LoadTile<7>(sums + 2 * kHalves);
        DotTiles<kBlock, 4, 7>();
      }
      AddBias<kSumParts, kParts, kBlocks, kBlock + 1>(sums + sum_steps * kBiasParts * kHalves);
    }
  }

  template <int kBlocks, int kBlock>
  JAXQ_INLINE void Finish(int64_t n) const {
    if constexpr (kBlock < kBlocks) {
      StoreTile<kBlock>(s->sums);
      const int64_t m = (block + kBlock) * kSide;
      WriteTile(args, m0 + m, Least(kSide, x.rows - m), n, s->sums);
      Finish<kBlocks, kBlock + 1>(n);
    }
  }
};

template <int kParts, int kBlocks>
void RunSteps(const PartsProduct& product, int64_t n, int64_t end) {
  if (!product.unpacker.nibbles()) return product.Run<kParts, kBlocks, 0>(n, end);
  switch (product.x.steps / product.x.groups) {
    case 1:
      return product.Run<kParts, kBlocks, 1>(n, end);
    case 2:
      return product.Run<kParts, kBlocks, 2>(n, end);
    default:
      return product.Run<kParts, kBlocks, 4>(n, end);
  }
}

template <int kParts>
void RunBlocks(const PartsProduct& product, int64_t blocks, int64_t n, int64_t end) {
  switch (blocks) {
    case 1:
      return RunSteps<kParts, 1>(product, n, end);
    case 2:
      return RunSteps<kParts, 2>(product, n, end);
    case 3:
      return RunSteps<kParts, 3>(product, n, end);
    default:
      return RunSteps<kParts, 4>(product, n, end);
  }
}

// Only where WeightParts are not 0.
Outcome MatmulParts(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  const StepUnpacker unpacker(args.format);
  const int64_t depth = DepthOf(args.format), parts = WeightParts(args.format, args.scale_dtype);
  const StepSplitter splitter(args.x_dtype, unpacker, depth);
  PackedX x = {0, args.K / depth, weight.groups, 1, 1, nullptr, nullptr, nullptr};
  const int64_t sum_steps = args.format.affine() ? Ceil(x.groups, depth) : 0;
  const int64_t tiles = x.steps * kHalves, sum_tiles = sum_steps * kBiasParts * kHalves, sums = weight.groups * kSide;
  // The rows of x are dealt out evenly to as few passes, and in these to as few chunks, as can be.
  const int64_t all = Ceil(args.M, kSide), passes = Ceil(all, Most(1, kPassBytes / (2 * tiles)));
  const int64_t most = Ceil(all, passes);
  const Scratch scratch(Room<uint16_t>(most * tiles) + Room<uint16_t>(most * sum_tiles) + Room<float>(most * sums) +
                        Room<PartsScratch>(parallel.slots()) + Room<uint16_t>(parallel.slots() * sum_tiles));
  if (!scratch.ok()) return Outcome::kNoMemory;
  char* cursor = scratch.data();
  x.tiles = Take<uint16_t>(&cursor, most * tiles);
  auto* const packed_sums = Take<uint16_t>(&cursor, most * sum_tiles);
  x.sums = Take<float>(&cursor, most * sums);
  auto* const slots = Take<PartsScratch>(&cursor, parallel.slots());
  auto* const biases = Take<uint16_t>(&cursor, parallel.slots() * sum_tiles);
  const int64_t task_rows = kSide * Least(kTaskBlocks, Most(1, args.N / (int64_t{4} * parallel.slots() * kSide)));
  for (int64_t m0 = 0; m0 < args.M; m0 += most * kSide) {
    x.rows = Least(most * kSide, args.M - m0);
    x.chunk = Ceil(x.blocks(), Ceil(x.blocks(), kChunkBlocks));
    ForGroups(args, parallel, x, [&](int64_t block, int64_t group) {
      PackGroup(args, splitter, m0 + block * kSide, block, group, x);
    });
    if (sum_steps > 0)
      parallel.For(x.blocks(), [&](int64_t block, int) { SumTiles(x, depth, block, packed_sums + block * sum_tiles); });
    parallel.For(Ceil(args.N, task_rows), [&](int64_t task, int slot) {
      const TileScope tiles_configured(2 * depth);
      const int64_t n = task * task_rows, end = Least(args.N, n + task_rows);
      for (int64_t block = 0; block < x.blocks(); block += x.chunk) {
        uint16_t* const own = biases + slot * sum_tiles;
        const PartsProduct product = {args, weight, unpacker, x, packed_sums, sum_steps, m0, block, slots + slot, own};
        parts == 1 ? RunBlocks<1>(product, x.InChunk(block), n, end) : RunBlocks<2>(product, x.InChunk(block), n, end);
      }
    });
  }
  return Outcome::kDone;
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_AMX_PARTS_INL_H_
