// Few rows of x by a weight of integer codes, transpose=True, with VNNI: a block of w at a time by the digits of x,
// which lie in the order in which the codes come out of the block.
//
// Codes of 2, 4 and 8 bits: byte j of a block holds codes j*P .. j*P+P-1, P = 8/bits; plane p (shift by p*bits, mask)
// gives every P-th code. Codes of 3 bits are moved two to a byte first, and are then like those of 4. Other widths: 64
// codes in order. Either way a 32-bit lane sums 4*P neighbouring codes, which lie in one group, in exact integers; then
// the lane's group's scale times the group's unit makes it a float.
//
// Scales go through registers 16 groups at a time: converted, multiplied by x's units, and dealt to the lanes of each
// block by a permutation.

#ifndef JAXQ_KERNELS_CPU_VNNI_DOT_INL_H_
#define JAXQ_KERNELS_CPU_VNNI_DOT_INL_H_

#include "digits-inl.h"
#include "runs-inl.h"
#include "scales-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kChunk = 16;  // groups whose scales are in a register at a time

template <DType kDType>
struct DTypeConstant {
  static constexpr DType value = kDType;
};

template <int kBits>
struct DotShape {
  static constexpr int kPlanes = kBits == 3 ? 2 : 8 % kBits == 0 ? 8 / kBits : 1;
  static constexpr int64_t kCodes = 64 * kPlanes;           // per block; kChunk groups are whole blocks
  static constexpr int64_t kBytes = kCodes / 8 * kBits;     // of w per block, at most 64
  static constexpr int64_t kDigitBytes = 3 * kPlanes * 64;  // of one row of x per block
};

// x as the kernel reads it, for each row of x: digits [blocks][3][planes][64]; units and sums [G], and zeros up to a
// multiple of kChunk.
struct DotX {
  int8_t* digits;
  float* units;
  float* sums;
  int64_t blocks, groups;

  int64_t padded_groups() const { return RoundUp(groups, kChunk); }
  template <int kBits>
  DotX From(int64_t m) const {
    const int64_t floats = m * padded_groups();
    return {digits + m * blocks * DotShape<kBits>::kDigitBytes, units + floats, sums + floats, blocks, groups};
  }
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
  const int64_t padded = x.blocks * Shape::kCodes, groups = x.padded_groups();
  std::memset(natural, 0, static_cast<size_t>(3 * padded));
  const Digits row = {{natural, natural + padded, natural + 2 * padded}, x.units + m * groups, x.sums + m * groups};
  if (!SplitRow(args, m, row)) return false;
  for (int64_t j = x.groups; j < groups; ++j) row.unit[j] = row.sum[j] = 0.0f;
  int8_t* out = x.digits + m * x.blocks * Shape::kDigitBytes;
  for (int64_t b = 0; b < x.blocks; ++b)
    for (int d = 0; d < 3; ++d, out += 64 * Shape::kPlanes)
      SplitPlanes<Shape::kPlanes>(row.digit[d] + b * Shape::kCodes, out);
  return true;
}

// How the codes of a block become planes.
template <int kBits>
struct DotUnpacker {
  __m512i spread, shifts;

  // Groups of 8 bytes get the bits of 8*kPlanes codes, and then each byte those of kPlanes codes.
  DotUnpacker() {
    constexpr int kStep = kBits * DotShape<kBits>::kPlanes;
    alignas(64) uint8_t from[64], shift[64];
    for (int i = 0; i < 64; ++i) {
      from[i] = static_cast<uint8_t>((i / 8 * kStep + i % 8) & 63);
      shift[i] = static_cast<uint8_t>(i % 8 * kStep);
    }
    spread = _mm512_load_si512(from), shifts = _mm512_load_si512(shift);
  }

  template <bool kE2m1>
  JAXQ_INLINE void operator()(const uint8_t* w, __mmask64 bytes, __m512i* planes) const {
    using Shape = DotShape<kBits>;
    __m512i packed = _mm512_maskz_loadu_epi8(bytes, w);
    if constexpr (8 % kBits != 0)
      packed = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, packed));
    const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << kBits) - 1));
    JAXQ_UNROLL
    for (int p = 0; p < Shape::kPlanes; ++p) {
      planes[p] = p ? _mm512_srli_epi16(packed, p * kBits) : packed;
      if constexpr (kBits != 8) planes[p] = _mm512_and_si512(planes[p], mask);
      if constexpr (kE2m1) planes[p] = ShiftedE2m1(planes[p]);
    }
  }
};

constexpr int kVnniRows = 4;  // of w at a time

// kVnniRows rows of w by kM rows of x.
template <int kBits, bool kE2m1, int kM>
struct DotTile {
  using Shape = DotShape<kBits>;
  static constexpr int kPlanes = Shape::kPlanes;

  const MatmulArgs& args;
  const Weight& weight;
  const DotUnpacker<kBits> unpack;

