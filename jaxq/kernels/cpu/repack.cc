#define JAXQ_ISA repack_scalar
#define JAXQ_REPACK kRepackScalar
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "isas.h"
#include "repack-inl.h"

namespace {

using jaxq::cpu::BlockType;
using jaxq::cpu::DType;

// The best table that this CPU can run, plain code in the end; for the tests, the one after so many better ones.
const jaxq::cpu::Repack& Get(int skip) {
#ifdef JAXQ_REPACK_AVX512
  static const bool avx512 = jaxq::cpu::MissingAvx512Vnni() == nullptr;
  if (avx512 && skip-- == 0) return jaxq::cpu::kRepackAvx512;
#endif
#ifdef JAXQ_REPACK_AVX2
  static const bool avx2 = jaxq::cpu::MissingAvx2() == nullptr;
  if (avx2 && skip-- == 0) return jaxq::cpu::kRepackAvx2;
#endif
  static_cast<void>(skip);
  return jaxq::cpu::kRepackScalar;
}

// Null where there is no such type, of these sizes.
const BlockType* Find(int skip, const char* type, int bytes, int weights, int bits, int group_size) {
  const jaxq::cpu::Repack& table = Get(skip);
  for (int i = 0; i < table.type_count; ++i) {
    const BlockType& row = table.types[i];
    if (std::strcmp(row.name, type) == 0)
      return row.bytes == bytes && row.weights == weights && row.bits == bits && row.group_size == group_size ? &row
                                                                                                             : nullptr;
  }
  return nullptr;
}

// bytes[size] from `offset` of a file on. Returns how many were read, fewer where the file ends; -errno where it can't
// be read.
int64_t Read(int file, int64_t offset, uint8_t* bytes, int64_t size) {
  int64_t done = 0;
  while (done < size) {
    const ssize_t got = pread(file, bytes + done, static_cast<size_t>(size - done), static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -errno;
    if (got == 0) break;
    done += got;
  }
  return done;
}

// use(rows, first, count) for rows[count] from the first on, at most `batch` of them at a time, until all `rows` of a
// file were. Returns as `Read`, in whole rows. A batch is in the caches when it is used. The loop is not in Python,
// whose threads would wait for each other between the batches.
template <typename Use>
int64_t ForRows(int file, int64_t offset, int64_t row_bytes, int64_t rows, int64_t batch, Use&& use) {
  if (batch > rows) batch = rows;
  auto* buffer = static_cast<uint8_t*>(std::malloc(static_cast<size_t>(batch * row_bytes)));
  if (buffer == nullptr && rows > 0) return -ENOMEM;
  int64_t done = 0, error = 0;
  while (done < rows) {
    const int64_t due = rows - done < batch ? rows - done : batch;
    const int64_t got = Read(file, offset + done * row_bytes, buffer, due * row_bytes);
    if (got < due * row_bytes) {
      error = got < 0 ? got : 0;
      break;
    }
    use(buffer, done, due);
    done += due;
  }
  std::free(buffer);
  return error < 0 ? error : done;
}

}  // namespace

// For ctypes; jaxq/kernels/repack.py checks every size.
extern "C" {
// 0: done; 1: a finite scale or bias became infinite; -1: no such type, of these sizes. dtype: kernels.h's DType.
__attribute__((visibility("default"))) int jaxq_repack_blocks(int skip, const char* type, int bytes, int weights,
                                                              int bits, int group_size, const void* blocks,
                                                              int64_t count, void* packed, void* scales, void* biases,
                                                              int dtype) {
  const BlockType* found = Find(skip, type, bytes, weights, bits, group_size);
  if (found == nullptr) return -1;
  const bool fit = found->repack(static_cast<const uint8_t*>(blocks), count, static_cast<uint8_t*>(packed), scales,
                                 biases, static_cast<DType>(dtype));
  return fit ? 0 : 1;
}

// The same of blocks in a file, `batch` at a time. Returns how many blocks were repacked, fewer where the file ends;
// -errno where it can't be read. outcome: what jaxq_repack_blocks returns.
__attribute__((visibility("default"))) int64_t jaxq_repack_file_blocks(
    int skip, const char* type, int bytes, int weights, int bits, int group_size, int file, int64_t offset,
    int64_t count, int64_t batch, void* packed, void* scales, void* biases, int dtype, int* outcome) {
  const BlockType* found = Find(skip, type, bytes, weights, bits, group_size);
  *outcome = found == nullptr ? -1 : 0;
  if (found == nullptr) return 0;
  const auto as = static_cast<DType>(dtype);
  const int64_t words = weights / 8 * bits, floats = weights / group_size * jaxq::cpu::SizeOf(as);
  return ForRows(file, offset, bytes, count, batch, [&](const uint8_t* blocks, int64_t first, int64_t some) {
    const auto at = [first](void* array, int64_t each) {
      return array == nullptr ? nullptr : static_cast<uint8_t*>(array) + first * each;
    };
    if (!found->repack(blocks, some, at(packed, words), at(scales, floats), at(biases, floats), as)) *outcome = 1;
  });
}

__attribute__((visibility("default"))) void jaxq_repack_transpose(int skip, const void* words, int64_t rows,
                                                                  int64_t columns, void* out, int64_t stride) {
  Get(skip).transpose(static_cast<const uint32_t*>(words), rows, columns, static_cast<uint32_t*>(out), stride);
}

__attribute__((visibility("default"))) void jaxq_repack_awq(int skip, const void* words, int64_t rows,
                                                            int64_t columns, void* out, int64_t stride) {
  Get(skip).awq(static_cast<const uint32_t*>(words), rows, columns, static_cast<uint32_t*>(out), stride);
}

// The same of words in a file, `batch` rows at a time, a multiple of 8 for AWQ, whose rows stand by eights. Returns how
// many of its rows were done, fewer where the file ends; -errno where it can't be read.
__attribute__((visibility("default"))) int64_t jaxq_repack_file_words(int skip, int awq, int file, int64_t offset,
                                                                      int64_t rows, int64_t columns, int64_t batch,
                                                                      void* out, int64_t stride) {
  const auto repack = awq ? Get(skip).awq : Get(skip).transpose;
  const int64_t each = awq ? 8 : 1;
  return ForRows(file, offset, columns * 4, rows, batch, [&](const uint8_t* words, int64_t first, int64_t some) {
    repack(reinterpret_cast<const uint32_t*>(words), some / each, columns, static_cast<uint32_t*>(out) + first / each,
           stride);
  });
}

// Returns a sum of `Lost`.
__attribute__((visibility("default"))) int jaxq_repack_groups(int skip, const void* scales, int from,
                                                              const void* zeros, int bits, int awq, int less,
                                                              int64_t groups, int64_t outputs, int64_t repeats,
                                                              void* out_scales, void* out_biases, int64_t row,
                                                              int dtype) {
  const jaxq::cpu::ZeroPoints points = {static_cast<const uint8_t*>(zeros), bits, awq != 0,
                                        static_cast<unsigned int>(less)};
  return Get(skip).groups(scales, static_cast<DType>(from), points, groups, outputs, repeats, out_scales, out_biases,
                          row, static_cast<DType>(dtype));
}
}
