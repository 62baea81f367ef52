// Fuzzes the FFI handlers: random shapes, formats, contents and thread pools, half of the calls spoiled in one to three
// places. Of the others a third gets random bits for contents.
//
//   fuzz_handlers [--seed 0] [--seconds 10 | --calls N] [--first I] [--verbose]
//
// A right call is served, and its results are held against float64 (or, for quantize, against the bits of `scalar`). A
// wrong one comes back as an error, before anything is written. Every buffer is as large as its shape says and no
// larger, beside memory that nobody may touch. Call I of a seed is always the same; after a crash, --verbose shows I.

#include <cinttypes>
#include <optional>

#include "ffi_attention.h"

using namespace jaxq::cpu;
using namespace jaxq::cpu::check;

namespace {

constexpr uint8_t kUntouched = 0xa5;

int64_t Below(Random* random, int64_t end) { return static_cast<int64_t>(random->Bits() % static_cast<uint64_t>(end)); }
bool Chance(Random* random, int64_t one_in) { return Below(random, one_in) == 0; }
template <typename T>
const T& Pick(Random* random, const std::vector<T>& from) {
  return from[static_cast<size_t>(Below(random, static_cast<int64_t>(from.size())))];
}

std::vector<std::string> UsableIsas() {
  std::vector<std::string> names = {""};
  for (int i = 0; i < IsaCount(); ++i)
    if (Missing(i) == nullptr) names.push_back(GetIsa(i).name);
  return names;
}

Wanted RandomCall(Random* random) {
  static const std::vector<std::string> isas = UsableIsas();
  static const std::vector<Format> formats = Formats();
  const std::vector<int64_t> rows = {0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 65, 130};
  Wanted c;
  c.op = Pick(random, std::vector<Op>{Op::kMatmul, Op::kMatmul, Op::kDequantize, Op::kQuantize});
  c.format = Pick(random, formats);
  for (int64_t i = Chance(random, 3) ? 1 + Below(random, 2) : 0; i > 0; --i) c.lead.push_back(Below(random, 4));
  c.M = Pick(random, rows), c.N = Below(random, Chance(random, 4) ? 200 : 40);
  c.K = Step(c.format) * Below(random, Chance(random, 4) ? 18 : 5);
  // The sums in float64 take most of the time.
  if (c.M * c.N * c.K > 1 << 20) c.M = 1 + c.M % 3;
  c.transpose = Chance(random, 2);
  c.x_dtype = static_cast<DType>(Below(random, 3)), c.scale_dtype = static_cast<DType>(Below(random, 3));
  c.isa = Pick(random, isas);
  if (c.op == Op::kMatmul && Chance(random, 4)) c.stack = 1 + Below(random, 3);
  return c;
}

// ---- what makes a call wrong, mostly

void SpoilShape(Random* random, std::vector<int64_t>* dims) {
  const int64_t axis = dims->empty() ? 0 : Below(random, static_cast<int64_t>(dims->size()));
  switch (Below(random, 6)) {
    case 0:
      dims->insert(dims->begin() + axis, Below(random, 3));
      break;
    case 1:
      if (!dims->empty()) dims->erase(dims->begin() + axis);
      break;
    case 2:
      dims->clear();
      break;
    default:
      if (!dims->empty()) {
        int64_t& dim = (*dims)[static_cast<size_t>(axis)];
        dim =
            Pick(random, std::vector<int64_t>{dim + 1, std::max<int64_t>(dim - 1, 0), 2 * dim, dim / 2, 0, 1, dim + 7});
      }
  }
}

void SpoilAttribute(Random* random, std::vector<Attribute>* attributes) {
  if (attributes->empty()) return;
  const auto at = attributes->begin() + Below(random, static_cast<int64_t>(attributes->size()));
  const std::vector<int64_t> numbers = {0, 1, -1, 2, 4, 7, 8, 16, 32, 64, 128, 256, INT64_MAX, INT64_MIN, 1 << 30};
  const std::vector<std::string> texts = {"",    "affine", "mxfp4",       "nvfp4",           "scalar", "avx2",
                                          "amx", "scala",  "avx512_vnni", std::string(1, 0), "Affine", "no such thing"};
  if (Chance(random, 8)) {
    attributes->erase(at);
  } else if (Chance(random, 8)) {
    attributes->push_back({"zzz", int64_t{1}});
  } else if (Chance(random, 4)) {
    at->value = Pick(random, std::vector<decltype(at->value)>{int64_t{4}, true, std::string("affine"), 1.0f});
  } else if (std::holds_alternative<int64_t>(at->value)) {
    at->value = Pick(random, numbers);
  } else if (std::holds_alternative<std::string>(at->value)) {
    at->value = Pick(random, texts);
  } else if (std::holds_alternative<bool>(at->value)) {
    at->value = !std::get<bool>(at->value);
  } else {
    at->value = Pick(random, std::vector<float>{0, -1, 1e30f, INFINITY, NAN});
  }
}

void Spoil(Random* random, Frame* frame) {
  const std::vector<XLA_FFI_DataType> types = {XLA_FFI_DataType_F32, XLA_FFI_DataType_F16,  XLA_FFI_DataType_BF16,
                                               XLA_FFI_DataType_F64, XLA_FFI_DataType_U8,   XLA_FFI_DataType_U32,
                                               XLA_FFI_DataType_S32, XLA_FFI_DataType_S16,  XLA_FFI_DataType_S4,
                                               XLA_FFI_DataType_S64, XLA_FFI_DataType_PRED, XLA_FFI_DataType_F8E4M3FN};
  if (Chance(random, 4)) return SpoilAttribute(random, &frame->attributes);
  std::vector<Buffer>* buffers = Chance(random, 3) ? &frame->results : &frame->operands;
  if (buffers->empty()) return;
  const auto at = buffers->begin() + Below(random, static_cast<int64_t>(buffers->size()));
  switch (Below(random, 8)) {
    case 0:
      buffers->erase(at);
      break;
    case 1:
      buffers->insert(at, Buffer(*at));
      break;
    case 2:
      std::swap(*at, buffers->back());
      break;
    case 3:
      at->dtype = Pick(random, types);
      break;
    default:
      SpoilShape(random, &at->dims);
  }
}

// ---- memory

// The frame's buffers, in memory of their own; results are filled with kUntouched.
class Memory {
 public:
  Memory(Random* random, Frame* frame) : frame_(frame) {
    for (std::vector<Buffer>* buffers : {&frame->operands, &frame->results}) {
      for (Buffer& buffer : *buffers) {
        const auto place = Chance(random, 4) ? Guarded::Place::kAfter : Guarded::Place::kBefore;
        held_.push_back(std::make_unique<Guarded>(Bytes(buffer), place));
        buffer.data = held_.back()->get();
      }
    }
    for (Buffer& buffer : frame->results) std::memset(buffer.data, kUntouched, static_cast<size_t>(Bytes(buffer)));
  }
  // Attention's caches are operands and results at once, where their sizes let them be.
  void Alias() {
    for (size_t i : {1, 2})
      if (frame_->results.size() > i && frame_->operands.size() > kCacheK + i - 1 &&
          Bytes(frame_->results[i]) == Bytes(frame_->operands[kCacheK + i - 1]))
        frame_->results[i].data = frame_->operands[kCacheK + i - 1].data;
  }
  void FillOperands(Random* random) {
    for (Buffer& buffer : frame_->operands)
      for (int64_t i = 0; i < Bytes(buffer); ++i) static_cast<uint8_t*>(buffer.data)[i] = (uint8_t)random->Bits();
  }
  std::vector<std::vector<uint8_t>> Results() const {
    std::vector<std::vector<uint8_t>> copies;
    for (const Buffer& buffer : frame_->results) {
      const uint8_t* data = static_cast<const uint8_t*>(buffer.data);
      copies.emplace_back(data, data + Bytes(buffer));
    }
    return copies;
  }

