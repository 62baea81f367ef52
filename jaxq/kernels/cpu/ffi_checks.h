// What the FFI handlers share: checks of buffers and the words of errors.
#ifndef JAXQ_KERNELS_CPU_FFI_CHECKS_H_
#define JAXQ_KERNELS_CPU_FFI_CHECKS_H_

#include <string>
#include <string_view>

#include "dispatch.h"
#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxq::cpu {

using Dims = ffi::Span<const int64_t>;

// What stands in an error message; the first failed check wins.
struct Failure {
  std::string message;
  ffi::ErrorCode code = ffi::ErrorCode::kInvalidArgument;
};

inline ffi::Error ErrorOf(const char* op, const Failure& failure) {
  return ffi::Error(failure.code, std::string("jaxq ") + op + " on cpu: " + failure.message);
}

inline std::string ShapeText(Dims dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

inline bool IsFloat(ffi::DataType dtype) {
  return dtype == ffi::DataType::F32 || dtype == ffi::DataType::F16 || dtype == ffi::DataType::BF16;
}

inline DType DTypeOf(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32:
      return DType::kF32;
    case ffi::DataType::F16:
      return DType::kF16;
    case ffi::DataType::BF16:
      return DType::kBF16;
    default:
      return DType::kU8;
  }
}

inline bool SameDims(Dims a, Dims b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i]) return false;
  return true;
}

// An attribute `isa`: empty for the best that this CPU has.
inline bool ParseIsa(std::string_view name, int* isa, Failure* failure) {
  *isa = FindIsa(name.data(), name.size());
  if (*isa < 0) return failure->message = "instruction set '" + std::string(name) + "' is not in this build", false;
  if (const char* missing = Missing(*isa)) {
    failure->code = ffi::ErrorCode::kUnimplemented;
    return failure->message = "'" + std::string(name) + "' cannot run here: " + missing, false;
  }
  return true;
}

inline ffi::Error Finish(const char* op, Outcome outcome) {
  if (outcome == Outcome::kDone) return ffi::Error::Success();
  if (outcome == Outcome::kNoMemory) return ErrorOf(op, {"out of memory for scratch", ffi::ErrorCode::kResourceExhausted});
  return ErrorOf(op, {"no kernel took the call", ffi::ErrorCode::kInternal});
}

}  // namespace jaxq::cpu

#define JAXQ_EXPORT extern "C" __attribute__((visibility("default")))

#endif  // JAXQ_KERNELS_CPU_FFI_CHECKS_H_
