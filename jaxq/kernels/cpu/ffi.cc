// The handlers that XLA calls for quantized weights. Every buffer is checked against the attributes before a kernel
// sees it.

#include <cstring>
#include <new>
#include <optional>
#include <string>
#include <string_view>

#include "dispatch.h"
#include "ffi_checks.h"
#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jaxq::cpu {
namespace {

// The attributes that all three share.
struct Common {
  Format format;
  int isa;
};

bool ParseCommon(std::string_view mode, int64_t bits, int64_t group_size, std::string_view isa, Common* common,
                 Failure* failure) {
  const auto fail = [&](std::string message) { return failure->message = std::move(message), false; };
  const bool odd = bits == 3 || bits == 5 || bits == 6;
  bool legal;
  if (mode == "affine") {
    common->format.mode = Mode::kAffine;
    legal = (odd || bits == 2 || bits == 4 || bits == 8) &&
            (group_size == 16 || group_size == 32 || group_size == 64 || group_size == 128);
  } else if (mode == "mxfp4") {
    common->format.mode = Mode::kMxfp4, legal = bits == 4 && group_size == 32;
  } else if (mode == "mxfp8") {
    common->format.mode = Mode::kMxfp8, legal = bits == 8 && group_size == 32;
  } else if (mode == "nvfp4") {
    common->format.mode = Mode::kNvfp4, legal = bits == 4 && group_size == 16;
  } else {
    return fail("mode '" + std::string(mode) + "' is unknown");
  }
  if (!legal)
    return fail("bits=" + std::to_string(bits) + " with group_size=" + std::to_string(group_size) +
                " is no format of mode '" + std::string(mode) + "'");
  common->format.bits = static_cast<int>(bits), common->format.group_size = static_cast<int>(group_size);
  return ParseIsa(isa, &common->isa, failure);
}

// A quantized weight's buffers, [batch..., rows, ...] each.
struct Weight {
  int64_t batch = 1, rows = 0, length = 0;
  const ffi::AnyBuffer* packed;
  const ffi::AnyBuffer* scales;
  const ffi::AnyBuffer* biases;  // null in the float modes
  DType scale_dtype;
};

int64_t Product(Dims dims, size_t end) {
  int64_t product = 1;
  for (size_t i = 0; i < end; ++i) product *= dims[i];
  return product;
}

// packed: uint32[..., rows, length*bits/32]; scales and biases: [..., rows, length/group_size].
bool CheckWeight(const Format& format, Weight* weight, Failure* failure) {
  const auto fail = [&](std::string message) { return failure->message = std::move(message), false; };
  const Dims packed = weight->packed->dimensions(), scales = weight->scales->dimensions();
  if (weight->packed->element_type() != ffi::DataType::U32) return fail("packed must be uint32");
  if (packed.size() < 2 || packed.size() != scales.size())
    return fail("packed and scales must have the same rank of at least 2, not " + ShapeText(packed) + " and " +
                ShapeText(scales));
  for (size_t i = 0; i + 1 < packed.size(); ++i)
    if (packed[i] != scales[i])
      return fail("packed " + ShapeText(packed) + " and scales " + ShapeText(scales) + " differ before the last axis");
  weight->batch = Product(packed, packed.size() - 2);
  weight->rows = packed[packed.size() - 2];
  weight->length = scales[scales.size() - 1] * format.group_size;
  if (weight->length * format.bits != packed[packed.size() - 1] * 32)
    return fail("scales " + ShapeText(scales) + " stand for " + std::to_string(weight->length) +
                " codes a row, but packed " + ShapeText(packed) + " does not hold that many");
  const ffi::DataType dtype = weight->scales->element_type();
  if (format.affine() ? !IsFloat(dtype) : dtype != ffi::DataType::U8)
    return fail(format.affine() ? "scales must be float32, float16 or bfloat16" : "scales must be uint8 in this mode");
  weight->scale_dtype = DTypeOf(dtype);
  if (format.affine() != (weight->biases != nullptr))
    return fail(format.affine() ? "biases are missing" : "there are no biases in this mode");
  if (weight->biases && (weight->biases->element_type() != dtype || !SameDims(weight->biases->dimensions(), scales)))
    return fail("biases must be like scales in shape and dtype");
  return true;
}

// Reads the operands that need not be there: the biases and then, for a product, the index. That is the only scalar.
bool OptionalArgs(ffi::RemainingArgs args, std::optional<ffi::AnyBuffer>* biases, std::optional<ffi::AnyBuffer>* index,
                  Failure* failure) {
  for (size_t i = 0; i < args.size(); ++i) {
    auto got = args.get<ffi::AnyBuffer>(i);
    if (!got.has_value()) return failure->message = "an operand is no buffer", false;
    const bool scalar = index != nullptr && got->dimensions().size() == 0;
    if (i + 1 < args.size() ? scalar || i > 0 : !scalar && i > 0) return failure->message = "too many operands", false;
    (scalar ? index : biases)->emplace(*got);
  }
  return true;
}

// One element along a buffer's first axis, where it lies.
class Element {
 public:
  Element(const ffi::AnyBuffer& stack, int64_t at) : buffer_(&raw_) {
    const Dims dims = stack.dimensions();
    raw_.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    raw_.dtype = static_cast<XLA_FFI_DataType>(stack.element_type());
    raw_.rank = static_cast<int64_t>(dims.size()) - 1;
    raw_.dims = const_cast<int64_t*>(dims.begin()) + 1;  // never written
    raw_.data = static_cast<char*>(stack.untyped_data()) + at * static_cast<int64_t>(buffer_.size_bytes());
  }
  Element(const Element&) = delete;
  Element& operator=(const Element&) = delete;
  const ffi::AnyBuffer* get() const { return &buffer_; }

