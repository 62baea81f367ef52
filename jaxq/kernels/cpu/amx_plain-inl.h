// transpose=False, y[M, K] = x[M, N] @ w, whose scales lie across the sum: w is dequantized into bfloat16 parts.
//
// x has as many parts as hold all of it; w has 1 in the float modes, whose values bfloat16 holds, and else 2 where x
// has 16 bits (an error of 2**-17, far below the rounding of the result) or 3. Part i is below 2**-8i, and products of
// parts i and j with i+j > 2 are left out: they are below 2**-24. Sums stay in tiles for a block of rows of w.

#ifndef JAXQ_KERNELS_CPU_AMX_PLAIN_INL_H_
#define JAXQ_KERNELS_CPU_AMX_PLAIN_INL_H_

#include "amx_pack-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kPlainRows = 256;     // of w at a time: 8 steps
constexpr int64_t kPlainColumns = 128;  // of w at a time; a multiple of every group
constexpr int64_t kPlainStrips = 4;     // such columns per task at most: fewer visits to each page of w
constexpr int64_t kPlainSums = 256 << 10;  // bytes of a task's sums, which should stay in the second-level cache
constexpr int64_t kPlainPassBytes = 8 << 20;
constexpr int64_t kPlainPassRows = 512;
constexpr int64_t kPlainLeastTerms = 120;  // below, the result's bound is so tight that w needs 3 parts

struct PlainScratch {
  // [step][part][block of 16 columns][16 pairs of rows][16 columns][2]
  alignas(64) uint16_t panel[kPlainRows / kStep][3][kPlainColumns / kSide][kHalves];
  uint8_t codes[kPlainRows][kPlainColumns + 64];
  float scales[kPlainRows][kPlainColumns / 16], biases[kPlainRows][kPlainColumns / 16];
};

// x as tiles [pair of 16 rows][step][part][2][512]. Rows and terms past the end are zeros.
struct PlainX {
  uint16_t* tiles;
  int64_t steps, parts;

  uint16_t* Tile(int64_t pair, int64_t step, int64_t part) const {
    return tiles + ((pair * steps + step) * parts + part) * 2 * kHalves;
  }
};

// 16 rows of one step.
void PackPlain(const MatmulArgs& args, int64_t m, int64_t rows, int64_t step, const PlainX& x, uint16_t* tile) {
  const int64_t first = step * kStep, count = Least(kStep, args.N - first);
  alignas(64) uint16_t upper[32];
  for (int i = 0; i < 32; ++i) upper[i] = static_cast<uint16_t>(2 * i + 1);
  const __m512i index = _mm512_load_si512(upper);
  for (int64_t r = 0; r < kSide; ++r) {
    alignas(64) float values[kStep] = {};
    if (r < rows) ToFloats(args.x_dtype, args.x, (m + r) * args.N + first, count, values);
    __m512 a = _mm512_load_ps(values), b = _mm512_load_ps(values + 16);
    for (int64_t part = 0; part < x.parts; ++part) {
      const __m512i halves = _mm512_permutex2var_epi16(_mm512_castps_si512(a), index, _mm512_castps_si512(b));
      _mm512_store_si512(tile + part * 2 * kHalves + 32 * r, halves);
      a = _mm512_sub_ps(a, Cut(a)), b = _mm512_sub_ps(b, Cut(b));
    }
  }
}

// Weights of up to 5 bits, 32 codes at a time, through a table of what each code stands for in its group: a row needs a
// table for every part, which costs less than to scale and to cut all of its codes.
class TableDequantizer {
 public:
  static bool Serves(const Format& format) {
    return format.mode != Mode::kMxfp8 && format.bits <= 5 && format.group_size >= 2 * kSide;
  }

