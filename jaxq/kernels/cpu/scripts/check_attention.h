// Attention over a cache for check_kernels.cc: against float64, with the bound of tests/test_attention.py, and the same
// bits from any number of workers. The cache ends with the last position seen, where unmapped memory begins.
#ifndef JAXQ_KERNELS_CPU_SCRIPTS_CHECK_ATTENTION_H_
#define JAXQ_KERNELS_CPU_SCRIPTS_CHECK_ATTENTION_H_

#include "check_kernels.h"

namespace jaxq::cpu::check {

struct AttentionCase {
  int64_t batch, tokens, heads, kv_heads, dim, position;
  DType dtype, cache_dtype;

  int64_t length() const { return position + tokens; }
};

inline std::vector<AttentionCase> AttentionCases(bool quick) {
  std::vector<AttentionCase> cases;
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    cases.push_back({1, 1, 4, 2, 64, 299, dtype, dtype});
    cases.push_back({2, 3, 7, 1, 32, 40, dtype, DType::kBF16});
    cases.push_back({2, 70, 6, 2, 40, 90, dtype, DType::kBF16});
    if (quick) continue;
    cases.push_back({1, 1, 16, 8, 128, 600, dtype, dtype});
    cases.push_back({1, 40, 5, 1, 80, 230, dtype, DType::kF32});
    cases.push_back({1, 330, 2, 2, 128, 0, dtype, dtype});
    cases.push_back({4, 130, 16, 8, 16, 3, dtype, dtype});
    cases.push_back({2, 1, 3, 3, 20, 0, dtype, DType::kF16});
    cases.push_back({1, 1, 8, 1, 16, 4000, dtype, dtype});
  }
  return cases;
}

// The operands of a case, the same for the same case; the result of a run on them.
struct Attended {
  const AttentionCase c;
  Random random{17};
  Floats q, k, v, cache_k, cache_v;
  Guarded y;

  explicit Attended(const AttentionCase& c_)
      : c(c_),
        q(&random, c.dtype, c.batch * c.tokens * c.heads * c.dim),
        k(&random, c.dtype, c.batch * c.tokens * c.kv_heads * c.dim),
        v(&random, c.dtype, c.batch * c.tokens * c.kv_heads * c.dim),
        cache_k(&random, c.cache_dtype, c.batch * c.kv_heads * c.length() * c.dim),
        cache_v(&random, c.cache_dtype, c.batch * c.kv_heads * c.length() * c.dim),
        y(c.batch * c.tokens * c.heads * c.dim * SizeOf(c.dtype)) {}

  bool Run(int isa, const Parallel& parallel) {
    const AttentionArgs args = {c.batch,          c.tokens,      c.heads,        c.kv_heads, c.length(),
                                c.dim,            c.position,    Scale(),        c.dtype,    c.cache_dtype,
                                q.data.get(),     k.data.get(),  v.data.get(),   cache_k.data.get(),
                                cache_v.data.get(), y.get()};
    return Attention(isa, args, parallel) == Outcome::kDone;
  }

  // Of a weight. Kernels for many queries in bfloat16 round it where the cache is bfloat16 too.
  double WeightRounding() const {
    const bool tiles = c.dtype == DType::kBF16 && c.cache_dtype == DType::kBF16;
    return tiles && c.tokens * (c.heads / c.kv_heads) >= 32 ? 0x1p-9 : 0.0;
  }

  float Scale() const { return 1 / std::sqrt(static_cast<float>(c.dim)); }

  // One query's error as a fraction of its bound.
  double Ratio(int64_t b, int64_t s, int64_t h) const {
    const double u = 0x1p-24;
    const int64_t count = c.position + s + 1, kv = h / (c.heads / c.kv_heads);
    const int64_t from = (b * c.kv_heads + kv) * c.length() * c.dim, at = ((b * c.tokens + s) * c.heads + h) * c.dim;
    std::vector<double> scores(count);
    double largest = -INFINITY, size = 0, weight = 0, worst = 0;
    for (int64_t t = 0; t < count; ++t) {
      double sum = 0, terms = 0;
      for (int64_t d = 0; d < c.dim; ++d) {
        const double product = q.values[at + d] * Decode(c.cache_dtype, cache_k.data.get(), from + t * c.dim + d);
        sum += product, terms += std::fabs(product);
      }
      scores[t] = sum * Scale();
      largest = std::fmax(largest, scores[t]);
      size = std::fmax(size, (c.dim + 8) * terms * Scale() + 4 * std::fabs(scores[t]));
    }
    for (double& score : scores) weight += score = std::exp(score - largest);
    const Rounding rounding = RoundingOf(c.dtype);
    for (int64_t d = 0; d < c.dim; ++d) {
      double want = 0, mean = 0;
      for (int64_t t = 0; t < count; ++t) {
        const double part = scores[t] / weight * Decode(c.cache_dtype, cache_v.data.get(), from + t * c.dim + d);
        want += part, mean += std::fabs(part);
      }
      const double weights = 2 * u * (size + 4) + 2 * WeightRounding();
      const double bound =
          (weights + 2 * (count + 8) * u) * mean + rounding.relative * std::fabs(want) + rounding.absolute;
      const double error = std::fabs(Decode(c.dtype, y.get(), at + d) - want);
      worst = std::fmax(worst, error <= bound ? error / bound : INFINITY);
    }
    return worst;
  }

  // Whether the new tokens stand in the cache where they belong, exactly or rounded to it.
  bool Joined() const {
    const Rounding rounding = RoundingOf(c.cache_dtype);
    for (int64_t i = 0; i < c.batch * c.tokens * c.kv_heads * c.dim; ++i) {
      const int64_t d = i % c.dim, kv = i / c.dim % c.kv_heads, s = i / c.dim / c.kv_heads % c.tokens;
      const int64_t b = i / c.dim / c.kv_heads / c.tokens;
      const int64_t at = ((b * c.kv_heads + kv) * c.length() + c.position + s) * c.dim + d;
      for (int which = 0; which < 2; ++which) {
        const double want = (which ? v : k).values[i];
        const double got = Decode(c.cache_dtype, (which ? cache_v : cache_k).data.get(), at);
        if (!(std::fabs(got - want) <= rounding.relative * std::fabs(want) + rounding.absolute)) return false;
      }
    }
    return true;
  }
};

// The worst error over a case as a fraction of its bound; infinite where the cache is wrong or bits depend on workers.
inline double AttentionRatio(int isa, const AttentionCase& c) {
  Attended first(c), second(c);
  if (!first.Run(isa, Threads(1)) || !second.Run(isa, Threads(3)) || !first.Joined()) return INFINITY;
  const size_t bytes = static_cast<size_t>(c.batch * c.tokens * c.heads * c.dim * SizeOf(c.dtype));
  if (std::memcmp(first.y.get(), second.y.get(), bytes) != 0) return INFINITY;
  double worst = 0;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t s = 0; s < c.tokens; ++s)
      for (int64_t h = 0; h < c.heads; ++h) worst = std::fmax(worst, first.Ratio(b, s, h));
  return worst;
}

}  // namespace jaxq::cpu::check

#endif  // JAXQ_KERNELS_CPU_SCRIPTS_CHECK_ATTENTION_H_
