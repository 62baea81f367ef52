// Arm's NEON, which every 64-bit Arm CPU has.

#include <arm_neon.h>

#include <cstring>

#include "isas.h"
#include "numbers.h"

#define JAXQ_ISA neon

namespace jaxq::cpu::neon {
namespace {

#include "neon-inl.h"

}  // namespace
}  // namespace jaxq::cpu::neon

#include "attention-inl.h"
#include "convert-inl.h"
#include "matmul-inl.h"

namespace jaxq::cpu {

const Isa kNeon = {"neon", MissingNeon, neon::Quantize, neon::Dequantize, neon::Matmul, neon::Attention};

}  // namespace jaxq::cpu
