// Attention over a cache in float32, over the vector type of simd-inl.h: each key and value is read from memory once
// for all queries of a token that share it, and widened in registers.
//
// A task takes up to kRowBlock rows of queries (those of one head of keys) and a range of keys, kChunk at a time: all
// scores of a chunk, their exponentials relative to the largest so far, then the sum of values. Where the queries are
// too few to make many tasks, the keys are cut too, always at the same places, and the parts are put together at the
// end. Every cut depends on the shapes and the position alone.

#ifndef JAXQ_KERNELS_CPU_ATTENTION_INL_H_
#define JAXQ_KERNELS_CPU_ATTENTION_INL_H_

#include "attention_cache-inl.h"
#include "simd-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kRowBlock = 16;
constexpr int64_t kChunk = 256;
constexpr int64_t kKeyBlock = 64;     // keys that stay in the first-level cache while the rows change
constexpr int64_t kEnoughTasks = 64;  // so many keep most machines busy without cutting the keys
constexpr int64_t kMostTasks = 256;   // of cut keys: each leaves a part in memory
constexpr int64_t kValueSums = kLanes == 8 ? 8 : 16;  // sums in registers: AVX2 has half as many registers
constexpr int64_t kCacheAhead = 4096;  // bytes: keys are read several at a time, an order that no hardware foresees

template <DType kT>
JAXQ_INLINE F LoadValues(const void* base, int64_t at) {
  if constexpr (kT == DType::kF32) return Load(static_cast<const float*>(base) + at);
  const uint16_t* halves = static_cast<const uint16_t*>(base) + at;
  return kT == DType::kF16 ? LoadF16(halves) : LoadBf16(halves);
}

// kStep vectors. Two of bfloat16 are the even numbers and the odd ones of 2*kLanes: half the loads, and less to widen.
// What they meet stands in the same order: see DealPairs.
template <DType kT, int kStep>
JAXQ_INLINE void LoadStep(const void* base, int64_t at, F* out) {
  static_assert(kStep == 1 || kT == DType::kBF16);
  if constexpr (kStep == 2)
    LoadBf16Pairs(static_cast<const uint16_t*>(base) + at, out, out + 1);
  else
    *out = LoadValues<kT>(base, at);
}

// Brings a row to that order, and back.
void DealPairs(float* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 2 * kLanes) {
    float block[2 * kLanes];
    std::memcpy(block, row + d, sizeof block);
    for (int i = 0; i < kLanes; ++i) row[d + i] = block[2 * i], row[d + kLanes + i] = block[2 * i + 1];
  }
}

void UndealPairs(float* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 2 * kLanes) {
    float block[2 * kLanes];
    std::memcpy(block, row + d, sizeof block);
    for (int i = 0; i < kLanes; ++i) row[d + 2 * i] = block[i], row[d + 2 * i + 1] = block[kLanes + i];
  }
}

bool DealsPairs(const AttentionArgs& args) { return args.cache_dtype == DType::kBF16 && args.dim % (2 * kLanes) == 0; }

// 2**x for x <= 0: 2**n * 2**f with n whole and |f| <= 1/2, the latter by its Taylor series, whose first omitted term
// is (ln(2)/2)**8 / 8! = 5e-9. Zero below 2**-125; a NaN stays one. Plain operations, which the compiler vectorizes.
JAXQ_INLINE float Exp2(float x) {
  const float bounded = x > -125.0f ? x : -125.0f;
  const float shifted = bounded + 0x1.8p23f, f = bounded - (shifted - 0x1.8p23f);  // n is in shifted's last bits
  float y = 1.52527338e-5f;
  y = y * f + 1.54035304e-4f;
  y = y * f + 1.33335581e-3f;
  y = y * f + 9.61812911e-3f;
  y = y * f + 5.55041087e-2f;
  y = y * f + 2.40226507e-1f;
  y = y * f + 6.93147181e-1f;
  y = y * f + 1.0f;
  const float power = FloatOfBits(BitsOfFloat(y) + (BitsOfFloat(shifted) << 23));
  return x > -125.0f ? power : x == x ? 0.0f : x;
}

// ---- tiles

