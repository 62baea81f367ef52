// What every vector instruction set's kernels share. Included once by each instruction set's file, after it has defined
// in its own namespace, which JAXQ_ISA names:
//
//   kLanes                        floats in a vector: 4, 8 or 16
//   kTileRows, kTileVectors       the register tile of the matrix product: rows of x by vectors of columns
//   F                             the vector type
//   Zero() Set1(f) Load(p) Store(p, v)
//   LoadF16(p) LoadBf16(p) StoreF16(p, v) StoreBf16(p, v)   uint16_t in memory, rounded to nearest even
//   LoadBf16Pairs(p, even, odd)   the even numbers and the odd ones of 2*kLanes
//   FromU8(p) FromS8(p)           kLanes bytes as floats
//   FromE4m3(p) FromE8m0(p)       kLanes bytes in those formats as floats, NaNs included
//   FromPacked<bits>(p, v) FromPackedE2m1(p, v)   16 codes of fewer than 8 bits, 2*bits bytes, as 16/kLanes vectors of
//                                 floats; E2M1 as twice the values
//   ToU8(p, F v[4], most)         4*kLanes floats below 2**15 in magnitude as bytes: rounded to nearest even, and to
//                                 the ends of [0, most] from outside it
//   Add Sub Mul Div Min Max Round (to nearest even)   Fma(a, b, c) = a*b + c, rounded once
//   IfMore(a, b, x, y)            x where a > b, else y
//   Sum(v) MaxOf(v)               over the lanes
//   Across(F rows[kLanes], op)    lane i is op of all lanes of row i, in some order
//   Transpose(F rows[kLanes])
//   UnpackOctets(src, octets, bits, readable, dst)   8*octets codes to bytes; `readable` bytes may be read from src
//   PackOctets(codes, octets, bits, dst)             the inverse; writes octets*bits bytes and no more
//   MapE2m1(codes, count)         E2M1 codes to twice their values, int8, in place; count is a multiple of 16
//
// Everything here has internal linkage: see kernels.h.

#ifndef JAXQ_KERNELS_CPU_SIMD_INL_H_
#define JAXQ_KERNELS_CPU_SIMD_INL_H_

#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "numbers.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kMaxGroup = 128;

JAXQ_INLINE int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }
JAXQ_INLINE int64_t Most(int64_t a, int64_t b) { return a > b ? a : b; }
JAXQ_INLINE int64_t Ceil(int64_t size, int64_t step) { return (size + step - 1) / step; }
JAXQ_INLINE int64_t RoundUp(int64_t size, int64_t step) { return Ceil(size, step) * step; }

