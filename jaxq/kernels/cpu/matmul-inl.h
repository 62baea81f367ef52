// quantized_matmul in float32 over the vector type of simd-inl.h: any format, any sizes.
//
//   few rows of x, transpose=True:   DotRows. Codes become floats in registers and are multiplied along K; a group's
//                                    sum is scaled once, and its bias meets the group's sum of x.
//   few rows of x, transpose=False:  SumColumns. The scale goes into x: y += (x*scale) * codes, along K again.
//   more rows:                       a blocked matrix product: a panel of w, some 128 columns of the result by 256
//                                    steps of the sum, is dequantized into the second-level cache, and used for all x.

#ifndef JAXQ_KERNELS_CPU_MATMUL_INL_H_
#define JAXQ_KERNELS_CPU_MATMUL_INL_H_

#include "simd-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kFewRows = 16;

// ---- transpose=True, few rows

constexpr int64_t kDotBlock = 4096;  // codes whose scales are converted at a time
constexpr int64_t kDotAhead = 8192;  // bytes of w from what is read to what is fetched: the time that memory takes
// Rows of w at a time: sums that do not wait for each other, four at least, as long as an addition takes; and as many
// as fit into 16 registers where vectors are 8 long, else into 32.
constexpr int64_t DotRowsAtATime(int m) { return m <= 2 || kLanes != 8 ? 4 : 2; }
constexpr int64_t kDotTask = 32;  // rows of w per task
constexpr int64_t kDotTile = 4;   // rows of x at a time at most: with more, registers run out

// sum_g bias[g] * xsum[g], as part of a vector of partial sums.
JAXQ_INLINE F DotGroups(const float* a, const float* b, int64_t count, F sum) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum = Fma(Load(a + i), Load(b + i), sum);
  float rest[kLanes] = {};
  for (int64_t j = i; j < count; ++j) rest[j - i] = a[j] * b[j];
  return Add(sum, Load(rest));
}

// A function of its own, since the compiler would copy all of it into each of those below.
__attribute__((noinline)) void DotScales(const Weight& weight, int64_t row, int64_t first, int64_t count, float* scales,
                                         float* biases) {
  weight.Scales(row, first, count, scales);
  if (weight.format.affine()) weight.Biases(row, first, count, biases);
}

// kM rows of x by rows n .. n+rows of w (DotRowsAtATime(kM) at most), to rows m0 .. m0+kM of y.
// x: float[kM, K], xsum: float[kM, G].
template <Kind kKind, int kBits, int kM>
void DotBlock(const MatmulArgs& args, const Weight& weight, int64_t n, int64_t rows, const float* x, const float* xsum,
              int64_t m0) {
  constexpr int64_t kRows = DotRowsAtATime(kM), kVectors = 16 / kLanes;
  const int64_t g = weight.format.group_size, per_block = kDotBlock / g, groups = weight.groups, K = weight.length;
  float scales[kRows][kDotBlock / 16], biases[kDotBlock / 16];
  const uint8_t* w[kRows];
  F totals[kRows][kM];
  JAXQ_UNROLL
  for (int64_t r = 0; r < kRows; ++r) {
    w[r] = weight.packed + (n + Least(r, rows - 1)) * weight.row_bytes;
    JAXQ_UNROLL
    for (F& total : totals[r]) total = Zero();
  }
  for (int64_t group = 0; group < groups; group += per_block) {
    const int64_t count = Least(per_block, groups - group);
    JAXQ_UNROLL
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t row = n + Least(r, rows - 1);
      weight.FetchScales(row + kRows, group, count);
      DotScales(weight, row, group, count, scales[r], biases);
      if (!weight.format.affine()) continue;
      JAXQ_UNROLL
      for (int m = 0; m < kM; ++m) totals[r][m] = DotGroups(biases, xsum + m * groups + group, count, totals[r][m]);
    }
    for (int64_t j = 0; j < count; ++j) {
      F sums[kRows][kM];
      JAXQ_UNROLL
      for (auto& row : sums)
        JAXQ_UNROLL
        for (F& sum : row) sum = Zero();
      JAXQ_UNROLL
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t i = 0; i < g / 8 * kBits; i += 64) __builtin_prefetch(w[r] + kDotAhead + i, 0, 2);
      const float* xg = x + (group + j) * g;
      for (int64_t i = 0; i < g; i += 16) {
        JAXQ_UNROLL
        for (int64_t r = 0; r < kRows; ++r) {
          F values[kVectors];
          PackedValues<kKind, kBits>(w[r], values);
          w[r] += 2 * kBits;
          JAXQ_UNROLL
          for (int64_t v = 0; v < kVectors; ++v)
            JAXQ_UNROLL
            for (int m = 0; m < kM; ++m) sums[r][m] = Fma(values[v], Load(xg + m * K + i + v * kLanes), sums[r][m]);
        }
      }
      JAXQ_UNROLL
      for (int64_t r = 0; r < kRows; ++r)
        JAXQ_UNROLL
        for (int m = 0; m < kM; ++m) totals[r][m] = Fma(sums[r][m], Set1(scales[r][j]), totals[r][m]);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    JAXQ_UNROLL
    for (int m = 0; m < kM; ++m) StoreAs(args.x_dtype, args.y, (m0 + m) * args.N + n + r, Sum(totals[r][m]));
}

