// The handler that XLA calls for attention over a cache. Every buffer is checked before a kernel sees it.

#include <new>
#include <string>
#include <string_view>

#include "dispatch.h"
#include "ffi_checks.h"
#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jaxq::cpu {
namespace {

struct Buffers {
  ffi::AnyBuffer q, k, v, cache_k, cache_v, layer, position, y, new_k, new_v;
};

bool IsScalar(const ffi::AnyBuffer& buffer) {
  return buffer.element_type() == ffi::DataType::S32 && buffer.dimensions().size() == 0;
}

bool SameKind(const ffi::AnyBuffer& a, const ffi::AnyBuffer& b) {
  return a.element_type() == b.element_type() && SameDims(a.dimensions(), b.dimensions());
}

int64_t ValueOf(const ffi::AnyBuffer& scalar) { return *static_cast<const int32_t*>(scalar.untyped_data()); }

bool CheckShapes(const Buffers& in, Failure* failure) {
  const auto fail = [&](std::string message) { return failure->message = std::move(message), false; };
  const Dims q = in.q.dimensions(), k = in.k.dimensions(), cache = in.cache_k.dimensions();
  if (!IsFloat(in.q.element_type()) || !IsFloat(in.cache_k.element_type()))
    return fail("q and the cache must be float32, float16 or bfloat16");
  if (q.size() != 4 || k.size() != 4 || cache.size() != 5)
    return fail("q, k and the cache must be [B, S, H, hd], [B, S, KV, hd] and [L, B, KV, T, hd], not " +
                ShapeText(q) + ", " + ShapeText(k) + " and " + ShapeText(cache));
  if (in.k.element_type() != in.q.element_type() || !SameKind(in.k, in.v))
    return fail("k and v must have q's dtype, and one shape");
  if (!SameKind(in.cache_k, in.cache_v)) return fail("the caches of keys and values must be alike");
  if (k[0] != q[0] || k[1] != q[1] || k[3] != q[3] || cache[1] != q[0] || cache[2] != k[2] || cache[4] != q[3])
    return fail("q " + ShapeText(q) + ", k " + ShapeText(k) + " and the cache " + ShapeText(cache) + " do not fit");
  if (k[2] == 0 ? q[2] != 0 : q[2] % k[2] != 0)
    return fail("the heads of q " + ShapeText(q) + " must be a multiple of those of k " + ShapeText(k));
  if (!SameKind(in.y, in.q)) return fail("the result must be like q");
  if (!SameKind(in.new_k, in.cache_k) || !SameKind(in.new_v, in.cache_k) ||
      in.new_k.untyped_data() != in.cache_k.untyped_data() || in.new_v.untyped_data() != in.cache_v.untyped_data())
    return fail("the last two results must be the caches themselves (input_output_aliases)");
  if (!IsScalar(in.layer) || !IsScalar(in.position)) return fail("layer and position must be int32 scalars");
  return true;
}

// Reads the two scalars, which must name a layer and places of the cache.
bool CheckPlace(const Buffers& in, int64_t* layer, int64_t* position, Failure* failure) {
  const Dims cache = in.cache_k.dimensions();
  const int64_t tokens = in.q.dimensions()[1];
  *layer = ValueOf(in.layer), *position = ValueOf(in.position);
  failure->code = ffi::ErrorCode::kOutOfRange;
  if (*layer < 0 || *layer >= cache[0])
    return failure->message = "layer " + std::to_string(*layer) + " is none of " + std::to_string(cache[0]), false;
  if (*position < 0 || *position + tokens > cache[3])
    return failure->message = "positions " + std::to_string(*position) + " to " +
                              std::to_string(*position + tokens - 1) + " do not lie in a cache of " +
                              std::to_string(cache[3]),
           false;
  return true;
}

ffi::Error AttentionHandler(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                            ffi::AnyBuffer cache_k, ffi::AnyBuffer cache_v, ffi::AnyBuffer layer,
                            ffi::AnyBuffer position, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> new_k,
                            ffi::Result<ffi::AnyBuffer> new_v, float scale, std::string_view isa) try {
  constexpr const char* kOp = "cached_attention";
  const Buffers buffers = {q, k, v, cache_k, cache_v, layer, position, *y, *new_k, *new_v};
  Failure failure;
  int index;
  int64_t at, first;
  if (!ParseIsa(isa, &index, &failure) || !CheckShapes(buffers, &failure) ||
      !CheckPlace(buffers, &at, &first, &failure))
    return ErrorOf(kOp, failure);
  if (q.element_count() == 0) return ffi::Error::Success();
  const Dims qs = q.dimensions(), caches = cache_k.dimensions();
  const int64_t kv_heads = caches[2], length = caches[3], dim = caches[4];
  const DType dtype = DTypeOf(q.element_type()), cache_dtype = DTypeOf(cache_k.element_type());
  const int64_t offset = at * caches[1] * kv_heads * length * dim * SizeOf(cache_dtype);
  const AttentionArgs args = {qs[0],
                              qs[1],
                              qs[2],
                              kv_heads,
                              length,
                              dim,
                              first,
                              scale,
                              dtype,
                              cache_dtype,
                              q.untyped_data(),
                              k.untyped_data(),
                              v.untyped_data(),
                              static_cast<char*>(cache_k.untyped_data()) + offset,
                              static_cast<char*>(cache_v.untyped_data()) + offset,
                              y->untyped_data()};
  return Finish(kOp, Attention(index, args, PoolParallel(pool)));
} catch (const std::bad_alloc&) {
  return Finish("cached_attention", Outcome::kNoMemory);
}

}  // namespace
}  // namespace jaxq::cpu

JAXQ_EXPORT XLA_FFI_Error* jaxq_cached_attention_cpu(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxq_cached_attention_cpu, jaxq::cpu::AttentionHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<std::string_view>("isa"));
