// Which instruction sets there are, and the choice among them.
#ifndef JAXQ_KERNELS_CPU_DISPATCH_H_
#define JAXQ_KERNELS_CPU_DISPATCH_H_

#include "kernels.h"

namespace jaxq::cpu {

// Index into the list, best first; -1 for an unknown name. The empty name takes the best that this CPU has.
int FindIsa(const char* name, size_t length);
int IsaCount();
const Isa& GetIsa(int index);
const char* Missing(int index);  // asked once per process

// Run `first` or, where it declines, the next one below it that this CPU has.
Outcome Quantize(int first, const QuantizeArgs& args, const Parallel& parallel);
Outcome Dequantize(int first, const DequantizeArgs& args, const Parallel& parallel);
Outcome Matmul(int first, const MatmulArgs& args, const Parallel& parallel);
Outcome Attention(int first, const AttentionArgs& args, const Parallel& parallel);

}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_DISPATCH_H_
