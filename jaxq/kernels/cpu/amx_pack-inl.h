// The two operands of amx_codes-inl.h's products, a step of up to 32 codes at a time. (amx_parts-inl.h has another A.)
//
//   A, the weight: 16 rows of codes as bfloat16, less the middle of their range: exact, and small enough that bias and
//   code do not cancel. Scales wait until a group has been summed in float32.
//   B, the rows of x, 16 columns to a tile, [pair of codes][column][2]: as many bfloat16 parts as hold every bit of them:
//   1 of bfloat16, 2 of float16, 3 of float32. Each part cuts off 8 bits, so what is left after each is exact.
//
// So every product is exact, and only the sums are rounded, to float32. (The tile unit takes subnormal numbers for
// zeros: x below 2**-126, or the parts of x below 2**-110.)

#ifndef JAXQ_KERNELS_CPU_AMX_PACK_INL_H_
#define JAXQ_KERNELS_CPU_AMX_PACK_INL_H_

#include "scales-inl.h"
#include "simd-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kStep = 32;            // codes, fewer where a group has fewer
constexpr int64_t kSide = 16;            // rows of a tile, and columns of a result
constexpr int64_t kHalves = 512;         // bfloat16 in a tile
constexpr int64_t kFloats = 256;         // floats in a tile
constexpr int64_t kAheadBytes = 128;     // of a row of w, that are fetched ahead
constexpr int64_t kTaskBlocks = 16;      // of 16 rows of w in a task, at most
constexpr int64_t kPassBytes = 8 << 20;  // of packed x at a time

JAXQ_INLINE __m512 Cut(__m512 v) {  // what bfloat16 holds of it
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(-65536)));
}

// The upper halves of two vectors, interleaved.
JAXQ_INLINE __m512i UpperHalves(__m512 even, __m512 odd) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_castps_si512(odd));
}

JAXQ_INLINE int64_t PartsOf(DType dtype) { return dtype == DType::kF32 ? 3 : dtype == DType::kF16 ? 2 : 1; }
JAXQ_INLINE int64_t DepthOf(const Format& format) { return Least(kStep, format.group_size); }

// What is subtracted from the codes.
JAXQ_INLINE float CentreOf(const Format& format) {
  return format.affine() ? static_cast<float>(1 << (format.bits - 1)) : 0.0f;
}

// `values` of the `bytes` bytes of each step as a row of its tile.
template <typename Values>
JAXQ_INLINE void RowsToTiles(const uint8_t* src, int64_t row_bytes, int64_t rows, int64_t steps, int64_t bytes,
                             uint16_t* out, Values&& values) {
  for (int64_t r = 0; r < kSide; ++r, out += 32) {
    const uint8_t* from = src;
    uint16_t* to = out;
    for (int64_t i = 0; i < steps; ++i, from += bytes, to += kHalves) _mm512_store_si512(to, values(from));
    _mm_prefetch(reinterpret_cast<const char*>(src + kAheadBytes), _MM_HINT_T0);
    if (r + 1 < rows) src += row_bytes;
  }
}

// The codes of one step out of a row of w, as bfloat16.
class StepUnpacker {
 public:
  explicit StepUnpacker(const Format& format)
      : format_(format),
        bytes_(DepthOf(format) / 8 * format.bits),
        there_(static_cast<__mmask32>(FirstBytes(bytes_))),
        nibbles_(format.bits == 4 && DepthOf(format) == kStep) {
    alignas(64) uint16_t shifts[32], low[32], high[32], upper[32];
    alignas(64) uint8_t spread[64];
    for (int i = 0; i < 32; ++i) {
      const int bit = i * format.bits;
      // Nibbles: 4 copies of 16 bytes; halfword i of copy c gives nibble c. Other widths: the 2 bytes of every code.
      shifts[i] = static_cast<uint16_t>(nibbles_ ? i / 8 * 4 : bit % 8);
      spread[2 * i] = static_cast<uint8_t>(bit / 8), spread[2 * i + 1] = static_cast<uint8_t>(bit / 8 + 1);
      // At most 8 bits, so cutting is exact.
      low[i] = static_cast<uint16_t>(BitsOfFloat(Value(i)) >> 16);
      high[i] = static_cast<uint16_t>(BitsOfFloat(Value(i + 32)) >> 16);
      upper[i] = static_cast<uint16_t>(2 * i + 1);
    }
    shifts_ = _mm512_load_si512(shifts), spread_ = _mm512_load_si512(spread), upper_ = _mm512_load_si512(upper);
    low_ = _mm512_load_si512(low), high_ = _mm512_load_si512(high);
  }

