// Calls of the handlers for ffi_host.h: what a right one looks like, random right ones with results that are known, and
// what makes a call wrong. Legal() is written from the contract (jaxq/lowerings/cpu.py), not from ffi.cc.
#ifndef JAXQ_KERNELS_CPU_SCRIPTS_FFI_CALLS_H_
#define JAXQ_KERNELS_CPU_SCRIPTS_FFI_CALLS_H_

#include "check_kernels.h"
#include "ffi_host.h"

namespace jaxq::cpu::check {

enum class Op { kMatmul, kDequantize, kQuantize, kAttention };

inline XLA_FFI_Handler* HandlerOf(Op op) {
  XLA_FFI_Handler* const handlers[] = {jaxq_quantized_matmul_cpu, jaxq_dequantize_cpu, jaxq_quantize_cpu,
                                       jaxq_cached_attention_cpu};
  return handlers[static_cast<int>(op)];
}

inline const char* ModeName(Mode mode) {
  const char* const names[] = {"affine", "mxfp4", "mxfp8", "nvfp4"};
  return names[static_cast<int>(mode)];
}

inline XLA_FFI_DataType XlaType(DType dtype) {
  const XLA_FFI_DataType types[] = {XLA_FFI_DataType_F32, XLA_FFI_DataType_F16, XLA_FFI_DataType_BF16,
                                    XLA_FFI_DataType_U8};
  return types[static_cast<int>(dtype)];
}

inline bool IsFloat(XLA_FFI_DataType type) {
  return type == XLA_FFI_DataType_F32 || type == XLA_FFI_DataType_F16 || type == XLA_FFI_DataType_BF16;
}

// Those that the checks use; four bits take a byte on CPUs.
inline int64_t BytesOf(XLA_FFI_DataType type) {
  switch (type) {
    case XLA_FFI_DataType_F64:
    case XLA_FFI_DataType_S64:
      return 8;
    case XLA_FFI_DataType_F32:
    case XLA_FFI_DataType_U32:
    case XLA_FFI_DataType_S32:
      return 4;
    case XLA_FFI_DataType_F16:
    case XLA_FFI_DataType_BF16:
    case XLA_FFI_DataType_S16:
      return 2;
    default:
      return 1;
  }
}

inline int64_t Count(const std::vector<int64_t>& dims) {
  int64_t count = 1;
  for (int64_t dim : dims) count *= dim;
  return count;
}
inline int64_t Bytes(const Buffer& buffer) { return Count(buffer.dims) * BytesOf(buffer.dtype); }

// lead: axes before the matrix; x has them too. M is for products alone, as is `stack`: the weight is an element of so
// many, along an axis before all others, and an index says which.
struct Wanted {
  Op op;
  Format format;
  std::vector<int64_t> lead;
  int64_t M, N, K;
  bool transpose;
  DType x_dtype, scale_dtype;
  std::string isa;
  int64_t stack = 0;
};

// The call, without memory.
inline Frame FrameOf(const Wanted& c) {
  const auto shape = [&](int64_t rows, int64_t columns) {
    std::vector<int64_t> dims = c.lead;
    dims.push_back(rows), dims.push_back(columns);
    return dims;
  };
  const XLA_FFI_DataType x = XlaType(c.x_dtype);
  const XLA_FFI_DataType scale = !c.format.affine()      ? XLA_FFI_DataType_U8
                                 : c.op == Op::kQuantize ? x
                                                         : XlaType(c.scale_dtype);
  std::vector<Buffer> weight = {{XLA_FFI_DataType_U32, shape(c.N, c.K * c.format.bits / 32), nullptr},
                                {scale, shape(c.N, c.K / c.format.group_size), nullptr}};
  if (c.format.affine()) weight.push_back(weight[1]);
  const Buffer dense = {x, shape(c.N, c.K), nullptr};
  Frame frame;
  frame.attributes = {{"bits", int64_t{c.format.bits}},
                      {"group_size", int64_t{c.format.group_size}},
                      {"isa", c.isa},
                      {"mode", std::string(ModeName(c.format.mode))}};
  if (c.op == Op::kQuantize) {
    frame.operands = {dense}, frame.results = weight;
  } else if (c.op == Op::kDequantize) {
    frame.operands = weight, frame.results = {dense};
  } else {
    frame.attributes.push_back({"transpose", c.transpose});
    for (Buffer& leaf : weight)
      if (c.stack) leaf.dims.insert(leaf.dims.begin(), c.stack);
    frame.operands = weight;
    if (c.stack) frame.operands.push_back({XLA_FFI_DataType_S32, {}, nullptr});
    frame.operands.insert(frame.operands.begin(), {x, shape(c.M, c.transpose ? c.K : c.N), nullptr});
    frame.results = {{x, shape(c.M, c.transpose ? c.N : c.K), nullptr}};
  }
  return frame;
}

// ---- what is legal

inline bool SameLead(const std::vector<int64_t>& a, const std::vector<int64_t>& b, size_t axes_after) {
  return a.size() == b.size() && a.size() >= axes_after && std::equal(a.begin(), a.end() - axes_after, b.begin());
}

struct Attributes {
  bool legal = false, transpose = false;
  Format format{};
};

inline bool KnownIsa(const std::string& isa) {
  bool known = isa.empty();
  for (int i = 0; i < IsaCount(); ++i) known = known || (isa == GetIsa(i).name && Missing(i) == nullptr);
  return known;
}

inline Attributes AttributesOf(Op op, const Frame& frame) {
  Attributes found;
  std::string names;
  for (const Attribute& a : frame.attributes) names += a.name + " ";
  if (names != (op == Op::kMatmul ? "bits group_size isa mode transpose " : "bits group_size isa mode ")) return found;
  const auto* bits = std::get_if<int64_t>(&frame.attributes[0].value);
  const auto* group = std::get_if<int64_t>(&frame.attributes[1].value);
  const auto* isa = std::get_if<std::string>(&frame.attributes[2].value);
  const auto* mode = std::get_if<std::string>(&frame.attributes[3].value);
  const auto* transpose = op == Op::kMatmul ? std::get_if<bool>(&frame.attributes[4].value) : nullptr;
  if (!bits || !group || !isa || !mode || (op == Op::kMatmul && !transpose)) return found;
  if (!KnownIsa(*isa)) return found;
  found.transpose = transpose && *transpose;
  for (const Format& format : Formats()) {
    if (*bits != format.bits || *group != format.group_size || *mode != ModeName(format.mode)) continue;
    found.format = format, found.legal = true;
  }
  return found;
}

// packed uint32[..., N, W], scales [..., N, G] and, in mode affine, biases like them: W * 32 bits for G groups.
inline bool LegalWeight(const Format& format, const Buffer* leaves, size_t count) {
  if (count != (format.affine() ? 3 : 2) || leaves[0].dtype != XLA_FFI_DataType_U32) return false;
  const std::vector<int64_t>&packed = leaves[0].dims, &scales = leaves[1].dims;
  if (packed.size() < 2 || !SameLead(packed, scales, 1)) return false;
  if (packed.back() * 32 != scales.back() * format.group_size * format.bits) return false;
  if (!format.affine()) return leaves[1].dtype == XLA_FFI_DataType_U8;
  return IsFloat(leaves[1].dtype) && leaves[2].dtype == leaves[1].dtype && leaves[2].dims == scales;
}

// Takes the index away, and from the weight's leaves the axis that it picks from; false where that is not to be had.
inline bool TakeIndex(std::vector<Buffer>* operands) {
  if (operands->size() < 4 || !operands->back().dims.empty()) return true;  // there is none
  if (operands->back().dtype != XLA_FFI_DataType_S32) return false;
  operands->pop_back();
  const int64_t length = (*operands)[1].dims.empty() ? 0 : (*operands)[1].dims[0];
  for (size_t i = 1; i < operands->size(); ++i) {
    std::vector<int64_t>& dims = (*operands)[i].dims;
    if (length == 0 || dims.size() < 3 || dims[0] != length) return false;
    dims.erase(dims.begin());
  }
  return true;
}

inline bool Legal(Op op, Frame frame) {
  if (op == Op::kMatmul && !TakeIndex(&frame.operands)) return false;
  const Attributes attributes = AttributesOf(op, frame);
  const std::vector<Buffer>&operands = frame.operands, &results = frame.results;
  if (!attributes.legal || operands.empty() || results.empty()) return false;
  const bool first_is_dense = op != Op::kDequantize;
  const std::vector<Buffer>& holder = op == Op::kQuantize ? results : operands;
  const size_t skip = op == Op::kMatmul ? 1 : 0;
  if (holder.size() < skip || !LegalWeight(attributes.format, holder.data() + skip, holder.size() - skip)) return false;
  if ((op == Op::kQuantize ? operands : results).size() != 1) return false;
  const Buffer &dense = first_is_dense ? operands[0] : results[0], &packed = holder[skip], &scales = holder[skip + 1];
  if (!IsFloat(dense.dtype)) return false;
  const int64_t N = packed.dims[packed.dims.size() - 2], K = scales.dims.back() * attributes.format.group_size;
  if (op != Op::kMatmul) {
    const bool scaled = op == Op::kDequantize || !attributes.format.affine() || scales.dtype == dense.dtype;
    return scaled && SameLead(dense.dims, packed.dims, 1) && dense.dims.back() == K;
  }
  const Buffer& y = results[0];
  if (dense.dims.size() < 2 || y.dtype != dense.dtype || !SameLead(dense.dims, y.dims, 1)) return false;
  if (dense.dims.back() != (attributes.transpose ? K : N) || y.dims.back() != (attributes.transpose ? N : K))
    return false;
  return packed.dims.size() == 2 || SameLead(dense.dims, packed.dims, 2);
}

// ---- for messages

inline std::string Text(const std::vector<Buffer>& buffers) {
  std::string text;
  for (const Buffer& buffer : buffers) {
    text += " type" + std::to_string(buffer.dtype) + "[";
    for (int64_t dim : buffer.dims) text += std::to_string(dim) + ",";
    text += "]";
  }
  return text;
}

inline std::string Text(Op op, const Frame& frame) {
  const char* const names[] = {"quantized_matmul", "dequantize", "quantize", "cached_attention"};
  std::string text = names[static_cast<int>(op)];
  for (const Attribute& a : frame.attributes) {
    text += " " + a.name + "=";
    if (const auto* whole = std::get_if<int64_t>(&a.value)) text += std::to_string(*whole);
    if (const auto* truth = std::get_if<bool>(&a.value)) text += *truth ? "true" : "false";
    if (const auto* string = std::get_if<std::string>(&a.value)) text += "'" + *string + "'";
  }
  return text + " of" + Text(frame.operands) + " ->" + Text(frame.results);
}

}  // namespace jaxq::cpu::check

#endif  // JAXQ_KERNELS_CPU_SCRIPTS_FFI_CALLS_H_
