// Arm's dot products of bytes (FEAT_DotProd: Cortex-A75, Neoverse N1, Apple A11 and later): few rows of x.

#include <arm_neon.h>

#include <cstring>

#include "isas.h"
#include "numbers.h"

#define JAXQ_ISA neon_dotprod

namespace jaxq::cpu::neon_dotprod {
namespace {

#include "neon-inl.h"

}  // namespace
}  // namespace jaxq::cpu::neon_dotprod

#include "neon_dot-inl.h"

namespace jaxq::cpu {

const Isa kNeonDotprod = {"neon_dotprod", MissingNeonDotprod, nullptr, nullptr,
                          neon_dotprod::MatmulDigits, nullptr};

}  // namespace jaxq::cpu
