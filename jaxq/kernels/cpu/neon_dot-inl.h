// Few rows of x by a weight of integer codes, transpose=True, with sdot: 16 bytes of w at a time against x's digits.
//
// Codes of 2 and 4 bits are taken as they lie: plane p of 16 bytes (shift by p*bits, mask) is every (8/bits)-th code,
// and x's digits are laid out in the same planes. Where a group is shorter than that, and for other widths, codes are
// unpacked to bytes first. A group is summed in integers and scaled once.

#ifndef JAXQ_KERNELS_CPU_NEON_DOT_INL_H_
#define JAXQ_KERNELS_CPU_NEON_DOT_INL_H_

#include "neon_digits-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kDotMaxM = 3;
constexpr int64_t kDotTaskRows = 32;
constexpr int64_t kDotCodes = 1024;  // of a row at a time
constexpr int64_t kMaxDotRows = 4;

// x, for each row: digits [K/(16*planes)][3][planes][16], units and sums [G].
struct DotX {
  int8_t* digits;
  float* units;
  float* sums;
};

bool PackDotX(const MatmulArgs& args, int64_t m, int planes, const DotX& out) {
  const int64_t g = args.format.group_size, groups = args.groups();
  int8_t* to = out.digits + m * 3 * args.K;
  for (int64_t group = 0; group < groups; ++group) {
    float x[kMaxGroup];
    DigitGroup split;
    ToFloats(args.x_dtype, args.x, m * args.K + group * g, g, x);
    if (!SplitGroup(x, g, &split)) return false;
    out.units[m * groups + group] = split.unit, out.sums[m * groups + group] = split.sum;
    for (int64_t i = 0; i < g; i += 16 * planes) {
      for (int d = 0; d < 3; ++d, to += 16 * planes) {
        const int8_t* from = split.digit[d] + i;
        if (planes == 1) vst1q_s8(to, vld1q_s8(from));
        if (planes == 2) {
          const int8x16x2_t parts = vld2q_s8(from);
          for (int p = 0; p < 2; ++p) vst1q_s8(to + 16 * p, parts.val[p]);
        }
        if (planes == 4) {
          const int8x16x4_t parts = vld4q_s8(from);
          for (int p = 0; p < 4; ++p) vst1q_s8(to + 16 * p, parts.val[p]);
        }
      }
    }
  }
  return true;
}

// Biases of groups first .. first+count of a row, for centred codes.
void CentredBiases(const Weight& weight, int64_t row, int64_t first, int64_t count, const float* scales, float* out) {
  weight.Biases(row, first, count, out);
  const float centre = CodeCentre(weight);
  if (centre == 0.0f) return;
  for (int64_t i = 0; i < count; ++i) out[i] = __builtin_fmaf(scales[i], centre, out[i]);
}

// Plane p of 16 bytes.
template <int kPlanes, bool kE2m1>
JAXQ_INLINE int8x16_t Plane(uint8x16_t bytes, int p, uint8x16_t flip) {
  if constexpr (kPlanes == 1) return vreinterpretq_s8_u8(veorq_u8(bytes, flip));
  constexpr int kBits = 8 / kPlanes;
  const int8x16_t shift = vdupq_n_s8(static_cast<int8_t>(-p * kBits));
  const uint8x16_t codes = vandq_u8(vshlq_u8(bytes, shift), vdupq_n_u8((1 << kBits) - 1));
  return kE2m1 ? vqtbl1q_s8(vld1q_s8(kTwiceE2m1), codes) : vreinterpretq_s8_u8(codes);
}

struct DotRow {
  const uint8_t* bytes;
  float scales[kDotCodes / 16], biases[kDotCodes / 16];
  uint8_t codes[kDotCodes + 64];
};

