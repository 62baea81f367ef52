// The blocked matrix product of matmul-inl.h: y[M, J] = x[M, L] by a dequantized weight, where J is N and L is K for
// transpose=True, and the other way round for transpose=False.

#ifndef JAXQ_KERNELS_CPU_GEMM_INL_H_
#define JAXQ_KERNELS_CPU_GEMM_INL_H_

#include "simd-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kTileColumns = kTileVectors * kLanes;
constexpr int64_t kPanelColumns = 128;  // J per panel; a multiple of every tile and of every group
constexpr int64_t kPanelSteps = 256;    // L per panel; a multiple of every group
constexpr int64_t kTaskPanels = 4;     // panels side by side per task at most, transpose=False: see MultiplyColumns
constexpr int64_t kTaskSums = 256 << 10;  // bytes of their sums, which should stay in the second-level cache
constexpr int64_t kPassBytes = 8 << 20;  // of x, packed as floats, at a time

// The scratch of one worker.
struct PanelScratch {
  float panel[kPanelColumns * kPanelSteps];  // [J / kTileColumns][L][kTileColumns]
  uint8_t codes[kPanelSteps + 64];
  float scales[kLanes][kPanelSteps / 16], biases[kLanes][kPanelSteps / 16];
};

// Columns n0 .. n0+kLanes of a panel: rows of w, transposed. Rows past the end give zeros.
template <Kind kKind, int kBits>
void TransposedColumns(const Weight& weight, int64_t n0, int64_t first, int64_t steps, float* out, PanelScratch* s) {
  constexpr int64_t kVectors = 16 / kLanes;
  const int64_t g = weight.format.group_size, rows = Least(kLanes, weight.rows - n0);
  for (int64_t r = 0; r < rows; ++r) {
    weight.Scales(n0 + r, first / g, steps / g, s->scales[r]);
    weight.Biases(n0 + r, first / g, steps / g, s->biases[r]);
  }
  const uint8_t* w = weight.packed + n0 * weight.row_bytes + first / 8 * kBits;
  for (int64_t k = 0; k < steps; k += 16, w += 2 * kBits) {
    const int64_t group = k / g;
    F block[kVectors][kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      F values[kVectors];
      if (r < rows) PackedValues<kKind, kBits>(w + r * weight.row_bytes, values);
      for (int64_t v = 0; v < kVectors; ++v)
        block[v][r] = r < rows ? Fma(values[v], Set1(s->scales[r][group]), Set1(s->biases[r][group])) : Zero();
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      Transpose(block[v]);
      for (int64_t i = 0; i < kLanes; ++i) Store(out + (k + v * kLanes + i) * kTileColumns, block[v][i]);
    }
  }
}

// panel <- w[first : first+columns, l0 : l0+steps].T
template <Kind kKind, int kBits>
void TransposedPanel(const Weight& weight, int64_t first, int64_t columns, int64_t l0, int64_t steps, PanelScratch* s) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    float* out = s->panel + j / kTileColumns * kTileColumns * steps + j % kTileColumns;
    TransposedColumns<kKind, kBits>(weight, first + j, l0, steps, out, s);
  }
  for (int64_t j = RoundUp(columns, kLanes); j % kTileColumns != 0; j += kLanes) {
    float* out = s->panel + j / kTileColumns * kTileColumns * steps + j % kTileColumns;
    for (int64_t l = 0; l < steps; ++l) Store(out + l * kTileColumns, Zero());
  }
}

// panel <- w[l0 : l0+steps, first : first+columns]. Fetches what lies `ahead` bytes further.
template <Kind kKind>
void PlainPanel(const Weight& weight, int64_t first, int64_t columns, int64_t l0, int64_t steps, int64_t ahead,
                PanelScratch* s) {
  const int64_t g = weight.format.group_size;
  for (int64_t l = 0; l < steps; ++l) {
    // Short pieces of many rows, which the hardware does not foresee. (An address past the end does nothing.)
    __builtin_prefetch(weight.packed + (l0 + l) * weight.row_bytes + first / 8 * weight.format.bits + ahead);
    weight.Codes(l0 + l, first, columns, s->codes);
    weight.Scales(l0 + l, first / g, columns / g, s->scales[0]);
    weight.Biases(l0 + l, first / g, columns / g, s->biases[0]);
    const auto at = [&](int64_t j) { return s->panel + (j / kTileColumns * steps + l) * kTileColumns + j % kTileColumns; };
    for (int64_t group = 0; group < columns / g; ++group) {
      const F scale = Set1(s->scales[0][group]), bias = Set1(s->biases[0][group]);
      for (int64_t j = group * g; j < (group + 1) * g; j += kLanes)
        Store(at(j), Fma(Values<kKind>(s->codes + j), scale, bias));
    }
    for (int64_t j = columns; j % kTileColumns != 0; j += kLanes) Store(at(j), Zero());
  }
}

// sums[kRows][kPanelColumns apart] += x[steps][kRows] by panel[steps][kTileColumns], all in registers.
template <int kRows>
JAXQ_INLINE void MultiplyTile(const float* x, const float* panel, int64_t steps, float* sums) {
  F acc[kRows][kTileVectors];
  JAXQ_UNROLL
  for (int r = 0; r < kRows; ++r)
    JAXQ_UNROLL
    for (int v = 0; v < kTileVectors; ++v) acc[r][v] = Load(sums + r * kPanelColumns + v * kLanes);
  for (int64_t l = 0; l < steps; ++l, x += kRows, panel += kTileColumns) {
    F w[kTileVectors];
    JAXQ_UNROLL
    for (int v = 0; v < kTileVectors; ++v) w[v] = Load(panel + v * kLanes);
    JAXQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const F xr = Set1(x[r]);
      JAXQ_UNROLL
      for (int v = 0; v < kTileVectors; ++v) acc[r][v] = Fma(xr, w[v], acc[r][v]);
    }
  }
  JAXQ_UNROLL
  for (int r = 0; r < kRows; ++r)
    JAXQ_UNROLL
    for (int v = 0; v < kTileVectors; ++v) Store(sums + r * kPanelColumns + v * kLanes, acc[r][v]);
}

