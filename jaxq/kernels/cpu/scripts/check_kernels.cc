// Runs every instruction set of the build over a table of cases, without Python: for machines that are only emulated,
// and for instruction sets that are.
//
//   check_kernels [--quick] [--require name,name,...] [--only name]
//
// Matrix products and dequantized weights are held against float64, quantized ones against the bits of `scalar`. Every
// buffer ends where unmapped memory begins, so that a read or a write past an end is a crash. Tolerances are those of
// tests/test_cpu_kernels.py. Exits with 1 after a failure, or when a required instruction set cannot run here.

#include "check_kernels.h"

#include "check_attention.h"

#include <cstdio>
#include <cstdlib>

using namespace jaxq::cpu;
using namespace jaxq::cpu::check;

extern "C" uint64_t jaxq_cpu_isa_calls(int index);

namespace {

int failures = 0;

void Fail(const char* isa, const char* what, const Case& c, double ratio) {
  if (++failures > 20) return;
  std::printf("FAILED %s %s: %s, M=%lld N=%lld K=%lld, %s, x dtype %d, scale dtype %d: %.3g of the bound\n", isa, what,
              FormatName(c.format).c_str(), (long long)c.M, (long long)c.N, (long long)c.K,
              c.transpose ? "transpose" : "plain", (int)c.x_dtype, (int)c.scale_dtype, ratio);
}

double MatmulRatio(int isa, const Case& c, const Parallel& parallel, bool* served) {
  Random random(c.seed);
  const Weights w(&random, c.format, c.N, c.K, c.scale_dtype);
  const int64_t inner = c.transpose ? c.K : c.N, outer = c.transpose ? c.N : c.K;
  const Floats x(&random, c.x_dtype, c.M * inner);
  Guarded y(c.M * outer * SizeOf(c.x_dtype));
  const MatmulArgs args = {
      c.format,       c.transpose,    c.M,           c.N,    c.K, x.data.get(), c.x_dtype, w.packed.get(),
      w.scales.get(), w.biases.get(), w.scale_dtype, y.get()};
  const uint64_t before = jaxq_cpu_isa_calls(isa);
  if (Matmul(isa, args, parallel) != Outcome::kDone) return INFINITY;
  *served = jaxq_cpu_isa_calls(isa) > before;
  return WorstProduct(c.transpose, c.M, c.N, c.K, x.values.data(), w.values.data(), w.sizes.data(), c.x_dtype, y.get());
}

double DequantizeRatio(int isa, const Case& c, const Parallel& parallel) {
  Random random(c.seed);
  const Weights w(&random, c.format, c.N, c.K, c.scale_dtype);
  Guarded out(c.N * c.K * SizeOf(c.x_dtype));
  const DequantizeArgs args = {c.format,       c.N,           c.K,       w.packed.get(), w.scales.get(),
                               w.biases.get(), w.scale_dtype, out.get(), c.x_dtype};
  if (Dequantize(isa, args, parallel) != Outcome::kDone) return INFINITY;
  return WorstDequantized(w.values, w.sizes, c.x_dtype, out.get());
}

// 0 where the bits are those of scalar, else infinite.
double QuantizeRatio(int isa, const Case& c, const Parallel& parallel) {
  Random random(c.seed);
  const Floats w(&random, c.x_dtype, c.N * c.K, /*awkward=*/true);
  const int64_t groups = c.N * c.K / c.format.group_size, bytes = c.N * c.K / 8 * c.format.bits;
  const int64_t scale_bytes = groups * (c.format.affine() ? SizeOf(c.x_dtype) : 1);
  Guarded packed[2] = {Guarded(bytes), Guarded(bytes)}, scales[2] = {Guarded(scale_bytes), Guarded(scale_bytes)};
  Guarded biases[2] = {Guarded(scale_bytes), Guarded(scale_bytes)};
  const int which[2] = {isa, FindIsa("scalar", 6)};
  for (int i = 0; i < 2; ++i) {
    const QuantizeArgs args = {c.format,
                               c.N,
                               c.K,
                               w.data.get(),
                               c.x_dtype,
                               packed[i].get(),
                               scales[i].get(),
                               c.format.affine() ? biases[i].get() : nullptr};
    if (Quantize(which[i], args, parallel) != Outcome::kDone) return INFINITY;
  }
  const bool same = std::memcmp(packed[0].get(), packed[1].get(), bytes) == 0 &&
                    std::memcmp(scales[0].get(), scales[1].get(), scale_bytes) == 0 &&
                    (!c.format.affine() || std::memcmp(biases[0].get(), biases[1].get(), scale_bytes) == 0);
  return same ? 0 : INFINITY;
}

// The error in norm, as a multiple of that of a float32 dot product over the dense weight.
double AccuracyRatio(int isa, const Format& format, bool transpose, int64_t M, const Parallel& parallel,
                     bool outliers) {
  const int64_t outer = 128, inner = 1024, N = transpose ? outer : inner, K = transpose ? inner : outer;
  Random random(11);
  const Weights w(&random, format, N, K, DType::kF32);
  Floats x(&random, DType::kF32, M * inner);
  if (outliers) x.Spike(1000.0f, 97);
  Guarded y(M * outer * 4);
  const MatmulArgs args = {
      format,         transpose,     M,      N, K, x.data.get(), DType::kF32, w.packed.get(), w.scales.get(),
      w.biases.get(), w.scale_dtype, y.get()};
  if (Matmul(isa, args, parallel) != Outcome::kDone) return INFINITY;
  double ours = 0, plain = 0;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t o = 0; o < outer; ++o) {
      double want = 0;
      float sum = 0;  // one rounding after another: the build forbids contraction, and nothing allows reordering
      for (int64_t i = 0; i < inner; ++i) {
        const double left = x.values[m * inner + i], right = w.values[transpose ? o * K + i : i * K + o];
        want += left * right;
        sum = sum + static_cast<float>(left) * static_cast<float>(right);
      }
      ours += std::pow(Decode(DType::kF32, y.get(), m * outer + o) - want, 2), plain += std::pow(sum - want, 2);
    }
  }
  return std::sqrt(ours / plain);
}

