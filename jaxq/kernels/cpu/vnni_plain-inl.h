// transpose=False, y[M, K] = x[M, N] @ w, with VNNI, in mode affine: the sum runs over the rows of w, each with a scale of
// its own, so the scales go into x (vnni_plain_pack-inl.h). Per group of columns and block of rows of w, x times scale
// becomes integers; their products with the codes are exact, and one float scales a block's sum. (The float modes are
// left out: their scales, powers of two, may differ too much within a block for one unit to hold them.)
//
// One row of x meets the codes as they are unpacked, in registers; more rows share a panel of them in the first-level
// cache. Work is cut into strips of columns and, where these are few, into chunks of rows, whose sums are added in order.
// A chunk's sums are apart from the next one's in either case: the bits do not depend on how the work is cut.

#ifndef JAXQ_KERNELS_CPU_VNNI_PLAIN_INL_H_
#define JAXQ_KERNELS_CPU_VNNI_PLAIN_INL_H_

#include "vnni_plain_pack-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kChunkRows = 512;  // a multiple of kBlockRows
constexpr int64_t kPlainPassRows = 256;
constexpr int64_t kPlainSums = 128 << 10;     // bytes of a strip's sums, which stay in the second-level cache
constexpr int64_t kPlainPartials = 8 << 20;   // bytes of all chunks' sums at most
constexpr int64_t kPlainBlock = 256 << 10;    // bytes of codes of a block, which is fetched into that cache while
                                              // another is multiplied
constexpr int64_t kPlainTasks = 4;            // per slot, as near as may be
constexpr int64_t kSingleRows = 2;            // of x, to unpack the codes for each rather than share a panel
constexpr int64_t kFirstLines = 4096;         // of a chunk's codes, fetched before it begins
constexpr int kMaxTileRows = 6;

struct PlainScratch {
  alignas(64) uint8_t codes[kSpanVectors / 2][kBlockRows / 4][2][64];
  int8_t digits[kMaxTileRows][3][kBlockRows];  // of one group and some rows of x
  float units[kMaxTileRows], biases[kMaxTileRows];
  PanelScales<kBlockRows> scales;
  ScaledStrip strips[kSingleRows];
};

JAXQ_INLINE __m512i BroadcastWord(const void* word) {
  int32_t quad;
  std::memcpy(&quad, word, 4);
  return _mm512_set1_epi32(quad);
}

// kM rows of x by kVectors vectors of columns of a panel; adds to y[kM][stride].
template <int kDigits, int kVectors, int kM>
JAXQ_INLINE void MultiplyColumns(const uint8_t* codes, int64_t quads, const PlainScratch& s, float* y, int64_t stride) {
  __m512i sums[kM][kVectors][kDigits];
  JAXQ_UNROLL
  for (auto& row : sums)
    JAXQ_UNROLL
    for (auto& vector : row)
      JAXQ_UNROLL
      for (__m512i& sum : vector) sum = _mm512_setzero_si512();
  const int8_t* word = s.digits[0][0];
  for (int64_t q = 0; q < quads; ++q, codes += 128, word += 4) {
    __m512i w[kVectors];
    JAXQ_UNROLL
    for (int v = 0; v < kVectors; ++v) w[v] = _mm512_loadu_si512(codes + 64 * v);
    JAXQ_UNROLL
    for (int m = 0; m < kM; ++m) {
      JAXQ_UNROLL
      for (int d = 0; d < kDigits; ++d) {
        const __m512i digit = BroadcastWord(word + (3 * m + d) * kBlockRows);
        JAXQ_UNROLL
        for (int v = 0; v < kVectors; ++v) sums[m][v][d] = DotBytes(sums[m][v][d], w[v], digit);
      }
    }
  }
  JAXQ_UNROLL
  for (int m = 0; m < kM; ++m) {
    JAXQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* out = y + m * stride + 16 * v;
      const __m512 total = FloatOfDigits<kDigits>(sums[m][v], s.units[m], s.biases[m]);
      _mm512_storeu_ps(out, _mm512_add_ps(total, _mm512_loadu_ps(out)));
    }
  }
}

