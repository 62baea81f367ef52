// Few rows of x by a weight of integer codes, transpose=True, with VNNI: 64 bytes of w at a time against the digits of
// x, which lie in the order in which the codes come out of those bytes.
//
// Codes of 2, 4 and 8 bits: byte j of a block holds codes j*P .. j*P+P-1, P = 8/bits; plane p (shift by p*bits, mask)
// gives every P-th code. Other widths: 64 codes in order. Either way a 32-bit lane sums 4*P neighbouring codes, which
// lie in one group, in exact integers; then the lane's group's scale times the group's unit makes it a float.

#ifndef JAXQ_KERNELS_CPU_VNNI_DOT_INL_H_
#define JAXQ_KERNELS_CPU_VNNI_DOT_INL_H_

#include "digits-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kVnniFewRows = 3;
constexpr int64_t kVnniTask = 32;  // rows of w per task, or a multiple
// Tasks are as long as an even share-out allows, for what is fetched ahead must be what the same thread comes to next.
constexpr int64_t kTasksPerSlot = 8;
// Bytes of w from what is read to what is fetched, into the second-level cache: the time that memory takes to answer.
// Rows are too short, and too many at a time, for the hardware to see where they lead.
constexpr int64_t kAhead = 16384;

template <int kBits>
struct DotShape {
  static constexpr int kPlanes = 8 % kBits == 0 ? 8 / kBits : 1;
  static constexpr int64_t kCodes = 64 * kPlanes;          // per block
  static constexpr int64_t kBytes = kCodes / 8 * kBits;    // of w per block
  static constexpr int64_t kDigitBytes = 3 * kPlanes * 64;  // of one row of x per block
};

// x as the kernel reads it, for each row of x: digits [blocks][3][planes][64], units [blocks][16 lanes], sums [G].
struct DotX {
  int8_t* digits;
  float* units;
  float* sums;
  int64_t blocks, groups;
};

// 64*kPlanes bytes -> planes of 64: plane p has every kPlanes-th byte, from byte p on.
template <int kPlanes>
JAXQ_INLINE void SplitPlanes(const int8_t* source, int8_t* out) {
  __m512i index[4];
  alignas(64) uint8_t even[64], odd[64];
  for (int i = 0; i < 64; ++i) even[i] = static_cast<uint8_t>(2 * i & 127), odd[i] = static_cast<uint8_t>((2 * i + 1) & 127);
  index[0] = _mm512_load_si512(even), index[1] = _mm512_load_si512(odd);
  __m512i v[4];
  JAXQ_UNROLL
  for (int p = 0; p < kPlanes; ++p) v[p] = _mm512_loadu_si512(source + 64 * p);
  const auto split = [&](int which, __m512i a, __m512i b) { return _mm512_permutex2var_epi8(a, index[which], b); };
  if constexpr (kPlanes == 1) {
    _mm512_storeu_si512(out, v[0]);
  } else if constexpr (kPlanes == 2) {
    for (int p = 0; p < 2; ++p) _mm512_storeu_si512(out + 64 * p, split(p, v[0], v[1]));
  } else {
    for (int p = 0; p < 4; ++p)
      _mm512_storeu_si512(out + 64 * p, split(p / 2, split(p % 2, v[0], v[1]), split(p % 2, v[2], v[3])));
  }
}

template <int kBits>
bool PrepareDot(const MatmulArgs& args, int64_t m, const DotX& x, int8_t* natural) {
  using Shape = DotShape<kBits>;
  const int64_t padded = x.blocks * Shape::kCodes, g = args.format.group_size;
  float* units = reinterpret_cast<float*>(natural + 3 * padded);
  std::memset(natural, 0, static_cast<size_t>(3 * padded));
  const Digits row = {{natural, natural + padded, natural + 2 * padded}, units, x.sums + m * x.groups};
  if (!SplitRow(args, m, row)) return false;
  int8_t* out = x.digits + m * x.blocks * Shape::kDigitBytes;
  for (int64_t b = 0; b < x.blocks; ++b)
    for (int d = 0; d < 3; ++d, out += 64 * Shape::kPlanes)
      SplitPlanes<Shape::kPlanes>(row.digit[d] + b * Shape::kCodes, out);
  for (int64_t lane = 0; lane < x.blocks * 16; ++lane) {
    const int64_t group = lane * 4 * Shape::kPlanes / g;
    x.units[m * x.blocks * 16 + lane] = group < x.groups ? units[group] : 0.0f;
  }
  return true;
}