  // The value of a code (twice that of E2M1, see simd-inl.h), less the centre, whatever stands in the bits above it.
  float Value(int code) const {
    const uint32_t low = static_cast<uint32_t>(code) & ((1u << format_.bits) - 1u);
    return format_.affine() ? static_cast<float>(low) - centre() : static_cast<float>(kTwiceE2m1[low & 15u]);
  }

  float centre() const { return CentreOf(format_); }
  int64_t step_bytes() const { return bytes_; }
  bool nibbles() const { return nibbles_; }

  // Which code of a step stands at place i.
  int Order(int i) const { return nibbles_ ? i % 8 * 4 + i / 8 : i; }

  // Calls `use` with what makes values of the bytes of a step.
  template <typename Use>
  JAXQ_INLINE void With(Use&& use) const {
    const StepUnpacker u = *this;  // in registers: stores might be to *this, as far as the compiler knows
    if (u.format_.mode == Mode::kMxfp8) return use([&](const uint8_t* p) { return u.E4m3(p); });
    if (u.nibbles_) return use([&](const uint8_t* p) { return u.LookUp(Nibbles(p, u.shifts_)); });
    if (u.format_.bits < 6) return use([&](const uint8_t* p) { return u.LookUp(u.Fields(p)); });
    if (u.format_.bits == 6) return use([&](const uint8_t* p) { return u.SixBits(p); });
    use([&](const uint8_t* p) { return u.Bytes(p); });
  }

  // `steps` steps from `src` on into as many tiles. 16 rows, of which `rows` exist; the others repeat the last. Fetches
  // what follows in each row: a few bytes of every row at a time are nothing that the CPU foresees.
  void Tiles(const uint8_t* src, int64_t row_bytes, int64_t rows, int64_t steps, uint16_t* out) const {
    const int64_t bytes = bytes_;
    With([&](auto&& values) __attribute__((always_inline)) {
      RowsToTiles(src, row_bytes, rows, steps, bytes, out, values);
    });
  }

  // The nibbles of a step in the low bits of 16, below others.
  JAXQ_INLINE static __m512i Nibbles(const uint8_t* src, __m512i shifts) {
    const __m512i copies = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
    return _mm512_srlv_epi16(copies, shifts);
  }
  __m512i shifts() const { return shifts_; }

 private:
  JAXQ_INLINE __m256i CodeBytes(const uint8_t* src) const { return _mm256_maskz_loadu_epi8(there_, src); }
  JAXQ_INLINE __m512i LookUp(__m512i fields) const {
    return _mm512_permutexvar_epi16(fields, low_);  // takes the low 5 bits of each
  }
  // As Nibbles, of other widths up to 6.
  JAXQ_INLINE __m512i Fields(const uint8_t* src) const {
    const __m512i bytes = _mm512_castsi256_si512(CodeBytes(src));
    return _mm512_srlv_epi16(_mm512_permutexvar_epi8(spread_, bytes), shifts_);
  }
  JAXQ_INLINE __m512i SixBits(const uint8_t* src) const {
    return _mm512_permutex2var_epi16(low_, Fields(src), high_);  // takes the low 6 bits of each
  }
  // 2 vectors of floats that bfloat16 holds exactly.
  JAXQ_INLINE __m512i Upper(__m512 first, __m512 second) const {
    return _mm512_permutex2var_epi16(_mm512_castps_si512(first), upper_, _mm512_castps_si512(second));
  }
  JAXQ_INLINE __m512i Bytes(const uint8_t* src) const {
    const __m256i less = _mm256_xor_si256(CodeBytes(src), _mm256_set1_epi8(INT8_MIN));
    return Upper(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(less))),
                 _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(less, 1))));
  }
  // E4M3 shifted into float16 is 2**-8 of its value, subnormal numbers included. S.1111.111 is NaN.
  JAXQ_INLINE __m512i E4m3(const uint8_t* src) const {
    const __m512i codes = _mm512_cvtepu8_epi16(CodeBytes(src));
    const __m512i size = _mm512_and_si512(codes, _mm512_set1_epi16(0x7f));
    const __m512i sign = _mm512_slli_epi16(_mm512_xor_si512(codes, size), 8);
    const __m512i half = _mm512_or_si512(_mm512_slli_epi16(size, 7), sign);
    const __m512i values =
        Upper(_mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), _mm512_set1_ps(256.0f)),
              _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), _mm512_set1_ps(256.0f)));
    return _mm512_mask_mov_epi16(values, _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(0x7f)),
                                 _mm512_set1_epi16(0x7fc0));
  }

  Format format_;
  int64_t bytes_;
  __mmask32 there_;
  bool nibbles_;  // of which 16 bytes are loaded together
  __m512i shifts_, spread_, low_, high_, upper_;
};

