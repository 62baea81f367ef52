// Few rows of x by a weight of integer codes, transpose=True, with VNNI: a block of w at a time by the digits of x,
// which lie in the order in which the codes come out of the block.
//
// Codes of 2, 4 and 8 bits: byte j of a block holds codes j*P .. j*P+P-1, P = 8/bits; plane p (shift by p*bits, mask)
// gives every P-th code. Codes of 3 bits are moved two to a byte first, and are then like those of 4. Other widths: 64
// codes in order. Either way a 32-bit lane has 4*P neighbouring codes, which lie in one group. Two blocks, whose lanes
// are dealt so that twice as many codes of a group meet in one, are a step: exact integer sums, which the lane's
// group's scale times the group's unit makes floats.
//
// Before a few rows of w are multiplied, their scales are multiplied by x's units, 16 groups at a time. In a step, a
// permutation deals them to the lanes.

#ifndef JAXQ_KERNELS_CPU_VNNI_DOT_INL_H_
#define JAXQ_KERNELS_CPU_VNNI_DOT_INL_H_

#include "digits-inl.h"
#include "runs-inl.h"
#include "scales-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int kVnniRows = 4;     // of w at a time
constexpr int64_t kNear = 8192;  // bytes of w from what is read to what is fetched past a cache
constexpr int64_t kChunk = 16;   // groups whose scales are in a register
constexpr int64_t kPage = 4096;

// Two blocks' lanes: the even ones of both, and the odd ones. What shares a lane number then is of one group, where a
// group has two lanes or more.
JAXQ_INLINE void DealLanes(__m512i* blocks) {
  const __m512 a = _mm512_castsi512_ps(blocks[0]), b = _mm512_castsi512_ps(blocks[1]);
  blocks[0] = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88));
  blocks[1] = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd));
}

template <int kBits_, int kDigits_, bool kPaired_>
struct DotShape {
  static constexpr int kBits = kBits_, kDigits = kDigits_;
  static constexpr int kPlanes = kBits == 3 ? 2 : 8 % kBits == 0 ? 8 / kBits : 1;
  static constexpr int kBlocks = kPaired_ ? 2 : 1;                 // that are multiplied together
  static constexpr int64_t kBlockCodes = 64 * kPlanes;
  static constexpr int64_t kBlockBytes = kBlockCodes / 8 * kBits;  // of w, at most 64
  static constexpr int64_t kCodes = kBlocks * kBlockCodes;         // per step; kChunk groups are whole steps
  static constexpr int64_t kBytes = kBlocks * kBlockBytes;
  static constexpr int64_t kDigitBytes = kDigits * kBlocks * kPlanes * 64;  // of one row of x per step
};

// x as the kernel reads it, for each row of x: digits [steps][planes][blocks][digits][64]; units and sums [G], and zeros
// up to a multiple of kChunk.
struct DotX {
  int8_t* digits;
  float* units;
  float* sums;
  int64_t steps, groups;

