#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

namespace jaxq::cpu {
namespace {

// To wake a helper costs the caller some microseconds, in which it does this much itself.
constexpr int64_t kAlone = 1 << 17;

// Shared with the helpers, which may start after Run has returned: they then find no task left, and touch nothing else.
struct Job {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  std::atomic<int> slots{1};  // the caller's is 0
  int64_t tasks;
  Parallel::Task task;
  void* context;

  void Work(int slot) {
    int64_t mine = 0;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks; ++mine) task(context, i, slot);
    if (mine) done.fetch_add(mine, std::memory_order_release);
  }
};

void Relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

PoolParallel::PoolParallel(xla::ffi::ThreadPool& pool, int64_t work)
    : pool_(pool),
      slots_(work <= kAlone ? 1 : static_cast<int>(std::clamp<int64_t>(pool.num_threads(), 1, 1024))) {}

void PoolParallel::Run(int64_t tasks, Task task, void* context) const {
  const int64_t helpers = std::min<int64_t>(slots_ - 1, tasks - 1);
  if (helpers <= 0) {
    for (int64_t i = 0; i < tasks; ++i) task(context, i, 0);
    return;
  }
  auto job = std::make_shared<Job>();
  job->tasks = tasks, job->task = task, job->context = context;
  for (int64_t i = 0; i < helpers; ++i)
    pool_.Schedule([job] { job->Work(job->slots.fetch_add(1, std::memory_order_relaxed)); });
  job->Work(0);
  for (int spins = 0; job->done.load(std::memory_order_acquire) < tasks; ++spins) {
    if (spins < 4096)
      Relax();
    else
      std::this_thread::yield();  // more threads than cores: let the helper have this one
  }
}

}  // namespace jaxq::cpu