// Rows of x as B tiles, [chunk of blocks of 16 rows][step][block][part][512], and their sums over groups, and what the
// digits of a group count in, if digits are the parts, [block][group][16] each.
struct PackedX {
  int64_t rows, steps, groups, parts;
  int64_t chunk;  // blocks in a chunk; the last one may have fewer
  uint16_t* tiles;
  float *sums, *units;

  JAXQ_INLINE int64_t blocks() const { return Ceil(rows, kSide); }
  JAXQ_INLINE int64_t InChunk(int64_t first) const { return Least(chunk, blocks() - first); }
  JAXQ_INLINE uint16_t* Tile(int64_t block, int64_t step) const {
    const int64_t at = block % chunk, first = block - at;
    return tiles + (first * steps + step * InChunk(first) + at) * parts * kHalves;
  }
  JAXQ_INLINE float* Sums(int64_t block, int64_t group) const { return sums + (block * groups + group) * kSide; }
  JAXQ_INLINE float* Units(int64_t block, int64_t group) const { return units + (block * groups + group) * kSide; }
};

// A step of one row of x in the order of the codes, cut into parts.
class StepSplitter {
 public:
  StepSplitter(DType dtype, const StepUnpacker& unpacker, int64_t depth)
      : dtype_(dtype), depth_(depth), there_(FirstLanes(depth)) {
    alignas(64) uint16_t upper[32], order[32];
    for (int i = 0; i < 32; ++i) {
      order[i] = static_cast<uint16_t>(unpacker.Order(i));
      upper[i] = static_cast<uint16_t>(2 * order[i] + 1);
    }
    upper_ = _mm512_load_si512(upper), order_ = _mm512_load_si512(order);
  }

  // Adds the values to sum[0..15].
  JAXQ_INLINE void Split(const void* x, int64_t at, __m512i* parts, __m512* sum) const {
    if (dtype_ == DType::kBF16) {
      const auto there = static_cast<__mmask32>(FirstBytes(depth_));
      const __m512i values = _mm512_maskz_loadu_epi16(there, static_cast<const uint16_t*>(x) + at);
      parts[0] = _mm512_permutexvar_epi16(order_, values);
      const __m512i even = _mm512_slli_epi32(values, 16), odd = _mm512_and_si512(values, _mm512_set1_epi32(-65536));
      *sum = _mm512_add_ps(*sum, _mm512_add_ps(_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)));
      return;
    }
    __m512 first = LoadSome(dtype_, x, at, there_), second = _mm512_setzero_ps();
    if (depth_ > 16) second = LoadSome(dtype_, x, at + 16, 0xffff);
    *sum = _mm512_add_ps(*sum, _mm512_add_ps(first, second));
    for (int64_t part = 0; part < PartsOf(dtype_); ++part) {
      parts[part] = _mm512_permutex2var_epi16(_mm512_castps_si512(first), upper_, _mm512_castps_si512(second));
      first = _mm512_sub_ps(first, Cut(first)), second = _mm512_sub_ps(second, Cut(second));
    }
  }

 private:
  DType dtype_;
  int64_t depth_;
  __mmask16 there_;
  __m512i upper_, order_;
};

