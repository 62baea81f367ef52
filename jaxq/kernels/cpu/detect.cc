// Compiled without any instruction-set flag: this is what decides whether the others may run.
#include "isas.h"

#if defined(__x86_64__)
#include <cpuid.h>

namespace jaxq::cpu {
namespace {

struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Cpuid(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

bool Bit(unsigned word, int bit) { return word >> bit & 1u; }

// XCR0: the registers that the operating system saves and restores.
unsigned SavedState() {
  if (!Bit(Cpuid(1, 0).ecx, 27)) return 0;  // OSXSAVE
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

}  // namespace

const char* MissingAvx2() {
  const Cpuid one(1, 0), seven(7, 0);
  if ((SavedState() & 0x6u) != 0x6u) return "the operating system does not save AVX registers";
  if (!Bit(seven.ebx, 5)) return "this CPU has no AVX2";
  if (!Bit(one.ecx, 12)) return "this CPU has no FMA";
  if (!Bit(one.ecx, 29)) return "this CPU has no F16C";
  if (!Bit(seven.ebx, 3) || !Bit(seven.ebx, 8)) return "this CPU has no BMI2";
  return nullptr;
}

const char* MissingAvx512() {
  if (const char* missing = MissingAvx2()) return missing;
  const Cpuid seven(7, 0);
  if ((SavedState() & 0xe6u) != 0xe6u) return "the operating system does not save AVX-512 registers";
  if (!Bit(seven.ebx, 16)) return "this CPU has no AVX-512";
  if (!Bit(seven.ebx, 17) || !Bit(seven.ebx, 30) || !Bit(seven.ebx, 31)) return "this CPU has no AVX-512 DQ, BW and VL";
  return nullptr;
}

const char* MissingAvx512Vnni() {
  if (const char* missing = MissingAvx512()) return missing;
  const Cpuid seven(7, 0);
  if (!Bit(seven.ecx, 11)) return "this CPU has no AVX-512 VNNI";
  if (!Bit(seven.ecx, 1)) return "this CPU has no AVX-512 VBMI";
  return nullptr;
}

const char* MissingAvx512Bf16() {
  if (const char* missing = MissingAvx512Vnni()) return missing;
  return Bit(Cpuid(7, 1).eax, 5) ? nullptr : "this CPU has no AVX-512 BF16";
}

}  // namespace jaxq::cpu

#elif defined(__aarch64__)

namespace jaxq::cpu {

const char* MissingNeon() { return nullptr; }  // part of the 64-bit architecture

}  // namespace jaxq::cpu
#endif
