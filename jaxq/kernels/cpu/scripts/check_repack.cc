// Runs the repacking of checkpoints' words and blocks on memory of exact sizes, without Python: the functions of every
// instruction set of this CPU against the portable ones, bit for bit, and the transpositions against plain loops.
// (That the portable ones are right, tests/checkpoints/test_repack.py holds against NumPy.)

#include "../repack.h"

#include "check_kernels.h"

using namespace jaxq::cpu;
using namespace jaxq::cpu::check;

extern "C" {
int jaxq_repack_blocks(int, const char*, int, int, int, int, const void*, int64_t, void*, void*, void*, int);
void jaxq_repack_transpose(int, const void*, int64_t, int64_t, void*, int64_t);
void jaxq_repack_awq(int, const void*, int64_t, int64_t, void*, int64_t);
int jaxq_repack_groups(int, const void*, int, const void*, int, int, int, int64_t, int64_t, int64_t, void*, void*,
                       int64_t, int);
int64_t jaxq_repack_file_blocks(int, const char*, int, int, int, int, int, int64_t, int64_t, int64_t, void*, void*,
                                void*, int, int*);
int64_t jaxq_repack_file_words(int, int, int, int64_t, int64_t, int64_t, int64_t, void*, int64_t);
}

namespace {

// How many of the best instruction sets are passed over: the last one leaves the portable functions on any CPU.
constexpr int kSkips = 3, kPortable = kSkips - 1;

int failures = 0;
void Fail(const char* what, int64_t a, int64_t b, int c) {
  if (++failures <= 20) std::printf("FAILED repack: %s, %lld, %lld, %d\n", what, (long long)a, (long long)b, c);
}

void Fill(Random* random, const Guarded& memory, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) memory.get()[i] = static_cast<uint8_t>(random->Bits());
}

// The same bits, or both not numbers: those keep no payload.
bool SameFloats(DType dtype, const uint8_t* a, const uint8_t* b, int64_t count) {
  if (dtype == DType::kU8) return std::memcmp(a, b, static_cast<size_t>(count)) == 0;
  for (int64_t i = 0; i < count; ++i)
    if (std::memcmp(a + i * SizeOf(dtype), b + i * SizeOf(dtype), static_cast<size_t>(SizeOf(dtype))) != 0 &&
        !(std::isnan(Decode(dtype, a, i)) && std::isnan(Decode(dtype, b, i))))
      return false;
  return true;
}

// Blocks of random bits, so that every kind of number stands in them. `place`: which side of a buffer is guarded by a
// page.
void CheckBlocks(const BlockType& type, int64_t count, DType dtype, Guarded::Place place) {
  Random random(static_cast<uint64_t>(count) + 1);
  const int64_t weights = count * type.weights, groups = weights / type.group_size;
  const int64_t packed_bytes = weights / 8 * type.bits, scale_bytes = groups * SizeOf(dtype);
  const bool affine = dtype != DType::kU8;
  const Guarded blocks(count * type.bytes, place);
  Fill(&random, blocks, count * type.bytes);
  const auto run = [&](int skip, const Guarded& packed, const Guarded& scales, const Guarded& biases) {
    return jaxq_repack_blocks(skip, type.name, type.bytes, type.weights, type.bits, type.group_size, blocks.get(),
                              count, packed.get(), scales.get(), affine ? biases.get() : nullptr,
                              static_cast<int>(dtype));
  };
  const Guarded want(packed_bytes, place), want_scales(scale_bytes, place), want_biases(scale_bytes, place);
  const int want_fits = run(kPortable, want, want_scales, want_biases);
  for (int skip = 0; skip < kPortable; ++skip) {
    const Guarded packed(packed_bytes, place), scales(scale_bytes, place), biases(scale_bytes, place);
    const int fits = run(skip, packed, scales, biases);
    if (fits < 0 || fits != want_fits ||
        std::memcmp(packed.get(), want.get(), static_cast<size_t>(packed_bytes)) != 0 ||
        !SameFloats(dtype, scales.get(), want_scales.get(), groups) ||
        (affine && !SameFloats(dtype, biases.get(), want_biases.get(), groups)))
      Fail(type.name, count, fits, static_cast<int>(dtype));
  }
  if (jaxq_repack_blocks(0, type.name, type.bytes + 1, type.weights, type.bits, type.group_size, nullptr, count,
                         nullptr, nullptr, nullptr, static_cast<int>(dtype)) != -1)
    Fail("blocks of another size were taken", count, 0, 0);
}