  int64_t padded_groups() const { return RoundUp(groups, kChunk); }
  template <typename Shape>
  DotX From(int64_t m) const {
    const int64_t floats = m * padded_groups();
    return {digits + m * steps * Shape::kDigitBytes, units + floats, sums + floats, steps, groups};
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

template <typename Shape>
bool PrepareDot(const MatmulArgs& args, int64_t m, const DotX& x, int8_t* natural) {
  constexpr int kDigits = Shape::kDigits, kPlanes = Shape::kPlanes, kBlocks = Shape::kBlocks;
  const int64_t padded = x.steps * Shape::kCodes, groups = x.padded_groups();
  std::memset(natural, 0, static_cast<size_t>(3 * padded));
  const Digits row = {{natural, natural + padded, natural + 2 * padded}, x.units + m * groups, x.sums + m * groups};
  if (!SplitRow<kDigits>(args, m, row)) return false;
  for (int64_t j = x.groups; j < groups; ++j) row.unit[j] = row.sum[j] = 0.0f;
  int8_t* out = x.digits + m * x.steps * Shape::kDigitBytes;
  for (int64_t step = 0; step < x.steps; ++step, out += Shape::kDigitBytes) {
    for (int d = 0; d < kDigits; ++d) {
      alignas(64) int8_t planes[kBlocks][kPlanes][64];
      for (int b = 0; b < kBlocks; ++b)
        SplitPlanes<kPlanes>(row.digit[d] + step * Shape::kCodes + b * Shape::kBlockCodes, planes[b][0]);
      for (int p = 0; p < kPlanes; ++p) {
        __m512i parts[kBlocks];
        for (int b = 0; b < kBlocks; ++b) parts[b] = _mm512_load_si512(planes[b][p]);
        if constexpr (kBlocks == 2) DealLanes(parts);
        for (int b = 0; b < kBlocks; ++b) _mm512_storeu_si512(out + ((p * kBlocks + b) * kDigits + d) * 64, parts[b]);
      }
    }
  }
  return true;
}

// How the codes of a block become planes.
template <int kBits>
struct DotUnpacker {
  __m512i spread, shifts;

  // Groups of 8 bytes get the bits of 8*kPlanes codes, and then each byte those of kPlanes codes.
  DotUnpacker() {
    constexpr int kStep = kBits * DotShape<kBits, 3, false>::kPlanes;
    alignas(64) uint8_t from[64], shift[64];
    for (int i = 0; i < 64; ++i) {
      from[i] = static_cast<uint8_t>((i / 8 * kStep + i % 8) & 63);
      shift[i] = static_cast<uint8_t>(i % 8 * kStep);
    }
    spread = _mm512_load_si512(from), shifts = _mm512_load_si512(shift);
  }

  // Codes of 3 bits two to a byte, and those of 5 and 6 one; others as they are.
  JAXQ_INLINE __m512i Pairs(__m512i bytes) const {
    if constexpr (8 % kBits == 0) return bytes;
    return _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, bytes));
  }

  template <bool kE2m1>
  JAXQ_INLINE __m512i Plane(__m512i pairs, int p) const {
    __m512i plane = p ? _mm512_srli_epi16(pairs, p * kBits) : pairs;
    if constexpr (kBits != 8) plane = _mm512_and_si512(plane, _mm512_set1_epi8(static_cast<char>((1 << kBits) - 1)));
    return kE2m1 ? ShiftedE2m1(plane) : plane;
  }
};

// kRows rows of w by kM rows of x.
template <typename Shape, bool kE2m1, int kM>
struct DotTile {
  static constexpr int kBits = Shape::kBits, kPlanes = Shape::kPlanes, kBlocks = Shape::kBlocks;
  static constexpr int kDigits = Shape::kDigits, kRows = kM == 1 ? kVnniRows : kVnniRows / 2;

  const MatmulArgs& args;
  const Weight& weight;
  float* const scaled;  // scratch: [kRows][kM][padded groups]
  const DotUnpacker<kBits> unpack;
  // Whether what is fetched passes the second-level cache by: what one row of x meets is not read again.
  const bool passes = kM == 1 && PassingFillsLastLevel();

  struct Masks {
    __mmask64 block[2];
  };

  struct State {
    DotX x;                // from the first row on
    int64_t ahead;         // bytes of w from what is read to what is fetched
    int64_t groups_ahead;  // and groups, whose scales are; whole blocks of rows
    const uint8_t* w[kRows];
    __m512 totals[kRows][kM];
  };

