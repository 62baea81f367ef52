// The interface between the FFI handlers and the kernels of one instruction set.
//
// How a new instruction set plugs in:
//   1. Write `<name>.cc`. It includes this header, puts everything in a namespace of its own inside jaxq::cpu, and
//      defines one `const Isa k<Name>`. A kernel that has no path for its arguments returns kDeclined before it
//      writes anything: the next instruction set down the list is asked then, and `scalar` takes everything.
//   2. Add one line to CMakeLists.txt, with the compiler flags of that file alone.
//   3. Add one row to kIsas in dispatch.cc (best first), and a check to detect.cc where no present one fits.
// The Python side and the tests read the list from the library, so they need no edit.
//
// Rules for such a file: no inline function or template of the standard library may be instantiated in it (the linker
// may keep the copy with the wider instructions, and an older CPU would then run it); no static or thread-local
// state; unaligned loads for everything that comes from outside; no read past the end of a buffer. `simd-inl.h` is a
// complete set of kernels over a small vector type: a new file starts from there with about 150 lines.
#ifndef JAXQ_KERNELS_CPU_KERNELS_H_
#define JAXQ_KERNELS_CPU_KERNELS_H_

#include <cstddef>
#include <cstdint>

// Never emitted as a function of its own, which the linker could share between files of different flags.
#define JAXQ_INLINE inline __attribute__((always_inline))

// Before a loop of constant length whose body must be written out, so that an array of vectors stays in registers.
#if defined(__clang__)
#define JAXQ_UNROLL _Pragma("clang loop unroll(full)")
#else
#define JAXQ_UNROLL _Pragma("GCC unroll 32")
#endif

namespace jaxq::cpu {

enum class DType : uint8_t { kF32, kF16, kBF16, kU8 };
enum class Mode : uint8_t { kAffine, kMxfp4, kMxfp8, kNvfp4 };
enum class Outcome : uint8_t { kDone, kDeclined, kNoMemory };

constexpr JAXQ_INLINE int64_t SizeOf(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kU8 ? 1 : 2;
}

struct Format {
  Mode mode;
  int bits;
  int group_size;

  JAXQ_INLINE bool affine() const { return mode == Mode::kAffine; }
};

// Work that is cut into numbered tasks. `slot` numbers the worker, 0 <= slot < slots(): two tasks that run at the same
// time have different slots, so scratch memory can be indexed by it. What a task computes must not depend on its slot
// or on the number of slots: results are the same bits whatever the number of threads.
class Parallel {
 public:
  using Task = void (*)(void* context, int64_t task, int slot);

  virtual int slots() const = 0;
  virtual void Run(int64_t tasks, Task task, void* context) const = 0;

  template <typename F>  // F is a lambda, so each file has an instance of its own
  JAXQ_INLINE void For(int64_t tasks, F&& body) const {
    Run(tasks, [](void* context, int64_t task, int slot) { (*static_cast<F*>(context))(task, slot); }, &body);
  }

 protected:
  ~Parallel() = default;
};

// w[rows, length] -> packed[rows, length*bits/32], scales and biases[rows, length/group_size].
struct QuantizeArgs {
  Format format;
  int64_t rows, length;
  const void* w;
  DType w_dtype;
  uint8_t* packed;
  void* scales;  // of w_dtype; uint8 in the float modes
  void* biases;  // of w_dtype; null in the float modes
};

// The inverse: out[rows, length] in out_dtype.
struct DequantizeArgs {
  Format format;
  int64_t rows, length;
  const uint8_t* packed;
  const void* scales;
  const void* biases;
  DType scale_dtype;
  void* out;
  DType out_dtype;
};

// A weight w[N, K] in groups along K. transpose: y[M, N] = x[M, K] @ w.T; otherwise y[M, K] = x[M, N] @ w.
// Everything is dense and in C order. M, N and K are at least 1; K is a multiple of group_size and of 32/bits words.
struct MatmulArgs {
  Format format;
  bool transpose;
  int64_t M, N, K;
  const void* x;
  DType x_dtype;
  const uint8_t* packed;
  const void* scales;
  const void* biases;
  DType scale_dtype;
  void* y;  // of x_dtype

  JAXQ_INLINE int64_t groups() const { return K / format.group_size; }
  JAXQ_INLINE int64_t row_bytes() const { return K / 8 * format.bits; }
};

// Attention of new tokens over one layer of a cache, which they join: the keys and values of token s, of S, are written
// at `position` + s, and its queries see the positions up to that one. Everything is dense and in C order. All sizes are
// at least 1; `heads` is a multiple of `kv_heads`, whose keys and values each serve heads/kv_heads queries of a token.
struct AttentionArgs {
  int64_t batch, tokens, heads, kv_heads, length, dim;
  int64_t position;  // position + tokens <= length
  float scale;       // of the products of queries and keys
  DType dtype;       // of q, k, v and y
  DType cache_dtype;
  const void* q;  // [batch, tokens, heads, dim]
  const void* k;  // [batch, tokens, kv_heads, dim]
  const void* v;
  void* cache_k;  // [batch, kv_heads, length, dim]
  void* cache_v;
  void* y;  // as q

  JAXQ_INLINE int64_t repeat() const { return heads / kv_heads; }
};

// detect.cc: whether memory that was fetched past the caches (prefetchnta) is yet found in the last-level cache the next
// time. Intel's servers leave it out there, and a weight that fits would come from memory every time.
bool PassingFillsLastLevel();

// One instruction set. `missing` returns null where this CPU (and its operating system) can run it, else what it
// lacks, for people to read. A null kernel declines everything.
struct Isa {
  const char* name;
  const char* (*missing)();
  Outcome (*quantize)(const QuantizeArgs&, const Parallel&);
  Outcome (*dequantize)(const DequantizeArgs&, const Parallel&);
  Outcome (*matmul)(const MatmulArgs&, const Parallel&);
  Outcome (*attention)(const AttentionArgs&, const Parallel&);
};

}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_KERNELS_H_
