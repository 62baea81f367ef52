#include "parallel.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

namespace jaxq::cpu {
namespace {

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

// Where helpers that have run out of work wait a while for more. To wake a sleeping thread takes longer than most calls
// in which one row is multiplied, and a model makes such calls one after the other.
constexpr auto kLinger = std::chrono::microseconds(200);
constexpr int kPausesPerLook = 32;

using Ticket = std::shared_ptr<Job>;
Ticket waiting;  // its address stands for a helper that waits
std::array<std::atomic<Ticket*>, 64> seats{};

// Hands a job to a helper that waits. False where none does.
bool Hand(const Ticket& job) {
  for (auto& seat : seats) {
    Ticket* there = seat.load(std::memory_order_relaxed);
    if (there != &waiting) continue;
    auto ticket = std::make_unique<Ticket>(job);
    if (seat.compare_exchange_strong(there, ticket.get(), std::memory_order_release, std::memory_order_relaxed)) {
      ticket.release();
      return true;
    }
  }
  return false;
}

// The next job, or null when none has come for a while.
Ticket AwaitJob() {
  for (auto& seat : seats) {
    Ticket* none = nullptr;
    if (!seat.compare_exchange_strong(none, &waiting, std::memory_order_relaxed)) continue;
    const auto until = std::chrono::steady_clock::now() + kLinger;
    while (seat.load(std::memory_order_relaxed) == &waiting && std::chrono::steady_clock::now() < until)
      for (int i = 0; i < kPausesPerLook; ++i) Relax();
    Ticket* there = &waiting;
    if (seat.compare_exchange_strong(there, nullptr, std::memory_order_relaxed)) return nullptr;
    const std::unique_ptr<Ticket> ticket(seat.exchange(nullptr, std::memory_order_acquire));
    return std::move(*ticket);
  }
  return nullptr;
}

void Help(Ticket job) {
  for (; job; job = AwaitJob()) {
    job->Work(job->slots.fetch_add(1, std::memory_order_relaxed));
    job.reset();
  }
}

}  // namespace

PoolParallel::PoolParallel(xla::ffi::ThreadPool& pool)
    : pool_(pool), slots_(static_cast<int>(std::clamp<int64_t>(pool.num_threads(), 1, 1024))) {}

void PoolParallel::Run(int64_t tasks, Task task, void* context) const {
  const int64_t helpers = std::min<int64_t>(slots_ - 1, tasks - 1);
  if (helpers <= 0) {
    for (int64_t i = 0; i < tasks; ++i) task(context, i, 0);
    return;
  }
  auto job = std::make_shared<Job>();
  job->tasks = tasks, job->task = task, job->context = context;
  for (int64_t i = 0; i < helpers; ++i)
    if (!Hand(job)) pool_.Schedule([job] { Help(job); });
  job->Work(0);
  for (int spins = 0; job->done.load(std::memory_order_acquire) < tasks; ++spins) {
    if (spins < 4096)
      Relax();
    else
      std::this_thread::yield();  // more threads than cores: let the helper have this one
  }
}

}  // namespace jaxq::cpu