  explicit TableDequantizer(const Format& format) : format_(format) {
    alignas(64) uint16_t shifts[32], upper[32];
    alignas(64) uint8_t spread[64];
    alignas(64) float values[2][16];
    const int last = (1 << format.bits) - 1;
    for (int i = 0; i < 32; ++i) {
      // Two rows are interleaved in 128-bit lanes: their lower halves are the first block of columns.
      const int bit = (i % 8 / 4 * 16 + i / 8 * 4 + i % 4) * format.bits, code = i & last;
      shifts[i] = static_cast<uint16_t>(bit % 8);
      spread[2 * i] = static_cast<uint8_t>(bit / 8), spread[2 * i + 1] = static_cast<uint8_t>(bit / 8 + 1);
      upper[i] = static_cast<uint16_t>(2 * (format.bits == 5 ? i : i % 16) + 1);
      values[i / 16][i % 16] = format.affine() ? static_cast<float>(code) : static_cast<float>(kTwiceE2m1[code & 15]);
    }
    shifts_ = _mm512_load_si512(shifts), spread_ = _mm512_load_si512(spread), upper_ = _mm512_load_si512(upper);
    values_[0] = _mm512_load_ps(values[0]), values_[1] = _mm512_load_ps(values[1]);
  }

  // 32 rows from n on by `columns` columns of one group from k on, a multiple of 32, into their blocks of `panel`.
  // Fetches what lies `ahead` bytes further: a line of each row at a time is nothing that the hardware foresees.
  template <int kParts>
  void Step(const Weight& weight, int64_t n, int64_t k, int64_t columns, int64_t ahead,
            uint16_t (*panel)[kPlainColumns / kSide][kHalves], int64_t block) const {
    const TableDequantizer d = *this;  // in registers: see StepUnpacker
    const int64_t group = k / d.format_.group_size, bits = d.format_.bits;
    const __mmask64 bytes = FirstBytes(4 * bits);
    for (int64_t pair = 0; pair < kSide; ++pair) {
      __m512i tables[2][kParts];
      const uint8_t* source[2];
      JAXQ_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int64_t row = Least(n + 2 * pair + i, weight.rows - 1);
        source[i] = weight.packed + row * weight.row_bytes + k / 8 * bits;
        _mm_prefetch(reinterpret_cast<const char*>(source[i] + ahead), _MM_HINT_T1);
        d.MakeTables<kParts>(weight, row * weight.groups + group, tables[i]);
      }
      for (int64_t c = 0; c < columns / 32; ++c) {
        __m512i codes[2];
        JAXQ_UNROLL
        for (int i = 0; i < 2; ++i) {
          const __m512i line = _mm512_maskz_loadu_epi8(bytes, source[i] + c * 4 * bits);
          codes[i] = _mm512_srlv_epi16(_mm512_permutexvar_epi8(d.spread_, line), d.shifts_);
        }
        JAXQ_UNROLL
        for (int part = 0; part < kParts; ++part) {
          const __m512i even = _mm512_permutexvar_epi16(codes[0], tables[0][part]);  // takes the low 5 bits of each
          const __m512i odd = _mm512_permutexvar_epi16(codes[1], tables[1][part]);
          auto* out = panel[part] + block + 2 * c;
          _mm512_store_si512(out[0] + 32 * pair, _mm512_unpacklo_epi16(even, odd));
          _mm512_store_si512(out[1] + 32 * pair, _mm512_unpackhi_epi16(even, odd));
        }
      }
    }
  }

 private:
  // The parts of all codes' values, as often as they fit in a vector.
  template <int kParts>
  JAXQ_INLINE void MakeTables(const Weight& weight, int64_t at, __m512i* tables) const {
    const Affine affine = LoadAffine(format_, weight.scale_dtype, weight.scales, weight.biases, at);
    const __m512 scale = _mm512_set1_ps(format_.affine() ? affine.scale : 0.5f * affine.scale);
    const __m512 bias = _mm512_set1_ps(affine.bias);
    __m512 v[2] = {_mm512_fmadd_ps(values_[0], scale, bias), _mm512_fmadd_ps(values_[1], scale, bias)};
    JAXQ_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const __m512i low = _mm512_castps_si512(v[0]), high = _mm512_castps_si512(v[1]);
      if (format_.bits == 5)
        tables[part] = _mm512_permutex2var_epi16(low, upper_, high);
      else
        tables[part] = _mm512_permutexvar_epi16(upper_, low);
      v[0] = _mm512_sub_ps(v[0], Cut(v[0])), v[1] = _mm512_sub_ps(v[1], Cut(v[1]));
    }
  }

  Format format_;
  __m512i shifts_, spread_, upper_;
  __m512 values_[2];
};