uint32_t WordAt(const Guarded& words, int64_t index) {
  uint32_t word;
  std::memcpy(&word, words.get() + 4 * index, 4);
  return word;
}

// `gap` words between the rows of the result, which are of others and must stay as they are.
void CheckTranspose(int skip, int64_t rows, int64_t columns, int64_t gap) {
  Random random(static_cast<uint64_t>(rows * 1000 + columns) + 1);
  const int64_t stride = rows + gap, size = (columns - 1) * stride + rows;
  const Guarded words(rows * columns * 4), out(size * 4);
  Fill(&random, words, rows * columns * 4);
  std::memset(out.get(), 0x77, static_cast<size_t>(size * 4));
  jaxq_repack_transpose(skip, words.get(), rows, columns, out.get(), stride);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t column = i / stride, row = i % stride;
    if (WordAt(out, i) != (row < rows ? WordAt(words, row * columns + column) : 0x77777777u))
      return Fail("transpose", rows, columns, skip);
  }
}

// AWQ: nibble i of a word stands for output kOrder[i] of eight, and a row is one input.
void CheckAwq(int skip, int64_t rows, int64_t columns, int64_t gap) {
  constexpr int kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  Random random(static_cast<uint64_t>(rows * 1000 + columns) + 1);
  const int64_t stride = rows + gap, size = (8 * columns - 1) * stride + rows;
  const Guarded words(8 * rows * columns * 4), out(size * 4);
  Fill(&random, words, 8 * rows * columns * 4);
  std::memset(out.get(), 0x77, static_cast<size_t>(size * 4));
  std::vector<uint32_t> want(static_cast<size_t>(size), 0x77777777u);
  for (int64_t output = 0; output < 8 * columns; ++output)
    for (int64_t row = 0; row < rows; ++row) want[static_cast<size_t>(output * stride + row)] = 0;
  for (int64_t input = 0; input < 8 * rows; ++input)
    for (int64_t column = 0; column < columns; ++column)
      for (int i = 0; i < 8; ++i)
        want[static_cast<size_t>((8 * column + kOrder[i]) * stride + input / 8)] |=
            (WordAt(words, input * columns + column) >> 4 * i & 15) << input % 8 * 4;
  jaxq_repack_awq(skip, words.get(), rows, columns, out.get(), stride);
  if (std::memcmp(out.get(), want.data(), static_cast<size_t>(size * 4)) != 0) Fail("awq", rows, columns, skip);
}

// GPTQ's and AWQ's scales and zero points. `cut`: how many of the last group's copies there is no place for.
void CheckGroups(DType from, DType to, int bits, bool awq, int64_t groups, int64_t outputs, int64_t repeats,
                 int64_t cut) {
  Random random(static_cast<uint64_t>(groups * 1000 + outputs) + 1);
  const int64_t row = groups * repeats - cut, words = groups * outputs * bits / 32;
  const Guarded scales(groups * outputs * SizeOf(from)), zeros(words * 4);
  Fill(&random, scales, groups * outputs * SizeOf(from));
  Fill(&random, zeros, words * 4);
  const int64_t bytes = outputs * row * SizeOf(to);
  const auto run = [&](int skip, const Guarded& out, const Guarded& biases) {
    return jaxq_repack_groups(skip, scales.get(), static_cast<int>(from), zeros.get(), bits, awq, awq ? 0 : 1, groups,
                              outputs, repeats, out.get(), biases.get(), row, static_cast<int>(to));
  };
  const Guarded want(bytes), want_biases(bytes);
  const int want_lost = run(kPortable, want, want_biases);
  for (int skip = 0; skip < kPortable; ++skip) {
    const Guarded out(bytes), biases(bytes);
    if (run(skip, out, biases) != want_lost || !SameFloats(to, out.get(), want.get(), outputs * row) ||
        !SameFloats(to, biases.get(), want_biases.get(), outputs * row))
      Fail("groups", groups, outputs, bits);
  }
}

int64_t CheckAllGroups() {
  int64_t cases = 0;
  const DType floats[] = {DType::kF32, DType::kF16, DType::kBF16};
  for (DType from : floats)
    for (DType to : floats)
      for (int bits : {2, 3, 4, 8})
        for (bool awq : {false, true})
          for (int64_t groups : {1, 2, 7, 16, 33})
            for (int64_t outputs : {32, 64, 96, 544})
              for (int64_t repeats : {1, 2, 4}) {
                if (awq && bits != 4) continue;
                CheckGroups(from, to, bits, awq, groups, outputs, repeats, 0);
                if (repeats > 1) CheckGroups(from, to, bits, awq, groups, outputs, repeats, 1);
                cases += repeats > 1 ? 2 : 1;
              }
  return cases;
}

