// The portable kernels: every format, every operation, one loop each. They define what the others must give.

#include <cmath>
#include <cstdlib>

#include "attention_cache-inl.h"
#include "isas.h"
#include "numbers.h"
#include "quantize-inl.h"

namespace jaxq::cpu {
namespace {

constexpr int64_t kRowsPerTask = 16;
constexpr int64_t kColumnsPerTask = 128;  // of w, for transpose=False; a multiple of every group size

int64_t Tasks(int64_t size, int64_t per_task) { return (size + per_task - 1) / per_task; }
int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }

const char* Missing() { return nullptr; }

// out[0:count] = w[row, first : first+count]; first and count are multiples of group_size.
void DecodeRow(const Format& format, const uint8_t* packed_row, const void* scales, const void* biases,
               DType scale_dtype, int64_t first_group, int64_t first, int64_t count, float* out) {
  const uint64_t mask = (uint64_t{1} << format.bits) - 1;
  for (int64_t k = 0; k < count; k += 8) {
    const Affine group = LoadAffine(format, scale_dtype, scales, biases, first_group + k / format.group_size);
    uint64_t octet = LoadOctet(packed_row + (first + k) / 8 * format.bits, format.bits);
    for (int i = 0; i < 8; ++i, octet >>= format.bits) {
      const float value = ValueOfCode(format.mode, static_cast<uint32_t>(octet & mask));
      out[k + i] = group.scale * value + group.bias;
    }
  }
}

Outcome Quantize(const QuantizeArgs& args, const Parallel& parallel) {
  parallel.For(Tasks(args.rows, kRowsPerTask), [&](int64_t task, int) {
    const int64_t end = Least(args.rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) QuantizeRow(args, row);
  });
  return Outcome::kDone;
}

Outcome Dequantize(const DequantizeArgs& args, const Parallel& parallel) {
  const int64_t groups = args.length / args.format.group_size, row_bytes = args.length / 8 * args.format.bits;
  parallel.For(Tasks(args.rows, kRowsPerTask), [&](int64_t task, int) {
    const int64_t end = Least(args.rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) {
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = group * args.format.group_size;
        float values[128];
        DecodeRow(args.format, args.packed + row * row_bytes, args.scales, args.biases, args.scale_dtype,
                  row * groups + group, first, args.format.group_size, values);
        for (int i = 0; i < args.format.group_size; ++i)
          StoreAs(args.out_dtype, args.out, row * args.length + first + i, values[i]);
      }
    }
  });
  return Outcome::kDone;
}

// y[m, n] = sum over k of x[m, k] * w[n, k], a group at a time.
void DotRow(const MatmulArgs& args, int64_t n) {
  const int g = args.format.group_size;
  constexpr int64_t kBlock = 8;  // rows of x that share one decoding of w
  for (int64_t m0 = 0; m0 < args.M; m0 += kBlock) {
    const int64_t rows = Least(kBlock, args.M - m0);
    float sums[kBlock] = {};
    for (int64_t group = 0; group < args.groups(); ++group) {
      float values[128];
      DecodeRow(args.format, args.packed + n * args.row_bytes(), args.scales, args.biases, args.scale_dtype,
                n * args.groups() + group, group * g, g, values);
      for (int64_t m = 0; m < rows; ++m) {
        float sum = 0;
        for (int i = 0; i < g; ++i) sum += LoadAs(args.x_dtype, args.x, (m0 + m) * args.K + group * g + i) * values[i];
        sums[m] += sum;
      }
    }
    for (int64_t m = 0; m < rows; ++m) StoreAs(args.x_dtype, args.y, (m0 + m) * args.N + n, sums[m]);
  }
}

