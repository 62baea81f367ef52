#include "dispatch.h"

#include <atomic>
#include <cstring>

#include "isas.h"

namespace jaxq::cpu {
namespace {

// Best first.
const Isa* const kIsas[] = {
#ifdef JAXQ_AMX
    &kAmx,
#endif
#ifdef JAXQ_AVX512_BF16
    &kAvx512Bf16,
#endif
#ifdef JAXQ_AVX512_VNNI
    &kAvx512Vnni,
#endif
#ifdef JAXQ_AVX512
    &kAvx512,
#endif
#ifdef JAXQ_AVX2
    &kAvx2,
#endif
#ifdef JAXQ_NEON_BF16
    &kNeonBf16,
#endif
#ifdef JAXQ_NEON_I8MM
    &kNeonI8mm,
#endif
#ifdef JAXQ_NEON_DOTPROD
    &kNeonDotprod,
#endif
#ifdef JAXQ_NEON
    &kNeon,
#endif
    &kScalar,
};
constexpr int kCount = sizeof(kIsas) / sizeof(kIsas[0]);

// How many calls each one has served: the tests prove with it that a forced one ran.
std::atomic<uint64_t> calls[kCount];

struct Usable {
  const char* missing[kCount];
  int best = kCount - 1;
  Usable() {
    for (int i = kCount - 1; i >= 0; --i) {
      missing[i] = kIsas[i]->missing();
      if (missing[i] == nullptr) best = i;
    }
  }
};

const Usable& GetUsable() {
  static const Usable usable;
  return usable;
}

template <typename Args>
Outcome RunFirst(int first, Outcome (*const Isa::*kernel)(const Args&, const Parallel&), const Args& args,
                 const Parallel& parallel) {
  for (int i = first; i < kCount; ++i) {
    if (GetUsable().missing[i] != nullptr || kIsas[i]->*kernel == nullptr) continue;
    const Outcome outcome = (kIsas[i]->*kernel)(args, parallel);
    if (outcome == Outcome::kDeclined) continue;
    calls[i].fetch_add(1, std::memory_order_relaxed);
    return outcome;
  }
  return Outcome::kDeclined;
}

}  // namespace

int FindIsa(const char* name, size_t length) {
  if (length == 0) return GetUsable().best;
  for (int i = 0; i < kCount; ++i)
    if (std::strlen(kIsas[i]->name) == length && std::memcmp(kIsas[i]->name, name, length) == 0) return i;
  return -1;
}

int IsaCount() { return kCount; }
const Isa& GetIsa(int index) { return *kIsas[index]; }
const char* Missing(int index) { return GetUsable().missing[index]; }

Outcome Quantize(int first, const QuantizeArgs& args, const Parallel& parallel) {
  return RunFirst(first, &Isa::quantize, args, parallel);
}
Outcome Dequantize(int first, const DequantizeArgs& args, const Parallel& parallel) {
  return RunFirst(first, &Isa::dequantize, args, parallel);
}
Outcome Matmul(int first, const MatmulArgs& args, const Parallel& parallel) {
  return RunFirst(first, &Isa::matmul, args, parallel);
}
Outcome Attention(int first, const AttentionArgs& args, const Parallel& parallel) {
  return RunFirst(first, &Isa::attention, args, parallel);
}

}  // namespace jaxq::cpu

// For ctypes. An index past the end gives null.
extern "C" {
__attribute__((visibility("default"))) const char* jaxq_cpu_isa_name(int index) {
  return index >= 0 && index < jaxq::cpu::kCount ? jaxq::cpu::kIsas[index]->name : nullptr;
}
__attribute__((visibility("default"))) const char* jaxq_cpu_isa_missing(int index) {
  return index >= 0 && index < jaxq::cpu::kCount ? jaxq::cpu::Missing(index) : "no such instruction set";
}
__attribute__((visibility("default"))) uint64_t jaxq_cpu_isa_calls(int index) {
  return index >= 0 && index < jaxq::cpu::kCount ? jaxq::cpu::calls[index].load(std::memory_order_relaxed) : 0;
}
}