template <int kRows>
void MultiplyRows(int64_t rows, const float* x, const float* panel, int64_t steps, float* sums) {
  if (rows == kRows) return MultiplyTile<kRows>(x, panel, steps, sums);
  if constexpr (kRows > 1) MultiplyRows<kRows - 1>(rows, x, panel, steps, sums);
}

// x[m0 : m0+rows] as floats in tiles [L][rows of the tile]; the last tile may have fewer rows.
void PackX(const MatmulArgs& args, int64_t L, int64_t m0, int64_t rows, float* out) {
  constexpr int64_t kBlock = 64;
  float lines[kTileRows][kBlock];
  for (int64_t l = 0; l < L; l += kBlock) {
    const int64_t steps = Least(kBlock, L - l);
    for (int64_t r = 0; r < rows; ++r) ToFloats(args.x_dtype, args.x, (m0 + r) * L + l, steps, lines[r]);
    for (int64_t i = 0; i < steps; ++i)
      for (int64_t r = 0; r < rows; ++r) out[(l + i) * rows + r] = lines[r][i];
  }
}

// One task: columns j0 .. j0+width of the result for rows m0 .. m0+rows. x: tiles of PackX; sums: [panel][rows, kPanelColumns].
//
// transpose=False takes a few panels side by side before it goes on along the sum: a row of a panel is one cache line of
// w or two, and each row lies in a page of its own.
void MultiplyColumns(const MatmulArgs& args, const Weight& weight, int64_t j0, int64_t width, int64_t m0, int64_t rows,
                     const float* x, float* sums, PanelScratch* s) {
  const int64_t L = args.transpose ? args.K : args.N, J = args.transpose ? args.N : args.K;
  const int64_t panel_bytes = kPanelColumns / 8 * weight.format.bits, sums_room = rows * kPanelColumns;
  const int64_t panels = Ceil(width, kPanelColumns);
  std::memset(sums, 0, static_cast<size_t>(panels * sums_room) * sizeof(float));
  for (int64_t l = 0; l < L; l += kPanelSteps) {
    const int64_t steps = Least(kPanelSteps, L - l);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = j0 + p * kPanelColumns, columns = Least(kPanelColumns, j0 + width - first);
      const int64_t ahead = p + 1 < panels ? panel_bytes : kPanelSteps * weight.row_bytes - p * panel_bytes;
      WithCodes(weight, [&](auto kind, auto bits) {
        if (args.transpose)
          TransposedPanel<decltype(kind)::value, decltype(bits)::value>(weight, first, columns, l, steps, s);
        else
          PlainPanel<decltype(kind)::value>(weight, first, columns, l, steps, ahead, s);
      });
      for (int64_t m = 0; m < rows; m += kTileRows) {
        const int64_t tile = Least(kTileRows, rows - m);
        float* out = sums + p * sums_room + m * kPanelColumns;
        for (int64_t j = 0; j < columns; j += kTileColumns)
          MultiplyRows<kTileRows>(tile, x + m * L + l * tile, s->panel + j * steps, steps, out + j);
      }
    }
  }
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = j0 + p * kPanelColumns, columns = Least(kPanelColumns, j0 + width - first);
    for (int64_t m = 0; m < rows; ++m)
      FromFloats(args.x_dtype, sums + p * sums_room + m * kPanelColumns, columns, args.y, (m0 + m) * J + first);
  }
}

Outcome MatmulPanels(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  const int64_t L = args.transpose ? args.K : args.N, J = args.transpose ? args.N : args.K;
  const int64_t fit = Most(kPassBytes / (L * 4) / kTileRows, 4) * kTileRows, pass = Least(args.M, fit);
  const int64_t fair = Ceil(J, kPanelColumns * 4 * parallel.slots());  // every worker should have a few tasks
  const int64_t panels = Most(1, Least(Least(kTaskPanels, fair), kTaskSums / (pass * kPanelColumns * 4)));
  const int64_t width = (args.transpose ? 1 : panels) * kPanelColumns;
  const int64_t per_slot = Room<PanelScratch>(1) + Room<float>(pass * width);
  const Scratch scratch(Room<float>(pass * L) + parallel.slots() * per_slot);
  if (!scratch.ok()) return Outcome::kNoMemory;
  char* cursor = scratch.data();
  float* x = Take<float>(&cursor, pass * L);
  for (int64_t m0 = 0; m0 < args.M; m0 += pass) {
    const int64_t rows = Least(pass, args.M - m0);
    parallel.For(Ceil(rows, kTileRows), [&](int64_t task, int) {
      const int64_t m = task * kTileRows;
      PackX(args, L, m0 + m, Least(kTileRows, rows - m), x + m * L);
    });
    parallel.For(Ceil(J, width), [&](int64_t task, int slot) {
      char* mine = cursor + slot * per_slot;
      auto* s = Take<PanelScratch>(&mine, 1);
      const int64_t j0 = task * width, columns = Least(width, J - j0);
      MultiplyColumns(args, weight, j0, columns, m0, rows, x, reinterpret_cast<float*>(mine), s);
    });
  }
  return Outcome::kDone;
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_GEMM_INL_H_