// Groups first .. first+count of kRows rows of w; adds to totals.
template <int kPlanes, bool kE2m1, int kM, int kRows>
JAXQ_INLINE void DotGroups(const MatmulArgs& args, const DotX& x, const DotRow* rows, int64_t first, int64_t count,
                           uint8x16_t flip, F (*totals)[kM]) {
  const int64_t g = args.format.group_size, groups = args.groups(), blocks = g / (16 * kPlanes);
  for (int64_t j = 0; j < count; ++j) {
    int32x4_t sums[kRows][kM][3];
    for (auto& row : sums)
      for (auto& column : row)
        for (int32x4_t& sum : column) sum = vdupq_n_s32(0);
    for (int64_t b = j * blocks; b < (j + 1) * blocks; ++b) {
      for (int r = 0; r < kRows; ++r) {
        const uint8x16_t bytes = vld1q_u8(rows[r].bytes + 16 * b);
        for (int p = 0; p < kPlanes; ++p) {
          const int8x16_t codes = Plane<kPlanes, kE2m1>(bytes, p, flip);
          for (int m = 0; m < kM; ++m) {
            const int8_t* digits = x.digits + 3 * (m * args.K + first * g + b * 16 * kPlanes) + 16 * p;
            for (int d = 0; d < 3; ++d)
              sums[r][m][d] = vdotq_s32(sums[r][m][d], codes, vld1q_s8(digits + d * 16 * kPlanes));
          }
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int m = 0; m < kM; ++m) {
        const int64_t at = m * groups + first + j;
        const F joined = JoinDigits(sums[r][m][0], sums[r][m][1], sums[r][m][2]);
        totals[r][m] = Fma(joined, Set1(rows[r].scales[j] * x.units[at]), totals[r][m]);
        const F bias = vsetq_lane_f32(rows[r].biases[j] * x.sums[at], Zero(), 0);
        totals[r][m] = Add(totals[r][m], bias);
      }
    }
  }
}

// Rows n .. n+count of w, kRows at most.
template <int kPlanes, bool kE2m1, int kM>
void DotRows(const MatmulArgs& args, const Weight& weight, const DotX& x, int64_t n, int64_t last) {
  constexpr int kRows = kM == 1 ? kMaxDotRows : 2;
  const int64_t g = args.format.group_size, per_chunk = kDotCodes / g;
  const uint8x16_t flip = vdupq_n_u8(CodeCentre(weight) != 0.0f ? 0x80 : 0);
  DotRow rows[kRows];
  for (; n < last; n += kRows) {
    F totals[kRows][kM];
    for (auto& row : totals)
      for (F& total : row) total = Zero();
    for (int64_t first = 0; first < weight.groups; first += per_chunk) {
      const int64_t count = Least(per_chunk, weight.groups - first);
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t row = Least(n + r, last - 1);
        weight.Scales(row, first, count, rows[r].scales);
        CentredBiases(weight, row, first, count, rows[r].scales, rows[r].biases);
        rows[r].bytes = weight.packed + row * weight.row_bytes + first * g / 8 * weight.format.bits;
        if constexpr (kPlanes == 1) {
          weight.Codes(row, first * g, count * g, rows[r].codes);
          rows[r].bytes = rows[r].codes;
        }
      }
      DotGroups<kPlanes, kE2m1, kM, kRows>(args, x, rows, first, count, flip, totals);
    }
    for (int m = 0; m < kM; ++m) {
      float out[kRows];
      for (int r = 0; r < kRows; ++r) out[r] = Sum(totals[r][m]);
      FromFloats(args.x_dtype, out, Least(kRows, last - n), args.y, m * args.N + n);
    }
  }
}

template <int kPlanes, bool kE2m1>
Outcome DotProduct(const MatmulArgs& args, const Weight& weight, const Parallel& parallel) {
  const int64_t groups = args.groups();
  const Scratch scratch(Room<int8_t>(args.M * 3 * args.K) + 2 * Room<float>(args.M * groups));
  if (!scratch.ok()) return Outcome::kNoMemory;
  char* cursor = scratch.data();
  DotX x;
  x.digits = Take<int8_t>(&cursor, args.M * 3 * args.K);
  x.units = Take<float>(&cursor, args.M * groups), x.sums = Take<float>(&cursor, args.M * groups);
  for (int64_t m = 0; m < args.M; ++m)
    if (!PackDotX(args, m, kPlanes, x)) return Outcome::kDeclined;
  parallel.For(Ceil(args.N, kDotTaskRows), [&](int64_t task, int) {
    const int64_t n = task * kDotTaskRows, last = Least(args.N, n + kDotTaskRows);
    if (args.M == 1) DotRows<kPlanes, kE2m1, 1>(args, weight, x, n, last);
    if (args.M == 2) DotRows<kPlanes, kE2m1, 2>(args, weight, x, n, last);
    if (args.M == 3) DotRows<kPlanes, kE2m1, 3>(args, weight, x, n, last);
  });
  return Outcome::kDone;
}

Outcome MatmulDigits(const MatmulArgs& args, const Parallel& parallel) {
  if (!args.transpose || args.M > kDotMaxM || args.format.mode == Mode::kMxfp8) return Outcome::kDeclined;
  const Weight weight(args, args.N, args.K);
  const int bits = args.format.bits, g = args.format.group_size;
  if (bits == 4 && g % 32 == 0)
    return args.format.affine() ? DotProduct<2, false>(args, weight, parallel)
                                : DotProduct<2, true>(args, weight, parallel);
  if (bits == 2 && g % 64 == 0) return DotProduct<4, false>(args, weight, parallel);
  return DotProduct<1, false>(args, weight, parallel);
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_NEON_DOT_INL_H_