// Memory for one call, cut into pieces that start on cache lines.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : base_(static_cast<char*>(std::malloc(static_cast<size_t>(bytes) + 64))) {}
  ~Scratch() { std::free(base_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  bool ok() const { return base_ != nullptr; }
  char* data() const { return base_ + (64 - reinterpret_cast<uintptr_t>(base_) % 64) % 64; }

 private:
  char* base_;
};

template <typename T>
JAXQ_INLINE T* Take(char** cursor, int64_t count) {
  T* piece = reinterpret_cast<T*>(*cursor);
  *cursor += RoundUp(count * static_cast<int64_t>(sizeof(T)), 64);
  return piece;
}

// Bytes that Take uses.
template <typename T>
JAXQ_INLINE int64_t Room(int64_t count) {
  return RoundUp(count * static_cast<int64_t>(sizeof(T)), 64);
}

// A value as a type, for generic lambdas.
template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

// count floats from an array of any of the three dtypes.
void ToFloats(DType dtype, const void* source, int64_t first, int64_t count, float* out) {
  int64_t i = 0;
  const char* base = static_cast<const char*>(source) + first * SizeOf(dtype);
  if (dtype == DType::kF32) {
    std::memcpy(out, base, static_cast<size_t>(count) * 4);
    return;
  }
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(base);
  if (dtype == DType::kF16)
    for (; i + kLanes <= count; i += kLanes) Store(out + i, LoadF16(halves + i));
  else
    for (; i + kLanes <= count; i += kLanes) Store(out + i, LoadBf16(halves + i));
  for (; i < count; ++i) out[i] = LoadAs(dtype, base, i);
}

void FromFloats(DType dtype, const float* source, int64_t count, void* out, int64_t first) {
  int64_t i = 0;
  char* base = static_cast<char*>(out) + first * SizeOf(dtype);
  if (dtype == DType::kF32) {
    std::memcpy(base, source, static_cast<size_t>(count) * 4);
    return;
  }
  uint16_t* halves = reinterpret_cast<uint16_t*>(base);
  if (dtype == DType::kF16)
    for (; i + kLanes <= count; i += kLanes) StoreF16(halves + i, Load(source + i));
  else
    for (; i + kLanes <= count; i += kLanes) StoreBf16(halves + i, Load(source + i));
  for (; i < count; ++i) StoreAs(dtype, base, i, source[i]);
}

// How the bytes of unpacked codes become floats. E2M1 codes stand as twice their value, so their scales are halved.
enum class Kind { kUnsigned, kTwiceE2m1, kE4m3 };

JAXQ_INLINE Kind KindOf(Mode mode) {
  return mode == Mode::kAffine ? Kind::kUnsigned : mode == Mode::kMxfp8 ? Kind::kE4m3 : Kind::kTwiceE2m1;
}

// A weight as the kernels read it: rows of codes with their groups' scales and biases.
struct Weight {
  Format format;
  Kind kind;
  int64_t rows, length, groups, row_bytes;
  const uint8_t* packed;
  const void* scales;
  const void* biases;
  DType scale_dtype;

  template <typename Args>
  Weight(const Args& args, int64_t rows_, int64_t length_)
      : format(args.format),
        kind(KindOf(args.format.mode)),
        rows(rows_),
        length(length_),
        groups(length_ / args.format.group_size),
        row_bytes(length_ / 8 * args.format.bits),
        packed(args.packed),
        scales(args.scales),
        biases(args.biases),
        scale_dtype(args.scale_dtype) {}

  // Codes first .. first+count of one row, a byte each; both are multiples of 8. dst has room for 64 bytes more.
  void Codes(int64_t row, int64_t first, int64_t count, uint8_t* dst) const {
    const int64_t offset = row * row_bytes + first / 8 * format.bits;
    UnpackOctets(packed + offset, count / 8, format.bits, rows * row_bytes - offset, dst);
    if (kind == Kind::kTwiceE2m1) MapE2m1(dst, count);
  }

  // Scales and biases of groups first .. first+count of one row. `e2m1_factor` of 1/2 makes E2M1 scales fit for twice
  // the values; it flushes the very smallest scale to zero where denormals are flushed.
  void Scales(int64_t row, int64_t first, int64_t count, float* out, float e2m1_factor = 0.5f) const {
    const int64_t at = row * groups + first;
    if (format.affine()) return ToFloats(scale_dtype, scales, at, count, out);
    const uint8_t* bytes = static_cast<const uint8_t*>(scales) + at;
    const float half = kind == Kind::kTwiceE2m1 ? e2m1_factor : 1.0f;
    const bool e4m3 = format.mode == Mode::kNvfp4;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      Store(out + i, Mul(Set1(half), e4m3 ? FromE4m3(bytes + i) : FromE8m0(bytes + i)));
    for (; i < count; ++i) out[i] = half * (e4m3 ? FloatOfE4m3(bytes[i]) : FloatOfE8m0(bytes[i]));
  }
  void Biases(int64_t row, int64_t first, int64_t count, float* out) const {
    if (format.affine()) return ToFloats(scale_dtype, biases, row * groups + first, count, out);
    for (int64_t i = 0; i < count; ++i) out[i] = 0.0f;
  }
  // Both, into the first-level cache. (An address past the end does nothing.)
  JAXQ_INLINE void FetchScales(int64_t row, int64_t first, int64_t count) const {
    const int64_t size = format.affine() ? SizeOf(scale_dtype) : 1, at = (row * groups + first) * size;
    for (int64_t i = 0; i < count * size; i += 64) {
      __builtin_prefetch(static_cast<const char*>(scales) + at + i);
      if (format.affine()) __builtin_prefetch(static_cast<const char*>(biases) + at + i);
    }
  }
};

template <Kind kKind>
JAXQ_INLINE F Values(const uint8_t* codes) {
  if constexpr (kKind == Kind::kUnsigned) return FromU8(codes);
  if constexpr (kKind == Kind::kTwiceE2m1) return FromS8(reinterpret_cast<const int8_t*>(codes));
  return FromE4m3(codes);
}

// 16 codes of kBits bits, in order, as they lie in w.
template <Kind kKind, int kBits>
JAXQ_INLINE void PackedValues(const uint8_t* w, F* out) {
  if constexpr (kKind == Kind::kTwiceE2m1) {
    FromPackedE2m1(w, out);
  } else if constexpr (kBits < 8) {
    FromPacked<kBits>(w, out);
  } else {
    JAXQ_UNROLL
    for (int64_t i = 0; i < 16 / kLanes; ++i) out[i] = Values<kKind>(w + i * kLanes);
  }
}

// Calls body with the kind as a compile-time constant.
template <typename Body>
JAXQ_INLINE void WithKind(Kind kind, Body&& body) {
  switch (kind) {
    case Kind::kUnsigned:
      return body(Constant<Kind::kUnsigned>{});
    case Kind::kTwiceE2m1:
      return body(Constant<Kind::kTwiceE2m1>{});
    case Kind::kE4m3:
      return body(Constant<Kind::kE4m3>{});
  }
}

// The same with the number of bits.
template <typename Body>
JAXQ_INLINE void WithCodes(const Weight& weight, Body&& body) {
  if (weight.kind == Kind::kTwiceE2m1) return body(Constant<Kind::kTwiceE2m1>{}, Constant<4>{});
  if (weight.kind == Kind::kE4m3) return body(Constant<Kind::kE4m3>{}, Constant<8>{});
  constexpr Constant<Kind::kUnsigned> kUnsigned;
  switch (weight.format.bits) {
    case 2:
      return body(kUnsigned, Constant<2>{});
    case 3:
      return body(kUnsigned, Constant<3>{});
    case 4:
      return body(kUnsigned, Constant<4>{});
    case 5:
      return body(kUnsigned, Constant<5>{});
    case 6:
      return body(kUnsigned, Constant<6>{});
    default:
      return body(kUnsigned, Constant<8>{});
  }
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_SIMD_INL_H_
