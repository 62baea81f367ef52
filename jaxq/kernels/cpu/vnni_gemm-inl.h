// More rows of x by a weight of integer codes, transpose=True, with VNNI: float32 accuracy at 4/3 of the speed of
// float32 multiplications, since three exact 8-bit products do the work of one and go four to a lane.
//
// Panels of codes (quads-inl.h), a tile of rows high, are multiplied by the digits of x a group at a time; a group's two
// or three integer sums become one float, which is scaled by the weight's scale times the digits' unit. A panel stays in
// the first-level cache while all rows of x meet it.
//
// Codes of 2, 4 and 8 bits are transposed as they are packed, 32 bits of 16 rows, and then unpacked: a quad has every
// P-th of the word's codes, P = 8/bits, and so has x's.

#ifndef JAXQ_KERNELS_CPU_VNNI_GEMM_INL_H_
#define JAXQ_KERNELS_CPU_VNNI_GEMM_INL_H_

#include "digits-inl.h"
#include "quads-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

// Rows of x in registers: 24 vectors of sums, of 2 for each digit of a row.
constexpr int DigitTile(int digits) { return digits == 3 ? 4 : 6; }

// x in tiles of `height` rows: quads[K/4][height][digits] of 4 digits each, units and sums[G][height].
struct DigitRows {
  const int32_t* quads;
  const float* units;
  const float* sums;
};

struct IntegerPanel {
  alignas(64) uint8_t codes[kQuadTile * kPanelDepth];
  PanelScales scales;
};

// Rows n .. n+kQuadTile of w, any number of bits.
void FillCodes(const Weight& weight, const Unpacker& unpack, int64_t n, int64_t first, int64_t depth, uint8_t* out) {
  for (int64_t r = 0; r < kQuadTile; r += 16) {
    for (int64_t k = 0; k < depth; k += 64) {
      const int64_t codes = Least(64, depth - k);
      QuadBlock(weight, unpack, n + r, first + k, codes, [&](int64_t i, __m512i quads) {
        if (i * 4 < codes) _mm512_storeu_si512(out + (k / 4 + i) * kQuadTile * 4 + r * 4, quads);
      });
    }
  }
}

// The same for 2, 4 and 8 bits, where a word has whole quads: in the order of OrderDigits.
template <int kBits, bool kE2m1>
void FillWords(const Weight& weight, int64_t n, int64_t first, int64_t depth, uint8_t* out) {
  constexpr int64_t kPlanes = 8 / kBits, kWord = 4 * kPlanes, kLine = 16 * kWord;
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << kBits) - 1));
  for (int64_t r = 0; r < kQuadTile; r += 16) {
    const int64_t rows = Least(16, weight.rows - n - r);
    for (int64_t k = 0; k < depth; k += kLine) {
      const uint8_t* src = weight.packed + (n + r) * weight.row_bytes + (first + k) / 8 * kBits;
      const __mmask64 bytes = FirstBytes((depth - k) / 8 * kBits);
      __m512i words[16];
      for (int64_t i = 0; i < 16; ++i, src += weight.row_bytes) {
        // The next 16 rows' bytes: too many short streams for the hardware to follow.
        _mm_prefetch(reinterpret_cast<const char*>(src + 16 * weight.row_bytes), _MM_HINT_T0);
        words[i] = i < rows ? _mm512_maskz_loadu_epi8(bytes, src) : _mm512_setzero_si512();
      }
      TransposeWords(words);
      uint8_t* at = out + k * kQuadTile + r * 4;
      for (int64_t i = 0; i < 16 && k + i * kWord < depth; ++i) {
        JAXQ_UNROLL
        for (int p = 0; p < kPlanes; ++p, at += kQuadTile * 4) {
          __m512i quads = p ? _mm512_srli_epi16(words[i], p * kBits) : words[i];
          if constexpr (kBits != 8) quads = _mm512_and_si512(quads, mask);
          _mm512_storeu_si512(at, kE2m1 ? ShiftedE2m1(quads) : quads);
        }
      }
    }
  }
}

// 16 digits at a time into the order of the quads above.
void OrderDigits(int planes, int64_t count, int8_t* digits) {
  alignas(16) uint8_t from[16];
  for (int i = 0; i < 16; ++i) {
    const int word = i / (4 * planes), at = i % (4 * planes);
    from[i] = static_cast<uint8_t>(word * 4 * planes + at % 4 * planes + at / 4);
  }
  const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(from));
  for (int64_t i = 0; i < count; i += 16) {
    auto* at = reinterpret_cast<__m128i*>(digits + i);
    _mm_storeu_si128(at, _mm_shuffle_epi8(_mm_loadu_si128(at), order));
  }
}

