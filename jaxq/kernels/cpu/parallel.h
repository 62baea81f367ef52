// Parallel over XLA's own thread pool.
#ifndef JAXQ_KERNELS_CPU_PARALLEL_H_
#define JAXQ_KERNELS_CPU_PARALLEL_H_

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace jaxq::cpu {

// The calling thread works too, and waits only for tasks that a helper has begun: a helper that never starts (the pool
// is busy, or it is the caller's own) costs nothing. Safe from any number of threads at once.
class PoolParallel final : public Parallel {
 public:
  // `work` is what there is to do in all, in multiplications or the like: a little is done by the caller alone.
  explicit PoolParallel(xla::ffi::ThreadPool& pool, int64_t work = INT64_MAX);
  int slots() const override { return slots_; }
  void Run(int64_t tasks, Task task, void* context) const override;

 private:
  xla::ffi::ThreadPool& pool_;
  int slots_;
};

}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_PARALLEL_H_
