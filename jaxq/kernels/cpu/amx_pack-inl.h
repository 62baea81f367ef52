// The two operands of amx.cc's products, a step of 32 codes at a time.
//
//   A, the weight: 16 rows of codes as bfloat16, less the middle of their range: exact, and small enough that bias and
//   code do not cancel. Scales wait until a group has been summed in float32.
//   B, the rows of x, 16 columns to a tile: as many bfloat16 parts as hold every bit of them: 1 of bfloat16, 2 of
//   float16, 3 of float32. Each part cuts off 8 bits, so what is left after each is exact.
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

constexpr int64_t kStep = 32;     // codes
constexpr int64_t kSide = 16;     // rows of a tile, and columns of a result
constexpr int64_t kHalves = 512;  // bfloat16 in a tile
constexpr int64_t kFloats = 256;  // floats in a tile

// The codes of one step out of a row of w.
class StepUnpacker {
 public:
  explicit StepUnpacker(const Format& format) : format_(format), bytes_(kStep / 8 * format.bits) {
    alignas(64) uint16_t shifts[32], low[32], high[32];
    alignas(64) uint8_t spread[64];
    const int centre = format.affine() ? 1 << (format.bits - 1) : 0;
    for (int i = 0; i < 32; ++i) {
      const int bit = i * format.bits;
      // Nibbles: 4 copies of 16 bytes; halfword i of copy c gives nibble c. Other widths: the 2 bytes of every code.
      shifts[i] = static_cast<uint16_t>(format.bits == 4 ? i / 8 * 4 : bit % 8);
      spread[2 * i] = static_cast<uint8_t>(bit / 8), spread[2 * i + 1] = static_cast<uint8_t>(bit / 8 + 1);
      low[i] = TableEntry(i, centre), high[i] = TableEntry(i + 32, centre);
    }
    shifts_ = _mm512_load_si512(shifts), spread_ = _mm512_load_si512(spread);
    low_ = _mm512_load_si512(low), high_ = _mm512_load_si512(high);
    alignas(64) uint16_t upper[32];
    for (int i = 0; i < 32; ++i) upper[i] = static_cast<uint16_t>(2 * i + 1);
    upper_ = _mm512_load_si512(upper);
  }

  int64_t step_bytes() const { return bytes_; }

  // What is subtracted from the codes.
  float centre() const { return format_.affine() ? static_cast<float>(1 << (format_.bits - 1)) : 0.0f; }

  // Which code of a step stands at place i.
  int Order(int i) const { return format_.bits == 4 ? i % 8 * 4 + i / 8 : i; }

  // A tile: 16 rows, of which `rows` exist; the others repeat the last.
  void Tile(const uint8_t* src, int64_t row_bytes, int64_t rows, uint16_t* out) const {
    const StepUnpacker u = *this;  // in registers: stores to `out` might be to *this, as far as the compiler knows
    if (u.format_.mode == Mode::kMxfp8) return Rows(src, row_bytes, rows, out, [&](auto* p) { return u.E4m3(p); });
    if (u.format_.bits == 4) return Rows(src, row_bytes, rows, out, [&](auto* p) { return u.Nibbles(p); });
    if (u.format_.bits < 6) return Rows(src, row_bytes, rows, out, [&](auto* p) { return u.Narrow(p); });
    if (u.format_.bits == 6) return Rows(src, row_bytes, rows, out, [&](auto* p) { return u.SixBits(p); });
    Rows(src, row_bytes, rows, out, [&](auto* p) { return u.Bytes(p); });
  }

 private:
  // The value of a code (twice that of E2M1, see simd-inl.h), whatever stands in the bits above it, as bfloat16: at
  // most 8 bits, so cutting is exact.
  uint16_t TableEntry(int code, int centre) const {
    const uint32_t low = static_cast<uint32_t>(code) & ((1u << format_.bits) - 1u);
    const float value = format_.affine() ? static_cast<float>(static_cast<int>(low) - centre)
                                         : static_cast<float>(kTwiceE2m1[low & 15u]);
    return static_cast<uint16_t>(BitsOfFloat(value) >> 16);
  }

  template <typename Row>
  JAXQ_INLINE static void Rows(const uint8_t* src, int64_t row_bytes, int64_t rows, uint16_t* out, Row&& row) {
    if (rows == kSide) {
      for (int64_t r = 0; r < kSide; ++r) _mm512_store_si512(out + 32 * r, row(src + r * row_bytes));
      return;
    }
    for (int64_t r = 0; r < kSide; ++r) _mm512_store_si512(out + 32 * r, row(src + Least(r, rows - 1) * row_bytes));
  }