// The planes of one block of w.
template <int kBits, bool kE2m1>
JAXQ_INLINE void LoadPlanes(const uint8_t* w, __mmask64 bytes, const Unpacker& unpack, __m512i* planes) {
  const __m512i packed = _mm512_maskz_loadu_epi8(bytes, w);
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << kBits) - 1));
  if constexpr (kBits == 8) {
    planes[0] = packed;
  } else if constexpr (8 % kBits == 0) {
    for (int p = 0; p < 8 / kBits; ++p) planes[p] = _mm512_and_si512(p ? _mm512_srli_epi16(packed, p * kBits) : packed, mask);
  } else {
    planes[0] = _mm512_permutexvar_epi8(unpack.spread, packed);
    planes[0] = _mm512_and_si512(_mm512_multishift_epi64_epi8(unpack.shifts, planes[0]), mask);
  }
  if constexpr (kE2m1)
    for (int p = 0; p < 8 / kBits; ++p) planes[p] = ShiftedE2m1(planes[p]);
}

// One block of codes by one row's digits: 16 sums, as floats. 8-bit codes need more than 32 bits for all three digits.
template <int kBits>
JAXQ_INLINE __m512 BlockSums(const __m512i* codes, const int8_t* digits) {
  constexpr int kPlanes = DotShape<kBits>::kPlanes;
  __m512i sums[3];
  JAXQ_UNROLL
  for (int d = 0; d < 3; ++d) {
    sums[d] = _mm512_setzero_si512();
    JAXQ_UNROLL
    for (int p = 0; p < kPlanes; ++p)
      sums[d] = DotBytes(sums[d], codes[p], _mm512_loadu_si512(digits + (d * kPlanes + p) * 64));
  }
  const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(sums[0], 8), sums[1]);
  if constexpr (kBits == 8)
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(sums[2]));
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), sums[2]));
}

// Which of a block's scales each lane takes.
struct ScaleLanes {
  __m512i index;
  __mmask16 mask;
  int64_t per_block;
};

template <int kBits>
ScaleLanes MakeScaleLanes(int64_t g) {
  alignas(64) int32_t index[16];
  for (int i = 0; i < 16; ++i) index[i] = static_cast<int32_t>(i * 4 * DotShape<kBits>::kPlanes / g);
  const int64_t per_block = DotShape<kBits>::kCodes / g;  // 0: two blocks share one
  return {_mm512_load_si512(index), static_cast<__mmask16>((1 << Most(per_block, 1)) - 1), per_block};
}

constexpr int kVnniRows = 4;  // rows of w at a time

template <int kBits, bool kE2m1, int kM>
JAXQ_INLINE void DotStep(const uint8_t* const* w, const float* const* scales, int64_t block, int64_t g, __mmask64 bytes,
                         __mmask16 scale_mask, const ScaleLanes& lanes, const Unpacker& unpack, const DotX& x,
                         __m512 (*totals)[kM]) {
  using Shape = DotShape<kBits>;
  JAXQ_UNROLL
  for (int r = 0; r < kVnniRows; ++r) {
    __m512i codes[Shape::kPlanes];
    _mm_prefetch(reinterpret_cast<const char*>(w[r] + kAhead + block * Shape::kBytes), _MM_HINT_T1);
    LoadPlanes<kBits, kE2m1>(w[r] + block * Shape::kBytes, bytes, unpack, codes);
    const float* s = scales[r] + block * Shape::kCodes / g;
    const __m512 scale = _mm512_permutexvar_ps(lanes.index, _mm512_maskz_loadu_ps(scale_mask, s));
    JAXQ_UNROLL
    for (int m = 0; m < kM; ++m) {
      const int64_t at = m * x.blocks + block;
      const __m512 sums = BlockSums<kBits>(codes, x.digits + at * Shape::kDigitBytes);
      totals[r][m] = _mm512_fmadd_ps(sums, _mm512_mul_ps(scale, _mm512_loadu_ps(x.units + at * 16)), totals[r][m]);
    }
  }
}

constexpr int64_t kScaleChunk = 512;  // scales of a row that are converted at a time

