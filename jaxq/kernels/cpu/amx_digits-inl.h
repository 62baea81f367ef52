// Weights of integer codes by the digits of x (digits-inl.h), for amx_gemm-inl.h, in exact integer arithmetic.
//
// 8-bit numbers take half as many products as bfloat16 ones: 64 terms of a 16x16 result take 2 for bfloat16 x and 3 for
// the others, where exact parts in bfloat16 take 4 and 6.
//
//   A, the weight: 16 rows of codes as signed bytes, less the middle of their range, so that bias and code do not cancel.
//   B, the rows of x: [depth/4][16 rows][4] of each digit.

#ifndef JAXQ_KERNELS_CPU_AMX_DIGITS_INL_H_
#define JAXQ_KERNELS_CPU_AMX_DIGITS_INL_H_

#include "amx_gemm-inl.h"
#include "digits-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kByteStep = 64;  // codes in a row of a tile, fewer where a group has fewer

JAXQ_INLINE int64_t ByteDepthOf(const Format& format) { return Least(kByteStep, format.group_size); }

// The codes of a step as signed bytes, less the middle of their range, or twice the value of E2M1.
class ByteUnpacker {
 public:
  explicit ByteUnpacker(const Format& format)
      : format_(format), depth_(ByteDepthOf(format)), unpack_(format.bits) {
    for (int i = 0; i < 64; ++i) twice_[i] = static_cast<int8_t>(kTwiceE2m1[i % 16]);
  }

  float centre() const { return CentreOf(format_); }

  // As StepUnpacker's.
  void Tiles(const uint8_t* src, int64_t row_bytes, int64_t rows, int64_t steps, uint16_t* out) const {
    const Unpacker unpack = unpack_;  // in registers: stores might be to *this, as far as the compiler knows
    const int64_t depth = depth_, bytes = depth / 8 * format_.bits;
    const __m512i centre = _mm512_set1_epi8(static_cast<char>(1 << (format_.bits - 1)));
    if (!format_.affine()) {
      const __m512i twice = _mm512_load_si512(twice_);
      RowsToTiles(src, row_bytes, rows, steps, bytes, out, [&](const uint8_t* p) __attribute__((always_inline)) {
        return _mm512_shuffle_epi8(twice, unpack(p, depth));
      });
    } else if (format_.bits == 8) {
      const __mmask64 there = FirstBytes(depth);
      RowsToTiles(src, row_bytes, rows, steps, bytes, out, [&](const uint8_t* p) __attribute__((always_inline)) {
        return _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, p), centre);
      });
    } else {
      RowsToTiles(src, row_bytes, rows, steps, bytes, out, [&](const uint8_t* p) __attribute__((always_inline)) {
        return _mm512_sub_epi8(unpack(p, depth), centre);
      });
    }
  }

 private:
  Format format_;
  int64_t depth_;
  Unpacker unpack_;
  alignas(64) int8_t twice_[64];
};

template <int kDigits>
class DigitArithmetic {
 public:
  static constexpr int kResults = kDigits;
  static constexpr int kLeft = 2 * kDigits, kLefts = kDigits == 3 ? 1 : 2, kRight = kLeft + kLefts;
  static constexpr int64_t kStrip = kDigits == 3 ? 8 : 4, kBlockTerms = kDigits == 3 ? 128 : 256, kStepBytes = 1;
  static constexpr int64_t parts = kDigits;

  const ByteUnpacker unpacker;

  explicit DigitArithmetic(const MatmulArgs& args) : unpacker(args.format) {}

  static int64_t Depth(const Format& format) { return ByteDepthOf(format); }

  // m: the first of the block's rows in args.x. False: see SplitGroup.
  static bool Pack(const MatmulArgs& args, int64_t m, int64_t block, int64_t group, const PackedX& out) {
    const int64_t g = args.format.group_size, steps = out.steps / out.groups, depth = g / steps;
    const int64_t rows = Least(kSide, out.rows - block * kSide);
    alignas(64) int8_t digits[kDigits][kSide][kMaxGroup] = {};
    float *units = out.Units(block, group), *sums = out.Sums(block, group);
    for (int64_t r = 0; r < kSide; ++r) units[r] = sums[r] = 0.0f;
    for (int64_t r = 0; r < rows; ++r) {
      float values[kMaxGroup];
      ToFloats(args.x_dtype, args.x, (m + r) * args.K + group * g, g, values);
      const Digits row = {{digits[0][r], digits[1][r], digits[kDigits - 1][r]}, units + r, sums + r};
      if (!SplitGroup<kDigits>(values, g, 0, row)) return false;
    }
    for (int64_t step = 0; step < steps; ++step)
      for (int d = 0; d < kDigits; ++d) {
        const __mmask64 there = FirstBytes(depth);
        __m512i words[kSide];
        for (int64_t r = 0; r < kSide; ++r) words[r] = _mm512_maskz_loadu_epi8(there, digits[d][r] + step * depth);
        TransposeWords(words);
        uint16_t* tile = out.Tile(block, group * steps + step) + d * kHalves;
        for (int64_t i = 0; i < depth / 4; ++i) _mm512_store_si512(tile + 32 * i, words[i]);
      }
    return true;
  }

  template <int kTurn, typename Between>
  JAXQ_INLINE static void Multiply(const uint16_t* x, const uint16_t* w, int64_t steps, Between&& between) {
    constexpr int kFirst = kTurn * kDigits, kA = kLeft + kTurn % kLefts, kB = kRight, kC = kDigits == 3 ? kB : kB + 1;
    for (int64_t step = 0; step < steps; ++step, w += kHalves, x += kDigits * kHalves) {
      LoadTile<kA>(w);
      LoadTile<kB>(x);
      if (step == 0) between(Constant<0>());
      DotByteTiles<kFirst, kA, kB>();
      LoadTile<kC>(x + kHalves);
      if (step == 0) between(Constant<1>());
      DotByteTiles<kFirst + 1, kA, kC>();
      if constexpr (kDigits == 3) {
        LoadTile<kB>(x + 2 * kHalves);
        if (step == 0) between(Constant<2>());
        DotByteTiles<kFirst + 2, kA, kB>();
      }
    }
  }

  JAXQ_INLINE static __m512 Total(const float* products, const float* units) {
    const auto digit = [&](int d) __attribute__((always_inline)) { return _mm512_load_si512(products + d * kFloats); };
    return _mm512_mul_ps(JoinDigits<kDigits>(digit(0), digit(1), digit(kDigits - 1)), _mm512_load_ps(units));
  }
};

// Not for E4M3 codes.
Outcome MatmulDigits(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  const bool two = DigitsFor(args.x_dtype, args.K) == 2;
  if (args.format.affine())
    return two ? MatmulStrips<DigitArithmetic<2>, true>(args, weight, parallel)
               : MatmulStrips<DigitArithmetic<3>, true>(args, weight, parallel);
  return two ? MatmulStrips<DigitArithmetic<2>, false>(args, weight, parallel)
             : MatmulStrips<DigitArithmetic<3>, false>(args, weight, parallel);
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_AMX_DIGITS_INL_H_
