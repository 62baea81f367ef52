// XLA's side of its FFI, for checks without XLA: call frames over buffers of exact sizes, errors, and a thread pool
// that promises no more than XLA's interface does. The handlers and parallel.cc are the real ones.
//
// XLA's own pool and allocator are not instrumented, so a sanitizer sees neither a race with a helper nor an access
// just outside of a buffer of XLA's. Of these it sees both.
#ifndef JAXQ_KERNELS_CPU_SCRIPTS_FFI_HOST_H_
#define JAXQ_KERNELS_CPU_SCRIPTS_FFI_HOST_H_

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "xla/ffi/api/c_api.h"

struct XLA_FFI_Error {
  std::string message;
};

extern "C" {
XLA_FFI_Error* jaxq_quantized_matmul_cpu(XLA_FFI_CallFrame*);
XLA_FFI_Error* jaxq_dequantize_cpu(XLA_FFI_CallFrame*);
XLA_FFI_Error* jaxq_quantize_cpu(XLA_FFI_CallFrame*);
XLA_FFI_Error* jaxq_cached_attention_cpu(XLA_FFI_CallFrame*);
}

namespace jaxq::cpu::check {

// When scheduled tasks start. kAfter: when the pool ends, which is after the call that scheduled them has returned.
// kRefused: XLA has no pool for this call, and says so.
enum class Start { kSoon, kLate, kAfter, kAtOnce, kRefused };

class Pool {
 public:
  // claimed: what the handlers are told. A busy pool has fewer threads to give, so `threads` may be fewer.
  Pool(int claimed, int threads, Start start) : claimed_(claimed), start_(start) {
    for (int i = 0; i < threads && start != Start::kAfter; ++i) threads_.emplace_back([this, i] { Serve(i); });
  }
  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    while (RunOne()) {
    }
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int claimed() const { return claimed_; }
  bool Schedule(XLA_FFI_Task* task, void* data) {
    if (start_ == Start::kRefused) return false;
    if (start_ == Start::kAtOnce) return task(data), true;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back({task, data});
    }
    wake_.notify_one();
    return true;
  }
  bool RunOne() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (tasks_.empty()) return false;
    const auto [task, data] = tasks_.front();
    tasks_.pop_front();
    lock.unlock();
    task(data);
    return true;
  }

 private:
  void Serve(int number) {
    for (int turn = 0;; ++turn) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return ended_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
      }
      // Around the time that a small call takes: some helpers find tasks left, some come when the call has returned.
      if (start_ == Start::kLate)
        std::this_thread::sleep_for(std::chrono::microseconds((turn * 37 + number * 11) % 200));
      RunOne();
    }
  }

  const int claimed_;
  const Start start_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::pair<XLA_FFI_Task*, void*>> tasks_;
  bool ended_ = false;
  std::vector<std::thread> threads_;
};

inline XLA_FFI_Error* CreateError(XLA_FFI_Error_Create_Args* args) { return new XLA_FFI_Error{args->message}; }
inline void GetErrorMessage(XLA_FFI_Error_GetMessage_Args* args) { args->message = args->error->message.c_str(); }
inline void DestroyError(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }
inline XLA_FFI_Error* ScheduleTask(XLA_FFI_ThreadPool_Schedule_Args* args) {
  const bool done = reinterpret_cast<Pool*>(args->ctx)->Schedule(args->task, args->data);
  return done ? nullptr : new XLA_FFI_Error{"no thread pool here"};
}
inline XLA_FFI_Error* CountThreads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = reinterpret_cast<Pool*>(args->ctx)->claimed();
  return nullptr;
}

inline const XLA_FFI_Api& HostApi() {
  static const XLA_FFI_Api api = [] {
    XLA_FFI_Api made{};
    made.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    made.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    made.XLA_FFI_Error_Create = CreateError;
    made.XLA_FFI_Error_GetMessage = GetErrorMessage;
    made.XLA_FFI_Error_Destroy = DestroyError;
    made.XLA_FFI_ThreadPool_Schedule = ScheduleTask;
    made.XLA_FFI_ThreadPool_NumThreads = CountThreads;
    return made;
  }();
  return api;
}

struct Buffer {
  XLA_FFI_DataType dtype;
  std::vector<int64_t> dims;
  void* data;
};

struct Attribute {
  std::string name;
  std::variant<int64_t, bool, std::string, float> value;
};

struct Frame {
  std::vector<Buffer> operands, results;
  std::vector<Attribute> attributes;  // sorted by name, as XLA has them
};

// Calls `handler` as XLA would; the message of its error, or "".
inline std::string Invoke(XLA_FFI_Handler* handler, const Frame& frame, Pool* pool) {
  const auto lower = [](const std::vector<Buffer>& buffers, auto* lowered, auto* pointers) {
    for (const Buffer& buffer : buffers)
      lowered->push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, buffer.dtype, buffer.data,
                          static_cast<int64_t>(buffer.dims.size()), const_cast<int64_t*>(buffer.dims.data())});
    for (XLA_FFI_Buffer& buffer : *lowered) pointers->push_back(&buffer);
  };
  std::vector<XLA_FFI_Buffer> operands, results;
  std::vector<void*> operand_pointers, result_pointers, values;
  lower(frame.operands, &operands, &operand_pointers);
  lower(frame.results, &results, &result_pointers);
  std::vector<XLA_FFI_ArgType> operand_types(operands.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> result_types(results.size(), XLA_FFI_RetType_BUFFER);
  // Deques, since what is pointed to must stay where it is.
  std::deque<XLA_FFI_ByteSpan> names, strings;
  std::deque<XLA_FFI_Scalar> scalars;
  std::vector<XLA_FFI_ByteSpan*> name_pointers;
  std::vector<XLA_FFI_AttrType> types;
  for (const Attribute& attribute : frame.attributes) {
    names.push_back({attribute.name.data(), attribute.name.size()});
    name_pointers.push_back(&names.back());
    if (const auto* text = std::get_if<std::string>(&attribute.value)) {
      strings.push_back({text->data(), text->size()});
      types.push_back(XLA_FFI_AttrType_STRING), values.push_back(&strings.back());
      continue;
    }
    const XLA_FFI_DataType dtype = std::holds_alternative<int64_t>(attribute.value) ? XLA_FFI_DataType_S64
                                   : std::holds_alternative<bool>(attribute.value)  ? XLA_FFI_DataType_PRED
                                                                                    : XLA_FFI_DataType_F32;
    const void* at = std::visit([](const auto& value) { return static_cast<const void*>(&value); }, attribute.value);
    scalars.push_back({dtype, const_cast<void*>(at)});
    types.push_back(XLA_FFI_AttrType_SCALAR), values.push_back(&scalars.back());
  }
  XLA_FFI_CallFrame call{};
  call.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  call.api = &HostApi();
  call.ctx = reinterpret_cast<XLA_FFI_ExecutionContext*>(pool);
  call.stage = XLA_FFI_ExecutionStage_EXECUTE;
  call.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(operands.size()), operand_types.data(),
               operand_pointers.data()};
  call.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(results.size()), result_types.data(),
               result_pointers.data()};
  call.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,      static_cast<int64_t>(types.size()), types.data(),
                name_pointers.data(),      values.data()};
  const std::unique_ptr<XLA_FFI_Error> error(handler(&call));
  if (error == nullptr) return "";
  return error->message.empty() ? "an error without a message" : error->message;
}

}  // namespace jaxq::cpu::check

#endif  // JAXQ_KERNELS_CPU_SCRIPTS_FFI_HOST_H_
