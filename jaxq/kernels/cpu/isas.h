// What each instruction set's file defines, and what a CPU can run.
#ifndef JAXQ_KERNELS_CPU_ISAS_H_
#define JAXQ_KERNELS_CPU_ISAS_H_

#include "kernels.h"

namespace jaxq::cpu {

// Those that the build has.
extern const Isa kScalar, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx;
extern const Isa kNeon, kNeonDotprod, kNeonI8mm, kNeonBf16;

// detect.cc: null where the CPU and its operating system can run it, else what is missing.
const char* MissingAvx2();
const char* MissingAvx512();
const char* MissingAvx512Vnni();
const char* MissingAvx512Bf16();
const char* MissingAmx();
const char* MissingNeon();
const char* MissingNeonDotprod();
const char* MissingNeonI8mm();
const char* MissingNeonBf16();

}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_ISAS_H_