// One group: kM rows of x by 32 rows of w, `quads` quads deep; adds to y[kM][kPanelRows apart].
template <int kDigits, int kM>
JAXQ_INLINE void MultiplyGroup(const uint8_t* codes, const int32_t* x, int64_t quads, const float* scales,
                               const float* biases, const float* units, const float* sums, float* y) {
  __m512i acc[kM][kDigits][2];
  JAXQ_UNROLL
  for (auto& row : acc)
    JAXQ_UNROLL
    for (auto& digit : row)
      JAXQ_UNROLL
      for (__m512i& sum : digit) sum = _mm512_setzero_si512();
  for (int64_t q = 0; q < quads; ++q, codes += kQuadTile * 4, x += kDigits * kM) {
    const __m512i left = _mm512_loadu_si512(codes), right = _mm512_loadu_si512(codes + 64);
    JAXQ_UNROLL
    for (int m = 0; m < kM; ++m) {
      JAXQ_UNROLL
      for (int d = 0; d < kDigits; ++d) {
        const __m512i digit = _mm512_set1_epi32(x[kDigits * m + d]);
        acc[m][d][0] = DotBytes(acc[m][d][0], left, digit);
        acc[m][d][1] = DotBytes(acc[m][d][1], right, digit);
      }
    }
  }
  JAXQ_UNROLL
  for (int v = 0; v < 2; ++v) {
    const __m512 scale = _mm512_loadu_ps(scales + 16 * v), bias = _mm512_loadu_ps(biases + 16 * v);
    JAXQ_UNROLL
    for (int m = 0; m < kM; ++m) {
      const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(acc[m][0][v], 8), acc[m][1][v]);
      __m512 total = _mm512_cvtepi32_ps(high);
      if constexpr (kDigits == 3)
        total = _mm512_fmadd_ps(total, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(acc[m][2][v]));
      float* out = y + m * kPanelRows + 16 * v;
      const __m512 biased = _mm512_fmadd_ps(bias, _mm512_set1_ps(sums[m]), _mm512_loadu_ps(out));
      _mm512_storeu_ps(out, _mm512_fmadd_ps(total, _mm512_mul_ps(scale, _mm512_set1_ps(units[m])), biased));
    }
  }
}

// Tile of `kM` or fewer rows of x by a whole panel.
template <int kDigits, int kM>
void MultiplyPanel(int64_t height, const DigitRows& x, const IntegerPanel& panel, int64_t first_group, int64_t groups,
                   int64_t g, int64_t column, float* y) {
  if (height < kM) {
    if constexpr (kM > 1) MultiplyPanel<kDigits, kM - 1>(height, x, panel, first_group, groups, g, column, y);
    return;
  }
  const int64_t quads = g / 4;
  for (int64_t j = 0; j < groups; ++j) {
    const int64_t group = first_group + j;
    MultiplyGroup<kDigits, kM>(panel.codes + j * quads * kQuadTile * 4, x.quads + group * quads * kDigits * kM, quads,
                               panel.scales.scales[j] + column, panel.scales.biases[j] + column, x.units + group * kM,
                               x.sums + group * kM, y + column);
  }
}

// The digits of rows m0 .. m0+height of x into a tile. False where a row cannot be split.
template <int kDigits>
bool PackDigits(const MatmulArgs& args, int64_t m0, int64_t height, int32_t* quads, float* units, float* sums,
                int8_t* rows) {
  const int64_t K = args.K, groups = args.groups();
  const int planes = 8 % args.format.bits == 0 ? 8 / args.format.bits : 1;
  float* row_units = reinterpret_cast<float*>(rows + 3 * K);
  for (int64_t m = 0; m < height; ++m) {
    const Digits row = {{rows, rows + K, rows + 2 * K}, row_units, row_units + groups};
    if (!SplitRow<kDigits>(args, m0 + m, row)) return false;
    JAXQ_UNROLL
    for (int d = 0; d < kDigits; ++d) {
      if (planes > 1) OrderDigits(planes, K, row.digit[d]);
      int32_t* out = quads + kDigits * m + d;
      for (int64_t q = 0; q < K / 4; ++q) std::memcpy(out + q * kDigits * height, row.digit[d] + 4 * q, 4);
    }
    for (int64_t j = 0; j < groups; ++j) units[j * height + m] = row.unit[j], sums[j * height + m] = row.sum[j];
  }
  return true;
}

template <int kDigits>
class VnniProduct {
 public:
  VnniProduct(const MatmulArgs& args, const Weight& weight, const Parallel& parallel)
      : args_(args), weight_(weight), parallel_(parallel), unpack_(args.format.bits), pass_(PassRows(args, kDigits)) {}