  struct State {
    DotX x;  // from the first row on
    const uint8_t* w[kVnniRows];
    int64_t first_group[kVnniRows];  // in the arrays of scales and biases
    __m512 scales[kVnniRows][kM];    // of a chunk of groups, times x's units
    __m512 totals[kVnniRows][kM];
  };

  // load gives the scales and biases of the chunk from `group` on.
  template <typename Load>
  JAXQ_INLINE void LoadChunk(int64_t group, State* state, Load&& load) const {
    const int64_t padded = state->x.padded_groups();
    JAXQ_UNROLL
    for (int r = 0; r < kVnniRows; ++r) {
      __m512 scales, biases;
      load(state->first_group[r] + group, &scales, &biases);
      JAXQ_UNROLL
      for (int m = 0; m < kM; ++m) {
        state->scales[r][m] = _mm512_mul_ps(scales, _mm512_loadu_ps(state->x.units + m * padded + group));
        const __m512 sums = _mm512_loadu_ps(state->x.sums + m * padded + group);
        state->totals[r][m] = _mm512_fmadd_ps(biases, sums, state->totals[r][m]);
      }
    }
  }

  template <DType kDType>
  JAXQ_INLINE __m512 LoadAhead(const void* base, int64_t at, __mmask16 mask) const {
    const int64_t ahead = (kAhead * 8 / kBits) >> __builtin_ctz(static_cast<unsigned>(weight.format.group_size));
    _mm_prefetch(static_cast<const char*>(base) + (at + ahead) * SizeOf(kDType), _MM_HINT_T0);
    return LoadSome(kDType, base, at, mask);
  }

  // What the scales are is asked once for all rows.
  JAXQ_INLINE void LoadChunk(int64_t group, State* state) const {
    const __mmask16 mask = FirstLanes(state->x.groups - group);
    const auto of_dtype = [&](auto dtype) {
      LoadChunk(group, state, [&](int64_t at, __m512* scales, __m512* biases) __attribute__((always_inline)) {
        *scales = LoadAhead<decltype(dtype)::value>(weight.scales, at, mask);
        *biases = LoadAhead<decltype(dtype)::value>(weight.biases, at, mask);
      });
    };
    if constexpr (kE2m1) {
      LoadChunk(group, state, [&](int64_t at, __m512* scales, __m512* biases) __attribute__((always_inline)) {
        *scales = LoadScales(weight, at, mask);
        *biases = _mm512_mul_ps(*scales, _mm512_set1_ps(-12.0f));  // scales are halved already
      });
    } else if (weight.scale_dtype == DType::kBF16) {
      of_dtype(DTypeConstant<DType::kBF16>{});
    } else if (weight.scale_dtype == DType::kF16) {
      of_dtype(DTypeConstant<DType::kF16>{});
    } else {
      of_dtype(DTypeConstant<DType::kF32>{});
    }
  }