// Floats of one pair of blocks of columns, for all pairs of 16 rows of x.
JAXQ_INLINE int64_t StripSums(int64_t pairs) { return pairs * 4 * kFloats; }

class PlainProduct {
 public:
  // sums: [strip of kPlainColumns][pair of 16 rows of x][pair of blocks of columns][4 tiles]
  PlainProduct(const MatmulArgs& args, const Weight& weight, const TableDequantizer& tables, const PlainX& x,
               int64_t w_parts, int64_t rows, PlainScratch* scratch, float* sums)
      : args_(args),
        weight_(weight),
        tables_(tables),
        in_tables_(TableDequantizer::Serves(args.format)),
        span_(in_tables_ ? Least(2, args.format.group_size / (2 * kSide)) : 1),
        x_(x),
        w_parts_(w_parts),
        pairs_(Ceil(rows, 2 * kSide)),
        lone_(rows <= kSide),
        s_(scratch),
        all_sums_(sums) {}

  // Columns k .. k+width of w.
  void Run(int64_t k, int64_t width) {
    switch (3 * w_parts_ + x_.parts) {
      case 4:
        return Run<1, 1>(k, width);
      case 5:
        return Run<1, 2>(k, width);
      case 6:
        return Run<1, 3>(k, width);
      case 7:
        return Run<2, 1>(k, width);
      case 8:
        return Run<2, 2>(k, width);
      case 10:
        return Run<3, 1>(k, width);
      case 11:
        return Run<3, 2>(k, width);
      default:
        return Run<3, 3>(k, width);
    }
  }

 private:
  // kW, kX: parts of w and x.
  template <int kW, int kX>
  void Run(int64_t k, int64_t width) {
    lone_ ? Run<kW, kX, true>(k, width) : Run<kW, kX, false>(k, width);
  }

  template <int kW, int kX, bool kLone>
  void Run(int64_t k, int64_t width) {
    const int64_t strip_bytes = kPlainColumns / 8 * weight_.format.bits;
    std::memset(all_sums_, 0, static_cast<size_t>(Ceil(width, 2 * kSide) * StripSums(pairs_)) * sizeof(float));
    for (first_ = 0; first_ < args_.N; first_ += kPlainRows) {
      const int64_t rows = Least(kPlainRows, args_.N - first_);
      steps_ = Ceil(rows, kStep);
      for (int64_t strip = 0; strip < width; strip += kPlainColumns) {
        k_ = k + strip, count_ = Least(kPlainColumns, width - strip), blocks_ = Ceil(count_, 2 * kSide);
        sums_ = all_sums_ + strip / (2 * kSide) * StripSums(pairs_);
        ahead_ = strip + count_ < width ? strip_bytes
                                        : kPlainRows * weight_.row_bytes - strip / kPlainColumns * strip_bytes;
        if (!in_tables_) Unpack(rows);
        for (int64_t step = 0; step < steps_; ++step) Dequantize(step, 0);
        for (int64_t pair = 0; pair < pairs_; ++pair)
          for (int64_t block = 0; block < blocks_; ++block) Multiply<kW, kX, kLone>(pair, block);
      }
    }
  }

  // Codes, scales and biases of a block of rows; rows past the end get zeros.
  void Unpack(int64_t rows) const {
    const int64_t g = weight_.format.group_size, groups = count_ / g;
    for (int64_t r = 0; r < steps_ * kStep; ++r) {
      if (r >= rows) {
        std::memset(s_->codes[r], 0, sizeof s_->codes[r]);
        std::memset(s_->scales[r], 0, sizeof s_->scales[r]);
        std::memset(s_->biases[r], 0, sizeof s_->biases[r]);
        continue;
      }
      weight_.Codes(first_ + r, k_, count_, s_->codes[r]);
      weight_.Scales(first_ + r, k_ / g, groups, s_->scales[r]);
      weight_.Biases(first_ + r, k_ / g, groups, s_->biases[r]);
    }
  }