 private:
  XLA_FFI_Buffer raw_{};
  ffi::AnyBuffer buffer_;
};

// The index, int32[], clamped to what the leaves of a stack hold, which must be one number for all of them.
bool ReadIndex(const ffi::AnyBuffer& index, const Weight& stack, int64_t* at, Failure* failure) {
  const auto fail = [&](std::string message) { return failure->message = std::move(message), false; };
  if (index.element_type() != ffi::DataType::S32) return fail("the index must be int32");
  int64_t size = -1;
  for (const ffi::AnyBuffer* leaf : {stack.packed, stack.scales, stack.biases}) {
    if (leaf == nullptr) continue;
    const Dims dims = leaf->dimensions();
    if (dims.size() < 3) return fail("an index needs a stack of weights, not a leaf of shape " + ShapeText(dims));
    if (size >= 0 && dims[0] != size) return fail("the leaves are stacks of different lengths");
    size = dims[0];
  }
  if (size == 0) return fail("an index needs a stack that is not empty");
  const int64_t asked = *static_cast<const int32_t*>(index.untyped_data());
  *at = asked < 0 ? 0 : asked < size ? asked : size - 1;
  return true;
}

const uint8_t* Bytes(const ffi::AnyBuffer& buffer) { return static_cast<const uint8_t*>(buffer.untyped_data()); }

// x[..., M, C] by a weight whose batch is x's, or that has none.
bool CheckMatmul(const Weight& weight, bool transpose, ffi::AnyBuffer x, ffi::AnyBuffer y, MatmulArgs* args,
                 int64_t* batch, Failure* failure) {
  const auto fail = [&](std::string message) { return failure->message = std::move(message), false; };
  const Dims xs = x.dimensions(), ys = y.dimensions();
  if (!IsFloat(x.element_type())) return fail("x must be float32, float16 or bfloat16");
  if (y.element_type() != x.element_type()) return fail("the result's dtype must be x's");
  if (xs.size() < 2) return fail("x must have at least 2 axes, not shape " + ShapeText(xs));
  const int64_t inner = transpose ? weight.length : weight.rows, outer = transpose ? weight.rows : weight.length;
  if (xs[xs.size() - 1] != inner)
    return fail("x " + ShapeText(xs) + " must end in " + std::to_string(inner) + ", the weight's contracted axis");
  bool fits = ys.size() == xs.size() && ys[ys.size() - 1] == outer;
  for (size_t i = 0; fits && i + 1 < xs.size(); ++i) fits = ys[i] == xs[i];
  if (!fits) return fail("the result " + ShapeText(ys) + " does not follow from x " + ShapeText(xs));
  const Dims ws = weight.packed->dimensions();
  const bool batched = ws.size() > 2;
  if (batched) {
    bool same = ws.size() == xs.size();
    for (size_t i = 0; same && i + 2 < ws.size(); ++i) same = ws[i] == xs[i];
    if (!same) return fail("packed " + ShapeText(ws) + " and x " + ShapeText(xs) + " differ in their leading axes");
  }
  *batch = batched ? weight.batch : 1;
  args->M = batched ? xs[xs.size() - 2] : Product(xs, xs.size() - 1);
  args->N = weight.rows, args->K = weight.length;
  args->transpose = transpose;
  args->x_dtype = DTypeOf(x.element_type()), args->scale_dtype = weight.scale_dtype;
  return true;
}

// One matrix of a batch after the other, each on all threads.
Outcome RunBatch(int isa, MatmulArgs args, int64_t batch, const Weight& weight, ffi::AnyBuffer x, ffi::AnyBuffer y,
                 const Parallel& parallel) {
  const int64_t width = SizeOf(args.x_dtype), scale_bytes = args.N * args.groups() * SizeOf(args.scale_dtype);
  const int64_t x_bytes = args.M * (args.transpose ? args.K : args.N) * width;
  const int64_t y_bytes = args.M * (args.transpose ? args.N : args.K) * width;
  for (int64_t i = 0; i < batch; ++i) {
    args.x = Bytes(x) + i * x_bytes;
    args.y = static_cast<char*>(y.untyped_data()) + i * y_bytes;
    args.packed = Bytes(*weight.packed) + i * args.N * args.row_bytes();
    args.scales = Bytes(*weight.scales) + i * scale_bytes;
    args.biases = weight.biases ? Bytes(*weight.biases) + i * scale_bytes : nullptr;
    if (const Outcome outcome = Matmul(isa, args, parallel); outcome != Outcome::kDone) return outcome;
  }
  return Outcome::kDone;
}

ffi::Error MatmulHandler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer packed, ffi::AnyBuffer scales,
                         ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y, std::string_view mode, int64_t bits,
                         int64_t group_size, bool transpose, std::string_view isa) try {
  constexpr const char* kOp = "quantized_matmul";
  Common common;
  Failure failure;
  std::optional<ffi::AnyBuffer> biases, index;
  if (!ParseCommon(mode, bits, group_size, isa, &common, &failure) ||
      !OptionalArgs(rest, &biases, &index, &failure))
    return ErrorOf(kOp, failure);
  Weight weight{1, 0, 0, &packed, &scales, biases ? &*biases : nullptr, DType::kF32};
  std::optional<Element> packed_at, scales_at, biases_at;
  if (index) {
    int64_t at;
    if (!ReadIndex(*index, weight, &at, &failure)) return ErrorOf(kOp, failure);
    weight.packed = packed_at.emplace(packed, at).get(), weight.scales = scales_at.emplace(scales, at).get();
    if (biases) weight.biases = biases_at.emplace(*biases, at).get();
  }
  MatmulArgs args{};
  int64_t batch;
  args.format = common.format;
  if (!CheckWeight(common.format, &weight, &failure) ||
      !CheckMatmul(weight, transpose, x, *y, &args, &batch, &failure))
    return ErrorOf(kOp, failure);
  if (batch == 0 || args.M == 0 || y->element_count() == 0) return ffi::Error::Success();
  if (args.N == 0 || args.K == 0) {  // a sum over nothing
    std::memset(y->untyped_data(), 0, y->size_bytes());
    return ffi::Error::Success();
  }
  const PoolParallel parallel(pool, args.M * args.N * args.K);
  return Finish(kOp, RunBatch(common.isa, args, batch, weight, x, *y, parallel));
} catch (const std::bad_alloc&) {
  return Finish("quantized_matmul", Outcome::kNoMemory);
}