// Rows n .. n+count of w, kVnniRows at most.
template <int kBits, bool kE2m1, int kM>
void VnniRows(const MatmulArgs& args, const Weight& weight, int64_t n, int64_t count, const ScaleLanes& lanes,
              const Unpacker& unpack, const DotX& x) {
  using Shape = DotShape<kBits>;
  const int64_t g = args.format.group_size, chunk = kScaleChunk * g / Shape::kCodes;  // blocks
  float scales[kVnniRows][kScaleChunk], biases[kScaleChunk];
  __m512 totals[kVnniRows][kM];
  const uint8_t* w[kVnniRows];
  const float* scale_rows[kVnniRows];
  JAXQ_UNROLL
  for (int r = 0; r < kVnniRows; ++r) {
    w[r] = weight.packed + (n + Least(r, count - 1)) * weight.row_bytes;
    JAXQ_UNROLL
    for (int m = 0; m < kM; ++m) totals[r][m] = _mm512_setzero_ps();
  }
  for (int64_t first = 0; first < x.blocks; first += chunk) {
    const int64_t last = Least(x.blocks, first + chunk), group = first * Shape::kCodes / g;
    const int64_t groups = Least(x.groups - group, kScaleChunk);
    JAXQ_UNROLL
    for (int r = 0; r < kVnniRows; ++r) {
      const int64_t row = n + Least(r, count - 1);
      weight.Scales(row, group, groups, scales[r]);
      scale_rows[r] = scales[r] - group;
      IntegerBiases(weight, row, group, groups, scales[r], biases);
      JAXQ_UNROLL
      for (int m = 0; m < kM; ++m)
        totals[r][m] = DotGroups(biases, x.sums + m * x.groups + group, groups, totals[r][m]);
    }
    const int64_t whole = Least(last, args.K / Shape::kCodes);
    for (int64_t b = first; b < whole; ++b)
      DotStep<kBits, kE2m1, kM>(w, scale_rows, b, g, FirstBytes(Shape::kBytes), lanes.mask, lanes, unpack, x, totals);
    if (whole < last) {
      const int64_t rest = args.K - whole * Shape::kCodes;
      const auto scale_mask = static_cast<__mmask16>((1 << Ceil(rest, g)) - 1);
      DotStep<kBits, kE2m1, kM>(w, scale_rows, whole, g, FirstBytes(rest / 8 * kBits), scale_mask, lanes, unpack, x,
                                totals);
    }
  }
  for (int64_t r = 0; r < count; ++r)
    JAXQ_UNROLL
    for (int m = 0; m < kM; ++m) StoreAs(args.x_dtype, args.y, m * args.N + n + r, _mm512_reduce_add_ps(totals[r][m]));
}

template <int kBits, bool kE2m1>
Outcome VnniDot(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  using Shape = DotShape<kBits>;
  DotX x;
  x.blocks = Ceil(args.K, Shape::kCodes), x.groups = args.groups();
  const int64_t natural_bytes = 3 * x.blocks * Shape::kCodes + (x.groups + 16) * 4;
  const Scratch scratch(Room<int8_t>(args.M * x.blocks * Shape::kDigitBytes) + Room<float>(args.M * x.blocks * 16) +
                        Room<float>(args.M * x.groups) + Room<int8_t>(natural_bytes));
  if (!scratch.ok()) return Outcome::kNoMemory;
  char* cursor = scratch.data();
  x.digits = Take<int8_t>(&cursor, args.M * x.blocks * Shape::kDigitBytes);
  x.units = Take<float>(&cursor, args.M * x.blocks * 16);
  x.sums = Take<float>(&cursor, args.M * x.groups);
  for (int64_t m = 0; m < args.M; ++m)
    if (!PrepareDot<kBits>(args, m, x, reinterpret_cast<int8_t*>(cursor))) return Outcome::kDeclined;
  const ScaleLanes lanes = MakeScaleLanes<kBits>(args.format.group_size);
  const Unpacker unpack(kBits);
  const int64_t rows = Most(Ceil(Ceil(args.N, kTasksPerSlot * parallel.slots()), kVnniTask), 1) * kVnniTask;
  parallel.For(Ceil(args.N, rows), [&](int64_t task, int) {
    const int64_t last = Least(args.N, (task + 1) * rows);
    for (int64_t n = task * rows; n < last; n += kVnniRows) {
      const int64_t count = Least(kVnniRows, last - n);
      if (args.M == 1) VnniRows<kBits, kE2m1, 1>(args, weight, n, count, lanes, unpack, x);
      if (args.M == 2) VnniRows<kBits, kE2m1, 2>(args, weight, n, count, lanes, unpack, x);
      if (args.M == 3) VnniRows<kBits, kE2m1, 3>(args, weight, n, count, lanes, unpack, x);
    }
  });
  return Outcome::kDone;
}

Outcome MatmulVnniDot(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  if (!args.transpose || args.M > kVnniFewRows || args.format.mode == Mode::kMxfp8) return Outcome::kDeclined;
  if (!args.format.affine()) return VnniDot<4, true>(args, weight, parallel);
  switch (args.format.bits) {
    case 2:
      return VnniDot<2, false>(args, weight, parallel);
    case 3:
      return VnniDot<3, false>(args, weight, parallel);
    case 4:
      return VnniDot<4, false>(args, weight, parallel);
    case 5:
      return VnniDot<5, false>(args, weight, parallel);
    case 6:
      return VnniDot<6, false>(args, weight, parallel);
    default:
      return VnniDot<8, false>(args, weight, parallel);
  }
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_VNNI_DOT_INL_H_