  // Scales times x's units to `scaled`; totals <- biases times x's sums. load gives 16 scales and biases.
  template <typename Load>
  JAXQ_INLINE void TakeScales(int64_t n, int64_t count, State* state, Load&& load) const {
    const int64_t padded = state->x.padded_groups(), groups = state->x.groups;
    int64_t first[kRows];
    JAXQ_UNROLL
    for (int r = 0; r < kRows; ++r) first[r] = (n + Least(r, count - 1)) * groups;
    for (int64_t j = 0; j < groups; j += kChunk) {
      const __mmask16 mask = FirstLanes(groups - j);
      JAXQ_UNROLL
      for (int r = 0; r < kRows; ++r) {
        __m512 scales, biases;
        load(first[r] + j, mask, &scales, &biases);
        JAXQ_UNROLL
        for (int m = 0; m < kM; ++m) {
          const __m512 units = _mm512_loadu_ps(state->x.units + m * padded + j);
          _mm512_storeu_ps(scaled + (r * kM + m) * padded + j, _mm512_mul_ps(scales, units));
          const __m512 sums = _mm512_loadu_ps(state->x.sums + m * padded + j);
          state->totals[r][m] = _mm512_fmadd_ps(biases, sums, state->totals[r][m]);
        }
      }
    }
  }

  template <DType kDType>
  JAXQ_INLINE static __m512 LoadAhead(const void* base, int64_t at, int64_t ahead, __mmask16 mask) {
    Prefetch(base, at + ahead, SizeOf(kDType));
    return LoadSome(kDType, base, at, mask);
  }
  JAXQ_INLINE static void Prefetch(const void* base, int64_t at, int64_t size) {
    _mm_prefetch(static_cast<const char*>(base) + at * size, _MM_HINT_T0);
  }

  // What the scales are is asked once for all rows.
  JAXQ_INLINE void TakeScales(int64_t n, int64_t count, State* state) const {
    const int64_t ahead = state->groups_ahead;
    if constexpr (kE2m1) {
      TakeScales(n, count, state, [&](int64_t at, __mmask16 mask, F* scales, F* biases) __attribute__((always_inline)) {
        Prefetch(weight.scales, at + ahead, 1);
        *scales = LoadScales(weight, at, mask);
        *biases = _mm512_mul_ps(*scales, _mm512_set1_ps(-12.0f));  // scales are halved already
      });
    } else {
      WithDType(weight.scale_dtype, [&](auto dtype) {
        constexpr DType kDType = decltype(dtype)::value;
        TakeScales(n, count, state, [&](int64_t at, __mmask16 mask, F* scales, F* biases) __attribute__((always_inline)) {
          *scales = LoadAhead<kDType>(weight.scales, at, ahead, mask);
          *biases = LoadAhead<kDType>(weight.biases, at, ahead, mask);
        });
      });
    }
  }