template <int kDigits, int kVectors, int kM>
void MultiplyHeight(int64_t height, const uint8_t* codes, int64_t quads, const PlainScratch& s, float* y,
                    int64_t stride) {
  if (height == kM) return MultiplyColumns<kDigits, kVectors, kM>(codes, quads, s, y, stride);
  if constexpr (kM > 1) MultiplyHeight<kDigits, kVectors, kM - 1>(height, codes, quads, s, y, stride);
}

// Some rows of w in a span of columns: see ColumnQuads.
struct SpanOfRows {
  const uint8_t* w;
  int64_t row_bytes, count, columns;
  SpanBytes bytes;
};

// One row of x by a span of kGroups groups, from number `first` of the strip on; adds to y[kSpan].
template <int kDigits, int kGroups, typename Quads>
JAXQ_INLINE void MultiplySpan(const Quads& load, SpanOfRows span, const ScaledStrip& s, int64_t first, Fetcher* next,
                              float* y) {
  __m512i sums[kSpanVectors][kDigits];
  JAXQ_UNROLL
  for (auto& vector : sums)
    JAXQ_UNROLL
    for (__m512i& sum : vector) sum = _mm512_setzero_si512();
  const int32_t* word = s.Group(first);
  for (; span.count > 0; span.count -= 4, span.w += 4 * span.row_bytes, word += ScaledStrip::kNext) {
    __m512i quads[Quads::kQuads];
    next->Next(load.bits());
    load(span.w, span.row_bytes, span.count, span.bytes, quads);
    constexpr int kVectors = kSpanVectors / kGroups;
    JAXQ_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      __m512i digits[kDigits];
      JAXQ_UNROLL
      for (int d = 0; d < kDigits; ++d)
        digits[d] = BroadcastWord(word + group % 4 * 16 + group / 4 * 4 + kDigits - 1 - d);
      JAXQ_UNROLL
      for (int v = group * kVectors; v < (group + 1) * kVectors; ++v) {
        const __m512i codes = load.Vector(quads, v);
        JAXQ_UNROLL
        for (int d = 0; d < kDigits; ++d) sums[v][d] = DotBytes(sums[v][d], codes, digits[d]);
      }
    }
  }
  JAXQ_UNROLL
  for (int v = 0; v < kSpanVectors; ++v) {
    const int64_t group = first + v * kGroups / kSpanVectors;
    const __m512 total = FloatOfDigits<kDigits>(sums[v], s.units[group], s.biases[group]);
    _mm512_storeu_ps(y + 16 * v, _mm512_add_ps(total, _mm512_loadu_ps(y + 16 * v)));
  }
}

// Columns whose scales are taken together: 16 groups, or the most that PanelScales holds.
JAXQ_INLINE int64_t StripColumns(const Format& format) { return Least(kMaxPanelGroups / 2 * format.group_size, 1024); }

template <int kDigits, typename Quads>
class PlainProduct {
 public:
  // Rows m0 .. m0+rows of x. x: float[rows][kBlockRows] for the block at hand.
  PlainProduct(const MatmulArgs& args, const Weight& weight, const Quads& load, int64_t m0, int64_t rows,
               PlainScratch* scratch, float* x)
      : args_(args),
        weight_(weight),
        load_(load),
        m0_(m0),
        rows_(rows),
        tiles_(Ceil(rows, kTile)),
        s_(scratch),
        x_(x) {}

  // y[rows][stride] = rows first .. last of w, columns k .. k+width. False where x cannot be split.
  bool Run(int64_t first, int64_t last, int64_t k, int64_t width, float* y, int64_t stride) const {
    std::memset(y, 0, static_cast<size_t>(rows_ * stride) * sizeof(float));
    Fetchers now = Fetch(first, k, width);
    now.scales.Next(now.scale_lines);
    now.biases.Next(now.scale_lines);
    now.codes.Next(kFirstLines);
    for (int64_t n = first; n < last; n += kBlockRows)
      if (!Block(n, Least(kBlockRows, last - n), k, width, y, stride)) return false;
    return true;
  }

 private:
  static constexpr int kTile = kDigits == 3 ? 4 : kMaxTileRows;

