// Compiled with AVX2 and F16C: the compiler makes wider vectors of the same loops.
#define JAXQ_ISA repack_avx2
#define JAXQ_REPACK kRepackAvx2
#include "repack-inl.h"
