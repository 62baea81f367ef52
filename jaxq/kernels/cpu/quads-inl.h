// Panels of codes for the integer and bfloat16 matrix products: kPanelRows rows of w by kPanelDepth codes, as bytes.
//
// A quad is 4 neighbouring codes of one row, 32 bits. The panel holds, for each tile of 32 rows and each quad of the
// depth, the 32 rows' quads side by side: two vectors, one product each. Rows past the end of w hold zeros.

#ifndef JAXQ_KERNELS_CPU_QUADS_INL_H_
#define JAXQ_KERNELS_CPU_QUADS_INL_H_

#include "scales-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kPanelRows = 128;
constexpr int64_t kPanelDepth = 512;
constexpr int64_t kQuadTile = 32;
constexpr int64_t kMaxPanelGroups = kPanelDepth / 16;

// 16 rows by 64 codes: calls put(i, quads) for i in 0..15 with quad i of every row.
template <typename Put>
JAXQ_INLINE void QuadBlock(const Weight& weight, const Unpacker& unpack, int64_t row, int64_t first, int64_t count,
                           Put&& put) {
  const int64_t rows = Least(16, weight.rows - row);
  const uint8_t* src = weight.packed + row * weight.row_bytes + first / 8 * weight.format.bits;
  __m512i quads[16];
  for (int64_t r = 0; r < 16; ++r, src += weight.row_bytes) {
    // The next 16 rows' bytes: too many short streams for the hardware to follow.
    _mm_prefetch(reinterpret_cast<const char*>(src + 16 * weight.row_bytes), _MM_HINT_T0);
    quads[r] = r < rows ? unpack(src, count) : _mm512_setzero_si512();
  }
  TransposeWords(quads);
  for (int i = 0; i < 16; ++i) put(i, quads[i]);
}

// Scales and biases of rows n .. n+count, groups first .. first+groups, transposed: out[group][kPanelRows].
struct PanelScales {
  float scales[kMaxPanelGroups][kPanelRows], biases[kMaxPanelGroups][kPanelRows];
};

// `centre` is what the panel subtracts from every code: it goes into the biases.
void FillScales(const Weight& weight, int64_t n, int64_t count, int64_t first, int64_t groups, float centre,
                PanelScales* out) {
  for (int64_t r0 = 0; r0 < count; r0 += 16) {
    for (int64_t j0 = 0; j0 < groups; j0 += 16) {
      const int64_t wide = Least(16, groups - j0);
      const __mmask16 mask = FirstLanes(wide);
      F scales[16], biases[16];
      for (int64_t r = 0; r < 16; ++r) {
        const int64_t at = (n + Least(r0 + r, count - 1)) * weight.groups + first + j0;
        scales[r] = LoadScales(weight, at, mask);
        biases[r] = weight.format.affine() ? LoadSome(weight.scale_dtype, weight.biases, at, mask) : Zero();
        biases[r] = Fma(scales[r], Set1(centre), biases[r]);
      }
      Transpose(scales);
      Transpose(biases);
      for (int64_t j = 0; j < wide; ++j) {
        Store(out->scales[j0 + j] + r0, scales[j]);
        Store(out->biases[j0 + j] + r0, biases[j]);
      }
    }
  }
}

// Rows of x that are multiplied in one go: what they are packed into stays near 12 MiB, or 64 rows.
JAXQ_INLINE int64_t PassRows(const MatmulArgs& args, int64_t bytes_per_value) {
  return Least(args.M, Most((12 << 20) / (args.K * bytes_per_value) / 4 * 4, 64));
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_QUADS_INL_H_
