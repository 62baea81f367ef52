// More rows of x, transpose=True, with Arm's matrix instructions: one multiplies 2 rows of w by 2 rows of x, 16 bytes
// of each, into a 2 by 2 block of sums. The including file defines what a block is made of, in its namespace:
//
//   struct Block
//     kDepth                         codes of a row in 16 bytes
//     kParts                         blocks that make one result: x is split into so many parts
//     kPairs                         pairs of rows of x in registers
//     Sums, Start()                  a block's sums, and zero
//     Multiply(sums, w, x)           sums + w * x
//     Join(const Sums* parts)        the parts of a result as 4 floats, before scale and unit
//     Centre(weight)                 what FillPair subtracts from the codes
//     FillPair(weight, codes0, codes1, depth, out)   two rows of unpacked codes as [depth/kDepth] blocks, 64 bytes
//     apart SplitX(args, m, group, out)    one group of one row: [g/kDepth][kParts] half blocks, 16*2*kParts*kPairs
//     bytes apart
//                                    and 32*kPairs for the part; its unit and its sum. False to decline the call.

#ifndef JAXQ_KERNELS_CPU_NEON_MMLA_INL_H_
#define JAXQ_KERNELS_CPU_NEON_MMLA_INL_H_

#include "simd-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kMmlaLeastRows = 4;
constexpr int64_t kTileW = 8;                  // rows of w in registers: 4 pairs
constexpr int64_t kTileX = 2 * Block::kPairs;  // rows of x
constexpr int64_t kPanelW = 64;                // rows of w per task
constexpr int64_t kPanelCodes = 512;           // codes of each at a time
constexpr int64_t kMmlaPassBytes = 8 << 20;    // of packed x at a time
constexpr int64_t kMmlaPassRows = 512;
constexpr int64_t kTileFloats = kTileW * kTileX;

// kTileX rows of x: blocks [K/kDepth][kParts][kPairs], units and sums [G][kTileX].
struct TileX {
  uint8_t* blocks;
  float* units;
  float* sums;
};

// kPanelW rows of w: blocks [tile][kPanelCodes/kDepth][4], and [group][row][2] of scales and biases, each twice over.
struct PanelW {
  uint8_t blocks[kPanelW * kPanelCodes / Block::kDepth * 8];
  float scales[kPanelCodes / 16][kPanelW][2], biases[kPanelCodes / 16][kPanelW][2];
  uint8_t codes[2][kPanelCodes + 64];
};

constexpr int64_t kTileBytes = kTileW * kPanelCodes / Block::kDepth * 8;

void FillPanel(const Weight& weight, int64_t n, int64_t rows, int64_t first, int64_t groups, PanelW* out) {
  const int64_t g = weight.format.group_size, depth = groups * g;
  for (int64_t r = 0; r < RoundUp(rows, kTileW); r += 2) {
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t row = n + Least(r + i, rows - 1);
      float scales[kPanelCodes / 16], biases[kPanelCodes / 16];
      weight.Codes(row, first * g, depth, out->codes[i]);
      weight.Scales(row, first, groups, scales);
      weight.Biases(row, first, groups, biases);
      for (int64_t j = 0; j < groups; ++j) {
        const float bias = __builtin_fmaf(scales[j], Block::Centre(weight), biases[j]);
        for (int twice = 0; twice < 2; ++twice)
          out->scales[j][r + i][twice] = scales[j], out->biases[j][r + i][twice] = bias;
      }
    }
    uint8_t* blocks = out->blocks + r / kTileW * kTileBytes + r % kTileW / 2 * 16;
    Block::FillPair(weight, out->codes[0], out->codes[1], depth, blocks);
  }
}

// One tile: all groups of a panel, added to sums[4 pairs of w][kPairs][4].
void MultiplyTile(const uint8_t* w, const PanelW& panel, int64_t row, const TileX& x, int64_t first, int64_t groups,
                  int64_t g, float* sums) {
  const int64_t blocks = g / Block::kDepth;
  const uint8_t* xs = x.blocks + first * blocks * Block::kParts * Block::kPairs * 16;
  for (int64_t j = 0; j < groups; ++j) {
    typename Block::Sums acc[4][Block::kPairs][Block::kParts];
    for (auto& pair : acc)
      for (auto& column : pair)
        for (auto& part : column) part = Block::Start();
    for (int64_t b = 0; b < blocks; ++b, w += 64) {
      const uint8x16_t rows[4] = {vld1q_u8(w), vld1q_u8(w + 16), vld1q_u8(w + 32), vld1q_u8(w + 48)};
      for (int part = 0; part < Block::kParts; ++part) {
        for (int column = 0; column < Block::kPairs; ++column, xs += 16) {
          const uint8x16_t right = vld1q_u8(xs);
          for (int pair = 0; pair < 4; ++pair)
            acc[pair][column][part] = Block::Multiply(acc[pair][column][part], rows[pair], right);
        }
      }
    }
    const float* units = x.units + (first + j) * kTileX;
    const float* x_sums = x.sums + (first + j) * kTileX;
    for (int pair = 0; pair < 4; ++pair) {
      const F scale = Load(panel.scales[j][row + 2 * pair]), bias = Load(panel.biases[j][row + 2 * pair]);
      for (int column = 0; column < Block::kPairs; ++column) {
        const float32x2_t unit = vld1_f32(units + 2 * column), x_sum = vld1_f32(x_sums + 2 * column);
        float* out = sums + (pair * Block::kPairs + column) * 4;
        const F biased = Fma(bias, vcombine_f32(x_sum, x_sum), Load(out));
        Store(out, Fma(Block::Join(acc[pair][column]), Mul(scale, vcombine_f32(unit, unit)), biased));
      }
    }
  }
}

