// What this machine can do at most, for the benchmarks (limits.py): prints bytes read per second and float32
// operations per second, on as many threads as the first argument says.
//   c++ -O3 -march=native -std=c++17 -pthread limits.cc -o limits && ./limits 2 MEBIBYTES
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

// Keeps the compiler from knowing what stands in a vector register.
#if defined(__x86_64__)
#define JAXQ_OPAQUE(v) asm volatile("" : "+v"(v))
#else
#define JAXQ_OPAQUE(v) asm volatile("" : "+w"(v))
#endif

using Clock = std::chrono::steady_clock;

template <typename F>
double Seconds(int threads, F&& body) {
  double best = 1e30;
  for (int repeat = 0; repeat < 9; ++repeat) {
    const auto start = Clock::now();
    std::vector<std::thread> pool;
    for (int t = 1; t < threads; ++t) pool.emplace_back([&, t] { body(t); });
    body(0);
    for (auto& thread : pool) thread.join();
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    if (seconds < best) best = seconds;
  }
  return best;
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const int64_t words = (argc > 2 ? std::atoll(argv[2]) : 512) << 17;  // of 8 bytes, over all threads
  std::vector<uint64_t> memory(words, 1);
  std::vector<uint64_t> sink(64 * threads);
  const int passes = words < (1 << 23) ? 64 : 1;
  double seconds = Seconds(threads, [&](int t) {
    const int64_t part = words / threads;
    const uint64_t* p = memory.data() + t * part;
    typedef uint64_t V __attribute__((vector_size(64), aligned(8), may_alias));
    V a{}, b{}, c{}, d{};
    for (int pass = 0; pass < passes; ++pass) {
      for (int64_t i = 0; i + 32 <= part; i += 32) {
        const V* v = reinterpret_cast<const V*>(p + i);
        a += v[0], b += v[1], c += v[2], d += v[3];
      }
      asm volatile("" : "+m"(a));
    }
    a += b + c + d;
    sink[64 * t] = a[0] + a[7];
  });
  const double bytes = static_cast<double>(words) * 8 * passes / seconds;

  constexpr int64_t kSteps = 1 << 22;
  seconds = Seconds(threads, [&](int t) {
    typedef float V __attribute__((vector_size(64)));
    V acc[12], x = V{} + 1.0f, y = V{} + 1e-9f;
    for (V& a : acc) {
      a = V{};
      JAXQ_OPAQUE(a);  // else they are all equal, and one stands for all
    }
    for (int64_t i = 0; i < kSteps; ++i) {
      for (V& a : acc) a = x * y + a;
      JAXQ_OPAQUE(x);
    }
    float total = 0;
    for (V& a : acc) {
      JAXQ_OPAQUE(a);
      total += a[0];
    }
    sink[64 * t] += static_cast<uint64_t>(total);
  });
  const double flops = 2.0 * 16 * 12 * kSteps * threads / seconds;
  std::printf("%.6g %.6g\n", bytes, flops);
  return sink[0] == 42;
}