  // The packed bytes of one row of w in a step.
  template <bool kPasses>
  JAXQ_INLINE void Load(const uint8_t* w, int64_t ahead, Masks bytes, __m512i* packed) const {
    JAXQ_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      const uint8_t* at = w + b * Shape::kBlockBytes;
      _mm_prefetch(reinterpret_cast<const char*>(at + ahead), kPasses ? _MM_HINT_NTA : _MM_HINT_T1);
      packed[b] = unpack.Pairs(_mm512_maskz_loadu_epi8(bytes.block[b], at));
    }
    if constexpr (kBlocks == 2) DealLanes(packed);
  }

  // The digits' sums as floats.
  JAXQ_INLINE __m512 Join(const __m512i* parts) const {
    if constexpr (kDigits == 2 || kBits >= 6 || kE2m1)
      return JoinDigits<kDigits>(parts[0], parts[1], parts[kDigits - 1]);
    // In 32 bits there is room for all three digits where codes are below 16: 16 codes of a lane, 15 each, 8355000.
    const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(parts[0], 8), parts[1]);
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), parts[2]));
  }

  // One step, whose first group is `group`. `lanes`: the group of each lane, from that one on.
  template <bool kPasses>
  JAXQ_INLINE void Step(int64_t step, int64_t group, Masks bytes, __m512i lanes, State* state) const {
    __m512i packed[kRows][kBlocks], parts[kRows][kM][kDigits];
    JAXQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      Load<kPasses>(state->w[r] + step * Shape::kBytes, state->ahead, bytes, packed[r]);
      JAXQ_UNROLL
      for (auto& row : parts[r])
        JAXQ_UNROLL
        for (__m512i& part : row) part = _mm512_setzero_si512();
    }
    const int8_t* digits = state->x.digits + step * Shape::kDigitBytes;
    const int64_t stride = state->x.steps * Shape::kDigitBytes;
    JAXQ_UNROLL
    for (int i = 0; i < kPlanes * kBlocks; ++i, digits += kDigits * 64) {
      __m512i codes[kRows];
      JAXQ_UNROLL
      for (int r = 0; r < kRows; ++r) codes[r] = unpack.template Plane<kE2m1>(packed[r][i % kBlocks], i / kBlocks);
      JAXQ_UNROLL
      for (int m = 0; m < kM; ++m) {
        JAXQ_UNROLL
        for (int d = 0; d < kDigits; ++d) {
          const __m512i digit = _mm512_loadu_si512(digits + m * stride + d * 64);
          JAXQ_UNROLL
          for (int r = 0; r < kRows; ++r) parts[r][m][d] = DotBytes(parts[r][m][d], codes[r], digit);
        }
      }
    }
    const int64_t padded = state->x.padded_groups();
    JAXQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      JAXQ_UNROLL
      for (int m = 0; m < kM; ++m) {
        const __m512 groups = _mm512_loadu_ps(scaled + (r * kM + m) * padded + group);
        const __m512 scales = _mm512_permutexvar_ps(lanes, groups);
        __m512* total = &state->totals[r][m];
        *total = _mm512_fmadd_ps(Join(parts[r][m]), scales, *total);
      }
    }
  }

  JAXQ_INLINE static Masks FirstOf(int64_t bytes) {
    return {{FirstBytes(Least(bytes, Shape::kBlockBytes)), FirstBytes(Most(0, bytes - Shape::kBlockBytes))}};
  }

  // The group of each lane of a step, from its first on.
  static __m512i LaneGroups(int64_t g) {
    const __m512i alone = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i dealt = _mm512_set_epi32(30, 28, 14, 12, 26, 24, 10, 8, 22, 20, 6, 4, 18, 16, 2, 0);
    const __m512i first = _mm512_mullo_epi32(kBlocks == 2 ? dealt : alone, _mm512_set1_epi32(4 * kPlanes));
    return _mm512_srl_epi32(first, _mm_cvtsi32_si128(__builtin_ctz(static_cast<unsigned>(g))));
  }

  // All of K.
  template <bool kPasses>
  JAXQ_INLINE void Steps(State* state) const {
    const int64_t g = weight.format.group_size, per_step = Shape::kCodes / g;
    const __m512i lanes = LaneGroups(g);
    const int64_t whole = args.K / Shape::kCodes, rest = args.K % Shape::kCodes;
    for (int64_t step = 0; step < whole; ++step)
      Step<kPasses>(step, step * per_step, FirstOf(Shape::kBytes), lanes, state);
    if (rest) Step<kPasses>(whole, whole * per_step, FirstOf(rest / 8 * kBits), lanes, state);
  }

  // Rows n .. n+count of w, kRows at most.
  JAXQ_INLINE void Rows(int64_t n, int64_t count, int64_t m0, State* state) const {
    JAXQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      state->w[r] = weight.packed + (n + Least(r, count - 1)) * weight.row_bytes;
      JAXQ_UNROLL
      for (__m512& total : state->totals[r]) total = _mm512_setzero_ps();
    }
    TakeScales(n, count, state);
    kM == 1 && passes ? Steps<kM == 1>(state) : Steps<false>(state);
    JAXQ_UNROLL
    for (int m = 0; m < kM; ++m) {
      __m512 totals[4];
      JAXQ_UNROLL
      for (int r = 0; r < 4; ++r) totals[r] = r < kRows ? state->totals[r % kRows][m] : _mm512_setzero_ps();
      StoreSome(args.x_dtype, args.y, (m0 + m) * args.N + n, count, SumFour(totals));
    }
  }

  // Rows first .. last of w by rows m0 .. m0+kM of x.
  void operator()(int64_t first, int64_t last, const DotX& x, int64_t m0) const {
    State state;
    state.x = x.From<Shape>(m0);
    // Past a cache, whole blocks of rows: what is fetched is what the same rows' successors have at the same place.
    state.ahead = passes ? RoundUp(kNear, kRows * weight.row_bytes) : kAhead;
    state.groups_ahead = RoundUp(kAhead * 8 / kBits / weight.format.group_size, kRows * weight.groups);
    for (int64_t n = first; n < last; n += kRows) Rows(n, Least(kRows, last - n), m0, &state);
  }
};

