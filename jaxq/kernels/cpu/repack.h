// From the layouts of checkpoints to packed words, scales and biases: see jaxq/kernels/repack.py for what callers owe.
//
// Plain loops, compiled for every CPU, for AVX2 and for AVX-512; all make the same bits. One file's functions stand in
// a table, so that the choice is made in one place, repack.cc.
#ifndef JAXQ_KERNELS_CPU_REPACK_H_
#define JAXQ_KERNELS_CPU_REPACK_H_

#include "kernels.h"

namespace jaxq::cpu {

// blocks[count] of one type -> packed words, and scales and biases in `dtype` (bytes, and no biases, in a float mode).
// Returns whether every finite scale and bias stayed finite.
using BlockRepack = bool (*)(const uint8_t* blocks, int64_t count, uint8_t* packed, void* scales, void* biases,
                             DType dtype);

struct BlockType {
  const char* name;  // GGUF's
  int bytes, weights, bits, group_size;
  BlockRepack repack;
};

// Zero points as GPTQ and AWQ have them, [groups, outputs] in 32-bit words along the outputs.
struct ZeroPoints {
  const uint8_t* words;
  int bits;           // 2, 3, 4 or 8
  bool awq;           // the nibbles of a word in AWQ's order, not in that of the outputs
  unsigned int less;  // what is stored is so much less, modulo 2^bits
};

// What becomes of finite scales and biases in a narrower dtype: some are infinite, some are rounded.
enum Lost : int { kBeyond = 1, kRounded = 2 };

struct Repack {
  const BlockType* types;
  int type_count;
  // words[rows, columns] -> out[columns, rows], whose rows begin `stride` words apart.
  void (*transpose)(const uint32_t* words, int64_t rows, int64_t columns, uint32_t* out, int64_t stride);
  // AWQ's words[8 * rows, columns] -> out[8 * columns, rows], whose rows begin `stride` words apart.
  void (*awq)(const uint32_t* words, int64_t rows, int64_t columns, uint32_t* out, int64_t stride);
  // scales[groups, outputs] and zero points -> scales and biases [outputs, row], each `repeats` times but for a last
  // one that `row` cuts. Returns a sum of `Lost`.
  int (*groups)(const void* scales, DType from, const ZeroPoints& zeros, int64_t groups, int64_t outputs,
                int64_t repeats, void* out_scales, void* out_biases, int64_t row, DType dtype);
};

extern const Repack kRepackScalar, kRepackAvx2, kRepackAvx512;

}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_REPACK_H_
