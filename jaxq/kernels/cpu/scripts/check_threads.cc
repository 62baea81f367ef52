// Runs the handlers and PoolParallel on thread pools whose helpers start soon, late, in the scheduling call, after the
// call has returned, or never; from several callers at once, and from the pool's own threads, as XLA calls them.
//
//   check_threads [--quick]
//
// Results must be the bits that one thread makes. What no comparison shows, a race, is for ThreadSanitizer to see.

#include <atomic>

#include "../parallel.h"
#include "ffi_calls.h"

using namespace jaxq::cpu;
using namespace jaxq::cpu::check;

namespace {

std::atomic<int> failures{0};
void Fail(const char* where, const std::string& what) {
  if (++failures <= 20) std::printf("FAILED threads, %s: %s\n", where, what.c_str());
}

const struct {
  const char* name;
  int claimed, threads;
  Start start;
} kPools[] = {
    {"helpers start soon", 4, 3, Start::kSoon},
    {"helpers start late", 4, 3, Start::kLate},
    {"one helper for eight", 8, 1, Start::kLate},
    {"helpers never start", 4, 0, Start::kSoon},
    {"helpers come when all is over", 4, 0, Start::kAfter},
    {"helpers run at once", 4, 0, Start::kAtOnce},
    {"the pool refuses", 4, 0, Start::kRefused},
    {"a pool of one", 1, 1, Start::kSoon},
    {"a pool of nobody", 0, 0, Start::kRefused},
};

// ---- PoolParallel by itself

struct Counts {
  int64_t tasks;
  std::vector<std::atomic<int>> runs, busy;
  std::atomic<bool> bad{false};
  Counts(int64_t tasks_, size_t slots) : tasks(tasks_), runs(static_cast<size_t>(tasks_)), busy(slots) {}
};
// XLA hands the pool to handlers alone, so this is one. It finds its counts where the operand's data would be.
xla::ffi::Error CountHandler(xla::ffi::ThreadPool pool, xla::ffi::AnyBuffer buffer) {
  Counts& counts = *static_cast<Counts*>(buffer.untyped_data());
  const PoolParallel parallel(pool);
  if (parallel.slots() < 1 || static_cast<size_t>(parallel.slots()) > counts.busy.size()) counts.bad = true;
  parallel.For(counts.tasks, [&](int64_t task, int slot) {
    if (slot < 0 || slot >= parallel.slots() || counts.busy[static_cast<size_t>(slot)].exchange(1)) counts.bad = true;
    ++counts.runs[static_cast<size_t>(task)];
    std::this_thread::yield();  // with the slot taken, so that others come by
    counts.busy[static_cast<size_t>(slot)] = 0;
  });
  // Every task has run when For returns, and each of them once.
  for (const std::atomic<int>& runs : counts.runs) counts.bad = counts.bad || runs != 1;
  return xla::ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER(kCount, CountHandler,
                       xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Arg<xla::ffi::AnyBuffer>());

void CheckTasks(const char* name, Pool* pool) {
  for (int round = 0; round < 40; ++round) {
    for (int64_t tasks : {0, 1, 2, 3, 5, 64}) {
      Counts counts(tasks, 8);  // of slots: as many as any pool of these claims threads
      const std::string error = Invoke(kCount, {{{XLA_FFI_DataType_U8, {}, &counts}}, {}, {}}, pool);
      if (!error.empty()) return Fail(name, error);
      if (counts.bad) return Fail(name, "a task ran twice, or not, or shared its slot: " + std::to_string(tasks));
    }
  }
}

// ---- the handlers

// A call with its memory and the results that one thread makes. Operands are read by many, results belong to one.
struct Prepared {
  Wanted wanted;
  Frame frame;
  std::vector<std::unique_ptr<Guarded>> operands, expected;

  explicit Prepared(const Wanted& c) : wanted(c), frame(FrameOf(c)) {
    Random random(static_cast<uint64_t>(c.M * 31 + c.N));
    const Weights w(&random, c.format, c.N, c.K, c.op == Op::kQuantize ? c.x_dtype : c.scale_dtype);
    const Floats x(&random, c.x_dtype, c.op == Op::kQuantize ? c.N * c.K : c.M * (c.transpose ? c.K : c.N));
    std::vector<const Guarded*> from = {&w.packed, &w.scales, &w.biases};
    if (c.op == Op::kQuantize) from = {};
    if (c.op != Op::kDequantize) from.insert(from.begin(), &x.data);
    for (size_t i = 0; i < frame.operands.size(); ++i) {
      operands.push_back(std::make_unique<Guarded>(Bytes(frame.operands[i])));
      frame.operands[i].data = operands.back()->get();
      std::memcpy(frame.operands[i].data, from[i]->get(), static_cast<size_t>(Bytes(frame.operands[i])));
    }
    Pool alone(1, 0, Start::kRefused);
    Frame once = frame;
    expected = NewResults(&once);
    if (const std::string error = Invoke(HandlerOf(c.op), once, &alone); !error.empty()) Fail("one thread", error);
  }
  static std::vector<std::unique_ptr<Guarded>> NewResults(Frame* into) {
    std::vector<std::unique_ptr<Guarded>> made;
    for (Buffer& buffer : into->results) {
      made.push_back(std::make_unique<Guarded>(Bytes(buffer)));
      buffer.data = made.back()->get();
    }
    return made;
  }
  void Check(const char* where, Pool* pool) const {
    Frame mine = frame;
    const auto results = NewResults(&mine);
    if (const std::string error = Invoke(HandlerOf(wanted.op), mine, pool); !error.empty()) return Fail(where, error);
    for (size_t i = 0; i < results.size(); ++i)
      if (std::memcmp(results[i]->get(), expected[i]->get(), static_cast<size_t>(Bytes(mine.results[i]))) != 0)
        return Fail(where, "other bits than from one thread: " + Text(wanted.op, mine));
  }
};

// Every operation and every regime of M on every instruction set, large enough to be cut into tasks.
std::vector<std::unique_ptr<Prepared>> Calls(bool quick) {
  std::vector<std::unique_ptr<Prepared>> calls;
  const std::vector<Format> formats = {{Mode::kAffine, 4, 64},
                                       {Mode::kAffine, 3, 32},
                                       {Mode::kAffine, 8, 128},
                                       {Mode::kMxfp4, 4, 32},
                                       {Mode::kNvfp4, 4, 16}};
  int number = 0;
  for (int i = 0; i < IsaCount(); ++i) {
    if (Missing(i) != nullptr) continue;
    for (const Format& format : formats) {
      for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
        if (quick && ++number % 7) continue;
        const auto add = [&](Op op, int64_t M, bool transpose) {
          calls.push_back(std::make_unique<Prepared>(
              Wanted{op, format, {}, M, 300, (quick ? 2 : 8) * Step(format), transpose, dtype, dtype, GetIsa(i).name}));
        };
        for (int64_t M : {1, 5, 17, quick ? 40 : 70})
          for (bool transpose : {true, false}) add(Op::kMatmul, M, transpose);
        add(Op::kDequantize, 0, true), add(Op::kQuantize, 0, true);
      }
    }
  }
  return calls;
}

using CallList = std::vector<std::unique_ptr<Prepared>>;

// Each caller goes through the calls from another one on.
void CheckCallers(const char* where, const CallList& calls, Pool* pool, int callers) {
  std::vector<std::thread> threads;
  for (int caller = 0; caller < callers; ++caller)
    threads.emplace_back([&, caller] {
      for (size_t i = 0; i < calls.size(); ++i)
        calls[(i + static_cast<size_t>(caller) * calls.size() / static_cast<size_t>(callers)) % calls.size()]->Check(
            where, pool);
    });
  for (std::thread& thread : threads) thread.join();
}

// XLA calls handlers from its pool's own threads: with as many calls as threads, no helper starts before they end.
void CheckNested(const CallList& calls, Pool* pool) {
  struct Nested {
    const Prepared* call;
    Pool* pool;
    std::atomic<size_t>* done;
  };
  std::atomic<size_t> done{0};
  for (const auto& call : calls)
    pool->Schedule(
        [](void* data) {
          const std::unique_ptr<Nested> nested(static_cast<Nested*>(data));
          nested->call->Check("called from the pool", nested->pool);
          ++*nested->done;
        },
        new Nested{call.get(), pool, &done});
  while (done < calls.size()) std::this_thread::yield();
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::string(argv[1]) == "--quick";
  {
    // The first calls of the process, all at once: what is worked out once must be ready for every one of them.
    const Wanted c = {Op::kDequantize, {Mode::kAffine, 4, 64}, {}, 0, 8, 64, true, DType::kF32, DType::kF32, ""};
    Pool pool(2, 1, Start::kSoon);
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) threads.emplace_back([&] { Prepared(c).Check("first calls", &pool); });
    for (std::thread& thread : threads) thread.join();
  }
  const CallList calls = Calls(quick);
  for (const auto& row : kPools) {
    Pool pool(row.claimed, row.threads, row.start);
    CheckTasks(row.name, &pool);
    for (const auto& call : calls) call->Check(row.name, &pool);
  }
  for (const auto& row : {kPools[0], kPools[1]}) {
    Pool pool(row.claimed, row.threads, row.start);
    CheckCallers("four callers", calls, &pool, 4);
    CheckNested(calls, &pool);
  }
  std::printf("threads: %zu calls on %zu pools, from four callers and from the pool itself: %s\n", calls.size(),
              std::size(kPools), failures ? "FAILED" : "ok");
  return failures ? 1 : 0;
}