  Outcome Run() {
    const int64_t K = args_.K, groups = args_.groups();
    row_room_ = Room<int8_t>(3 * K + 8 * groups);
    slot_room_ = Room<IntegerPanel>(1) + Room<float>(pass_ * kPanelRows);
    const Scratch scratch(Room<int32_t>(pass_ * K / 4 * kDigits) + 2 * Room<float>(pass_ * groups) +
                          parallel_.slots() * Most(slot_room_, row_room_));
    if (!scratch.ok()) return Outcome::kNoMemory;
    char* cursor = scratch.data();
    quads_ = Take<int32_t>(&cursor, pass_ * K / 4 * kDigits);
    units_ = Take<float>(&cursor, pass_ * groups);
    sums_ = Take<float>(&cursor, pass_ * groups);
    for (int64_t m0 = 0; m0 < args_.M; m0 += pass_) {
      const int64_t rows = Least(pass_, args_.M - m0);
      if (!Pack(m0, rows, cursor)) return Outcome::kDeclined;
      parallel_.For(Ceil(args_.N, kPanelRows), [&](int64_t task, int slot) {
        char* mine = cursor + slot * slot_room_;
        auto* panel = Take<IntegerPanel>(&mine, 1);
        Columns(task * kPanelRows, m0, rows, panel, reinterpret_cast<float*>(mine));
      });
    }
    return Outcome::kDone;
  }

 private:
  static constexpr int kTile = DigitTile(kDigits);

  // The rows of a pass are shared out evenly, so that no tile is much lower than the others.
  static int64_t First(int64_t tile, int64_t rows) { return tile * rows / Ceil(rows, kTile); }

  DigitRows Rows(int64_t m) const {
    return {quads_ + m * args_.K / 4 * kDigits, units_ + m * args_.groups(), sums_ + m * args_.groups()};
  }

  bool Pack(int64_t m0, int64_t rows, char* cursor) {
    const int64_t K = args_.K, groups = args_.groups();
    bool* failed = &failed_;
    parallel_.For(Ceil(rows, kTile), [&](int64_t tile, int slot) {
      const int64_t m = First(tile, rows), height = First(tile + 1, rows) - m;
      if (!PackDigits<kDigits>(args_, m0 + m, height, quads_ + m * K / 4 * kDigits, units_ + m * groups,
                               sums_ + m * groups, reinterpret_cast<int8_t*>(cursor + slot * row_room_)))
        __atomic_store_n(failed, true, __ATOMIC_RELAXED);
    });
    return !failed_;
  }

  void Fill(int64_t n, int64_t k, int64_t depth, uint8_t* out) const {
    if (!args_.format.affine()) return FillWords<4, true>(weight_, n, k, depth, out);
    switch (args_.format.bits) {
      case 2:
        return FillWords<2, false>(weight_, n, k, depth, out);
      case 4:
        return FillWords<4, false>(weight_, n, k, depth, out);
      case 8:
        return FillWords<8, false>(weight_, n, k, depth, out);
      default:
        return FillCodes(weight_, unpack_, n, k, depth, out);
    }
  }

  // y[m0 : m0+rows, n : n+kPanelRows]
  void Columns(int64_t n, int64_t m0, int64_t rows, IntegerPanel* panel, float* y) const {
    const int64_t K = args_.K, g = args_.format.group_size;
    const int64_t count = Least(kPanelRows, args_.N - n);
    const float centre = weight_.kind == Kind::kTwiceE2m1 ? -12.0f : 0.0f;
    std::memset(y, 0, static_cast<size_t>(rows * kPanelRows) * sizeof(float));
    for (int64_t k = 0; k < K; k += kPanelDepth) {
      const int64_t depth = Least(kPanelDepth, K - k);
      FillScales(weight_, n, count, k / g, depth / g, centre, &panel->scales);
      for (int64_t column = 0; column < count; column += kQuadTile) {
        Fill(n + column, k, depth, panel->codes);
        for (int64_t tile = 0; tile < Ceil(rows, kTile); ++tile) {
          const int64_t m = First(tile, rows), height = First(tile + 1, rows) - m;
          MultiplyPanel<kDigits, kTile>(height, Rows(m), *panel, k / g, depth / g, g, column, y + m * kPanelRows);
        }
      }
    }
    for (int64_t m = 0; m < rows; ++m)
      FromFloats(args_.x_dtype, y + m * kPanelRows, count, args_.y, (m0 + m) * args_.N + n);
  }

  const MatmulArgs& args_;
  const Weight& weight_;
  const Parallel& parallel_;
  const Unpacker unpack_;
  const int64_t pass_;
  int64_t row_room_ = 0, slot_room_ = 0;
  int32_t* quads_ = nullptr;
  float* units_ = nullptr;
  float* sums_ = nullptr;
  bool failed_ = false;
};

Outcome MatmulVnniPanels(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  if (!args.transpose || args.M <= FewRows(args.format) || args.format.mode == Mode::kMxfp8) return Outcome::kDeclined;
  if (DigitsFor(args.x_dtype, args.K) == 2) return VnniProduct<2>(args, weight, parallel).Run();
  return VnniProduct<3>(args, weight, parallel).Run();
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_VNNI_GEMM_INL_H_