  int64_t First(int64_t tile) const { return tile * rows_ / tiles_; }

  // The block of rows after this one is fetched on the way, be it in this chunk or in the next.
  bool Block(int64_t n, int64_t count, int64_t k, int64_t width, float* y, int64_t stride) const {
    const int64_t bits = weight_.format.bits, strip = StripColumns(weight_.format), spans = Ceil(width, kSpan);
    for (int64_t m = 0; m < rows_; ++m) {
      float* row = x_ + m * kBlockRows;
      ToFloats(args_.x_dtype, args_.x, (m0_ + m) * args_.N + n, count, row);
      std::memset(row + count, 0, static_cast<size_t>(kBlockRows - count) * sizeof(float));
    }
    Fetchers next = Fetch(n + kBlockRows, k, width);
    for (int64_t column = 0; column < width; column += kSpan) {
      const int64_t columns = Least(kSpan, width - column), in_strip = column % strip;
      if (in_strip == 0 && !TakeStrip(n, count, k + column, Least(strip, width - column))) return false;
      next.scales.Next(Ceil(next.scale_lines, spans));
      next.biases.Next(Ceil(next.scale_lines, spans));
      const uint8_t* w = weight_.packed + n * weight_.row_bytes + (k + column) / 8 * bits;
      const SpanOfRows span = {w, weight_.row_bytes, count, columns, load_.Bytes(columns)};
      if (rows_ <= kSingleRows)
        Single(span, in_strip, &next.codes, y + column, stride);
      else if (!Panel(span, in_strip, &next.codes, y + column, stride))
        return false;
    }
    return true;
  }

  struct Fetchers {
    Fetcher codes, scales, biases;
    int64_t scale_lines;
  };

  // For rows n .. of a block.
  Fetchers Fetch(int64_t n, int64_t k, int64_t width) const {
    const int64_t rows = Most(0, Least(kBlockRows, args_.N - n)), size = SizeOf(weight_.scale_dtype);
    const int64_t at = n * weight_.groups + k / weight_.format.group_size, wide = width / weight_.format.group_size * size;
    const auto scales = [&](const void* base) {
      return Fetcher(static_cast<const char*>(base) + at * size, wide, rows, weight_.groups * size);
    };
    const int64_t bits = weight_.format.bits;
    const uint8_t* w = weight_.packed + n * weight_.row_bytes + k / 8 * bits;
    return {Fetcher(w, width / 8 * bits, rows, weight_.row_bytes), scales(weight_.scales), scales(weight_.biases),
            rows * Ceil(wide, 64)};
  }

  // Of a strip: its scales, or the digits of few rows of x. False as SplitGroup.
  bool TakeStrip(int64_t n, int64_t count, int64_t k, int64_t columns) const {
    const int64_t g = weight_.format.group_size, filled = RoundUp(count, 16);
    if (rows_ <= kSingleRows) {
      for (int64_t m = 0; m < rows_; ++m) {
        const float* x = x_ + m * kBlockRows;
        if (!SplitStrip<kDigits>(weight_, n, count, k / g, columns / g, x, s_->strips + m)) return false;
      }
      return true;
    }
    FillScales(weight_, n, count, k / g, columns / g, 0.0f, &s_->scales);
    for (int64_t j = 0; j < columns / g && filled < kBlockRows; ++j) {
      std::memset(s_->scales.scales[j] + filled, 0, static_cast<size_t>(kBlockRows - filled) * sizeof(float));
      std::memset(s_->scales.biases[j] + filled, 0, static_cast<size_t>(kBlockRows - filled) * sizeof(float));
    }
    return true;
  }

  // Digits of row m for the group `group` of the strip, as number `at`.
  JAXQ_INLINE bool Split(int64_t m, int64_t group, int64_t at) const {
    return SplitScaled<kDigits>(x_ + m * kBlockRows, s_->scales.scales[group], s_->scales.biases[group],
                                {s_->digits[at][0], s_->units + at, s_->biases + at});
  }