// Rows first .. last of w by rows m .. m+height of x.
template <Kind kKind, int kBits, int kM>
void DotRows(const MatmulArgs& args, const Weight& weight, int64_t first, int64_t last, const float* x,
             const float* xsum, int64_t m, int64_t height) {
  if (height < kM) {
    if constexpr (kM > 1) DotRows<kKind, kBits, kM - 1>(args, weight, first, last, x, xsum, m, height);
    return;
  }
  constexpr int64_t kRows = DotRowsAtATime(kM);
  for (int64_t n = first; n < last; n += kRows)
    DotBlock<kKind, kBits, kM>(args, weight, n, Least(kRows, last - n), x + m * args.K, xsum + m * weight.groups, m);
}

Outcome MatmulDot(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  const int64_t g = weight.format.group_size, groups = weight.groups, tiles = Ceil(args.M, kDotTile);
  const Scratch scratch(Room<float>(args.M * args.K) + Room<float>(args.M * groups));
  if (!scratch.ok()) return Outcome::kNoMemory;
  char* cursor = scratch.data();
  float* x = Take<float>(&cursor, args.M * args.K);
  float* xsum = Take<float>(&cursor, args.M * groups);
  ToFloats(args.x_dtype, args.x, 0, args.M * args.K, x);
  for (int64_t at = 0; at < args.M * groups; ++at) {
    F sum = Zero();
    for (int64_t i = 0; i < g; i += kLanes) sum = Add(sum, Load(x + at * g + i));
    xsum[at] = Sum(sum);
  }
  parallel.For(Ceil(args.N, kDotTask), [&](int64_t task, int) {
    const int64_t first = task * kDotTask, last = Least(args.N, first + kDotTask);
    WithCodes(weight, [&](auto kind, auto bits) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t m = tile * args.M / tiles, height = (tile + 1) * args.M / tiles - m;
        DotRows<decltype(kind)::value, decltype(bits)::value, kDotTile>(args, weight, first, last, x, xsum, m, height);
      }
    });
  });
  return Outcome::kDone;
}

// ---- transpose=False, few rows

constexpr int64_t kColumns = 512;    // columns of w per task
constexpr int64_t kColumnRows = 16;  // rows of x at most: with more, a panel of floats is faster
constexpr int64_t kColumnTile = 4;   // rows of x whose sums are in registers
constexpr int64_t kSumRows = 32;     // rows of w whose scales are converted at a time

struct ColumnScratch {
  float scales[kSumRows][kColumns / 16], biases[kSumRows][kColumns / 16];
  float scaled[kSumRows][kColumnTile][kColumns / 16];  // x * scale
  float biased[kColumnRows][kColumns / 16];            // sum of x * bias
  float totals[kColumnRows][kColumns];
};

// totals[m, at : at + kVectors*kLanes] += sum over rows of scaled * codes. w: the codes of the first row from `at` on.
template <Kind kKind, int kBits, int kM, int kVectors>
JAXQ_INLINE void SumStripe(const Weight& weight, const uint8_t* w, int64_t rows, int64_t at, const ColumnScratch& s,
                           float (*totals)[kColumns]) {
  constexpr int kUnit = 16 / kLanes;
  const int64_t g = weight.format.group_size;
  F sums[kM][kVectors];
  int64_t group[kVectors];
  JAXQ_UNROLL
  for (int v = 0; v < kVectors; ++v) group[v] = (at + v * kLanes) / g;
  JAXQ_UNROLL
  for (auto& row : sums)
    JAXQ_UNROLL
    for (F& sum : row) sum = Zero();
  for (int64_t r = 0; r < rows; ++r, w += weight.row_bytes) {
    JAXQ_UNROLL
    for (int first = 0; first < kVectors; first += kUnit) {
      F values[kUnit];
      PackedValues<kKind, kBits>(w + first / kUnit * 2 * kBits, values);
      JAXQ_UNROLL
      for (int v = first; v < first + kUnit; ++v)
        JAXQ_UNROLL
        for (int m = 0; m < kM; ++m)
          sums[m][v] = Fma(values[v - first], Set1(s.scaled[r][m][group[v]]), sums[m][v]);
    }
  }
  JAXQ_UNROLL
  for (int m = 0; m < kM; ++m)
    JAXQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* total = totals[m] + at + v * kLanes;
      Store(total, Add(Load(total), sums[m][v]));
    }
}

