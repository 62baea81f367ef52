// What check_kernels.cc makes its cases of: guarded memory, random weights with their float64 values, worker threads.
// Number formats are decoded here anew, with ldexp: nothing is shared with the kernels.
#ifndef JAXQ_KERNELS_CPU_SCRIPTS_CHECK_KERNELS_H_
#define JAXQ_KERNELS_CPU_SCRIPTS_CHECK_KERNELS_H_

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../dispatch.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define JAXQ_POISON ASAN_POISON_MEMORY_REGION
#define JAXQ_UNPOISON ASAN_UNPOISON_MEMORY_REGION
#else
#define JAXQ_POISON(at, size)
#define JAXQ_UNPOISON(at, size)
#endif

namespace jaxq::cpu::check {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t Bits() {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return state_ * 0x2545f4914f6cdd1du >> 16;
  }
  double Uniform(double low, double high) {
    return low + (high - low) * static_cast<double>(Bits() & 0xffffffff) * 0x1p-32;
  }
  double Normal() {  // the sum of 12 uniform numbers
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += Uniform(0, 1);
    return sum;
  }

 private:
  uint64_t state_;
};

// Memory beside a page without access: it ends where that begins, or begins where it ends. What is left of its own
// pages must stay as it is, and AddressSanitizer is told that nobody has business there.
class Guarded {
 public:
  enum class Place { kBefore, kAfter };  // the page

  explicit Guarded(int64_t bytes, Place place = Place::kBefore) {
    const int64_t page = sysconf(_SC_PAGESIZE), body = (bytes + page - 1) / page * page;
    size_ = static_cast<size_t>(body + 2 * page);
    void* base = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) std::abort();
    base_ = static_cast<uint8_t*>(base);
    for (uint8_t* guard : {base_, base_ + page + body})
      if (mprotect(guard, static_cast<size_t>(page), PROT_NONE) != 0) std::abort();
    rest_size_ = static_cast<size_t>(body - bytes);
    const bool ends = place == Place::kBefore;
    data_ = base_ + page + (ends ? body - bytes : 0), rest_ = base_ + page + (ends ? 0 : bytes);
    JAXQ_POISON(rest_, rest_size_);
  }
  ~Guarded() {
    JAXQ_UNPOISON(rest_, rest_size_);
    for (size_t i = 0; i < rest_size_; ++i) {
      if (rest_[i] == 0) continue;
      std::fprintf(stderr, "FAILED: a write outside of a buffer\n");
      std::abort();
    }
    munmap(base_, size_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  uint8_t* get() const { return data_; }

 private:
  uint8_t *base_, *data_, *rest_;
  size_t size_, rest_size_;
};

inline double DecodeMini(uint32_t code, int exponent_bits, int mantissa_bits, int bias) {
  const int mantissa = static_cast<int>(code & ((1u << mantissa_bits) - 1));
  const int exponent = static_cast<int>(code >> mantissa_bits & ((1u << exponent_bits) - 1));
  const double size = exponent ? std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)
                               : std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return code >> (mantissa_bits + exponent_bits) & 1 ? -size : size;
}