  // A span, which begins at column `at` of the strip.
  void Single(const SpanOfRows& span, int64_t at, Fetcher* next, float* y, int64_t stride) const {
    const int64_t g = weight_.format.group_size;
    for (int64_t m = 0; m < rows_; ++m, y += stride) {
      const auto multiply = [&](auto groups) {
        MultiplySpan<kDigits, decltype(groups)::value>(load_, span, s_->strips[m], at / g, next, y);
      };
      if (g == 128) multiply(Constant<1>{});
      if (g == 64) multiply(Constant<2>{});
      if (g == 32) multiply(Constant<4>{});
      if constexpr (!Quads::kInPairs)
        if (g == 16) multiply(Constant<8>{});
    }
  }

  bool Panel(const SpanOfRows& span, int64_t in_strip, Fetcher* next, float* y, int64_t stride) const {
    const int64_t g = weight_.format.group_size, quads = Ceil(span.count, 4);
    for (int64_t q = 0; q < quads; ++q) {
      __m512i vectors[Quads::kQuads];
      next->Next(load_.bits());
      load_(span.w + 4 * q * span.row_bytes, span.row_bytes, span.count - 4 * q, span.bytes, vectors);
      JAXQ_UNROLL
      for (int v = 0; v < kSpanVectors; ++v) _mm512_store_si512(s_->codes[v / 2][q][v % 2], load_.Vector(vectors, v));
    }
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const int64_t first = First(tile), height = First(tile + 1) - first;
      for (int64_t at = 0; at < span.columns; at += g) {
        for (int64_t m = 0; m < height; ++m)
          if (!Split(first + m, (in_strip + at) / g, m)) return false;
        float* out = y + first * stride;
        if (g == 16) {
          MultiplyHeight<kDigits, 1, kTile>(height, s_->codes[at / 32][0][at / 16 % 2], quads, *s_, out + at, stride);
          continue;
        }
        for (int64_t c = at; c < at + g; c += 32)
          MultiplyHeight<kDigits, 2, kTile>(height, s_->codes[c / 32][0][0], quads, *s_, out + c, stride);
      }
    }
    return true;
  }

  const MatmulArgs& args_;
  const Weight& weight_;
  const Quads& load_;
  const int64_t m0_, rows_, tiles_;
  PlainScratch* const s_;
  float* const x_;
};

// y[m0 : m0+rows, k : k+count] out of sums[rows][stride] in the order of `Quads`.
template <typename Quads>
void WritePlain(const MatmulArgs& args, int64_t m0, int64_t rows, int64_t k, int64_t count, const float* sums,
                int64_t stride) {
  alignas(64) int32_t index[32];
  for (int i = 0; i < 32; ++i) index[i] = i / 2 + i % 2 * 16;
  const __m512i low = _mm512_load_si512(index), high = _mm512_load_si512(index + 16);
  for (int64_t m = 0; m < rows; ++m) {
    const float* row = sums + m * stride;
    const int64_t to = (m0 + m) * args.K + k;
    if constexpr (!Quads::kInPairs) {
      FromFloats(args.x_dtype, row, count, args.y, to);
    } else {
      for (int64_t at = 0; at < count; at += 32) {
        const __m512 even = _mm512_loadu_ps(row + at), odd = _mm512_loadu_ps(row + at + 16);
        float out[32];
        _mm512_storeu_ps(out, _mm512_permutex2var_ps(even, low, odd));
        _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(even, high, odd));
        FromFloats(args.x_dtype, out, 32, args.y, to + at);
      }
    }
  }
}

JAXQ_INLINE void AddTo(float* total, const float* terms, int64_t count) {
  for (int64_t i = 0; i < count; i += 16)
    _mm512_storeu_ps(total + i, _mm512_add_ps(_mm512_loadu_ps(total + i), _mm512_loadu_ps(terms + i)));
}