// Rows first .. last of w by all of x: at most two rows of x at a time, since with more registers run out.
template <typename Shape, bool kE2m1>
void DotRange(const MatmulArgs& args, const Weight& weight, const DotX& x, float* scaled, int64_t first, int64_t last) {
  int64_t m = 0;
  for (; m + 2 <= args.M; m += 2) DotTile<Shape, kE2m1, 2>{args, weight, scaled, {}}(first, last, x, m);
  if (m < args.M) DotTile<Shape, kE2m1, 1>{args, weight, scaled, {}}(first, last, x, m);
}

template <typename Shape, bool kE2m1>
Outcome DotOfShape(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  DotX x;
  x.steps = Ceil(args.K, Shape::kCodes), x.groups = args.groups();
  const int64_t floats = args.M * x.padded_groups(), digits = args.M * x.steps * Shape::kDigitBytes;
  const int64_t scaled = kVnniRows * x.padded_groups() + kChunk;  // a step reads 16, whichever it needs
  // A page before each: what one core fetches ahead of its own, or counts with, would else be what another writes.
  const int64_t slot_room = kPage + Room<float>(scaled);
  const Scratch scratch(Room<int8_t>(digits) + 2 * Room<float>(floats) + Runs::RoomFor(parallel) +
                        parallel.slots() * slot_room + Room<int8_t>(3 * x.steps * Shape::kCodes));
  if (!scratch.ok()) return Outcome::kNoMemory;
  char* cursor = scratch.data();
  x.digits = Take<int8_t>(&cursor, digits);
  x.units = Take<float>(&cursor, floats);
  x.sums = Take<float>(&cursor, floats);
  int64_t* next = Take<int64_t>(&cursor, 8 * parallel.slots());
  char* const slots = cursor;
  cursor += parallel.slots() * slot_room;
  for (int64_t m = 0; m < args.M; ++m)
    if (!PrepareDot<Shape>(args, m, x, reinterpret_cast<int8_t*>(cursor))) return Outcome::kDeclined;
  ForRuns(args.N, parallel, next, [&](int64_t first, int64_t last, int slot) {
    float* mine = reinterpret_cast<float*>(slots + slot * slot_room + kPage);
    // What is read more than once is still in the second-level cache when its turn comes again.
    const int64_t step = args.M > 2 ? kRunTask : last - first;
    for (int64_t n = first; n < last; n += step) DotRange<Shape, kE2m1>(args, weight, x, mine, n, Least(last, n + step));
  });
  return Outcome::kDone;
}

template <int kBits, bool kE2m1>
Outcome VnniDot(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  const bool two = DigitsFor(args.x_dtype, args.K) == 2;
  if constexpr (kBits == 2) {
    if (args.format.group_size == 16)  // one lane
      return two ? DotOfShape<DotShape<2, 2, false>, kE2m1>(args, weight, parallel)
                 : DotOfShape<DotShape<2, 3, false>, kE2m1>(args, weight, parallel);
  }
  return two ? DotOfShape<DotShape<kBits, 2, true>, kE2m1>(args, weight, parallel)
             : DotOfShape<DotShape<kBits, 3, true>, kE2m1>(args, weight, parallel);
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