inline double Decode(DType dtype, const uint8_t* base, int64_t index) {
  if (dtype == DType::kF32) {
    float value;
    std::memcpy(&value, base + 4 * index, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, base + 2 * index, 2);
  const int mantissa_bits = dtype == DType::kF16 ? 10 : 7, exponent_bits = 15 - mantissa_bits;
  const uint32_t infinity = ((1u << exponent_bits) - 1) << mantissa_bits;
  if ((half & infinity) == infinity) return half & (infinity ^ 0x7fff) ? NAN : half & 0x8000 ? -INFINITY : INFINITY;
  return DecodeMini(half, exponent_bits, mantissa_bits, (1 << (exponent_bits - 1)) - 1);
}

// Cuts a float's mantissa off until the dtype holds it; big and small values are the caller's care.
inline void Encode(DType dtype, uint8_t* base, int64_t index, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == DType::kF32) {
    std::memcpy(base + 4 * index, &bits, 4);
    return;
  }
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (dtype == DType::kF16) {
    const uint32_t magnitude = bits & 0x7fffffff;
    half = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (magnitude >= 0x47800000)
      half = static_cast<uint16_t>(half | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
    else if (magnitude >= 0x38800000)
      half = static_cast<uint16_t>(half | (magnitude - 0x38000000) >> 13);
  }
  std::memcpy(base + 2 * index, &half, 2);
}

// Random floats of a dtype and their values.
struct Floats {
  DType dtype;
  Guarded data;
  std::vector<double> values;

  Floats(Random* random, DType dtype_, int64_t count, bool awkward = false)
      : dtype(dtype_), data(count * SizeOf(dtype_)), values(static_cast<size_t>(count)) {
    for (int64_t i = 0; i < count; ++i) {
      double value = random->Normal();
      if (awkward && i / 256 % 4 == 1) value = std::floor(value * 4) / 4;
      if (awkward && i / 256 % 4 == 2) value = std::fabs(value) * (i / 1024 % 2 ? 1e-3 : -30);
      if (awkward && i / 512 % 8 == 7) value = i / 256 % 2 ? 0 : -0.75;
      Put(i, static_cast<float>(value));
    }
  }
  void Put(int64_t index, float value) {
    Encode(dtype, data.get(), index, value);
    values[static_cast<size_t>(index)] = Decode(dtype, data.get(), index);
  }
  void Spike(float factor, int64_t step) {
    for (size_t i = 0; i < values.size(); i += static_cast<size_t>(step))
      Put(static_cast<int64_t>(i), static_cast<float>(values[i] * factor));
  }
};

// A random weight, packed, with its values and |scale*code| + |bias|.
struct Weights {
  DType scale_dtype;
  Guarded packed, scales, biases;
  std::vector<double> values, sizes;

  Weights(Random* random, const Format& format, int64_t rows, int64_t length, DType dtype)
      : scale_dtype(format.affine() ? dtype : DType::kU8),
        packed(rows * length / 8 * format.bits),
        scales(rows * length / format.group_size * SizeOf(scale_dtype)),
        biases(rows * length / format.group_size * SizeOf(scale_dtype)) {
    for (int64_t group = 0; group < rows * length / format.group_size; ++group) {
      const Scale scale = MakeScale(random, format, group);
      for (int i = 0; i < format.group_size; ++i) {
        const int64_t at = group * format.group_size + i;
        const double value = MakeCode(random, format, at);
        values.push_back(scale.scale * value + scale.bias);
        sizes.push_back(std::fabs(scale.scale * value) + std::fabs(scale.bias));
      }
    }
  }

 private:
  struct Scale {
    double scale, bias;
  };
  Scale MakeScale(Random* random, const Format& format, int64_t group) {
    if (format.affine()) {
      const int top = (1 << format.bits) - 1;
      Encode(scale_dtype, scales.get(), group, static_cast<float>(random->Uniform(0.5, 1.5) / (top + 1)));
      const double scale = Decode(scale_dtype, scales.get(), group);
      Encode(scale_dtype, biases.get(), group, static_cast<float>(-scale * top / 2 * random->Uniform(0.8, 1.2)));
      return {scale, Decode(scale_dtype, biases.get(), group)};
    }
    const bool e4m3 = format.mode == Mode::kNvfp4;
    const int code = static_cast<int>(random->Uniform(e4m3 ? 40 : 118, e4m3 ? 72 : 130));
    scales.get()[group] = static_cast<uint8_t>(code);
    return {e4m3 ? DecodeMini(static_cast<uint32_t>(code), 4, 3, 7) : std::ldexp(1, code - 127), 0};
  }
  double MakeCode(Random* random, const Format& format, int64_t at) {
    uint32_t code = static_cast<uint32_t>(random->Bits()) & ((1u << format.bits) - 1);
    if (format.mode == Mode::kMxfp8 && (code & 127) == 127) --code;  // not a number
    for (int bit = 0; bit < format.bits; ++bit) {
      const int64_t place = at * format.bits + bit;
      packed.get()[place / 8] = static_cast<uint8_t>(packed.get()[place / 8] | (code >> bit & 1) << place % 8);
    }
    if (format.affine()) return code;
    return format.mode == Mode::kMxfp8 ? DecodeMini(code, 4, 3, 7) : DecodeMini(code, 2, 1, 1);
  }
};

// Rounding once to a dtype: half a unit in the last place.
struct Rounding {
  double relative, absolute;
};
inline Rounding RoundingOf(DType dtype) {
  if (dtype == DType::kF32) return {0x1p-24, 0x1p-149};
  return dtype == DType::kF16 ? Rounding{0x1p-11, 0x1p-25} : Rounding{0x1p-8, 0x1p-133};
}

// |got - want| as a fraction of its bound; infinite for a NaN.
inline double Ratio(double got, double want, double bound) {
  const double error = std::fabs(got - want);
  return error <= bound || error > bound ? error / bound : INFINITY;
}

// The worst ratio of y against x by w in float64; `sizes` are Weights', bounds those of tests/test_cpu_kernels.py.
inline double WorstProduct(bool transpose, int64_t M, int64_t N, int64_t K, const double* x, const double* w,
                           const double* sizes, DType dtype, const uint8_t* y) {
  const int64_t inner = transpose ? K : N, outer = transpose ? N : K;
  const Rounding rounding = RoundingOf(dtype);
  double worst = 0;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t o = 0; o < outer; ++o) {
      double want = 0, terms = 0;
      for (int64_t i = 0; i < inner; ++i) {
        const int64_t at = transpose ? o * K + i : i * K + o;
        want += x[m * inner + i] * w[at];
        terms += std::fabs(x[m * inner + i]) * sizes[at];
      }
      const double bound = (inner + 8) * 0x1p-24 * terms + rounding.relative * std::fabs(want) + rounding.absolute;
      worst = std::fmax(worst, Ratio(Decode(dtype, y, m * outer + o), want, bound));
    }
  }
  return worst;
}

