// One row of x by a weight of codes of up to 4 bits, transpose=True, without VNNI: codes times the digits of x
// (digits-inl.h) in 16 bits, where the few products that meet there have room. (More rows are faster in floats.)
//
// Byte j of a block, one vector of w, holds codes j*P .. j*P+P-1, P = 8/bits; plane p (shift by p*bits, mask) gives every
// P-th code, and x's digits lie in the same order. A 32-bit lane sums 4*P neighbouring codes, which lie in one group, in
// exact integers: 2*P products meet in 16 bits, 4 of at most 24*128 or 8 of 3*128, and all digits' sums, joined, in 32,
// 8*24 * 2**23 at most. Then the scale of the lane's group times the group's unit makes it a float.
//
// Beside simd-inl.h's and digits-inl.h's, the instruction set's file defines on integers:
//   LoadInts(p) SetBytes(v) SetHalves(v) And AddHalves AddWords, of 16 and 32 bits
//   ShiftHalves(a, right) ShiftWords(a, left)
//   MultiplyBytes(codes, digits)   sums of two products, unsigned by signed, in 16 bits
//   MultiplyHalves(a, b)           sums of two products in 32 bits
//   Floats(words)  Deal(v, lanes)  v[lanes[i]] for each lane i

#ifndef JAXQ_KERNELS_CPU_MADD_DOT_INL_H_
#define JAXQ_KERNELS_CPU_MADD_DOT_INL_H_

#include "digits-inl.h"
#include "matmul-inl.h"
#include "runs-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kMaddRows = 4;             // of w at a time
constexpr int64_t kMaddPiece = 4096;         // codes whose scales are made at a time
constexpr int64_t kBlockBytes = 4 * kLanes;  // of w, and of a plane of digits

// x: digits [blocks][kDigits][planes][kBlockBytes]; units and sums [groups], and zeros up to a multiple of a vector.
struct MaddX {
  int8_t* digits;
  float* units;
  float* sums;
};

template <DType kDType>
JAXQ_INLINE F LoadFloats(const void* base, int64_t at) {
  if constexpr (kDType == DType::kF32) return Load(static_cast<const float*>(base) + at);
  const uint16_t* halves = static_cast<const uint16_t*>(base) + at;
  return kDType == DType::kF16 ? LoadF16(halves) : LoadBf16(halves);
}

// Groups first .. first+count of a row of w: scales times x's units to `out`, and zeros up to two vectors more. Returns
// what the biases add to the sum.
struct MaddScales {
  const Weight& weight;
  const MaddX& x;

  JAXQ_INLINE void Put(F scales, F biases, int64_t group, float* out, F* total) const {
    Store(out, Mul(scales, Load(x.units + group)));
    *total = Fma(biases, Load(x.sums + group), *total);
  }

  template <DType kDType>
  JAXQ_INLINE F Affine(int64_t row, int64_t first, int64_t count, float* out) const {
    const int64_t at = row * weight.groups + first;
    F total = Zero();
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes)
      Put(LoadFloats<kDType>(weight.scales, at + j), LoadFloats<kDType>(weight.biases, at + j), first + j, out + j, &total);
    float scales[kLanes] = {}, biases[kLanes] = {};
    for (int64_t i = 0; i < count - j; ++i) {
      scales[i] = LoadAs(kDType, weight.scales, at + j + i);
      biases[i] = LoadAs(kDType, weight.biases, at + j + i);
    }
    Put(Load(scales), Load(biases), first + j, out + j, &total);
    Store(out + j + kLanes, Zero());
    return total;
  }

  JAXQ_INLINE F E2m1(int64_t row, int64_t first, int64_t count, float* out) const {
    F total = Zero();
    weight.Scales(row, first, count, out);
    for (int64_t j = count; j < count + 2 * kLanes; ++j) out[j] = 0.0f;
    for (int64_t j = 0; j < count; j += kLanes) {
      const F scales = Load(out + j);
      Put(scales, Mul(scales, Set1(-12.0f)), first + j, out + j, &total);  // scales are halved already
    }
    return total;
  }

  __attribute__((noinline)) F operator()(int64_t row, int64_t first, int64_t count, float* out) const {
    weight.FetchScales(row + 8, first, count);
    if (!weight.format.affine()) return E2m1(row, first, count, out);
    if (weight.scale_dtype == DType::kF16) return Affine<DType::kF16>(row, first, count, out);
    if (weight.scale_dtype == DType::kBF16) return Affine<DType::kBF16>(row, first, count, out);
    return Affine<DType::kF32>(row, first, count, out);
  }
};

template <int kBits, bool kE2m1, int kDigits>
struct MaddDot {
  static constexpr int kPlanes = 8 / kBits;
  static constexpr int64_t kCodes = kBlockBytes * kPlanes, kDigitBytes = kDigits * kPlanes * kBlockBytes;

  // `natural`: int8[kDigits][blocks*kCodes].
  static bool Prepare(const MatmulArgs& args, int64_t blocks, const MaddX& x, int8_t* natural) {
    const int64_t length = blocks * kCodes;
    std::memset(natural, 0, static_cast<size_t>(kDigits * length));
    const Digits row = {{natural, natural + length, natural + (kDigits - 1) * length}, x.units, x.sums};
    if (!SplitRow<kDigits>(args, 0, row)) return false;
    int8_t* out = x.digits;
    for (int64_t b = 0; b < blocks; ++b)
      for (int d = 0; d < kDigits; ++d)
        for (int p = 0; p < kPlanes; ++p, out += kBlockBytes)
          for (int64_t j = 0; j < kBlockBytes; ++j) out[j] = row.digit[d][b * kCodes + j * kPlanes + p];
    return true;
  }