// Rows m .. m+kM of x by a block of `rows` rows of w, whose scales are in the scratch. w: the first row's codes.
template <Kind kKind, int kBits, int kM>
void SumTile(const Weight& weight, const uint8_t* w, int64_t rows, int64_t count, const float* x, int64_t stride,
             int64_t m, ColumnScratch* s) {
  const int64_t g = weight.format.group_size;
  // Vectors of sums for each row of x: with those of the codes they fill the registers, 32 of the widest vectors.
  constexpr int kRegisters = kLanes == 8 ? 8 : 16, kVectors = kM == 1 ? 8 : kM == 3 ? kRegisters / 4 : kRegisters / kM;
  for (int64_t r = 0; r < rows; ++r) {
    JAXQ_UNROLL
    for (int i = 0; i < kM; ++i) {
      const float xi = x[(m + i) * stride + r];
      for (int64_t j = 0; j < count / g; ++j) {
        s->scaled[r][i][j] = xi * s->scales[r][j];
        s->biased[m + i][j] += xi * s->biases[r][j];
      }
    }
  }
  int64_t at = 0;
  for (; at + kVectors * kLanes <= count; at += kVectors * kLanes)
    SumStripe<kKind, kBits, kM, kVectors>(weight, w + at / 8 * kBits, rows, at, *s, s->totals + m);
  for (; at < count; at += 16)
    SumStripe<kKind, kBits, kM, 16 / kLanes>(weight, w + at / 8 * kBits, rows, at, *s, s->totals + m);
}

// y[:, first : first+count], count a multiple of group_size and of 16.
template <Kind kKind, int kBits>
void SumColumns(const MatmulArgs& args, const Weight& weight, int64_t first, int64_t count, const float* x,
                ColumnScratch* s) {
  const int64_t g = weight.format.group_size, groups = count / g, tiles = Ceil(args.M, kColumnTile);
  std::memset(s->biased, 0, sizeof s->biased);
  std::memset(s->totals, 0, sizeof s->totals);
  for (int64_t n = 0; n < args.N; n += kSumRows) {
    const int64_t rows = Least(kSumRows, args.N - n);
    const uint8_t* w = weight.packed + n * weight.row_bytes + first / 8 * kBits;
    for (int64_t r = 0; r < rows; ++r) {
      // The next rows': pieces too short for the hardware to foresee. (An address past the end does nothing.)
      const uint8_t* next = w + (r + kSumRows) * weight.row_bytes;
      for (int64_t i = 0; i < count / 8 * kBits; i += 64) __builtin_prefetch(next + i);
      weight.Scales(n + r, first / g, groups, s->scales[r]);
      weight.Biases(n + r, first / g, groups, s->biases[r]);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = tile * args.M / tiles, height = (tile + 1) * args.M / tiles - m;
      if (height == 1) SumTile<kKind, kBits, 1>(weight, w, rows, count, x + n, args.N, m, s);
      if (height == 2) SumTile<kKind, kBits, 2>(weight, w, rows, count, x + n, args.N, m, s);
      if (height == 3) SumTile<kKind, kBits, 3>(weight, w, rows, count, x + n, args.N, m, s);
      if (height == 4) SumTile<kKind, kBits, 4>(weight, w, rows, count, x + n, args.N, m, s);
    }
  }
  for (int64_t m = 0; m < args.M; ++m) {
    for (int64_t j = 0; j < groups; ++j) {
      const F bias = Set1(s->biased[m][j]);
      for (int64_t i = j * g; i < (j + 1) * g; i += kLanes) Store(s->totals[m] + i, Add(Load(s->totals[m] + i), bias));
    }
    FromFloats(args.x_dtype, s->totals[m], count, args.y, m * args.K + first);
  }
}

Outcome MatmulColumns(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  const int64_t room = Room<float>(args.M * args.N);
  const Scratch scratch(room + parallel.slots() * Room<ColumnScratch>(1));
  if (!scratch.ok()) return Outcome::kNoMemory;
  char* cursor = scratch.data();
  float* x = Take<float>(&cursor, args.M * args.N);
  ToFloats(args.x_dtype, args.x, 0, args.M * args.N, x);
  parallel.For(Ceil(args.K, kColumns), [&](int64_t task, int slot) {
    auto* s = reinterpret_cast<ColumnScratch*>(cursor + slot * Room<ColumnScratch>(1));
    const int64_t first = task * kColumns, count = Least(kColumns, args.K - first);
    WithCodes(weight, [&](auto kind, auto bits) {
      SumColumns<decltype(kind)::value, decltype(bits)::value>(args, weight, first, count, x, s);
    });
  });
  return Outcome::kDone;
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#include "gemm-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

Outcome Matmul(const MatmulArgs& args, const Parallel& parallel) {
  const Weight weight(args, args.N, args.K);
  if (args.M > (args.transpose ? kFewRows : kColumnRows)) return MatmulPanels(args, weight, parallel);
  return args.transpose ? MatmulDot(args, weight, parallel) : MatmulColumns(args, weight, parallel);
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_MATMUL_INL_H_
