// Calls of the attention handler for fuzz_handlers.cc: random right ones, what is legal, and the results in float64.
// The contract is that of AttentionArgs in kernels.h: [B, S, H, hd] over caches [L, B, KV, T, hd], which are results
// too.
#ifndef JAXQ_KERNELS_CPU_SCRIPTS_FFI_ATTENTION_H_
#define JAXQ_KERNELS_CPU_SCRIPTS_FFI_ATTENTION_H_

#include "ffi_calls.h"

namespace jaxq::cpu::check {

constexpr size_t kCacheK = 3, kCacheV = 4, kLayer = 5, kPosition = 6;  // operands; q, k and v come first

inline Frame AttentionFrame(Random* random, const std::string& isa) {
  const auto below = [&](int64_t end) { return static_cast<int64_t>(random->Bits() % static_cast<uint64_t>(end)); };
  const XLA_FFI_DataType q = XlaType(static_cast<DType>(below(3))), cache = XlaType(static_cast<DType>(below(3)));
  const int64_t batch = below(3), tokens = below(below(8) ? 6 : 70), kv_heads = 1 + below(3), heads = kv_heads * (1 + below(4));
  const int64_t layers = 1 + below(3), length = tokens + 1 + below(40), dim = 1 + below(below(2) ? 130 : 20);
  const Buffer queries = {q, {batch, tokens, heads, dim}, nullptr}, keys = {q, {batch, tokens, kv_heads, dim}, nullptr};
  const Buffer caches = {cache, {layers, batch, kv_heads, length, dim}, nullptr};
  const Buffer number = {XLA_FFI_DataType_S32, {}, nullptr};
  return {{queries, keys, keys, caches, caches, number, number},
          {queries, caches, caches},
          {{"isa", isa}, {"scale", 0.25f}}};
}

inline DType FloatOf(const Buffer& buffer) {
  return buffer.dtype == XLA_FFI_DataType_F32   ? DType::kF32
         : buffer.dtype == XLA_FFI_DataType_F16 ? DType::kF16
                                                : DType::kBF16;
}

inline int32_t NumberIn(const Buffer& buffer) {
  int32_t number;
  std::memcpy(&number, buffer.data, 4);
  return number;
}

// With its memory, since the layer and the position stand there, and since the caches must be the results.
inline bool LegalAttention(const Frame& frame) {
  const std::vector<Buffer>&in = frame.operands, &out = frame.results;
  std::string names;
  for (const Attribute& a : frame.attributes) names += a.name + " ";
  if (names != "isa scale " || in.size() != 7 || out.size() != 3) return false;
  const auto* isa = std::get_if<std::string>(&frame.attributes[0].value);
  if (isa == nullptr || !KnownIsa(*isa) || !std::holds_alternative<float>(frame.attributes[1].value)) return false;
  const std::vector<int64_t>&q = in[0].dims, &k = in[1].dims, &cache = in[kCacheK].dims;
  const auto alike = [](const Buffer& a, const Buffer& b) { return a.dtype == b.dtype && a.dims == b.dims; };
  if (q.size() != 4 || k.size() != 4 || cache.size() != 5) return false;
  if (!IsFloat(in[0].dtype) || in[1].dtype != in[0].dtype || !IsFloat(in[kCacheK].dtype)) return false;
  if (!alike(in[1], in[2]) || !alike(in[kCacheK], in[kCacheV]) || !alike(out[0], in[0])) return false;
  for (size_t i : {1, 2})
    if (!alike(out[i], in[kCacheK + i - 1]) || out[i].data != in[kCacheK + i - 1].data) return false;
  if (k != std::vector<int64_t>{q[0], q[1], k[2], q[3]}) return false;
  if (cache != std::vector<int64_t>{cache[0], q[0], k[2], cache[3], q[3]}) return false;
  if (k[2] == 0 ? q[2] != 0 : q[2] % k[2] != 0) return false;
  for (size_t i : {kLayer, kPosition})
    if (in[i].dtype != XLA_FFI_DataType_S32 || !in[i].dims.empty()) return false;
  const int64_t layer = NumberIn(in[kLayer]), position = NumberIn(in[kPosition]);
  return layer >= 0 && layer < cache[0] && position >= 0 && position + q[1] <= cache[3];
}

// Fills the operands with numbers: NaNs where no query may look.
inline void FillAttention(Random* random, const Frame& frame) {
  const std::vector<int64_t>& cache = frame.operands[kCacheK].dims;
  const int64_t tokens = frame.operands[0].dims[1], length = cache[3], dim = cache[4];
  const int32_t layer = static_cast<int32_t>(random->Bits() % static_cast<uint64_t>(cache[0]));
  const int32_t position = static_cast<int32_t>(random->Bits() % static_cast<uint64_t>(length - tokens + 1));
  std::memcpy(frame.operands[kLayer].data, &layer, 4), std::memcpy(frame.operands[kPosition].data, &position, 4);
  for (size_t i = 0; i < kLayer; ++i) {
    const Buffer& buffer = frame.operands[i];
    const DType dtype = FloatOf(buffer);
    for (int64_t at = 0; at < Count(buffer.dims); ++at) {
      const bool hidden = i >= kCacheK && (at / dim % length >= position || at / (Count(cache) / cache[0]) != layer);
      Encode(dtype, static_cast<uint8_t*>(buffer.data), at, hidden ? NAN : static_cast<float>(random->Normal()));
    }
  }
}

// What a served call has made of `before`, a copy of the caches; "" or what is wrong.
//
// The caches: the new tokens' keys and values, rounded once, and otherwise the same bits. The result: with scores that
// are off by e, of which (hd + 4) units of float32's roundoff of the sum of their terms' sizes, weights are off by a
// factor of exp(2 e), and by 2^-18 at most, the arithmetic of an exponential to single precision with some room; sums
// of T values add (T + 8) units. Many queries in bfloat16 over a cache in bfloat16: weights may be rounded to it.
inline std::string CheckAttention(const Frame& frame, const std::vector<uint8_t> (&before)[2]) {
  const std::vector<Buffer>& in = frame.operands;
  const DType dtype = FloatOf(in[0]), cache_dtype = FloatOf(in[kCacheK]);
  const int64_t B = in[0].dims[0], S = in[0].dims[1], H = in[0].dims[2], KV = in[1].dims[2], D = in[0].dims[3];
  const int64_t T = in[kCacheK].dims[3], layer = NumberIn(in[kLayer]), position = NumberIn(in[kPosition]);
  const double scale = std::get<float>(frame.attributes[1].value);
  const auto get = [](DType type, const Buffer& buffer, int64_t at) {
    return Decode(type, static_cast<const uint8_t*>(buffer.data), at);
  };
  const auto place = [&](int64_t b, int64_t head, int64_t t) { return (((layer * B + b) * KV + head) * T + t) * D; };
  const Rounding stored = RoundingOf(cache_dtype);
  for (size_t which : {0, 1}) {
    std::vector<uint8_t> expected = before[which];
    const Buffer& cache = in[kCacheK + which];
    for (int64_t b = 0; b < B; ++b)
      for (int64_t s = 0; s < S; ++s)
        for (int64_t head = 0; head < KV; ++head)
          for (int64_t d = 0; d < D; ++d) {
            const double value = get(dtype, in[1 + which], ((b * S + s) * KV + head) * D + d);
            const int64_t at = place(b, head, position + s) + d;
            if (!(Ratio(get(cache_dtype, cache, at), value, stored.relative * std::fabs(value) + stored.absolute) <= 1))
              return "the cache does not hold a new token";
            const int64_t bytes = SizeOf(cache_dtype);
            std::memcpy(expected.data() + at * bytes, static_cast<uint8_t*>(cache.data) + at * bytes,
                        static_cast<size_t>(bytes));
          }
    if (!expected.empty() && std::memcmp(expected.data(), cache.data, expected.size()) != 0)
      return "the cache changed elsewhere";
  }
  const Rounding rounding = RoundingOf(dtype);
  const bool tiles = dtype == DType::kBF16 && cache_dtype == DType::kBF16 && S * (H / KV) >= 32;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t s = 0; s < S; ++s)
      for (int64_t h = 0; h < H; ++h) {
        const int64_t query = ((b * S + s) * H + h) * D, seen = position + s + 1, head = h / (H / KV);
        std::vector<double> weights;
        double most = -INFINITY, error = 0, sum = 0;
        for (int64_t t = 0; t < seen; ++t) {
          double score = 0, size = 0;
          for (int64_t d = 0; d < D; ++d) {
            const double term = get(dtype, in[0], query + d) * get(cache_dtype, in[kCacheK], place(b, head, t) + d);
            score += term, size += std::fabs(term);
          }
          weights.push_back(score * scale), most = std::fmax(most, score * scale);
          error = std::fmax(error, (D + 4) * 0x1p-24 * size * scale);
        }
        for (double& weight : weights) weight = std::exp(weight - most), sum += weight;
        for (int64_t d = 0; d < D; ++d) {
          double want = 0, size = 0;
          for (int64_t t = 0; t < seen; ++t) {
            const double term =
                weights[static_cast<size_t>(t)] / sum * get(cache_dtype, in[kCacheV], place(b, head, t) + d);
            want += term, size += std::fabs(term);
          }
          const double bound = (std::expm1(2 * error) + 0x1p-18 + (tiles ? 0x1p-8 : 0) + (seen + 8) * 0x1p-24) * size +
                               rounding.relative * std::fabs(want) + rounding.absolute;
          const double ratio = Ratio(get(dtype, frame.results[0], query + d), want, bound);
          if (!(ratio <= 1)) return std::to_string(ratio) + " times the bound";
        }
      }
  return "";
}

}  // namespace jaxq::cpu::check

#endif  // JAXQ_KERNELS_CPU_SCRIPTS_FFI_ATTENTION_H_
