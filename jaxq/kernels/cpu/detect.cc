// Compiled without any instruction-set flag: this is what decides whether the others may run.
#include "isas.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

bool PassingFillsLastLevel() {
  static const bool amd = Cpuid(0, 0).ebx == 0x68747541u;  // "Auth" of AuthenticAMD. CPUID takes long in virtual machines
  return amd;
}

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

const char* MissingAmx() {
  if (const char* missing = MissingAvx512Vnni()) return missing;
#if defined(JAXQ_EMULATE_AMX)
  return nullptr;
#elif defined(__linux__)
  const Cpuid seven(7, 0);
  if (!Bit(seven.edx, 24) || !Bit(seven.edx, 22) || !Bit(seven.edx, 25))
    return "this CPU has no AMX for bfloat16 and int8";
  if ((SavedState() & 0x60000u) != 0x60000u) return "the operating system does not save AMX tiles";
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
    return "the operating system refuses AMX tiles to this process";
  return nullptr;
#else
  return "AMX is used on Linux only";
#endif
}

}  // namespace jaxq::cpu

#elif defined(__aarch64__)
#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif

namespace jaxq::cpu {
namespace {

// `capability` and `bit`: as the kernel's arch/arm64/include/uapi/asm/hwcap.h has them. `feature`: Apple's name.
[[maybe_unused]] bool Has(int capability, int bit, const char* feature) {
#if defined(__APPLE__)
  int value = 0;
  size_t size = sizeof value;
  (void)capability, (void)bit;
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
#elif defined(__linux__)
  (void)feature;
  return getauxval(capability == 1 ? AT_HWCAP : AT_HWCAP2) >> bit & 1u;
#else
  (void)capability, (void)bit, (void)feature;
  return false;
#endif
}

}  // namespace

const char* MissingNeon() { return nullptr; }  // part of the 64-bit architecture

const char* MissingNeonDotprod() {
  return Has(1, 20, "hw.optional.arm.FEAT_DotProd") ? nullptr : "this CPU has no dot products of bytes (FEAT_DotProd)";
}

const char* MissingNeonI8mm() {
  if (const char* missing = MissingNeonDotprod()) return missing;
  return Has(2, 13, "hw.optional.arm.FEAT_I8MM") ? nullptr : "this CPU has no byte matrix products (FEAT_I8MM)";
}

const char* MissingNeonBf16() {
  if (const char* missing = MissingNeonDotprod()) return missing;
  return Has(2, 14, "hw.optional.arm.FEAT_BF16") ? nullptr : "this CPU has no bfloat16 matrix products (FEAT_BF16)";
}

}  // namespace jaxq::cpu
#endif