  // One block. `lanes`: the group of each lane, from the chunk's first on.
  JAXQ_INLINE void Step(int64_t block, __mmask64 bytes, __m512i lanes, State* state) const {
    __m512i codes[kVnniRows][kPlanes];
    JAXQ_UNROLL
    for (int r = 0; r < kVnniRows; ++r) {
      const uint8_t* w = state->w[r] + block * Shape::kBytes;
      _mm_prefetch(reinterpret_cast<const char*>(w + kAhead), _MM_HINT_T1);
      unpack.template operator()<kE2m1>(w, bytes, codes[r]);
    }
    JAXQ_UNROLL
    for (int m = 0; m < kM; ++m) {
      const int8_t* digits = state->x.digits + (m * state->x.blocks + block) * Shape::kDigitBytes;
      __m512i sums[kVnniRows], low[kVnniRows];
      JAXQ_UNROLL
      for (int r = 0; r < kVnniRows; ++r) sums[r] = low[r] = _mm512_setzero_si512();
      // All rows take one digit after the other, so that there is always one that need not wait for its last sum.
      JAXQ_UNROLL
      for (int d = 0; d < 3; ++d) {
        JAXQ_UNROLL
        for (int p = 0; p < kPlanes; ++p) {
          const __m512i digit = _mm512_loadu_si512(digits + (d * kPlanes + p) * 64);
          JAXQ_UNROLL
          for (int r = 0; r < kVnniRows; ++r) {
            // 8-bit codes need more than 32 bits for all three digits.
            __m512i& sum = kBits == 8 && d == 2 ? low[r] : sums[r];
            if (p == 0 && d > 0 && !(kBits == 8 && d == 2)) sum = _mm512_slli_epi32(sum, 8);
            sum = DotBytes(sum, codes[r][p], digit);
          }
        }
      }
      JAXQ_UNROLL
      for (int r = 0; r < kVnniRows; ++r) {
        __m512 sum = _mm512_cvtepi32_ps(sums[r]);
        if (kBits == 8) sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low[r]));
        const __m512 scales = _mm512_permutexvar_ps(lanes, state->scales[r][m]);
        state->totals[r][m] = _mm512_fmadd_ps(sum, scales, state->totals[r][m]);
      }
    }
  }

  // Rows n .. n+count of w, kVnniRows at most.
  JAXQ_INLINE void Rows(int64_t n, int64_t count, const DotX& x, int64_t m0) const {
    const int64_t g = weight.format.group_size, per_chunk = kChunk * g / Shape::kCodes;
    const __m128i shift = _mm_cvtsi32_si128(__builtin_ctz(static_cast<unsigned>(g)));
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i lane_codes = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(4 * kPlanes));
    const int64_t blocks = args.K / Shape::kCodes, rest = args.K % Shape::kCodes;
    State state;
    state.x = x.From<kBits>(m0);
    JAXQ_UNROLL
    for (int r = 0; r < kVnniRows; ++r) {
      const int64_t row = n + Least(r, count - 1);
      state.w[r] = weight.packed + row * weight.row_bytes;
      state.first_group[r] = row * x.groups;
      JAXQ_UNROLL
      for (int m = 0; m < kM; ++m) state.totals[r][m] = _mm512_setzero_ps();
    }
    for (int64_t first = 0, group = 0; first < x.blocks; first += per_chunk, group += kChunk) {
      LoadChunk(group, &state);
      const int64_t last = Least(blocks, first + per_chunk);
      __m512i at = lane_codes;
      for (int64_t b = first; b < last; ++b) {
        Step(b, FirstBytes(Shape::kBytes), _mm512_srl_epi32(at, shift), &state);
        at = _mm512_add_epi32(at, _mm512_set1_epi32(Shape::kCodes));
      }
      if (rest && blocks < first + per_chunk)
        Step(blocks, FirstBytes(rest / 8 * kBits), _mm512_srl_epi32(at, shift), &state);
    }
    JAXQ_UNROLL
    for (int m = 0; m < kM; ++m) {
      __m512 totals[4];
      JAXQ_UNROLL
      for (int r = 0; r < 4; ++r) totals[r] = r < kVnniRows ? state.totals[r % kVnniRows][m] : _mm512_setzero_ps();
      StoreSome(args.x_dtype, args.y, (m0 + m) * args.N + n, count, SumFour(totals));
    }
  }

  // Rows first .. last of w by rows m0 .. m0+kM of x.
  void operator()(int64_t first, int64_t last, const DotX& x, int64_t m0) const {
    for (int64_t n = first; n < last; n += kVnniRows) Rows(n, Least(kVnniRows, last - n), x, m0);
  }
};

// Rows first .. last of w by all of x: at most three rows of x at a time, since with more registers run out.
template <int kBits, bool kE2m1>
void DotRange(const MatmulArgs& args, const Weight& weight, const DotX& x, int64_t first, int64_t last) {
  for (int64_t m = 0; m < args.M;) {
    const int64_t rest = args.M - m;
    if (rest == 1) {
      DotTile<kBits, kE2m1, 1>{args, weight, {}}(first, last, x, m), m += 1;
    } else if (rest == 2 || rest == 4) {
      DotTile<kBits, kE2m1, 2>{args, weight, {}}(first, last, x, m), m += 2;
    } else {
      DotTile<kBits, kE2m1, 3>{args, weight, {}}(first, last, x, m), m += 3;
    }
  }
}

template <int kBits, bool kE2m1>
Outcome VnniDot(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  using Shape = DotShape<kBits>;
  DotX x;
  x.blocks = Ceil(args.K, Shape::kCodes), x.groups = args.groups();
  const int64_t floats = args.M * x.padded_groups();
  const Scratch scratch(Room<int8_t>(args.M * x.blocks * Shape::kDigitBytes) + 2 * Room<float>(floats) +
                        Runs::RoomFor(parallel) + Room<int8_t>(3 * x.blocks * Shape::kCodes));
  if (!scratch.ok()) return Outcome::kNoMemory;
  char* cursor = scratch.data();
  x.digits = Take<int8_t>(&cursor, args.M * x.blocks * Shape::kDigitBytes);
  x.units = Take<float>(&cursor, floats);
  x.sums = Take<float>(&cursor, floats);
  int64_t* next = Take<int64_t>(&cursor, 8 * parallel.slots());
  for (int64_t m = 0; m < args.M; ++m)
    if (!PrepareDot<kBits>(args, m, x, reinterpret_cast<int8_t*>(cursor))) return Outcome::kDeclined;
  ForRuns(args.N, parallel, next, [&](int64_t first, int64_t last) {
    // What is read more than once is still in the second-level cache when its turn comes again.
    const int64_t step = args.M > 3 ? kRunTask : last - first;
    for (int64_t n = first; n < last; n += step) DotRange<kBits, kE2m1>(args, weight, x, n, Least(last, n + step));
  });
  return Outcome::kDone;
}

Outcome MatmulVnniDot(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  if (!args.transpose || args.M > FewRows(args.format) || args.format.mode == Mode::kMxfp8) return Outcome::kDeclined;
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