  JAXQ_INLINE __m512i Nibbles(const uint8_t* src) const {
    const __m512i copies = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(copies, shifts_), low_);  // takes the low 5 bits of each
  }
  JAXQ_INLINE __m512i Fields(const uint8_t* src) const {
    const __m512i bytes = _mm512_maskz_loadu_epi8(FirstBytes(bytes_), src);
    return _mm512_srlv_epi16(_mm512_permutexvar_epi8(spread_, bytes), shifts_);
  }
  JAXQ_INLINE __m512i Narrow(const uint8_t* src) const { return _mm512_permutexvar_epi16(Fields(src), low_); }
  JAXQ_INLINE __m512i SixBits(const uint8_t* src) const {
    return _mm512_permutex2var_epi16(low_, Fields(src), high_);  // takes the low 6 bits of each
  }
  // 2 vectors of floats that bfloat16 holds exactly.
  JAXQ_INLINE __m512i Upper(__m512 first, __m512 second) const {
    return _mm512_permutex2var_epi16(_mm512_castps_si512(first), upper_, _mm512_castps_si512(second));
  }
  JAXQ_INLINE __m512i Bytes(const uint8_t* src) const {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
    const __m256i less = _mm256_xor_si256(codes, _mm256_set1_epi8(INT8_MIN));
    return Upper(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(less))),
                 _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(less, 1))));
  }
  // E4M3 shifted into float16 is 2**-8 of its value, subnormal numbers included. S.1111.111 is NaN.
  JAXQ_INLINE __m512i E4m3(const uint8_t* src) const {
    const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)));
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
  __m512i shifts_, spread_, low_, high_, upper_;
};

JAXQ_INLINE int64_t PartsOf(DType dtype) { return dtype == DType::kF32 ? 3 : dtype == DType::kF16 ? 2 : 1; }

// Rows of x as tiles [step][part][block of 16 columns][512], and their sums over groups [group][16*blocks].
struct PackedX {
  int64_t rows, blocks, parts;
  uint16_t* tiles;
  float* sums;

  uint16_t* Tile(int64_t step, int64_t part) const { return tiles + (step * parts + part) * blocks * kHalves; }
};

// A step of one row of x in the order of the codes, cut into parts.
class StepSplitter {
 public:
  StepSplitter(const MatmulArgs& args, const StepUnpacker& unpacker) : dtype_(args.x_dtype), parts_(PartsOf(dtype_)) {
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
      const __m512i values = _mm512_loadu_si512(static_cast<const uint16_t*>(x) + at);
      parts[0] = _mm512_permutexvar_epi16(order_, values);
      const __m512i even = _mm512_slli_epi32(values, 16), odd = _mm512_and_si512(values, _mm512_set1_epi32(-65536));
      *sum = _mm512_add_ps(*sum, _mm512_add_ps(_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)));
      return;
    }
    __m512 first, second;
    if (dtype_ == DType::kF32) {
      first = _mm512_loadu_ps(static_cast<const float*>(x) + at);
      second = _mm512_loadu_ps(static_cast<const float*>(x) + at + 16);
    } else {
      first = LoadF16(static_cast<const uint16_t*>(x) + at),
      second = LoadF16(static_cast<const uint16_t*>(x) + at + 16);
    }
    *sum = _mm512_add_ps(*sum, _mm512_add_ps(first, second));
    for (int64_t part = 0; part < parts_; ++part) {
      parts[part] = _mm512_permutex2var_epi16(_mm512_castps_si512(first), upper_, _mm512_castps_si512(second));
      first = _mm512_sub_ps(first, Cut(first)), second = _mm512_sub_ps(second, Cut(second));
    }
  }

 private:
  JAXQ_INLINE static __m512 Cut(__m512 v) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(-65536)));
  }

  DType dtype_;
  int64_t parts_;
  __m512i upper_, order_;
};