// A NaN or an infinity in x reaches its row of y and no other.
bool PassesPoisonOn(int isa, DType dtype, int64_t M, float poison, const Parallel& parallel) {
  Random random(12);
  const Format format = {Mode::kAffine, 4, 64};
  const int64_t N = 40, K = 256;
  const Weights w(&random, format, N, K, DType::kF32);
  Floats x(&random, dtype, M * K);
  x.Put(M / 2 * K + 100, poison);
  Guarded y(M * N * SizeOf(dtype));
  const MatmulArgs args = {
      format,         true,          M,      N, K, x.data.get(), dtype, w.packed.get(), w.scales.get(),
      w.biases.get(), w.scale_dtype, y.get()};
  if (Matmul(isa, args, parallel) != Outcome::kDone) return false;
  for (int64_t i = 0; i < M * N; ++i)
    if (std::isfinite(Decode(dtype, y.get(), i)) == (i / N == M / 2)) return false;
  return true;
}

// The same bits from one worker and from three.
bool Deterministic(int isa, DType dtype, int64_t M) {
  Random random(13);
  const Format format = {Mode::kAffine, 4, 64};
  const int64_t N = 300, K = 512;
  const Weights w(&random, format, N, K, DType::kBF16);
  const Floats x(&random, dtype, M * K);
  const int64_t bytes = M * N * SizeOf(dtype);
  Guarded y[2] = {Guarded(bytes), Guarded(bytes)};
  const Threads one(1), three(3);
  for (int i = 0; i < 2; ++i) {
    const MatmulArgs args = {
        format,         true,          M,         N, K, x.data.get(), dtype, w.packed.get(), w.scales.get(),
        w.biases.get(), w.scale_dtype, y[i].get()};
    if (Matmul(isa, args, i ? static_cast<const Parallel&>(three) : one) != Outcome::kDone) return false;
  }
  return std::memcmp(y[0].get(), y[1].get(), bytes) == 0;
}