inline double WorstDequantized(const std::vector<double>& w, const std::vector<double>& sizes, DType dtype,
                               const uint8_t* out) {
  const Rounding rounding = RoundingOf(dtype);
  double worst = 0;
  for (size_t i = 0; i < w.size(); ++i) {
    const double bound = 2 * 0x1p-24 * sizes[i] + rounding.relative * std::fabs(w[i]) + rounding.absolute;
    worst = std::fmax(worst, Ratio(Decode(dtype, out, static_cast<int64_t>(i)), w[i], bound));
  }
  return worst;
}

class Threads final : public Parallel {
 public:
  explicit Threads(int count) : count_(count) {}
  int slots() const override { return count_; }
  void Run(int64_t tasks, Task task, void* context) const override {
    std::atomic<int64_t> next{0};
    std::vector<std::thread> threads;
    const auto work = [&](int slot) {
      for (int64_t i; (i = next.fetch_add(1)) < tasks;) task(context, i, slot);
    };
    for (int slot = 1; slot < count_ && slot < tasks; ++slot) threads.emplace_back(work, slot);
    work(0);
    for (std::thread& thread : threads) thread.join();
  }

 private:
  int count_;
};

struct Case {
  Format format;
  int64_t M, N, K;
  bool transpose;
  DType x_dtype, scale_dtype;
  uint64_t seed;
};

inline std::string FormatName(const Format& format) {
  const char* modes[] = {"affine", "mxfp4", "mxfp8", "nvfp4"};
  return std::string(modes[static_cast<int>(format.mode)]) + " " + std::to_string(format.bits) + " bits in groups of " +
         std::to_string(format.group_size);
}

inline std::vector<Format> Formats() {
  std::vector<Format> formats;
  for (int bits : {2, 3, 4, 5, 6, 8})
    for (int group : {16, 32, 64, 128}) formats.push_back({Mode::kAffine, bits, group});
  formats.push_back({Mode::kMxfp4, 4, 32});
  formats.push_back({Mode::kMxfp8, 8, 32});
  formats.push_back({Mode::kNvfp4, 4, 16});
  return formats;
}