  // One step of span_ pairs of blocks of columns.
  void Dequantize(int64_t step, int64_t pair) const {
    if (in_tables_) {
      const int64_t n = first_ + step * kStep, k = k_ + pair * 2 * kSide, columns = Least(span_, blocks_ - pair) * 2 * kSide;
      auto* panel = s_->panel[step];
      if (w_parts_ == 1) return tables_.Step<1>(weight_, n, k, columns, ahead_, panel, 2 * pair);
      if (w_parts_ == 2) return tables_.Step<2>(weight_, n, k, columns, ahead_, panel, 2 * pair);
      return tables_.Step<3>(weight_, n, k, columns, ahead_, panel, 2 * pair);
    }
    WithKind(weight_.kind, [&](auto kind) {
      for (int64_t block = 2 * pair; block < 2 * pair + 2; ++block) DequantizeBlock<decltype(kind)::value>(step, block);
    });
  }

  template <Kind kKind>
  void DequantizeBlock(int64_t step, int64_t block) const {
    if (block * kSide >= count_) {  // only where K is an odd number of blocks
      for (int64_t part = 0; part < w_parts_; ++part) std::memset(s_->panel[step][part][block], 0, 2 * kHalves);
      return;
    }
    const int64_t group = block * kSide / weight_.format.group_size;
    for (int64_t r = 0; r < kSide; ++r) {
      __m512 v[2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t row = step * kStep + 2 * r + i;
        v[i] = Fma(Values<kKind>(s_->codes[row] + block * kSide), Set1(s_->scales[row][group]),
                   Set1(s_->biases[row][group]));
      }
      for (int64_t part = 0; part < w_parts_; ++part) {
        _mm512_store_si512(s_->panel[step][part][block] + 32 * r, UpperHalves(v[0], v[1]));
        for (__m512& value : v) value = _mm512_sub_ps(value, Cut(value));
      }
    }
  }

  // 32 rows of x by 32 columns, all steps of the block of rows.
  template <int kW, int kX, bool kLone>
  void Multiply(int64_t pair, int64_t block) const {
    float* sums = sums_ + (pair * blocks_ + block) * 4 * kFloats;
    LoadTile<0>(sums);
    LoadTile<1>(sums + kFloats);
    LoadTile<2>(sums + 2 * kFloats);
    LoadTile<3>(sums + 3 * kFloats);
    // Those of the next span are dequantized while this one's pairs of blocks are first multiplied.
    const int64_t next = (block / span_ + 1) * span_;
    for (int64_t step = 0; step < steps_; ++step) {
      Products<kW, kX, kLone, 0, -1, -1>(s_->panel[step], 2 * block, x_.Tile(pair, first_ / kStep + step, 0));
      if (pair == 0 && next < blocks_ && step % span_ == block % span_) Dequantize(step, next);
    }
    StoreTile<0>(sums);
    StoreTile<1>(sums + kFloats);
    StoreTile<2>(sums + 2 * kFloats);
    StoreTile<3>(sums + 3 * kFloats);
  }

  // Those of kProducts from number kI on of the parts that there are; kWAt and kXAt: the parts that are in tiles.
  template <int kW, int kX, bool kLone, int kI, int kWAt, int kXAt>
  JAXQ_INLINE static void Products(const uint16_t (*panel)[kPlainColumns / kSide][kHalves], int64_t block,
                                   const uint16_t* x) {
    if constexpr (kI < 6) {
      constexpr int kWPart = kProducts[kI][0], kXPart = kProducts[kI][1];
      if constexpr (kWPart >= kW || kXPart >= kX) {
        Products<kW, kX, kLone, kI + 1, kWAt, kXAt>(panel, block, x);
      } else {
        if constexpr (kWPart != kWAt) LoadTile<6>(panel[kWPart][block]), LoadTile<7>(panel[kWPart][block + 1]);
        if constexpr (kXPart != kXAt) LoadTile<4>(x + kXPart * 2 * kHalves);
        if constexpr (kXPart != kXAt && !kLone) LoadTile<5>(x + (kXPart * 2 + 1) * kHalves);
        DotTiles<0, 4, 6>(), DotTiles<1, 4, 7>();
        if constexpr (!kLone) DotTiles<2, 5, 6>(), DotTiles<3, 5, 7>();
        Products<kW, kX, kLone, kI + 1, kWPart, kXPart>(panel, block, x);
      }
    }
  }

  // Parts of w and x that are multiplied, in an order in which few operands change.
  static constexpr int kProducts[6][2] = {{0, 2}, {0, 1}, {0, 0}, {2, 0}, {1, 0}, {1, 1}};

