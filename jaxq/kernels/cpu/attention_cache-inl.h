// What the kernels of attention share, the portable one included: how new tokens join the cache, and which row of q is
// whose. static, not inline, as in numbers.h.

#ifndef JAXQ_KERNELS_CPU_ATTENTION_CACHE_INL_H_
#define JAXQ_KERNELS_CPU_ATTENTION_CACHE_INL_H_

#include "numbers.h"

namespace jaxq::cpu {

constexpr float kLog2e = 1.44269504088896341f;

// count values of `from` as `to`.
[[maybe_unused]] static void Convert(DType from, const void* source, DType to, void* out, int64_t count) {
  if (from == to) {
    std::memcpy(out, source, static_cast<size_t>(count * SizeOf(to)));
    return;
  }
  for (int64_t i = 0; i < count; ++i) StoreAs(to, out, i, LoadAs(from, source, i));
}

// Copies the new keys and values of one head of one batch member into the cache.
[[maybe_unused]] static void AppendTokens(const AttentionArgs& args, int64_t b, int64_t kv) {
  for (int64_t s = 0; s < args.tokens; ++s) {
    const int64_t from = ((b * args.tokens + s) * args.kv_heads + kv) * args.dim * SizeOf(args.dtype);
    const int64_t to = ((b * args.kv_heads + kv) * args.length + args.position + s) * args.dim;
    const int64_t at = to * SizeOf(args.cache_dtype);
    Convert(args.dtype, static_cast<const char*>(args.k) + from, args.cache_dtype,
            static_cast<char*>(args.cache_k) + at, args.dim);
    Convert(args.dtype, static_cast<const char*>(args.v) + from, args.cache_dtype,
            static_cast<char*>(args.cache_v) + at, args.dim);
  }
}

// All of them; a prompt's on all threads.
template <typename Pool>
static void AppendAll(const AttentionArgs& args, const Pool& parallel) {
  const int64_t heads = args.batch * args.kv_heads;
  const auto append = [&](int64_t head) { AppendTokens(args, head / args.kv_heads, head % args.kv_heads); };
  if (args.tokens < 16) {
    for (int64_t head = 0; head < heads; ++head) append(head);
    return;
  }
  parallel.For(heads, [&](int64_t head, int) { append(head); });
}

// The queries that share a head of keys, a token's after another's, are numbered rows. Where row `row`'s begins in q
// and in y, in values:
[[maybe_unused]] static int64_t OffsetOfRow(const AttentionArgs& args, int64_t b, int64_t kv, int64_t row) {
  const int64_t repeat = args.repeat(), token = b * args.tokens + row / repeat;
  return (token * args.heads + kv * repeat + row % repeat) * args.dim;
}

// How many keys a row sees.
[[maybe_unused]] static int64_t Visible(const AttentionArgs& args, int64_t row) {
  return args.position + row / args.repeat() + 1;
}

}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_ATTENTION_CACHE_INL_H_