// Whole groups in whole words.
inline int64_t Step(const Format& format) {
  return format.group_size * format.bits % 32 ? 2 * format.group_size : format.group_size;
}

// One case in `step`, spread evenly over every property of the cases.
inline bool Chosen(uint64_t seed, int64_t step) { return Random(seed).Bits() % static_cast<uint64_t>(step) == 0; }

// Every format with every pair of dtypes, and tails in every direction; then every regime of M.
inline std::vector<Case> MatmulCases(bool quick) {
  const DType dtypes[] = {DType::kF32, DType::kF16, DType::kBF16};
  const int64_t sizes[][3] = {{1, 33, 1}, {2, 7, 3}, {5, 40, 5}, {19, 70, 2}, {9, 17, 9}, {35, 50, 7}, {193, 34, 3}};
  std::vector<Case> cases;
  uint64_t seed = 0;
  for (const Format& format : Formats())
    for (bool transpose : {true, false})
      for (DType x : dtypes)
        for (DType scale : dtypes) {
          if (!format.affine() && scale != DType::kF32) continue;
          for (const auto& size : sizes)
            if (Chosen(++seed, quick ? 24 : 1))
              cases.push_back({format, size[0], size[1], size[2] * Step(format), transpose, x, scale, seed});
        }
  for (int64_t M : {1, 2, 3, 4, 5, 6, 8, 9, 13, 16, 17, 32, 48, 49, 64, 65, 130}) {
    for (bool transpose : {true, false}) {
      if (quick && !Chosen(++seed, 6)) continue;
      for (DType x : dtypes) cases.push_back({{Mode::kAffine, 4, 64}, M, 150, 1344, transpose, x, x, ++seed});
      cases.push_back({{Mode::kAffine, 3, 32}, M, 97, 1056, transpose, DType::kF32, DType::kF16, ++seed});
      cases.push_back({{Mode::kAffine, 8, 128}, M, 61, 1152, transpose, DType::kF16, DType::kBF16, ++seed});
      cases.push_back({{Mode::kMxfp8, 8, 32}, M, 97, 1056, transpose, DType::kBF16, DType::kF32, ++seed});
    }
  }
  // More groups, and more rows, than any kernel takes at once.
  for (bool transpose : {true, false}) {
    for (int64_t M : {1, 4, 20, 40})
      cases.push_back({{Mode::kAffine, 4, 32}, M, 40, 2112, transpose, DType::kBF16, DType::kF32, ++seed});
    for (DType x : dtypes) cases.push_back({{Mode::kAffine, 4, 64}, 70, 700, 1216, transpose, x, DType::kBF16, ++seed});
    cases.push_back({{Mode::kAffine, 4, 64}, 530, 144, 128, transpose, DType::kF32, DType::kF32, ++seed});
    cases.push_back({{Mode::kAffine, 4, 64}, 530, 144, 128, transpose, DType::kBF16, DType::kF32, ++seed});
    cases.push_back({{Mode::kAffine, 4, 64}, 530, 40, 1152, transpose, DType::kBF16, DType::kBF16, ++seed});
  }
  return cases;
}

inline std::vector<Case> ConvertCases(bool quick) {
  std::vector<Case> cases;
  uint64_t seed = 1000;
  for (const Format& format : Formats())
    for (DType x : {DType::kF32, DType::kF16, DType::kBF16})
      for (DType scale : {DType::kF32, DType::kF16, DType::kBF16})
        if ((format.affine() || scale == DType::kF32) && Chosen(++seed, quick ? 3 : 1))
          cases.push_back({format, 0, 7, 5 * Step(format), true, x, scale, seed});
  return cases;
}

}  // namespace jaxq::cpu::check

#endif  // JAXQ_KERNELS_CPU_SCRIPTS_CHECK_KERNELS_H_