// scores[r * kChunk + j] of kRows rows of q and kLanes / kRows keys, key j at keys[at(j)]. One transposition sums the
// lanes of kLanes products.
template <DType kT, int kStep, int64_t kRows, typename At>
JAXQ_INLINE void ScoreTile(const float* q, int64_t dim, const void* keys, At&& at, float* scores) {
  constexpr int64_t kKeys = kLanes / kRows;
  F sums[kLanes];
  JAXQ_UNROLL
  for (F& sum : sums) sum = Zero();
  const char* ahead = static_cast<const char*>(keys) + at(0) * SizeOf(kT) + kCacheAhead;
  for (int64_t d = 0; d < dim; d += kStep * kLanes) {
    F rows[kRows][kStep];
    JAXQ_UNROLL
    for (int64_t r = 0; r < kRows; ++r)
      JAXQ_UNROLL
      for (int i = 0; i < kStep; ++i) rows[r][i] = Load(q + r * dim + d + i * kLanes);
    for (int64_t line = 0; line < kKeys * kStep * kLanes * SizeOf(kT); line += 64) __builtin_prefetch(ahead + line);
    ahead += kKeys * kStep * kLanes * SizeOf(kT);
    JAXQ_UNROLL
    for (int64_t j = 0; j < kKeys; ++j) {
      F key[kStep];
      LoadStep<kT, kStep>(keys, at(j) + d, key);
      JAXQ_UNROLL
      for (int i = 0; i < kStep; ++i)
        JAXQ_UNROLL
        for (int64_t r = 0; r < kRows; ++r) sums[r * kKeys + j] = Fma(rows[r][i], key[i], sums[r * kKeys + j]);
    }
  }
  Transpose(sums);
  JAXQ_UNROLL
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    JAXQ_UNROLL
    for (int64_t i = 0; i < width; ++i) sums[i] = Add(sums[i], sums[i + width]);
  float out[kLanes];
  Store(out, sums[0]);
  JAXQ_UNROLL
  for (int64_t r = 0; r < kRows; ++r) std::memcpy(scores + r * kChunk, out + r * kKeys, kKeys * sizeof(float));
}

// The same for count keys from `first` on. Past the last one stand copies of its score: a row has room for kChunk.
template <DType kT, int kStep, int64_t kRows>
void Scores(const float* q, int64_t dim, const void* keys, int64_t first, int64_t count, float* scores) {
  constexpr int64_t kKeys = kLanes / kRows;
  int64_t t = 0;
  for (; t + kKeys <= count; t += kKeys)
    ScoreTile<kT, kStep, kRows>(q, dim, keys, [&](int64_t j) { return (first + t + j) * dim; }, scores + t);
  const auto rest = [&](int64_t j) { return (first + Least(t + j, count - 1)) * dim; };
  if (t < count) ScoreTile<kT, kStep, kRows>(q, dim, keys, rest, scores + t);
}

// total[r, d : dim] += sum over t of weights[r * kChunk + t] * values[first + t, d : dim], kVectors vectors at a time.
template <DType kT, int kStep, int64_t kRows, int64_t kVectors>
void AddValues(const float* weights, const void* values, int64_t first, int64_t count, int64_t dim, int64_t d,
               float* total) {
  for (; d + kVectors * kLanes <= dim; d += kVectors * kLanes) {
    F sums[kRows][kVectors];
    JAXQ_UNROLL
    for (int64_t r = 0; r < kRows; ++r)
      JAXQ_UNROLL
      for (int64_t i = 0; i < kVectors; ++i) sums[r][i] = Load(total + r * dim + d + i * kLanes);
    for (int64_t t = 0; t < count; ++t) {
      F scaled[kRows];
      JAXQ_UNROLL
      for (int64_t r = 0; r < kRows; ++r) scaled[r] = Set1(weights[r * kChunk + t]);
      JAXQ_UNROLL
      for (int64_t i = 0; i < kVectors; i += kStep) {
        const int64_t at = (first + t) * dim + d + i * kLanes;
        __builtin_prefetch(static_cast<const char*>(values) + at * SizeOf(kT) + kCacheAhead);
        F value[kStep];
        LoadStep<kT, kStep>(values, at, value);
        JAXQ_UNROLL
        for (int j = 0; j < kStep; ++j)
          JAXQ_UNROLL
          for (int64_t r = 0; r < kRows; ++r) sums[r][i + j] = Fma(scaled[r], value[j], sums[r][i + j]);
      }
    }
    JAXQ_UNROLL
    for (int64_t r = 0; r < kRows; ++r)
      JAXQ_UNROLL
      for (int64_t i = 0; i < kVectors; ++i) Store(total + r * dim + d + i * kLanes, sums[r][i]);
  }
  if constexpr (kVectors > kStep) {
    if (d < dim) AddValues<kT, kStep, kRows, kVectors / 2>(weights, values, first, count, dim, d, total);
  }
}