ffi::Error DequantizeHandler(ffi::ThreadPool pool, ffi::AnyBuffer packed, ffi::AnyBuffer scales,
                             ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out, std::string_view mode,
                             int64_t bits, int64_t group_size, std::string_view isa) try {
  constexpr const char* kOp = "dequantize";
  Common common;
  Failure failure;
  std::optional<ffi::AnyBuffer> biases;
  if (!ParseCommon(mode, bits, group_size, isa, &common, &failure) ||
      !OptionalArgs(rest, &biases, nullptr, &failure))
    return ErrorOf(kOp, failure);
  Weight weight{1, 0, 0, &packed, &scales, biases ? &*biases : nullptr, DType::kF32};
  if (!CheckWeight(common.format, &weight, &failure)) return ErrorOf(kOp, failure);
  const Dims outs = out->dimensions(), ws = packed.dimensions();
  bool fits = IsFloat(out->element_type()) && outs.size() == ws.size() && outs[outs.size() - 1] == weight.length;
  for (size_t i = 0; fits && i + 1 < ws.size(); ++i) fits = outs[i] == ws[i];
  if (!fits) return ErrorOf(kOp, {"the result " + ShapeText(outs) + " does not follow from packed " + ShapeText(ws)});
  if (out->element_count() == 0) return ffi::Error::Success();
  const DequantizeArgs args{common.format,        weight.batch * weight.rows, weight.length,
                            Bytes(packed),        scales.untyped_data(),      biases ? biases->untyped_data() : nullptr,
                            weight.scale_dtype,   out->untyped_data(),        DTypeOf(out->element_type())};
  return Finish(kOp, Dequantize(common.isa, args, PoolParallel(pool)));
} catch (const std::bad_alloc&) {
  return Finish("dequantize", Outcome::kNoMemory);
}