void CheckIsa(int isa, bool quick) {
  const char* name = GetIsa(isa).name;
  const Threads parallel(2);
  double worst = 0, worst_dequantize = 0, accuracy = 0;
  int64_t cases = 0, served_cases = 0;
  for (const Case& c : MatmulCases(quick)) {
    bool served = false;
    const double ratio = MatmulRatio(isa, c, parallel, &served);
    if (!(ratio <= 1)) Fail(name, "quantized_matmul", c, ratio);
    worst = std::fmax(worst, ratio), ++cases, served_cases += served;
  }
  if (served_cases == 0 && ++failures) std::printf("FAILED %s: it served no matrix product\n", name);
  for (const Case& c : ConvertCases(quick)) {
    const double ratio = DequantizeRatio(isa, c, parallel);
    if (!(ratio <= 1)) Fail(name, "dequantize", c, ratio);
    worst_dequantize = std::fmax(worst_dequantize, ratio);
    Case same = c;
    same.scale_dtype = c.x_dtype;
    if (QuantizeRatio(isa, same, parallel) != 0) Fail(name, "quantize", c, INFINITY);
  }
  for (int64_t M : {1, 3, 8, 20, 70}) {
    if (quick && M % 20 != 0 && M != 3) continue;
    for (const Format& format :
         {Format{Mode::kAffine, 4, 64}, Format{Mode::kAffine, 8, 128}, Format{Mode::kMxfp4, 4, 32}})
      for (int which = 0; which < 4; ++which)
        accuracy = std::fmax(accuracy, AccuracyRatio(isa, format, which / 2, M, parallel, which % 2));
    for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      if (!Deterministic(isa, dtype, M) && ++failures)
        std::printf("FAILED %s: bits change with threads, M=%d\n", name, (int)M);
      for (float poison : {INFINITY, -INFINITY, NAN})
        if (!PassesPoisonOn(isa, dtype, M, poison, parallel) && ++failures)
          std::printf("FAILED %s: %g in x, M=%d, dtype %d\n", name, poison, (int)M, (int)dtype);
    }
  }
  if (!(accuracy <= 4) && ++failures) std::printf("FAILED %s: %g times the error of a float32 dot\n", name, accuracy);
  double attention = 0;
  for (const AttentionCase& c : AttentionCases(quick)) {
    const double ratio = AttentionRatio(isa, c);
    if (!(ratio <= 1) && ++failures)
      std::printf("FAILED %s: attention of %lld heads of %lld over %lld, dtype %d: %.3g of the bound\n", name,
                  (long long)c.heads, (long long)c.dim, (long long)c.length(), (int)c.dtype, ratio);
    attention = std::fmax(attention, ratio);
  }
  std::printf(
      "%-14s %5lld products (%lld its own), worst %.2f of the bound; dequantize %.2f; attention %.2f; error %.2f of "
      "float32's\n",
      name, (long long)cases, (long long)served_cases, worst, worst_dequantize, attention, accuracy);
  std::fflush(stdout);
}

bool Contains(const std::string& list, const std::string& name) {
  return ("," + list + ",").find("," + name + ",") != std::string::npos;
}

}  // namespace

int main(int argc, char** argv) {
  bool quick = false;
  std::string required, only;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--quick") quick = true;
    if (arg == "--require" && i + 1 < argc) required = argv[++i];
    if (arg == "--only" && i + 1 < argc) only = argv[++i];
  }
  std::string ran;
  for (int isa = 0; isa < IsaCount(); ++isa) {
    const std::string name = GetIsa(isa).name;
    if (!only.empty() && !Contains(only, name)) continue;
    if (const char* missing = Missing(isa)) {
      std::printf("%-14s not run: %s\n", name.c_str(), missing);
      continue;
    }
    CheckIsa(isa, quick);
    ran += "," + name;
  }
  for (size_t at = 0; at < required.size();) {
    const size_t end = required.find(',', at) == std::string::npos ? required.size() : required.find(',', at);
    const std::string name = required.substr(at, end - at);
    if (!Contains(ran, name) && ++failures) std::printf("FAILED: %s is required and did not run\n", name.c_str());
    at = end + 1;
  }
  std::printf("%s\n", failures ? "FAILED" : "ok");
  return failures ? 1 : 0;
}