// Calls body(first row, rows as a constant) over `rows` rows, four at a time as long as there are four.
template <typename Body>
JAXQ_INLINE void ForRows(int64_t rows, Body&& body) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) body(r, Constant<4>{});
  if (r + 2 <= rows) body(r, Constant<2>{}), r += 2;
  if (r < rows) body(r, Constant<1>{});
}

// ---- one task

// What is known of some rows after some keys: sums of values weighted by 2**(score - largest), and of the weights.
struct Partial {
  float* total;  // [rows, dim]
  float* largest;
  float* weight;

  static int64_t Floats(int64_t rows, int64_t dim) { return rows * (dim + 2); }
  Partial(float* base, int64_t rows, int64_t dim)
      : total(base), largest(base + rows * dim), weight(base + rows * (dim + 1)) {}
};

// Scores to weights, in place, of one row over a chunk; what was summed before is brought to the new largest score.
void Weigh(float* scores, int64_t count, int64_t dim, int64_t row, const Partial& partial) {
  F top = Set1(partial.largest[row]);
  for (int64_t i = 0; i < count; i += kLanes) top = Max(top, Load(scores + i));
  const float largest = MaxOf(top);
  const float base = BitsOfFloat(largest) == 0xff800000u ? 0.0f : largest;  // nothing seen yet: -inf - -inf is a NaN
  const float before = Exp2(partial.largest[row] - base);
  for (int64_t i = 0; i < count; ++i) scores[i] = Exp2(scores[i] - base);
  F sum = Zero();
  for (int64_t i = 0; i < count; i += kLanes) sum = Add(sum, Load(scores + i));
  partial.weight[row] = partial.weight[row] * before + Sum(sum);
  partial.largest[row] = largest;
  float* total = partial.total + row * dim;
  for (int64_t d = 0; d < dim; d += kLanes) Store(total + d, Mul(Load(total + d), Set1(before)));
}

struct Task {
  int64_t b, kv, row, rows;  // rows of queries
  int64_t first, last;       // keys
};

int64_t SlotBytes(int64_t dim) { return Room<float>(kRowBlock * dim) + Room<float>(kRowBlock * kChunk); }

// The first bytes of what is read next. (An address past the end does nothing.)
template <DType kT>
JAXQ_INLINE void Fetch(const void* cache, int64_t at) {
  const char* first = static_cast<const char*>(cache) + at * SizeOf(kT);
  for (int64_t line = 0; line < kCacheAhead; line += 64) __builtin_prefetch(first + line);
}

template <DType kT, int kStep>
void AttendTo(const AttentionArgs& args, const Task& task, char* scratch, const Partial& partial) {
  const int64_t dim = args.dim, rows = task.rows, head = (task.b * args.kv_heads + task.kv) * args.length;
  float* q = Take<float>(&scratch, kRowBlock * dim);
  float* scores = Take<float>(&scratch, kRowBlock * kChunk);
  const F factor = Set1(args.scale * kLog2e);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = q + r * dim;
    ToFloats(args.dtype, args.q, OffsetOfRow(args, task.b, task.kv, task.row + r), dim, row);
    for (int64_t d = 0; d < dim; d += kLanes) Store(row + d, Mul(Load(row + d), factor));
    if constexpr (kStep == 2) DealPairs(row, dim);
    partial.largest[r] = FloatOfBits(0xff800000u), partial.weight[r] = 0.0f;
  }
  for (int64_t i = 0; i < rows * dim; ++i) partial.total[i] = 0.0f;
  const int64_t last = Least(task.last, Visible(args, task.row + rows - 1));
  for (int64_t t = task.first; t < last; t += kChunk) {
    const int64_t count = Least(kChunk, last - t), padded = RoundUp(count, kLanes);
    Fetch<kT>(args.cache_v, (head + t) * dim);
    for (int64_t k = 0; k < count; k += kKeyBlock)
      ForRows(rows, [&](int64_t r, auto n) {
        Scores<kT, kStep, decltype(n)::value>(q + r * dim, dim, args.cache_k, head + t + k,
                                              Least(kKeyBlock, count - k), scores + r * kChunk + k);
      });
    for (int64_t r = 0; r < rows; ++r) {
      float* row = scores + r * kChunk;
      const int64_t seen = Most(0, Least(count, Visible(args, task.row + r) - t));
      for (int64_t i = seen; i < padded; ++i) row[i] = FloatOfBits(0xff800000u);
      Weigh(row, padded, dim, r, partial);
    }
    for (int64_t k = 0; k < count; k += kKeyBlock)
      ForRows(rows, [&](int64_t r, auto n) {
        constexpr int64_t kRows = decltype(n)::value;
        AddValues<kT, kStep, kRows, kValueSums / kRows>(scores + r * kChunk + k, args.cache_v, head + t + k,
                                                        Least(kKeyBlock, count - k), dim, 0, partial.total + r * dim);
      });
  }
}

