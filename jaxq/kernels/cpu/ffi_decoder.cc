// The handlers that XLA calls for what a decoder computes between its products. Every buffer is checked before a kernel
// sees it.

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

constexpr int64_t kWorkPerValue = 4;  // as PoolParallel counts it

bool Alike(const ffi::AnyBuffer& a, const ffi::AnyBuffer& b) {
  return a.element_type() == b.element_type() && SameDims(a.dimensions(), b.dimensions());
}

// A stack of weights for values that are `width` wide: the one that the index names.
bool CheckWeight(const ffi::AnyBuffer& stack, const ffi::AnyBuffer& index, int64_t width, const float** weight,
                 Failure* failure) {
  const auto fail = [&](std::string message) { return failure->message = std::move(message), false; };
  const Dims dims = stack.dimensions();
  if (stack.element_type() != ffi::DataType::F32 || dims.size() != 2 || dims[1] != width)
    return fail("a stack of weights must be float32[L, " + std::to_string(width) + "], not " + ShapeText(dims));
  if (index.element_type() != ffi::DataType::S32 || index.dimensions().size() != 0)
    return fail("the index must be an int32 scalar");
  const int64_t at = *static_cast<const int32_t*>(index.untyped_data());
  if (at < 0 || at >= dims[0]) {
    failure->code = ffi::ErrorCode::kOutOfRange;
    return fail("index " + std::to_string(at) + " is none of " + std::to_string(dims[0]));
  }
  *weight = static_cast<const float*>(stack.untyped_data()) + at * width;
  return true;
}

ffi::Error AddNormHandler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer y, ffi::AnyBuffer weights,
                          ffi::AnyBuffer index, ffi::Result<ffi::AnyBuffer> sum, ffi::Result<ffi::AnyBuffer> out,
                          float eps, std::string_view isa) try {
  constexpr const char* kOp = "add_norm";
  Failure failure;
  int at;
  if (!ParseIsa(isa, &at, &failure)) return ErrorOf(kOp, failure);
  const Dims dims = x.dimensions();
  if (!IsFloat(x.element_type()) || dims.size() == 0)
    return ErrorOf(kOp, {"x must be float32, float16 or bfloat16 with an axis or more, not " + ShapeText(dims)});
  if (!Alike(x, y) || !Alike(x, *sum) || !Alike(x, *out)) return ErrorOf(kOp, {"y and the results must be like x"});
  const int64_t width = dims[dims.size() - 1];
  const float* weight;
  if (!CheckWeight(weights, index, width, &weight, &failure)) return ErrorOf(kOp, failure);
  const int64_t count = static_cast<int64_t>(x.element_count());
  if (count == 0) return ffi::Error::Success();
  const AddNormArgs args = {count / width,    width,  eps,  DTypeOf(x.element_type()), x.untyped_data(),
                            y.untyped_data(), weight, sum->untyped_data(), out->untyped_data()};
  return Finish(kOp, AddNorm(at, args, PoolParallel(pool, kWorkPerValue * count)));
} catch (const std::bad_alloc&) {
  return Finish("add_norm", Outcome::kNoMemory);
}

ffi::Error GatedHandler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out,
                        std::string_view isa) try {
  constexpr const char* kOp = "gated";
  Failure failure;
  int at;
  if (!ParseIsa(isa, &at, &failure)) return ErrorOf(kOp, failure);
  const Dims xs = x.dimensions(), outs = out->dimensions();
  bool fits = IsFloat(x.element_type()) && out->element_type() == x.element_type() && xs.size() == outs.size() &&
              xs.size() > 0 && xs[xs.size() - 1] == 2 * outs[outs.size() - 1];
  for (size_t i = 0; fits && i + 1 < xs.size(); ++i) fits = xs[i] == outs[i];
  if (!fits)
    return ErrorOf(kOp, {"x " + ShapeText(xs) + " must be float32, float16 or bfloat16, and the result " +
                         ShapeText(outs) + " of its dtype and half as wide"});
  const int64_t count = static_cast<int64_t>(out->element_count());
  if (count == 0) return ffi::Error::Success();
  const int64_t width = outs[outs.size() - 1];
  const GatedArgs args = {count / width, width, DTypeOf(x.element_type()), x.untyped_data(), out->untyped_data()};
  return Finish(kOp, Gated(at, args, PoolParallel(pool, 2 * kWorkPerValue * count)));
} catch (const std::bad_alloc&) {
  return Finish("gated", Outcome::kNoMemory);
}