ffi::Error QuantizeHandler(ffi::ThreadPool pool, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> packed,
                           ffi::Result<ffi::AnyBuffer> scales, ffi::RemainingRets rest, std::string_view mode,
                           int64_t bits, int64_t group_size, std::string_view isa) try {
  constexpr const char* kOp = "quantize";
  Common common;
  Failure failure;
  if (!ParseCommon(mode, bits, group_size, isa, &common, &failure)) return ErrorOf(kOp, failure);
  std::optional<ffi::AnyBuffer> biases;
  if (rest.size() > 1) return ErrorOf(kOp, {"too many results"});
  if (rest.size() == 1) {
    auto got = rest.get<ffi::AnyBuffer>(0);
    if (!got.has_value()) return ErrorOf(kOp, {"the last result is no buffer"});
    biases.emplace(**got);
  }
  const ffi::AnyBuffer packed_buffer = *packed, scales_buffer = *scales;
  Weight weight{1, 0, 0, &packed_buffer, &scales_buffer, biases ? &*biases : nullptr, DType::kF32};
  if (!CheckWeight(common.format, &weight, &failure)) return ErrorOf(kOp, failure);
  const Dims ws = w.dimensions(), ps = packed->dimensions();
  bool fits = ws.size() == ps.size() && ws[ws.size() - 1] == weight.length;
  for (size_t i = 0; fits && i + 1 < ws.size(); ++i) fits = ws[i] == ps[i];
  if (!fits) return ErrorOf(kOp, {"packed " + ShapeText(ps) + " does not follow from w " + ShapeText(ws)});
  if (!IsFloat(w.element_type())) return ErrorOf(kOp, {"w must be float32, float16 or bfloat16"});
  if (common.format.affine() && scales->element_type() != w.element_type())
    return ErrorOf(kOp, {"scales must have w's dtype"});
  if (w.element_count() == 0) return ffi::Error::Success();
  const QuantizeArgs args{common.format,
                          weight.batch * weight.rows,
                          weight.length,
                          w.untyped_data(),
                          DTypeOf(w.element_type()),
                          static_cast<uint8_t*>(packed->untyped_data()),
                          scales->untyped_data(),
                          biases ? biases->untyped_data() : nullptr};
  return Finish(kOp, Quantize(common.isa, args, PoolParallel(pool)));
} catch (const std::bad_alloc&) {
  return Finish("quantize", Outcome::kNoMemory);
}

// Does nothing: what a call costs by itself, for the benchmark.
ffi::Error EmptyHandler(ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer>) { return ffi::Error::Success(); }

}  // namespace
}  // namespace jaxq::cpu

JAXQ_EXPORT XLA_FFI_Error* jaxq_quantized_matmul_cpu(XLA_FFI_CallFrame*);
JAXQ_EXPORT XLA_FFI_Error* jaxq_dequantize_cpu(XLA_FFI_CallFrame*);
JAXQ_EXPORT XLA_FFI_Error* jaxq_quantize_cpu(XLA_FFI_CallFrame*);
JAXQ_EXPORT XLA_FFI_Error* jaxq_empty_cpu(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxq_quantized_matmul_cpu, jaxq::cpu::MatmulHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<std::string_view>("mode")
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<bool>("transpose")
                                  .Attr<std::string_view>("isa"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxq_dequantize_cpu, jaxq::cpu::DequantizeHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<std::string_view>("mode")
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<std::string_view>("isa"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxq_quantize_cpu, jaxq::cpu::QuantizeHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets()
                                  .Attr<std::string_view>("mode")
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<std::string_view>("isa"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxq_empty_cpu, jaxq::cpu::EmptyHandler,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