// ---- the call

// A row's result from its parts over the keys, `stride` floats apart; the first one is overwritten.
void Finish(const AttentionArgs& args, int64_t b, int64_t kv, int64_t row, int64_t rows, int64_t at, float* parts,
            int64_t count, int64_t stride) {
  const int64_t dim = args.dim;
  float largest = FloatOfBits(0xff800000u), weight = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float part = Partial(parts + i * stride, rows, dim).largest[at];
    largest = part > largest || part != part ? part : largest;
  }
  float* sum = Partial(parts, rows, dim).total + at * dim;
  for (int64_t i = 0; i < count; ++i) {
    const Partial part(parts + i * stride, rows, dim);
    const float factor = Exp2(part.largest[at] - largest);
    const float* total = part.total + at * dim;
    weight += part.weight[at] * factor;
    for (int64_t d = 0; d < dim; d += kLanes) {
      const F scaled = Mul(Load(total + d), Set1(factor));
      Store(sum + d, i ? Add(Load(sum + d), scaled) : scaled);
    }
  }
  for (int64_t d = 0; d < dim; d += kLanes) Store(sum + d, Div(Load(sum + d), Set1(weight)));
  if (DealsPairs(args)) UndealPairs(sum, dim);
  FromFloats(args.dtype, sum, dim, args.y, OffsetOfRow(args, b, kv, row + at));
}

Outcome Attention(const AttentionArgs& args, const Parallel& parallel) {
  if (args.dim % kLanes != 0) return Outcome::kDeclined;
  const int64_t heads = args.batch * args.kv_heads, rows = args.tokens * args.repeat();
  const int64_t blocks = Ceil(rows, kRowBlock), block = Least(rows, kRowBlock), seen = args.position + args.tokens;
  const int64_t pieces = heads * blocks;
  int64_t parts = pieces < kEnoughTasks ? Least(Ceil(seen, kChunk), kMostTasks / pieces) : 1;
  const int64_t keys = RoundUp(Ceil(seen, parts), kChunk);
  parts = Ceil(seen, keys);
  const int64_t stride = RoundUp(Partial::Floats(block, args.dim), kLanes), slot_bytes = SlotBytes(args.dim);
  const int64_t partials = parts > 1 ? pieces * parts : parallel.slots();
  const Scratch scratch(Room<float>(partials * stride) + parallel.slots() * slot_bytes);
  if (!scratch.ok()) return Outcome::kNoMemory;
  char* cursor = scratch.data();
  float* const partial = Take<float>(&cursor, partials * stride);
  AppendAll(args, parallel);
  const auto finish = [&](int64_t piece, float* from) {
    const int64_t head = piece / blocks, row = piece % blocks * kRowBlock, count = Least(kRowBlock, rows - row);
    for (int64_t r = 0; r < count; ++r)
      Finish(args, head / args.kv_heads, head % args.kv_heads, row, count, r, from, parts, stride);
  };
  parallel.For(pieces * parts, [&](int64_t number, int slot) {
    const int64_t piece = number / parts, part = number % parts, head = piece / blocks;
    const int64_t row = piece % blocks * kRowBlock, count = Least(kRowBlock, rows - row);
    const int64_t first = part * keys, last = Least(seen, first + keys);
    const Task task = {head / args.kv_heads, head % args.kv_heads, row, count, first, last};
    float* const base = partial + (parts > 1 ? number : slot) * stride;
    char* const own = cursor + slot * slot_bytes;
    const Partial result(base, count, args.dim);
    if (args.cache_dtype == DType::kF32)
      AttendTo<DType::kF32, 1>(args, task, own, result);
    else if (args.cache_dtype == DType::kF16)
      AttendTo<DType::kF16, 1>(args, task, own, result);
    else if (DealsPairs(args))
      AttendTo<DType::kBF16, 2>(args, task, own, result);
    else
      AttendTo<DType::kBF16, 1>(args, task, own, result);
    if (parts == 1) finish(piece, base);
  });
  if (parts > 1)
    for (int64_t piece = 0; piece < pieces; ++piece) finish(piece, partial + piece * parts * stride);
  return Outcome::kDone;
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_ATTENTION_INL_H_
