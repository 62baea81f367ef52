// Compiled with AVX-512, VBMI among it.
#define JAXQ_ISA repack_avx512
#define JAXQ_REPACK kRepackAvx512
#include "repack-inl.h"