// One group of a block of 16 rows of x; m: the first of these in args.x.
void PackGroup(const MatmulArgs& args, const StepSplitter& splitter, int64_t m, int64_t block, int64_t group,
               const PackedX& out) {
  const int64_t steps = out.steps / out.groups, depth = args.format.group_size / steps;
  const int64_t rows = Least(kSide, out.rows - block * kSide);
  __m512 lanes[kSide];
  for (__m512& lane : lanes) lane = _mm512_setzero_ps();
  for (int64_t step = group * steps; step < (group + 1) * steps; ++step) {
    __m512i tiles[3][kSide];
    for (auto& tile : tiles)
      for (__m512i& row : tile) row = _mm512_setzero_si512();
    for (int64_t r = 0; r < rows; ++r) {
      __m512i parts[3];
      splitter.Split(args.x, (m + r) * args.K + step * depth, parts, &lanes[r]);
      for (int64_t p = 0; p < out.parts; ++p) tiles[p][r] = parts[p];
    }
    for (int64_t p = 0; p < out.parts; ++p) {
      TransposeWords(tiles[p]);
      uint16_t* tile = out.Tile(block, step) + p * kHalves;
      for (int i = 0; i < kSide; ++i) _mm512_store_si512(tile + 32 * i, tiles[p][i]);
    }
  }
  float* sums = out.Sums(block, group);
  for (int64_t r = 0; r < kSide; ++r) sums[r] = _mm512_reduce_add_ps(lanes[r]);
}

// Calls pack(block, group) for all of a pass.
template <typename Pack>
void ForGroups(const MatmulArgs& args, const Parallel& parallel, const PackedX& x, Pack&& pack) {
  const int64_t together = Most(1, 1024 / args.format.group_size), chunks = Ceil(x.groups, together);
  parallel.For(x.blocks() * chunks, [&](int64_t task, int) {
    const int64_t block = task / chunks, first = task % chunks * together;
    for (int64_t group = first; group < Least(x.groups, first + together); ++group) pack(block, group);
  });
}

// Scales and biases of 16 rows and up to kScaleGroups groups, [group][row]. The codes' centre goes into the biases.
constexpr int64_t kScaleGroups = 64;

struct TileScales {
  alignas(64) float values[2][kScaleGroups][kSide];  // scales, then biases
};

void FillScales(const Weight& weight, int64_t n, int64_t first, int64_t count, float centre, TileScales* out) {
  const F middle = Set1(centre);
  for (int64_t j = 0; j < count; j += kSide) {
    const __mmask16 there = FirstLanes(count - j);
    F scales[kSide], biases[kSide];
    for (int64_t r = 0; r < kSide; ++r) {
      const int64_t at = Least(n + r, weight.rows - 1) * weight.groups + first + j;
      scales[r] = LoadScales(weight, at, there);
      if (!weight.format.affine()) continue;
      biases[r] = Fma(scales[r], middle, LoadSome(weight.scale_dtype, weight.biases, at, there));
    }
    Transpose(scales);
    for (int64_t i = 0; i < kSide; ++i) Store(out->values[0][j + i], scales[i]);
    if (!weight.format.affine()) continue;
    Transpose(biases);
    for (int64_t i = 0; i < kSide; ++i) Store(out->values[1][j + i], biases[i]);
  }
}

// Sums of 16 rows of w, from n on, by 16 rows of x, of which `rows` exist, from m on, written to y.
void WriteTile(const MatmulArgs& args, int64_t m, int64_t rows, int64_t n, const float* sums) {
  __m512 columns[kSide];
  for (int64_t i = 0; i < kSide; ++i) columns[i] = _mm512_load_ps(sums + kSide * i);
  Transpose(columns);
  const int64_t count = Least(kSide, args.N - n), at = m * args.N + n;
  if (args.x_dtype == DType::kBF16 && count == kSide) {
    for (int64_t r = 0; r < rows; ++r) StoreBf16(static_cast<uint16_t*>(args.y) + at + r * args.N, columns[r]);
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    alignas(64) float out[kSide];
    _mm512_store_ps(out, columns[r]);
    FromFloats(args.x_dtype, out, count, args.y, at + r * args.N);
  }
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_AMX_PACK_INL_H_
