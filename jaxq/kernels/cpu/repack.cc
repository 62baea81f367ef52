#define JAXQ_ISA repack_scalar
#define JAXQ_REPACK kRepackScalar
#include <cstring>

#include "isas.h"
#include "repack-inl.h"

namespace {

using jaxq::cpu::DType;

const jaxq::cpu::Repack& Best() {
#ifdef JAXQ_REPACK_AVX2
  static const bool avx2 = jaxq::cpu::MissingAvx2() == nullptr;
  if (avx2) return jaxq::cpu::kRepackAvx2;
#endif
  return jaxq::cpu::kRepackScalar;
}

// `portable`: as a CPU would run it that has nothing beyond the baseline; for the tests.
const jaxq::cpu::Repack& Get(int portable) { return portable ? jaxq::cpu::kRepackScalar : Best(); }

}  // namespace

// For ctypes; jaxq/kernels/repack.py checks every size.
extern "C" {
// 0: done; 1: a finite scale or bias became infinite; -1: no such type, of these sizes. dtype: kernels.h's DType.
__attribute__((visibility("default"))) int jaxq_repack_blocks(int portable, const char* type, int bytes, int weights,
                                                              int bits, int group_size, const void* blocks,
                                                              int64_t count, void* packed, void* scales, void* biases,
                                                              int dtype) {
  const jaxq::cpu::Repack& table = Get(portable);
  for (int i = 0; i < table.type_count; ++i) {
    const jaxq::cpu::BlockType& row = table.types[i];
    if (std::strcmp(row.name, type) != 0) continue;
    if (row.bytes != bytes || row.weights != weights || row.bits != bits || row.group_size != group_size) return -1;
    const bool fit = row.repack(static_cast<const uint8_t*>(blocks), count, static_cast<uint8_t*>(packed), scales,
                                biases, static_cast<DType>(dtype));
    return fit ? 0 : 1;
  }
  return -1;
}

__attribute__((visibility("default"))) void jaxq_repack_transpose(int portable, const void* words, int64_t rows,
                                                                  int64_t columns, void* out, int64_t stride) {
  Get(portable).transpose(static_cast<const uint32_t*>(words), rows, columns, static_cast<uint32_t*>(out), stride);
}

__attribute__((visibility("default"))) void jaxq_repack_awq(int portable, const void* words, int64_t rows,
                                                            int64_t columns, void* out, int64_t stride) {
  Get(portable).awq(static_cast<const uint32_t*>(words), rows, columns, static_cast<uint32_t*>(out), stride);
}

// Returns a sum of `Lost`.
__attribute__((visibility("default"))) int jaxq_repack_groups(int portable, const void* scales, int from,
                                                              const void* zeros, int bits, int awq, int less,
                                                              int64_t groups, int64_t outputs, int64_t repeats,
                                                              void* out_scales, void* out_biases, int64_t row,
                                                              int dtype) {
  const jaxq::cpu::ZeroPoints points = {static_cast<const uint8_t*>(zeros), bits, awq != 0,
                                        static_cast<unsigned int>(less)};
  return Get(portable).groups(scales, static_cast<DType>(from), points, groups, outputs, repeats, out_scales,
                              out_biases, row, static_cast<DType>(dtype));
}
}