 private:
  Frame* frame_;
  std::vector<std::unique_ptr<Guarded>> held_;
};

// ---- results

const uint8_t* Data(const Buffer& buffer) { return static_cast<const uint8_t*>(buffer.data); }
void Put(const Buffer& buffer, const Guarded& from) {
  std::memcpy(buffer.data, from.get(), static_cast<size_t>(Bytes(buffer)));
}

// Serves the call, whose frame has its memory, and checks the results; "" or what is wrong.
std::string CheckServed(Random* random, const Wanted& c, const Frame& frame, Pool* pool) {
  const int64_t batch = Count(c.lead);
  if (c.op == Op::kQuantize) {
    const Floats w(random, c.x_dtype, batch * c.N * c.K, /*awkward=*/true);
    Put(frame.operands[0], w.data);
    if (const std::string error = Invoke(HandlerOf(c.op), frame, pool); !error.empty()) return error;
    Frame other = frame;
    Memory memory(random, &other);
    Put(other.operands[0], w.data);
    other.attributes[2].value = std::string("scalar");
    if (const std::string error = Invoke(HandlerOf(c.op), other, pool); !error.empty()) return error;
    for (size_t i = 0; i < frame.results.size(); ++i)
      if (std::memcmp(frame.results[i].data, other.results[i].data, static_cast<size_t>(Bytes(other.results[i]))) != 0)
        return "other bits than scalar's in result " + std::to_string(i);
    return "";
  }
  const size_t first = c.op == Op::kMatmul ? 1 : 0;
  const Weights w(random, c.format, std::max<int64_t>(c.stack, 1) * batch * c.N, c.K, c.scale_dtype);
  const Guarded* const leaves[] = {&w.packed, &w.scales, &w.biases};
  const size_t last = frame.operands.size() - (c.stack ? 1 : 0);
  for (size_t i = first; i < last; ++i) Put(frame.operands[i], *leaves[i - first]);
  int64_t element = 0;
  if (c.stack) {  // an index out of range is as good as the nearest one that is in range
    const int32_t index = Pick(random, std::vector<int32_t>{0, 1, 2, 3, -1, INT32_MAX, INT32_MIN});
    std::memcpy(frame.operands[last].data, &index, 4);
    element = std::clamp<int64_t>(index, 0, c.stack - 1);
  }
  const int64_t inner = c.transpose ? c.K : c.N, outer = c.transpose ? c.N : c.K;
  std::optional<Floats> x;
  if (first) Put(frame.operands[0], x.emplace(random, c.x_dtype, batch * c.M * inner).data);
  if (const std::string error = Invoke(HandlerOf(c.op), frame, pool); !error.empty()) return error;
  double worst = 0;
  if (!first) worst = WorstDequantized(w.values, w.sizes, c.x_dtype, Data(frame.results[0]));
  const double *values = w.values.data() + element * batch * c.N * c.K,
               *sizes = w.sizes.data() + element * batch * c.N * c.K;
  for (int64_t i = 0; first && i < batch; ++i)
    worst = std::fmax(worst, WorstProduct(c.transpose, c.M, c.N, c.K, x->values.data() + i * c.M * inner,
                                          values + i * c.N * c.K, sizes + i * c.N * c.K, c.x_dtype,
                                          Data(frame.results[0]) + i * c.M * outer * SizeOf(c.x_dtype)));
  return worst <= 1 ? "" : std::to_string(worst) + " times the bound";
}

struct Totals {
  int64_t right = 0, wild = 0, wrong = 0;
};

// Layers and positions that are often right: of random bits none is.
void PutSmallNumbers(Random* random, const Frame& frame) {
  for (const Buffer& buffer : frame.operands) {
    const int32_t number = static_cast<int32_t>(Below(random, 20)) - 2;
    if (buffer.dims.empty() && BytesOf(buffer.dtype) == 4 && !Chance(random, 4)) std::memcpy(buffer.data, &number, 4);
  }
}

// A right call of attention, with its memory.
std::string CheckAttended(Random* random, const Frame& frame, Pool* pool) {
  FillAttention(random, frame);
  std::vector<uint8_t> before[2];
  for (size_t i : {0, 1}) {
    const uint8_t* data = Data(frame.operands[kCacheK + i]);
    before[i].assign(data, data + Bytes(frame.operands[kCacheK + i]));
  }
  const std::string error = Invoke(HandlerOf(Op::kAttention), frame, pool);
  return error.empty() ? CheckAttention(frame, before) : error;
}

// Call `index` of `seed`; "" or what is wrong.
std::string RunCall(uint64_t seed, int64_t index, bool verbose, Pool* threads, Totals* totals, std::string* text) {
  Random random(seed * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(index) * 0xd1342543de82ef95u + 1);
  for (int i = 0; i < 8; ++i) random.Bits();  // seeds that differ little begin alike
  const Wanted call = RandomCall(&random);
  const bool attention = Chance(&random, 5);
  const Op op = attention ? Op::kAttention : call.op;
  Frame frame = attention ? AttentionFrame(&random, call.isa) : FrameOf(call);
  const bool spoiled = Chance(&random, 2), wild = spoiled || Chance(&random, 3);
  if (spoiled)
    for (int64_t i = Below(&random, 3); i >= 0; --i) Spoil(&random, &frame);
  *text = Text(op, frame);
  if (verbose) std::fprintf(stderr, "call %" PRId64 ": %s\n", index, text->c_str());
  const Start start = Pick(&random, std::vector<Start>{Start::kAfter, Start::kAtOnce, Start::kRefused});
  Pool other(static_cast<int>(Below(&random, 9)), 0, start);  // 0 threads: what XLA says where it can't tell
  Pool* pool = Chance(&random, 3) ? threads : &other;
  Memory memory(&random, &frame);
  if (attention) memory.Alias();
  if (!wild) ++totals->right;
  if (!wild) return attention ? CheckAttended(&random, frame, pool) : CheckServed(&random, call, frame, pool);
  memory.FillOperands(&random);
  if (attention) PutSmallNumbers(&random, frame);
  const std::vector<std::vector<uint8_t>> before = memory.Results();
  const std::string error = Invoke(HandlerOf(op), frame, pool);
  if (attention ? LegalAttention(frame) : Legal(op, frame)) return ++totals->wild, error;
  ++totals->wrong;
  if (error.empty()) return "it is wrong, and was served";
  return memory.Results() == before ? "" : "it is wrong, and something was written";
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t seed = 0;
  int64_t calls = -1, first = 0;
  double seconds = 10;
  bool verbose = false;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--verbose") verbose = true;
    if (i + 1 == argc) break;
    if (arg == "--seed") seed = std::strtoull(argv[++i], nullptr, 10);
    if (arg == "--seconds") seconds = std::strtod(argv[++i], nullptr);
    if (arg == "--calls") calls = std::strtoll(argv[++i], nullptr, 10);
    if (arg == "--first") first = std::strtoll(argv[++i], nullptr, 10);
  }
  const auto begin = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
  Totals totals;
  int64_t index = first;
  {
    Pool threads(3, 2, Start::kSoon);
    for (; calls >= 0 ? index < first + calls : elapsed() < seconds; ++index) {
      std::string text;
      const std::string problem = RunCall(seed, index, verbose, &threads, &totals, &text);
      if (problem.empty()) continue;
      std::printf("FAILED call %" PRId64 " of seed %" PRIu64 ": %s\n  %s\n", index, seed, problem.c_str(),
                  text.c_str());
      return 1;
    }
  }
  std::printf("handlers: %" PRId64 " right calls, %" PRId64 " of random bits, %" PRId64 " wrong; %.0f s, seed %" PRIu64
              "\n",
              totals.right, totals.wild, totals.wrong, elapsed(), seed);
  return totals.right && totals.wrong ? 0 : 1;
}
