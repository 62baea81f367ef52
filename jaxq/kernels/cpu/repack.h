// From the layouts of checkpoints to packed words, scales and biases: see jaxq/kernels/repack.py for what callers owe.
//
// Plain loops, compiled once for every CPU and once for AVX2; both make the same bits. One file's functions stand in a
// table, so that the choice is made in one place, repack.cc.
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

struct Repack {
  const BlockType* types;
  int type_count;
  // words[rows, columns] -> out[columns, rows], whose rows begin `stride` words apart.
  void (*transpose)(const uint32_t* words, int64_t rows, int64_t columns, uint32_t* out, int64_t stride);
  // AWQ's words[8 * rows, columns] -> out[8 * columns, rows], whose rows begin `stride` words apart.
  void (*awq)(const uint32_t* words, int64_t rows, int64_t columns, uint32_t* out, int64_t stride);
};

extern const Repack kRepackScalar, kRepackAvx2;

}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_REPACK_H_