struct HeadBuffers {
  ffi::AnyBuffer x, cos, sin, q, k, v;
};

bool CheckHeads(const HeadBuffers& in, SplitHeadsArgs* args, Failure* failure) {
  const auto fail = [&](std::string message) { return failure->message = std::move(message), false; };
  const Dims xs = in.x.dimensions(), q = in.q.dimensions(), k = in.k.dimensions(), cos = in.cos.dimensions();
  if (!IsFloat(in.x.element_type()) || in.q.element_type() != in.x.element_type() ||
      in.k.element_type() != in.x.element_type() || !Alike(in.k, in.v))
    return fail("x must be float32, float16 or bfloat16, and the results of its dtype, the last two alike");
  bool fits = xs.size() == 4 && q.size() == 4 && k.size() == 4 && xs[2] == q[2] + 2 * k[2] && xs[3] % 2 == 0;
  for (size_t i = 0; fits && i < 4; ++i) fits = i == 2 || (q[i] == xs[i] && k[i] == xs[i]);
  if (!fits)
    return fail("x " + ShapeText(xs) + " must be [B, S, H + 2*KV, hd] with an even hd, and the results [B, S, H, hd]" +
                " and [B, S, KV, hd], not " + ShapeText(q) + " and " + ShapeText(k));
  if (in.cos.element_type() != ffi::DataType::F32 || !Alike(in.cos, in.sin) || cos.size() != 2 || cos[0] != xs[1] ||
      cos[1] * 2 != xs[3])
    return fail("cosines and sines must be float32[S, hd/2], not " + ShapeText(cos));
  *args = {xs[0], xs[1], q[2], k[2], xs[3], 0.0f, DTypeOf(in.x.element_type()), in.x.untyped_data(),
           static_cast<const float*>(in.cos.untyped_data()), static_cast<const float*>(in.sin.untyped_data()),
           nullptr, nullptr, in.q.untyped_data(), in.k.untyped_data(), in.v.untyped_data()};
  return true;
}

ffi::Error SplitHeadsHandler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer cos, ffi::AnyBuffer sin,
                             ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> q, ffi::Result<ffi::AnyBuffer> k,
                             ffi::Result<ffi::AnyBuffer> v, float eps, std::string_view isa) try {
  constexpr const char* kOp = "split_heads";
  Failure failure;
  int at;
  SplitHeadsArgs args;
  if (!ParseIsa(isa, &at, &failure) || !CheckHeads({x, cos, sin, *q, *k, *v}, &args, &failure))
    return ErrorOf(kOp, failure);
  args.eps = eps;
  if (rest.size() != 0) {
    const auto q_weights = rest.get<ffi::AnyBuffer>(0);
    if (rest.size() != 3) return ErrorOf(kOp, {"weights of q and of k and an index, or none of them"});
    const auto k_weights = rest.get<ffi::AnyBuffer>(1), index = rest.get<ffi::AnyBuffer>(2);
    if (!q_weights.has_value() || !k_weights.has_value() || !index.has_value())
      return ErrorOf(kOp, {"an operand is no buffer"});
    if (!CheckWeight(*q_weights, *index, args.dim, &args.q_weight, &failure) ||
        !CheckWeight(*k_weights, *index, args.dim, &args.k_weight, &failure))
      return ErrorOf(kOp, failure);
  }
  const int64_t count = static_cast<int64_t>(x.element_count());
  if (count == 0) return ffi::Error::Success();
  return Finish(kOp, SplitHeads(at, args, PoolParallel(pool, kWorkPerValue * count)));
} catch (const std::bad_alloc&) {
  return Finish("split_heads", Outcome::kNoMemory);
}

}  // namespace
}  // namespace jaxq::cpu

JAXQ_EXPORT XLA_FFI_Error* jaxq_add_norm_cpu(XLA_FFI_CallFrame*);
JAXQ_EXPORT XLA_FFI_Error* jaxq_gated_cpu(XLA_FFI_CallFrame*);
JAXQ_EXPORT XLA_FFI_Error* jaxq_split_heads_cpu(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxq_add_norm_cpu, jaxq::cpu::AddNormHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps")
                                  .Attr<std::string_view>("isa"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxq_gated_cpu, jaxq::cpu::GatedHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<std::string_view>("isa"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxq_split_heads_cpu, jaxq::cpu::SplitHeadsHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps")
                                  .Attr<std::string_view>("isa"));
