// The quantization rule, in plain C++. Bit for bit that of mlx.core.quantize on the CPU (mlx/backend/cpu/quantized.cpp),
// except that a group with a NaN or an infinity gets a NaN for its scale: it dequantizes to NaN.
#ifndef JAXQ_KERNELS_CPU_QUANTIZE_INL_H_
#define JAXQ_KERNELS_CPU_QUANTIZE_INL_H_

#include <cmath>

#include "numbers.h"

namespace jaxq::cpu {

// The affine rule: the edge of the group with the larger magnitude is hit exactly, and zero is one of the values.
[[maybe_unused]] static Affine AffineOfRange(float low, float high, float max_code) {
  const bool low_edge = std::fabs(low) > std::fabs(high);
  float scale = (high - low) / max_code;
  if (!(scale > 1e-7f)) scale = 1e-7f;
  if (!low_edge) scale = -scale;
  const float edge = low_edge ? low : high;
  const float code = std::nearbyint(edge / scale);
  if (code == 0) return {scale, 0.0f};
  return {edge / code, edge};
}

// A float mode's group: its scale's code, and what its values are divided by. MLX computes these modes in the weight's
// own dtype and rounds after every operation; so does this.
struct FloatScale {
  float divisor;
  uint8_t code;
};

[[maybe_unused]] static FloatScale FloatScaleOf(Mode mode, DType dtype, float peak) {
  const float scale = RoundTo(dtype, peak / (mode == Mode::kMxfp8 ? 448.0f : 6.0f));
  const uint8_t code = mode == Mode::kNvfp4 ? E4m3OfFloat(scale) : E8m0OfFloat(scale);
  return {RoundTo(dtype, mode == Mode::kNvfp4 ? FloatOfE4m3(code) : FloatOfE8m0(code)), code};
}

[[maybe_unused]] static void QuantizeAffineGroup(const QuantizeArgs& args, int64_t group, const float* values,
                                                 uint8_t* packed) {
  const int g = args.format.group_size, bits = args.format.bits;
  const float max_code = static_cast<float>((1 << bits) - 1);
  float low = values[0], high = values[0];
  bool finite = true;
  for (int i = 0; i < g; ++i) {
    finite = finite && IsFinite(values[i]);
    if (values[i] < low) low = values[i];
    if (values[i] > high) high = values[i];
  }
  Affine affine = {FloatOfBits(0x7fc00000u), FloatOfBits(0x7fc00000u)};
  if (finite) affine = AffineOfRange(low, high, max_code);
  for (int i = 0; i < g; i += 8) {
    uint64_t octet = 0;
    for (int j = 0; j < 8; ++j) {
      float code = std::nearbyint((values[i + j] - affine.bias) / affine.scale);
      if (!(code > 0)) code = 0;
      if (code > max_code) code = max_code;
      octet |= uint64_t{static_cast<uint32_t>(code)} << (j * bits);
    }
    StoreOctet(packed + i / 8 * bits, bits, octet);
  }
  StoreAs(args.w_dtype, args.scales, group, affine.scale);
  StoreAs(args.w_dtype, args.biases, group, affine.bias);
}

[[maybe_unused]] static void QuantizeFloatGroup(const QuantizeArgs& args, int64_t group, const float* values,
                                                uint8_t* packed) {
  const int g = args.format.group_size, bits = args.format.bits;
  float peak = 0;
  bool finite = true;
  for (int i = 0; i < g; ++i) {
    finite = finite && IsFinite(values[i]);
    if (std::fabs(values[i]) > peak) peak = std::fabs(values[i]);
  }
  const uint8_t nan = args.format.mode == Mode::kNvfp4 ? 0x7f : 0xff;
  const FloatScale scale = finite ? FloatScaleOf(args.format.mode, args.w_dtype, peak) : FloatScale{1, nan};
  for (int i = 0; i < g; i += 8) {
    uint64_t octet = 0;
    for (int j = 0; j < 8; ++j) {
      const float value = finite ? RoundTo(args.w_dtype, values[i + j] / scale.divisor) : 0.0f;
      octet |= uint64_t{bits == 8 ? E4m3OfFloat(value) : E2m1OfFloat(value)} << (j * bits);
    }
    StoreOctet(packed + i / 8 * bits, bits, octet);
  }
  static_cast<uint8_t*>(args.scales)[group] = scale.code;
}

[[maybe_unused]] static void QuantizeRow(const QuantizeArgs& args, int64_t row) {
  const int g = args.format.group_size;
  const int64_t groups = args.length / g, row_bytes = args.length / 8 * args.format.bits;
  for (int64_t group = 0; group < groups; ++group) {
    float values[128];
    for (int i = 0; i < g; ++i) values[i] = LoadAs(args.w_dtype, args.w, row * args.length + group * g + i);
    uint8_t* packed = args.packed + row * row_bytes + group * g / 8 * args.format.bits;
    if (args.format.affine())
      QuantizeAffineGroup(args, row * groups + group, values, packed);
    else
      QuantizeFloatGroup(args, row * groups + group, values, packed);
  }
}

}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_QUANTIZE_INL_H_