// y[m, first:first+count] = sum over n of x[m, n] * w[n, first:first+count]; partial sums over 64 rows of w keep the
// rounding error near that of a blocked sum.
void SumColumns(const MatmulArgs& args, int64_t first, int64_t count) {
  constexpr int64_t kBlock = 4;
  for (int64_t m0 = 0; m0 < args.M; m0 += kBlock) {
    const int64_t rows = Least(kBlock, args.M - m0);
    float totals[kBlock][kColumnsPerTask] = {}, sums[kBlock][kColumnsPerTask] = {};
    for (int64_t n = 0; n < args.N; ++n) {
      float values[kColumnsPerTask];
      DecodeRow(args.format, args.packed + n * args.row_bytes(), args.scales, args.biases, args.scale_dtype,
                n * args.groups() + first / args.format.group_size, first, count, values);
      const bool flush = n % 64 == 63 || n + 1 == args.N;
      for (int64_t m = 0; m < rows; ++m) {
        const float x = LoadAs(args.x_dtype, args.x, (m0 + m) * args.N + n);
        for (int64_t k = 0; k < count; ++k) sums[m][k] += x * values[k];
        if (!flush) continue;
        for (int64_t k = 0; k < count; ++k) totals[m][k] += sums[m][k], sums[m][k] = 0;
      }
    }
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t k = 0; k < count; ++k) StoreAs(args.x_dtype, args.y, (m0 + m) * args.K + first + k, totals[m][k]);
  }
}

Outcome Matmul(const MatmulArgs& args, const Parallel& parallel) {
  if (args.transpose) {
    parallel.For(Tasks(args.N, kRowsPerTask), [&](int64_t task, int) {
      const int64_t end = Least(args.N, (task + 1) * kRowsPerTask);
      for (int64_t n = task * kRowsPerTask; n < end; ++n) DotRow(args, n);
    });
  } else {
    parallel.For(Tasks(args.K, kColumnsPerTask), [&](int64_t task, int) {
      const int64_t first = task * kColumnsPerTask;
      SumColumns(args, first, Least(kColumnsPerTask, args.K - first));
    });
  }
  return Outcome::kDone;
}

// One row of queries over all that it sees: scores, their exponentials relative to the largest, the weighted sum.
void AttendRow(const AttentionArgs& args, int64_t b, int64_t kv, int64_t row, float* scores, float* sums) {
  const int64_t q = OffsetOfRow(args, b, kv, row), keys = (b * args.kv_heads + kv) * args.length * args.dim;
  const int64_t seen = Visible(args, row);
  float largest = -INFINITY, weight = 0;
  for (int64_t t = 0; t < seen; ++t) {
    float sum = 0;
    for (int64_t d = 0; d < args.dim; ++d)
      sum += LoadAs(args.dtype, args.q, q + d) * LoadAs(args.cache_dtype, args.cache_k, keys + t * args.dim + d);
    scores[t] = args.scale * sum;
    largest = std::fmax(largest, scores[t]);
  }
  for (int64_t d = 0; d < args.dim; ++d) sums[d] = 0;
  for (int64_t t = 0; t < seen; ++t) {
    const float share = std::exp(scores[t] - largest);
    weight += share;
    for (int64_t d = 0; d < args.dim; ++d)
      sums[d] += share * LoadAs(args.cache_dtype, args.cache_v, keys + t * args.dim + d);
  }
  for (int64_t d = 0; d < args.dim; ++d) StoreAs(args.dtype, args.y, q + d, sums[d] / weight);
}

Outcome Attention(const AttentionArgs& args, const Parallel& parallel) {
  const int64_t rows = args.tokens * args.repeat(), room = args.position + args.tokens + args.dim;
  float* const scratch = static_cast<float*>(std::malloc(sizeof(float) * static_cast<size_t>(room * parallel.slots())));
  if (scratch == nullptr) return Outcome::kNoMemory;
  AppendAll(args, parallel);
  parallel.For(args.batch * args.kv_heads * rows, [&](int64_t task, int slot) {
    const int64_t head = task / rows;
    float* const own = scratch + slot * room;
    AttendRow(args, head / args.kv_heads, head % args.kv_heads, task % rows, own, own + room - args.dim);
  });
  std::free(scratch);
  return Outcome::kDone;
}

}  // namespace

const Isa kScalar = {"scalar", Missing, Quantize, Dequantize, Matmul, Attention};

}  // namespace jaxq::cpu
