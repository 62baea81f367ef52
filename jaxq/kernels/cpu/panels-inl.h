// y[M, N] = x[M, K] @ w.T by panels of w (quads-inl.h), for any arithmetic in which a group's products become one sum.
//
// A panel, kPanelRows rows of w by Arithmetic::kDepth codes, stays in the first-level cache while all rows of x meet
// it, a tile of up to Arithmetic::kTile rows at a time; a group's sums are scaled and added to those of the groups
// before. What the next panel is made of is fetched meanwhile.
//
// An Arithmetic has:
//
//   kTile, kDepth         see above; kDepth is a multiple of every group, and divides kMaxPanelGroups of them
//   kPanelBytes           of the codes of a panel
//   kBytes                of x as it is packed, for each value
//   Arithmetic(format)
//   centre()              what a panel subtracts from every code
//   Fill(weight, n, first, depth, codes)   codes <- codes first .. first+depth of rows n .. n+kPanelRows
//   Pack(args, m, height, tile)            tile <- rows m .. m+height of x; false where one cannot be packed
//   Group<kM>(codes, x, g, scales, y)      adds one group, kM rows of x by a panel, to y[kM][kPanelRows]

#ifndef JAXQ_KERNELS_CPU_PANELS_INL_H_
#define JAXQ_KERNELS_CPU_PANELS_INL_H_

#include "quads-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kPanelsPerTask = 4;  // at most

// Rows of x, as many as the tile is high: words in the order in which they are multiplied, K * kBytes / 4 of a row;
// units (where the arithmetic has them) and sums, [G][height].
struct XTile {
  int32_t* words;
  float* units;
  float* sums;
};

// Of a group, for the rows of a panel.
struct GroupScales {
  const float* scales;
  const float* biases;
};

// Rows of x that are multiplied in one go: what they are packed into stays near 12 MiB, or 64 rows.
JAXQ_INLINE int64_t PassRows(const MatmulArgs& args, int64_t bytes_per_value) {
  return Least(args.M, Most((12 << 20) / (args.K * bytes_per_value) / 4 * 4, 64));
}

template <typename Arithmetic>
class PanelProduct {
 public:
  PanelProduct(const MatmulArgs& args, const Weight& weight, const Parallel& parallel)
      : args_(args),
        weight_(weight),
        parallel_(parallel),
        arithmetic_(args.format),
        pass_(PassRows(args, Arithmetic::kBytes)) {}

  Outcome Run() {
    const int64_t groups = args_.groups(), words = pass_ * RowWords();
    const int64_t slot_room = Room<Panel>(1) + Room<float>(pass_ * kPanelRows);
    const Scratch scratch(Room<int32_t>(words) + 2 * Room<float>(pass_ * groups) + parallel_.slots() * slot_room);
    if (!scratch.ok()) return Outcome::kNoMemory;
    char* cursor = scratch.data();
    x_.words = Take<int32_t>(&cursor, words);
    x_.units = Take<float>(&cursor, pass_ * groups);
    x_.sums = Take<float>(&cursor, pass_ * groups);
    // Every worker should have a few tasks.
    const int64_t panels = Ceil(args_.N, kPanelRows), fair = Most(1, panels / (4 * parallel_.slots()));
    const int64_t rows = kPanelRows * Least(kPanelsPerTask, fair);
    for (int64_t m0 = 0; m0 < args_.M; m0 += pass_) {
      rows_ = Least(pass_, args_.M - m0), tiles_ = Ceil(rows_, Arithmetic::kTile);
      if (!Pack(m0)) return Outcome::kDeclined;
      parallel_.For(Ceil(args_.N, rows), [&](int64_t task, int slot) {
        char* mine = cursor + slot * slot_room;
        auto* panel = Take<Panel>(&mine, 1);
        const int64_t end = Least(args_.N, (task + 1) * rows);
        for (int64_t n = task * rows; n < end; n += kPanelRows) Columns(n, m0, panel, reinterpret_cast<float*>(mine));
      });
    }
    return Outcome::kDone;
  }

 private:
  struct Panel {
    alignas(64) uint8_t codes[Arithmetic::kPanelBytes];
    PanelScales<kPanelRows> scales;
  };

  // What comes next is fetched while a panel is multiplied.
  struct Ahead {
    Fetcher codes, scales, biases;
    int64_t code_lines, scale_lines;  // a group

    JAXQ_INLINE void Next() { codes.Next(code_lines), scales.Next(scale_lines), biases.Next(scale_lines); }
  };

  int64_t RowWords() const { return args_.K * Arithmetic::kBytes / 4; }  // of packed x

  // The rows of a pass are shared out evenly, so that no tile is much lower than the others.
  int64_t First(int64_t tile) const { return tile * rows_ / tiles_; }

