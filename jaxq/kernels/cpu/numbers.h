// Number formats in plain integer arithmetic: no instruction set is assumed, and no flush-to-zero mode changes them.
//
// static, not inline: each translation unit keeps its own copy, compiled with its own flags (see kernels.h).
#ifndef JAXQ_KERNELS_CPU_NUMBERS_H_
#define JAXQ_KERNELS_CPU_NUMBERS_H_

#include <cstring>

#include "kernels.h"

namespace jaxq::cpu {

[[maybe_unused]] static float FloatOfBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

[[maybe_unused]] static uint32_t BitsOfFloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

[[maybe_unused]] static bool IsFinite(float value) { return (BitsOfFloat(value) & 0x7f800000u) != 0x7f800000u; }

[[maybe_unused]] static float FloatOfBf16(uint16_t half) { return FloatOfBits(uint32_t{half} << 16); }

// Rounds to nearest, ties to even; a NaN stays one.
[[maybe_unused]] static uint16_t Bf16OfFloat(float value) {
  const uint32_t bits = BitsOfFloat(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

[[maybe_unused]] static float FloatOfF16(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  uint32_t exponent = half >> 10 & 0x1fu, mantissa = half & 0x3ffu;
  if (exponent == 31) return FloatOfBits(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) {
    if (mantissa == 0) return FloatOfBits(sign);
    for (exponent = 1; (mantissa & 0x400u) == 0; --exponent) mantissa <<= 1;
    mantissa &= 0x3ffu;
  }
  return FloatOfBits(sign | (exponent + 112u) << 23 | mantissa << 13);
}

// Rounds to nearest, ties to even; overflows to infinity; a NaN stays one.
[[maybe_unused]] static uint16_t F16OfFloat(float value) {
  const uint32_t bits = BitsOfFloat(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x33000000u) return sign;                                    // below 2^-25: to zero
  const int exponent = static_cast<int>(magnitude >> 23) - 112;
  if (exponent >= 1) {
    const uint32_t rebased = magnitude - (112u << 23);
    return static_cast<uint16_t>(sign | (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13);
  }
  const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
  const int shift = 14 - exponent;  // a subnormal counts units of 2^-24
  const uint32_t quotient = mantissa >> shift, rest = mantissa & ((1u << shift) - 1u), half = 1u << (shift - 1);
  return static_cast<uint16_t>(sign | (quotient + (rest > half || (rest == half && (quotient & 1u)) ? 1u : 0u)));
}

// E2M1, OCP Microscaling Formats v1.0: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives. Twice the value is an integer.
constexpr int8_t kTwiceE2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

[[maybe_unused]] static float FloatOfE2m1(uint32_t code) {
  return (code & 8u) ? -0.5f * kTwiceE2m1[code & 7u] : 0.5f * kTwiceE2m1[code];
}

// E4M3 without infinities, OCP 8-bit Floating Point v1.0: bias 7, S.1111.111 is NaN.
[[maybe_unused]] static float FloatOfE4m3(uint32_t code) {
  const uint32_t sign = (code & 0x80u) << 24, exponent = code >> 3 & 15u, mantissa = code & 7u;
  if ((code & 0x7fu) == 0x7fu) return FloatOfBits(sign | 0x7fc00000u);
  if (exponent == 0) return FloatOfBits(sign | BitsOfFloat(static_cast<float>(mantissa) * 0x1p-9f));
  return FloatOfBits(sign | (exponent + 120u) << 23 | mantissa << 20);
}

// E8M0, OCP Microscaling Formats v1.0: 2^(code - 127); 255 is NaN.
[[maybe_unused]] static float FloatOfE8m0(uint32_t code) {
  if (code == 255) return FloatOfBits(0x7fc00000u);
  return code == 0 ? FloatOfBits(0x00400000u) : FloatOfBits(code << 23);
}

// Saturates at 448 and rounds to nearest, ties to even.
[[maybe_unused]] static uint8_t E4m3OfFloat(float value) {
  const uint32_t bits = BitsOfFloat(value), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 24 & 0x80u;
  if (magnitude >= 543u << 21) return static_cast<uint8_t>(sign | 0x7eu);
  if (magnitude >= 121u << 23) {
    const uint32_t rebased = magnitude - (120u << 23);
    return static_cast<uint8_t>(sign | (rebased + 0x7ffffu + (rebased >> 20 & 1u)) >> 20);
  }
  // A subnormal counts units of 2^-9: adding 2^14, whose last bit is that unit, rounds to it.
  return static_cast<uint8_t>(sign | ((BitsOfFloat(FloatOfBits(magnitude) + 0x1p14f) - (141u << 23)) & 0xffu));
}

// The nearest of the 16 values by float differences, the first one found where two are as near: ties go to the smaller
// magnitude, what rounds to zero is +0, and a magnitude that swallows the differences, or a NaN, gives code 0.
// Source: mlx/ops.cpp, `fp_quantize`.
[[maybe_unused]] static uint8_t E2m1OfFloat(float value) {
  const float a = value < 0 ? -value : value;
  if (a < 0x1p20f) {
    const int code = (a > 0.25f) + (a > 0.75f) + (a > 1.25f) + (a > 1.75f) + (a > 2.5f) + (a > 3.5f) + (a > 5.0f);
    return static_cast<uint8_t>(code ? code | (value < 0 ? 8 : 0) : 0);
  }
  uint8_t best = 0;
  float distance = a;
  for (uint8_t code = 1; code < 16; ++code) {
    const float difference = value - FloatOfE2m1(code), candidate = difference < 0 ? -difference : difference;
    if (candidate < distance) best = code, distance = candidate;
  }
  return best;
}

// The least power of two that is not below `value`, >= 0: bias 127, and 1 for 0. Rounding up keeps a group's peak
// inside the range of its codes. Source: mlx/ops.cpp, `fp_quantize`.
[[maybe_unused]] static uint8_t E8m0OfFloat(float value) {
  const uint32_t bits = BitsOfFloat(value), exponent = (bits >> 23) + ((bits & 0x7fffffu) != 0 ? 1u : 0u);
  return static_cast<uint8_t>(bits == 0 ? 127u : exponent < 254u ? exponent : 254u);
}

[[maybe_unused]] static float LoadAs(DType dtype, const void* base, int64_t index) {
  if (dtype == DType::kF32) {
    float value;
    std::memcpy(&value, static_cast<const char*>(base) + 4 * index, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, static_cast<const char*>(base) + 2 * index, 2);
  return dtype == DType::kF16 ? FloatOfF16(half) : FloatOfBf16(half);
}

[[maybe_unused]] static void StoreAs(DType dtype, void* base, int64_t index, float value) {
  if (dtype == DType::kF32) {
    std::memcpy(static_cast<char*>(base) + 4 * index, &value, 4);
    return;
  }
  const uint16_t half = dtype == DType::kF16 ? F16OfFloat(value) : Bf16OfFloat(value);
  std::memcpy(static_cast<char*>(base) + 2 * index, &half, 2);
}

[[maybe_unused]] static float RoundTo(DType dtype, float value) {
  if (dtype == DType::kF32) return value;
  return dtype == DType::kF16 ? FloatOfF16(F16OfFloat(value)) : FloatOfBf16(Bf16OfFloat(value));
}

// Group `index`'s scale and bias as floats; the bias is 0 in the float modes.
struct Affine {
  float scale, bias;
};

[[maybe_unused]] static Affine LoadAffine(const Format& format, DType dtype, const void* scales, const void* biases,
                                          int64_t index) {
  if (format.affine()) return {LoadAs(dtype, scales, index), LoadAs(dtype, biases, index)};
  const uint8_t code = static_cast<const uint8_t*>(scales)[index];
  return {format.mode == Mode::kNvfp4 ? FloatOfE4m3(code) : FloatOfE8m0(code), 0.0f};
}

// What a code stands for before scale and bias.
[[maybe_unused]] static float ValueOfCode(Mode mode, uint32_t code) {
  if (mode == Mode::kAffine) return static_cast<float>(code);
  return mode == Mode::kMxfp8 ? FloatOfE4m3(code) : FloatOfE2m1(code);
}

// Eight codes are `bits` whole bytes, little-endian: code i starts at bit i*bits.
[[maybe_unused]] static uint64_t LoadOctet(const uint8_t* bytes, int bits) {
  uint64_t word = 0;
  for (int i = 0; i < bits; ++i) word |= uint64_t{bytes[i]} << (8 * i);
  return word;
}

[[maybe_unused]] static void StoreOctet(uint8_t* bytes, int bits, uint64_t word) {
  for (int i = 0; i < bits; ++i) bytes[i] = static_cast<uint8_t>(word >> (8 * i));
}

}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_NUMBERS_H_
