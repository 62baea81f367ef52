// Parallel over XLA's own thread pool.
#ifndef JAXQ_KERNELS_CPU_PARALLEL_H_
#define JAXQ_KERNELS_CPU_PARALLEL_H_

#include <optional>
#include <variant>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

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

// What a handler gives back: that it is done, or a future that will be.
struct Completion {
  Completion(ffi::Error error_) : error(std::move(error_)) {}
  Completion(ffi::Future later_) : error(ffi::Error::Success()), later(std::move(later_)) {}

  ffi::Error error;
  std::optional<ffi::Future> later;
};

// The end of a handler's call of `run`, whose work was shared out over `parallel`. XLA begins a program on a thread that
// is none of the pool's, whose threads are as many as the CPUs and wait for work in a loop: together they are one more
// than there are CPUs, and take them from each other. So from a program's second such call on, the program goes on in a
// thread of the pool. (The first may be the only one, for which that would be a detour.)
Completion Complete(ffi::Error error, ffi::ThreadPool& pool, ffi::RunId run, const Parallel& parallel);

}  // namespace jaxq::cpu

template <xla::ffi::ExecutionStage stage>
struct xla::ffi::ResultEncoding<stage, jaxq::cpu::Completion> {
  static std::variant<XLA_FFI_Error*, XLA_FFI_Future*> Encode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* ctx,
                                                              jaxq::cpu::Completion completion) {
    if (completion.later) return ResultEncoding<stage, Future>::Encode(api, ctx, std::move(*completion.later));
    return ResultEncoding<stage, Error>::Encode(api, ctx, std::move(completion.error));
  }
};

#endif  // JAXQ_KERNELS_CPU_PARALLEL_H_