  // One block's sums, in units of x.
  static JAXQ_INLINE F Multiply(const uint8_t* w, const int8_t* digits) {
    const I packed = LoadInts(w);
    I sums[kDigits];
    JAXQ_UNROLL
    for (int p = 0; p < kPlanes; ++p) {
      I codes = And(p ? ShiftHalves(packed, p * kBits) : packed, SetBytes((1 << kBits) - 1));
      if constexpr (kE2m1) codes = ShiftedE2m1(codes);
      JAXQ_UNROLL
      for (int d = 0; d < kDigits; ++d) {
        const I products = MultiplyBytes(codes, LoadInts(digits + (d * kPlanes + p) * kBlockBytes));
        sums[d] = p ? AddHalves(sums[d], products) : products;
      }
    }
    I total = AddWords(MultiplyHalves(sums[0], SetHalves(256)), MultiplyHalves(sums[1], SetHalves(1)));
    if constexpr (kDigits == 3) total = AddWords(ShiftWords(total, 8), MultiplyHalves(sums[2], SetHalves(1)));
    return Floats(total);
  }

  // Rows n .. n+rows of w, kMaddRows at most, by x. `lanes`: the group of each lane of a block, from the block's first on.
  static JAXQ_INLINE void Rows(const MatmulArgs& args, const Weight& weight, const MaddX& x, int64_t n, int64_t rows,
                               I lanes) {
    const int64_t g = weight.format.group_size, per_piece = kMaddPiece / g;
    const int shift = __builtin_ctz(static_cast<unsigned>(g));
    float scales[kMaddRows][kMaddPiece / 16 + 2 * kLanes];
    F totals[kMaddRows];
    for (F& total : totals) total = Zero();
    for (int64_t first = 0; first < weight.groups; first += per_piece) {
      const int64_t count = Least(per_piece, weight.groups - first), codes = count * g;
      // All rows' at once, since what was stored just now is slow to read in another cut.
      for (int64_t r = 0; r < rows; ++r) totals[r] = Add(totals[r], MaddScales{weight, x}(n + r, first, count, scales[r]));
      for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* w = weight.packed + (n + r) * weight.row_bytes + first * g / kPlanes;
        const int8_t* digits = x.digits + first * g / kCodes * kDigitBytes;
        F total = totals[r];
        int64_t at = 0;
        for (; at + kCodes <= codes; at += kCodes, w += kBlockBytes, digits += kDigitBytes) {
          __builtin_prefetch(w + kAhead, 0, 2);
          total = Fma(Multiply(w, digits), Deal(Load(scales[r] + (at >> shift)), lanes), total);
        }
        if (at < codes) {
          uint8_t rest[kBlockBytes] = {};
          std::memcpy(rest, w, static_cast<size_t>((codes - at) / kPlanes));
          total = Fma(Multiply(rest, digits), Deal(Load(scales[r] + (at >> shift)), lanes), total);
        }
        totals[r] = total;
      }
    }
    for (int64_t r = 0; r < rows; ++r) StoreAs(args.x_dtype, args.y, n + r, Sum(totals[r]));
  }

  static Outcome Run(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
    const int64_t blocks = Ceil(args.K, kCodes), floats = RoundUp(weight.groups, kLanes) + kLanes;
    const int64_t digit_room = Room<int8_t>(blocks * kDigitBytes);
    const Scratch scratch(2 * digit_room + 2 * Room<float>(floats) + Runs::RoomFor(parallel));
    if (!scratch.ok()) return Outcome::kNoMemory;
    char* cursor = scratch.data();
    std::memset(cursor, 0, static_cast<size_t>(2 * Room<float>(floats)));
    float* units = Take<float>(&cursor, floats);
    float* sums = Take<float>(&cursor, floats);
    const MaddX x = {Take<int8_t>(&cursor, blocks * kDigitBytes), units, sums};
    int8_t* natural = Take<int8_t>(&cursor, blocks * kDigitBytes);
    if (!Prepare(args, blocks, x, natural)) return Outcome::kDeclined;
    int32_t of_lane[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) of_lane[i] = static_cast<int32_t>(i * 4 * kPlanes / weight.format.group_size);
    const I lanes = LoadInts(of_lane);
    ForRuns(args.N, parallel, reinterpret_cast<int64_t*>(cursor), [&](int64_t first, int64_t last, int) {
      for (int64_t n = first; n < last; n += kMaddRows) Rows(args, weight, x, n, Least(kMaddRows, last - n), lanes);
    });
    return Outcome::kDone;
  }
};

template <int kBits, bool kE2m1>
Outcome MaddOfRow(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  if (DigitsFor(args.x_dtype, args.K) == 2) return MaddDot<kBits, kE2m1, 2>::Run(args, weight, parallel);
  return MaddDot<kBits, kE2m1, 3>::Run(args, weight, parallel);
}

Outcome MatmulMadd(const MatmulArgs& args, const Parallel& parallel) {
  const Weight weight(args, args.N, args.K);
  const bool affine = weight.kind == Kind::kUnsigned;
  Outcome outcome = Outcome::kDeclined;
  if (args.transpose && args.M == 1) {
    if (weight.kind == Kind::kTwiceE2m1) outcome = MaddOfRow<4, true>(args, weight, parallel);
    if (affine && args.format.bits == 4) outcome = MaddOfRow<4, false>(args, weight, parallel);
    if (affine && args.format.bits == 2) outcome = MaddOfRow<2, false>(args, weight, parallel);
  }
  return outcome == Outcome::kDeclined ? Matmul(args, parallel) : outcome;
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_MADD_DOT_INL_H_