template <int kDigits, typename Quads>
Outcome PlainPasses(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  const Quads load(args.format.bits);
  const int64_t pass = Least(args.M, kPlainPassRows), chunks = Ceil(args.N, kChunkRows);
  // Tasks as wide as they may be, for a page of w has whole rows; but enough of them.
  const bool can_cut = chunks > 1 && chunks * pass * RoundUp(args.K, kSpan) * 4 <= kPlainPartials;
  const int64_t tasks = kPlainTasks * parallel.slots(), strip = StripColumns(args.format);
  const int64_t fit = Least(kPlainSums / (4 * pass), kPlainBlock * 8 / (args.format.bits * kBlockRows));
  const int64_t most = Most(kSpan, fit / kSpan * kSpan);
  const int64_t fair = RoundUp(Ceil(args.K, Ceil(tasks, can_cut ? chunks : 1)), strip);
  const int64_t width = Least(Least(most, fair), RoundUp(args.K, kSpan)), strips = Ceil(args.K, width);
  const bool cut = can_cut && strips < tasks;
  const int64_t x_room = Room<float>(pass * kBlockRows), sum_room = Room<float>(pass * width);
  const int64_t slot_room = Room<PlainScratch>(1) + x_room + 2 * sum_room;
  const int64_t count_room = Runs::RoomFor(parallel);
  const Scratch scratch(parallel.slots() * slot_room + count_room + (cut ? chunks * strips * sum_room : 0));
  if (!scratch.ok()) return Outcome::kNoMemory;
  char* const counts = scratch.data() + parallel.slots() * slot_room;
  char* const partials = counts + count_room;
  bool failed = false;
  for (int64_t m0 = 0; m0 < args.M; m0 += pass) {
    const int64_t rows = Least(pass, args.M - m0);
    const Runs runs = {cut ? strips * chunks : strips, parallel.slots(), reinterpret_cast<int64_t*>(counts)};
    std::memset(counts, 0, static_cast<size_t>(count_room));
    parallel.For(runs.tasks, [&](int64_t, int slot) {
      const int64_t task = runs.Take(slot);
      char* mine = scratch.data() + slot * slot_room;
      auto* s = Take<PlainScratch>(&mine, 1);
      float* x = Take<float>(&mine, pass * kBlockRows);
      float* terms = Take<float>(&mine, pass * width);
      float* total = Take<float>(&mine, pass * width);
      const int64_t strip = cut ? task / chunks : task, k = strip * width, count = Least(width, args.K - k);
      const PlainProduct<kDigits, Quads> product(args, weight, load, m0, rows, s, x);
      if (cut) {
        const int64_t n = task % chunks * kChunkRows;
        terms = reinterpret_cast<float*>(partials + task * sum_room);
        if (!product.Run(n, Least(args.N, n + kChunkRows), k, count, terms, width))
          __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
        return;
      }
      std::memset(total, 0, static_cast<size_t>(rows * width) * sizeof(float));
      for (int64_t n = 0; n < args.N; n += kChunkRows) {
        if (!product.Run(n, Least(args.N, n + kChunkRows), k, count, terms, width))
          return __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
        AddTo(total, terms, rows * width);
      }
      WritePlain<Quads>(args, m0, rows, k, count, total, width);
    });
    if (failed) return Outcome::kDeclined;
    if (!cut) continue;
    parallel.For(strips, [&](int64_t strip, int slot) {
      float* total = reinterpret_cast<float*>(scratch.data() + slot * slot_room + Room<PlainScratch>(1) + x_room);
      std::memset(total, 0, static_cast<size_t>(rows * width) * sizeof(float));
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        AddTo(total, reinterpret_cast<float*>(partials + (strip * chunks + chunk) * sum_room), rows * width);
      WritePlain<Quads>(args, m0, rows, strip * width, Least(width, args.K - strip * width), total, width);
    });
  }
  return Outcome::kDone;
}

template <typename Quads>
Outcome PlainOfQuads(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  if (DigitsFor(args.x_dtype, args.N) == 2) return PlainPasses<2, Quads>(args, weight, parallel);
  return PlainPasses<3, Quads>(args, weight, parallel);
}

Outcome MatmulVnniPlain(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  if (args.transpose || !args.format.affine()) return Outcome::kDeclined;
  if (args.format.bits == 4 && args.format.group_size >= 32)
    return PlainOfQuads<ColumnQuads<true>>(args, weight, parallel);
  return PlainOfQuads<ColumnQuads<false>>(args, weight, parallel);
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_VNNI_PLAIN_INL_H_
