// How the rows of a weight are shared out where few rows of x are multiplied, and how far ahead they are fetched.

#ifndef JAXQ_KERNELS_CPU_RUNS_INL_H_
#define JAXQ_KERNELS_CPU_RUNS_INL_H_

#include "simd-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

// Bytes of w from what is read to what is fetched, into the second-level cache: the time that memory takes to answer.
// Rows are too short, and too many at a time, for the hardware to see where they lead; scales and biases are fetched as
// far ahead, in rows, for the hardware finds out anew in each page of memory.
constexpr int64_t kAhead = 16384;

constexpr int64_t kRunTask = 32;  // rows of w per task, or a multiple
// Tasks are as long as an even share-out allows, for what is fetched ahead must be what the same thread comes to next.
constexpr int64_t kTasksPerSlot = 8;

// Tasks in as many runs as there are workers: each takes the next of its own run, and of another's once that is over.
struct Runs {
  int64_t tasks;
  int64_t slots;
  int64_t* next;  // [slots], 64 bytes apart: how many of each run are taken

  static int64_t RoomFor(const Parallel& parallel) { return Room<int64_t>(8 * parallel.slots()); }

  int64_t First(int64_t run) const { return tasks * run / slots; }
  int64_t Take(int64_t slot) const {
    for (int64_t run = slot;; run = run + 1 < slots ? run + 1 : 0) {
      const int64_t task = First(run) + __atomic_fetch_add(next + 8 * run, 1, __ATOMIC_RELAXED);
      if (task < First(run + 1)) return task;
    }
  }
};

// Calls body(first, last, slot) for all of N rows. `next`: Runs::RoomFor bytes.
template <typename Body>
JAXQ_INLINE void ForRuns(int64_t N, const Parallel& parallel, int64_t* next, Body&& body) {
  const int64_t rows = Most(Ceil(Ceil(N, kTasksPerSlot * parallel.slots()), kRunTask), 1) * kRunTask;
  const Runs runs = {Ceil(N, rows), parallel.slots(), next};
  std::memset(next, 0, static_cast<size_t>(Runs::RoomFor(parallel)));
  parallel.For(runs.tasks, [&](int64_t, int slot) {
    const int64_t first = runs.Take(slot) * rows;
    body(first, Least(N, first + rows), slot);
  });
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_RUNS_INL_H_