// One group of 16 columns: rows first .. of x from m0 on.
void PackGroup(const MatmulArgs& args, const StepSplitter& splitter, int64_t m0, int64_t block, int64_t group,
               const PackedX& out) {
  const int64_t g = args.format.group_size, first = block * kSide, rows = Least(kSide, out.rows - first);
  alignas(64) float sums[kSide] = {};
  __m512 lanes[kSide];
  for (__m512& lane : lanes) lane = _mm512_setzero_ps();
  for (int64_t step = group * g / kStep; step < (group + 1) * g / kStep; ++step) {
    __m512i tiles[3][kSide];
    for (auto& tile : tiles)
      for (__m512i& row : tile) row = _mm512_setzero_si512();
    for (int64_t r = 0; r < rows; ++r) {
      __m512i parts[3];
      splitter.Split(args.x, (m0 + first + r) * args.K + step * kStep, parts, &lanes[r]);
      for (int64_t p = 0; p < out.parts; ++p) tiles[p][r] = parts[p];
    }
    for (int64_t p = 0; p < out.parts; ++p) {
      TransposeWords(tiles[p]);
      uint16_t* tile = out.Tile(step, p) + block * kHalves;
      for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + 32 * i, tiles[p][i]);
    }
  }
  for (int64_t r = 0; r < rows; ++r) sums[r] = _mm512_reduce_add_ps(lanes[r]);
  _mm512_store_ps(out.sums + group * out.blocks * kSide + first, _mm512_load_ps(sums));
}

// Scales and biases of 16 rows and up to kScaleGroups groups, [group][row]. The codes' centre goes into the biases.
constexpr int64_t kScaleGroups = 64;

struct TileScales {
  float values[2][kScaleGroups][kSide];  // scales, then biases
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

// One group's tiles of products, [16 rows of w][16 columns], side by side for each block of columns.
struct Products {
  const float* tiles;
  const float* x_sums;  // of the group and its columns
  int64_t group;        // in TileScales
};

// sums[block] += products times scales + x's sums times biases, for rows first .. last of 16 rows of w: a sum is loaded
// and stored once for all groups, since stores are what the vector units have least of.
template <bool kAffine, int kGroups, int kBlocks>
JAXQ_INLINE void AddScaled(const Products* products, const TileScales& scales, int64_t first, int64_t last,
                           float* sums) {
  const float *tiles[kGroups], *scale[kGroups];
  __m512 x_sums[kGroups][kBlocks];
  for (int i = 0; i < kGroups; ++i) {
    tiles[i] = products[i].tiles, scale[i] = scales.values[0][products[i].group];
    for (int c = 0; c < kBlocks; ++c) x_sums[i][c] = _mm512_load_ps(products[i].x_sums + c * kSide);
  }
  constexpr int64_t kBias = kSide * kScaleGroups;  // from a scale to its bias
  for (int64_t r = first; r < last; ++r) {
    __m512 sum[kBlocks];
    for (int c = 0; c < kBlocks; ++c) sum[c] = _mm512_load_ps(sums + c * kFloats + r * kSide);
    for (int i = 0; i < kGroups; ++i) {
      const __m512 s = _mm512_set1_ps(scale[i][r]);
      for (int c = 0; c < kBlocks; ++c)
        sum[c] = _mm512_fmadd_ps(_mm512_load_ps(tiles[i] + c * kFloats + r * kSide), s, sum[c]);
      if constexpr (!kAffine) continue;
      const __m512 b = _mm512_set1_ps(scale[i][r + kBias]);
      for (int c = 0; c < kBlocks; ++c) sum[c] = _mm512_fmadd_ps(x_sums[i][c], b, sum[c]);
    }
    for (int c = 0; c < kBlocks; ++c) _mm512_store_ps(sums + c * kFloats + r * kSide, sum[c]);
  }
}

// The same for one or two groups.
template <int kBlocks>
void AddGroups(bool affine, int64_t count, const Products* products, const TileScales& scales, int64_t first,
               int64_t last, float* sums) {
  if (affine && count == 2) return AddScaled<true, 2, kBlocks>(products, scales, first, last, sums);
  if (affine) return AddScaled<true, 1, kBlocks>(products, scales, first, last, sums);
  if (count == 2) return AddScaled<false, 2, kBlocks>(products, scales, first, last, sums);
  AddScaled<false, 1, kBlocks>(products, scales, first, last, sums);
}

// Sums of 16 rows of w by one block of columns, written to y.
void WriteTile(const MatmulArgs& args, const PackedX& x, int64_t m0, int64_t block, int64_t n, const float* sums) {
  __m512 columns[kSide];
  for (int64_t i = 0; i < kSide; ++i) columns[i] = _mm512_load_ps(sums + kSide * i);
  Transpose(columns);
  const int64_t count = Least(kSide, args.N - n), first = block * kSide, rows = Least(kSide, x.rows - first);
  for (int64_t r = 0; r < rows; ++r) {
    alignas(64) float out[kSide];
    _mm512_store_ps(out, columns[r]);
    FromFloats(args.x_dtype, out, count, args.y, (m0 + first + r) * args.N + n);
  }
}

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_AMX_PACK_INL_H_