// Results of one tile, rows m .. of x by rows n .. of w.
void WriteTile(const MatmulArgs& args, int64_t m, int64_t rows, int64_t n, const float* sums) {
  const int64_t count = Least(kTileW, args.N - n);
  for (int64_t r = 0; r < rows; ++r) {
    float out[kTileW];
    for (int64_t i = 0; i < kTileW; i += 4) {
      const float* at = sums + (i / 2 * Block::kPairs + r / 2) * 4;
      const F first = Load(at), second = Load(at + Block::kPairs * 4);
      Store(out + i, r % 2 ? vuzp2q_f32(first, second) : vuzp1q_f32(first, second));
    }
    FromFloats(args.x_dtype, out, count, args.y, (m + r) * args.N + n);
  }
}

class MmlaProduct {
 public:
  MmlaProduct(const MatmulArgs& args, const Weight& weight, const Parallel& parallel)
      : args_(args), weight_(weight), parallel_(parallel), g_(args.format.group_size), groups_(args.groups()) {}

  Outcome Run() {
    const int64_t x_bytes = args_.K / Block::kDepth * Block::kParts * Block::kPairs * 16;
    const int64_t fit = Least(Most(1, kMmlaPassBytes / x_bytes), kMmlaPassRows / kTileX);
    const int64_t tiles = Least(fit, Ceil(args_.M, kTileX));
    const int64_t x_room = Room<uint8_t>(x_bytes) + 2 * Room<float>(groups_ * kTileX);
    const int64_t slot_room = Room<PanelW>(1) + Room<float>(tiles * kPanelW / kTileW * kTileFloats);
    const Scratch scratch(tiles * x_room + parallel_.slots() * slot_room);
    if (!scratch.ok()) return Outcome::kNoMemory;
    char* x = scratch.data();
    char* slots = x + tiles * x_room;
    for (int64_t m0 = 0; m0 < args_.M; m0 += tiles * kTileX) {
      const int64_t count = Least(tiles, Ceil(args_.M - m0, kTileX));
      bool failed = false;
      parallel_.For(count, [&](int64_t tile, int) {
        if (!PackTile(m0 + tile * kTileX, At(x, x_room, tile))) __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      });
      if (failed) return Outcome::kDeclined;
      parallel_.For(Ceil(args_.N, kPanelW), [&](int64_t task, int slot) {
        char* mine = slots + slot * slot_room;
        auto* panel = Take<PanelW>(&mine, 1);
        Columns(task * kPanelW, m0, count, x, x_room, panel, reinterpret_cast<float*>(mine));
      });
    }
    return Outcome::kDone;
  }

 private:
  TileX At(char* x, int64_t room, int64_t tile) const {
    char* cursor = x + tile * room;
    TileX out;
    out.units = Take<float>(&cursor, groups_ * kTileX), out.sums = Take<float>(&cursor, groups_ * kTileX);
    out.blocks = reinterpret_cast<uint8_t*>(cursor);
    return out;
  }

  bool PackTile(int64_t m, const TileX& out) const {
    const int64_t group_bytes = g_ / Block::kDepth * Block::kParts * Block::kPairs * 16;
    if (m + kTileX > args_.M) {  // rows past the end are zeros
      std::memset(out.blocks, 0, static_cast<size_t>(groups_ * group_bytes));
      std::memset(out.units, 0, static_cast<size_t>(groups_ * kTileX) * sizeof(float));
      std::memset(out.sums, 0, static_cast<size_t>(groups_ * kTileX) * sizeof(float));
    }
    for (int64_t r = 0; r < Least(kTileX, args_.M - m); ++r) {
      for (int64_t group = 0; group < groups_; ++group) {
        uint8_t* blocks = out.blocks + group * group_bytes + r * 8;
        float* unit = out.units + group * kTileX + r;
        if (!Block::SplitX(args_, m + r, group, blocks, unit, out.sums + group * kTileX + r)) return false;
      }
    }
    return true;
  }

  // y[m0 : , n : n+kPanelW] for `count` tiles of x.
  void Columns(int64_t n, int64_t m0, int64_t count, char* x, int64_t x_room, PanelW* panel, float* sums) const {
    const int64_t rows = Least(kPanelW, args_.N - n), per_panel = kPanelCodes / g_, tiles = Ceil(rows, kTileW);
    std::memset(sums, 0, static_cast<size_t>(count * tiles * kTileFloats) * sizeof(float));
    for (int64_t first = 0; first < groups_; first += per_panel) {
      const int64_t groups = Least(per_panel, groups_ - first);
      FillPanel(weight_, n, rows, first, groups, panel);
      for (int64_t m = 0; m < count; ++m)
        for (int64_t tile = 0; tile < tiles; ++tile)
          MultiplyTile(panel->blocks + tile * kTileBytes, *panel, tile * kTileW, At(x, x_room, m), first, groups, g_,
                       sums + (m * tiles + tile) * kTileFloats);
    }
    for (int64_t m = 0; m < count; ++m)
      for (int64_t tile = 0; tile < tiles; ++tile)
        WriteTile(args_, m0 + m * kTileX, Least(kTileX, args_.M - m0 - m * kTileX), n + tile * kTileW,
                  sums + (m * tiles + tile) * kTileFloats);
  }

  const MatmulArgs& args_;
  const Weight& weight_;
  const Parallel& parallel_;
  const int64_t g_, groups_;
};

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_NEON_MMLA_INL_H_