  XTile Tile(int64_t m) const {
    return {x_.words + m * RowWords(), x_.units + m * args_.groups(), x_.sums + m * args_.groups()};
  }

  bool Pack(int64_t m0) const {
    bool failed = false;
    parallel_.For(tiles_, [&](int64_t tile, int) {
      const int64_t m = First(tile);
      if (!arithmetic_.Pack(args_, m0 + m, First(tile + 1) - m, Tile(m)))
        __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    });
    return !failed;
  }

  // kM or fewer rows of x by a panel, whose codes begin with group `group`, and its scales with `first`.
  template <int kM>
  void Multiply(int64_t height, const Panel& panel, const XTile& x, int64_t group, int64_t groups, int64_t first,
                Ahead* next, float* y) const {
    if (height < kM) {
      if constexpr (kM > 1) Multiply<kM - 1>(height, panel, x, group, groups, first, next, y);
      return;
    }
    const int64_t g = args_.format.group_size;
    for (int64_t j = 0; j < groups; ++j) {
      next->Next();
      const int64_t at = group + j, to = at - first;
      const XTile here = {x.words + at * g * Arithmetic::kBytes / 4 * kM, x.units + at * kM, x.sums + at * kM};
      Arithmetic::template Group<kM>(panel.codes + j * g * Arithmetic::kPanelBytes / Arithmetic::kDepth, here, g,
                                     {panel.scales.scales[to], panel.scales.biases[to]}, y);
      // Else gcc carries y over in registers, of which there are none left.
      asm volatile("" ::: "memory");
    }
  }

  // What the panel of rows n .. and codes k .. is made of, and the scales from `group` on.
  Fetcher Codes(int64_t n, int64_t k) const {
    const int64_t bytes = Least(Arithmetic::kDepth, args_.K - k) / 8 * args_.format.bits;
    return {weight_.packed + n * weight_.row_bytes + k / 8 * args_.format.bits, bytes, Rows(n), weight_.row_bytes};
  }

  Fetcher Scales(const void* base, int64_t n, int64_t group) const {
    const int64_t size = args_.format.affine() ? SizeOf(args_.scale_dtype) : 1, groups = args_.groups();
    return {static_cast<const char*>(base) + (n * groups + group) * size, Least(kMaxPanelGroups, groups - group) * size,
            base ? Rows(n) : 0, groups * size};
  }

  int64_t Rows(int64_t n) const { return Most(0, Least(kPanelRows, args_.N - n)); }

  // y[m0 : m0+rows_, n : n+kPanelRows]
  void Columns(int64_t n, int64_t m0, Panel* panel, float* y) const {
    const int64_t K = args_.K, g = args_.format.group_size, groups = args_.groups(), count = Rows(n);
    Ahead next = {};
    std::memset(y, 0, static_cast<size_t>(rows_ * kPanelRows) * sizeof(float));
    for (int64_t k = 0; k < K; k += Arithmetic::kDepth) {
      const int64_t depth = Least(Arithmetic::kDepth, K - k), group = k / g, last = k + depth;
      const int64_t first = group / kMaxPanelGroups * kMaxPanelGroups, scales = Least(kMaxPanelGroups, groups - first);
      if (group == first) {
        FillScales(weight_, n, count, first, scales, arithmetic_.centre(), &panel->scales);
        const bool more = first + scales < groups;
        const int64_t to = more ? n : n + kPanelRows, from = more ? first + scales : 0;
        next.scales = Scales(weight_.scales, to, from), next.biases = Scales(weight_.biases, to, from);
        next.scale_lines = Ceil(next.scales.lines(), scales * tiles_);
      }
      arithmetic_.Fill(weight_, n, k, depth, panel->codes);
      next.codes = last < K ? Codes(n, last) : Codes(n + kPanelRows, 0);
      next.code_lines = Ceil(next.codes.lines(), depth / g * tiles_);
      for (int64_t tile = 0; tile < tiles_; ++tile) {
        const int64_t m = First(tile), height = First(tile + 1) - m;
        Multiply<Arithmetic::kTile>(height, *panel, Tile(m), group, depth / g, first, &next, y + m * kPanelRows);
      }
    }
    for (int64_t m = 0; m < rows_; ++m)
      FromFloats(args_.x_dtype, y + m * kPanelRows, count, args_.y, (m0 + m) * args_.N + n);
  }

  const MatmulArgs& args_;
  const Weight& weight_;
  const Parallel& parallel_;
  const Arithmetic arithmetic_;
  const int64_t pass_;
  int64_t rows_ = 0, tiles_ = 0;
  XTile x_ = {};
};

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_PANELS_INL_H_