  const MatmulArgs& args_;
  const Weight& weight_;
  const TableDequantizer& tables_;
  const bool in_tables_;
  const int64_t span_;  // pairs of blocks of columns that are dequantized together
  const PlainX& x_;
  const int64_t w_parts_, pairs_;
  const bool lone_;  // no second tile of rows
  PlainScratch* const s_;
  float* const all_sums_;
  float* sums_ = nullptr;  // of the strip at hand
  int64_t k_ = 0, count_ = 0, blocks_ = 0, first_ = 0, steps_ = 0, ahead_ = 0;
};

// y[m0 : m0+rows, k : k+count] out of PlainProduct's sums.
void WritePlain(const MatmulArgs& args, int64_t m0, int64_t rows, int64_t k, int64_t count, const float* sums) {
  const int64_t blocks = Ceil(count, 2 * kSide);
  for (int64_t m = 0; m < rows; ++m) {
    float out[kPlainColumns + kSide];
    for (int64_t block = 0; block < Ceil(count, kSide); ++block) {
      const int64_t tile = (m / (2 * kSide) * blocks + block / 2) * 4 + m / kSide % 2 * 2 + block % 2;
      Store(out + block * kSide, Load(sums + tile * kFloats + m % kSide * kSide));
    }
    FromFloats(args.x_dtype, out, count, args.y, (m0 + m) * args.K + k);
  }
}

Outcome MatmulPlain(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  const TableDequantizer tables(args.format);
  const bool tight = args.x_dtype == DType::kF32 || args.N < kPlainLeastTerms;
  const int64_t w_parts = !args.format.affine() ? 1 : tight ? 3 : 2;
  PlainX x = {nullptr, Ceil(args.N, kStep), PartsOf(args.x_dtype)};
  const int64_t tiles = x.steps * x.parts * 2 * kHalves;  // of a pair
  const int64_t fit = Least(Most(1, kPlainPassBytes / (2 * tiles)), kPlainPassRows / (2 * kSide));
  const int64_t pairs = Least(fit, Ceil(args.M, 2 * kSide)), pass = pairs * 2 * kSide;
  const int64_t strip_sums = kPlainColumns / (2 * kSide) * StripSums(pairs);
  const int64_t fair = Ceil(args.K, kPlainColumns * 4 * parallel.slots());  // every worker should have a few tasks
  const int64_t strips = Most(1, Least(Least(kPlainStrips, fair), kPlainSums / (4 * strip_sums)));
  const int64_t width = strips * kPlainColumns, sums = strips * strip_sums;
  const int64_t slot_room = Room<PlainScratch>(1) + Room<float>(sums);
  const Scratch scratch(Room<uint16_t>(pairs * tiles) + parallel.slots() * slot_room);
  if (!scratch.ok()) return Outcome::kNoMemory;
  char* cursor = scratch.data();
  x.tiles = Take<uint16_t>(&cursor, pairs * tiles);
  for (int64_t m0 = 0; m0 < args.M; m0 += pass) {
    const int64_t rows = Least(pass, args.M - m0), rows_sums = StripSums(Ceil(rows, 2 * kSide));
    parallel.For(x.steps, [&](int64_t step, int) {
      for (int64_t m = 0; m < RoundUp(rows, 2 * kSide); m += kSide)
        PackPlain(args, m0 + m, rows - m, step, x, x.Tile(m / (2 * kSide), step, 0) + m / kSide % 2 * kHalves);
    });
    parallel.For(Ceil(args.K, width), [&](int64_t task, int slot) {
      const TileScope tiles_configured;
      char* mine = cursor + slot * slot_room;
      auto* s = Take<PlainScratch>(&mine, 1);
      float* y = reinterpret_cast<float*>(mine);
      const int64_t last = Least(args.K, (task + 1) * width);
      PlainProduct(args, weight, tables, x, w_parts, rows, s, y).Run(task * width, last - task * width);
      for (int64_t k = task * width; k < last; k += kPlainColumns, y += kPlainColumns / (2 * kSide) * rows_sums)
        WritePlain(args, m0, rows, k, Least(kPlainColumns, last - k), y);
    });
  }
  return Outcome::kDone;
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_AMX_PLAIN_INL_H_