// A file with `bytes` of these from byte 3 on, open.
std::FILE* FileOf(const Guarded& memory, int64_t bytes) {
  std::FILE* file = std::tmpfile();
  if (file == nullptr || std::fwrite("abc", 1, 3, file) != 3 ||
      std::fwrite(memory.get(), 1, static_cast<size_t>(bytes), file) != static_cast<size_t>(bytes) ||
      std::fflush(file) != 0) {
    std::printf("no temporary file\n");
    std::exit(1);
  }
  return file;
}

// Blocks and words from files, in batches, against those from memory.
int64_t CheckFiles() {
  int64_t cases = 0;
  Random random(1);
  for (int64_t batch : {1, 7, 8, 64, 1000}) {
    const Guarded blocks(50 * 34), packed[2] = {Guarded(50 * 32), Guarded(50 * 32)};
    const Guarded scales[2] = {Guarded(100), Guarded(100)}, biases[2] = {Guarded(100), Guarded(100)};
    Fill(&random, blocks, 50 * 34);
    jaxq_repack_blocks(0, "Q8_0", 34, 32, 8, 32, blocks.get(), 50, packed[0].get(), scales[0].get(),
                       biases[0].get(), 1);
    std::FILE* file = FileOf(blocks, 50 * 34);
    int outcome = 7;
    const int64_t done = jaxq_repack_file_blocks(0, "Q8_0", 34, 32, 8, 32, fileno(file), 3, 50, batch, packed[1].get(),
                                                 scales[1].get(), biases[1].get(), 1, &outcome);
    std::fclose(file);
    if (done != 50 || outcome < 0 || std::memcmp(packed[0].get(), packed[1].get(), 50 * 32) != 0 ||
        !SameFloats(DType::kF16, scales[0].get(), scales[1].get(), 50) ||
        !SameFloats(DType::kF16, biases[0].get(), biases[1].get(), 50))
      Fail("blocks of a file", batch, done, outcome);
    ++cases;
  }
  for (int awq : {0, 1})
    for (int64_t batch : {8, 16, 128, 1000}) {
      const int64_t rows = 72, columns = 20, bytes = rows * columns * 4;
      const Guarded words(bytes), out[2] = {Guarded(bytes), Guarded(bytes)};
      Fill(&random, words, bytes);
      if (awq)
        jaxq_repack_awq(0, words.get(), rows / 8, columns, out[0].get(), rows / 8);
      else
        jaxq_repack_transpose(0, words.get(), rows, columns, out[0].get(), rows);
      std::FILE* file = FileOf(words, bytes);
      const int64_t done = jaxq_repack_file_words(0, awq, fileno(file), 3, rows, columns, batch, out[1].get(),
                                                  awq ? rows / 8 : rows);
      std::fclose(file);
      if (done != rows || std::memcmp(out[0].get(), out[1].get(), static_cast<size_t>(bytes)) != 0)
        Fail("words of a file", batch, done, awq);
      ++cases;
    }
  return cases;
}

}  // namespace

int main() {
  int64_t cases = 0;
  const Repack& table = kRepackScalar;
  for (int i = 0; i < table.type_count; ++i) {
    const BlockType& type = table.types[i];
    const bool affine = std::strcmp(type.name, "MXFP4") != 0;  // the only one whose scales are bytes
    // Around the strips that it works in, of 2048 weights, and ends of every length behind them.
    const int64_t strip = 2048 / type.weights;
    for (int64_t count : {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{3}, strip - 1, strip, strip + 1, 2 * strip + 3})
      for (int dtype = affine ? 0 : 3; dtype < (affine ? 3 : 4); ++dtype)
        for (Guarded::Place place : {Guarded::Place::kBefore, Guarded::Place::kAfter})
          CheckBlocks(type, count, static_cast<DType>(dtype), place), ++cases;
  }
  for (int skip = 0; skip < kSkips; ++skip)
    for (int64_t rows : {1, 2, 7, 8, 15, 16, 17, 33, 100})
      for (int64_t columns : {1, 3, 8, 16, 31, 64, 65})
        for (int64_t gap : {0, 5}) {
          CheckTranspose(skip, rows, columns, gap);
          CheckAwq(skip, rows, columns, gap);
          cases += 2;
        }
  cases += CheckAllGroups();
  cases += CheckFiles();
  std::printf("repack: %lld cases %s\n", (long long)cases, failures ? "FAILED" : "ok");
  return failures ? 1 : 0;
}
