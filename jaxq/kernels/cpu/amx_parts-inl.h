// Rows of w as tiles of bfloat16 with their scales and biases inside, for amx_dense-inl.h.
//
// A value, dequantized in float32, is cut into two parts: the first is rounded to bfloat16, the second is what is left,
// cut to bfloat16. Together they are wrong by 2**-16 of the value at most, 2**-7 of what rounding a result to bfloat16
// may take. The float modes need one: 4 bits of a code by 4 of a scale at most are exact.

#ifndef JAXQ_KERNELS_CPU_AMX_PARTS_INL_H_
#define JAXQ_KERNELS_CPU_AMX_PARTS_INL_H_

#include "amx_pack-inl.h"
#include "scales-inl.h"

namespace jaxq::cpu {
namespace JAXQ_ISA {
namespace {

constexpr int64_t kSlabSteps = 32;  // steps that are unpacked together, at most
constexpr int64_t kSlabGroups = 16;

// Where a group's codes can take few values, a table of them is made once per group, and codes look up their parts;
// otherwise every code is dequantized by itself. In what order the codes of a step stand is up to the unpacker, which
// tells it to whoever packs x.
class PartsUnpacker {
 public:
  explicit PartsUnpacker(const Weight& weight)
      : weight_(weight),
        parts_(weight.format.affine() ? 2 : 1),
        group_(weight.format.group_size),
        group_shift_(__builtin_ctzll(static_cast<uint64_t>(group_))),
        bits_(weight.format.bits),
        step_bytes_(kStep / 8 * bits_),
        tables_(weight.kind != Kind::kE4m3 && (bits_ < 5 || (bits_ == 5 && group_ >= kStep))) {
    alignas(64) uint16_t shifts[32], second[32], once[32], twice[32];
    alignas(64) uint8_t spread[64];
    for (int i = 0; i < 32; ++i) {
      const int bit = i * bits_;
      // Nibbles: 4 copies of 16 bytes; halfword i of copy c gives nibble c. Other widths: the 2 bytes of every code.
      shifts[i] = static_cast<uint16_t>(bits_ == 4 ? i / 8 * 4 : bit % 8);
      spread[2 * i] = static_cast<uint8_t>(bit / 8), spread[2 * i + 1] = static_cast<uint8_t>(bit / 8 + 1);
      second[i] = Order(i) >= kSide ? 16 : 0;
      values_[i] = ValueOf(i);
      once[i] = static_cast<uint16_t>(2 * (i % 16) + 1), twice[i] = static_cast<uint16_t>(2 * i + 1);
    }
    once_ = _mm512_load_si512(once), twice_ = _mm512_load_si512(twice);
    shifts_ = _mm512_load_si512(shifts), spread_ = _mm512_load_si512(spread), second_ = _mm512_load_si512(second);
  }

  // Which code of a step stands at place i.
  int Order(int i) const { return tables_ && bits_ == 4 ? i % 8 * 4 + i / 8 : i; }
  int64_t parts() const { return parts_; }
  int64_t MaxSteps() const { return Least(kSlabSteps, kSlabGroups * group_ / kStep); }
  // From a step's tiles, two of each part, to the next one's, with a line between them: at a distance of whole pages
  // every store of a row would look to the CPU like one to the tiles that it is about to load.
  int64_t step_halves() const { return parts_ * 2 * kHalves + 32; }

  // Steps first .. first+steps, at most MaxSteps() and whole groups, of one row; part p of step i goes to
  // out + i * step_halves() + p * 2 * kHalves, as 32 halves.
  JAXQ_INLINE void Row(int64_t row, int64_t first, int64_t steps, uint16_t* out) const {
    if (!tables_) return Each(row, first, steps, out);
    if (parts_ == 1) return LookUp<1, true>(row, first, steps, out);
    return bits_ == 4 ? LookUp<2, true>(row, first, steps, out) : LookUp<2, false>(row, first, steps, out);
  }

  // Asks for what Row reads.
  JAXQ_INLINE void Prefetch(int64_t row, int64_t first, int64_t steps) const {
    const uint8_t* src = weight_.packed + row * weight_.row_bytes + first * step_bytes_;
    for (int64_t at = 0; at < steps * step_bytes_; at += 64) Fetch(src + at);
    const int64_t group = row * weight_.groups + ((first * kStep) >> group_shift_);
    const int64_t width = weight_.format.affine() ? SizeOf(weight_.scale_dtype) : 1;
    Fetch(static_cast<const uint8_t*>(weight_.scales) + group * width);
    if (weight_.format.affine()) Fetch(static_cast<const uint8_t*>(weight_.biases) + group * width);
  }

 private:
  JAXQ_INLINE static void Fetch(const uint8_t* line) {
    _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1);
  }

  // What a code stands for (E2M1: twice that, see LoadScales), whatever stands in the bits above it.
  float ValueOf(int code) const {
    const uint32_t low = static_cast<uint32_t>(code) & ((1u << bits_) - 1u);
    return static_cast<float>(weight_.format.affine() ? static_cast<int>(low) : kTwiceE2m1[low & 15u]);
  }

  // The scales and biases of up to 16 groups of one row.
  JAXQ_INLINE void LoadGroups(int64_t row, int64_t first, int64_t count, float* scales, float* biases) const {
    const int64_t at = row * weight_.groups + first;
    _mm512_store_ps(scales, LoadScales(weight_, at, FirstLanes(count)));
    _mm512_store_ps(biases, weight_.format.affine()
                                ? LoadSome(weight_.scale_dtype, weight_.biases, at, FirstLanes(count))
                                : _mm512_setzero_ps());
  }

  // Rounded to a bfloat16, ties away from zero, whose bits stand in the upper halves.
  JAXQ_INLINE static __m512 Upper(__m512 v) {
    const __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(-65536)));
  }
  // The parts of 16 values and 16 others.
  template <int kParts>
  JAXQ_INLINE static void Split(__m512 a, __m512 b, __m512i upper, __m512i* parts) {
    const __m512 first = Upper(a), second = Upper(b);
    parts[0] = _mm512_permutex2var_epi16(_mm512_castps_si512(first), upper, _mm512_castps_si512(second));
    if constexpr (kParts == 2)
      parts[1] = _mm512_permutex2var_epi16(_mm512_castps_si512(_mm512_sub_ps(a, first)), upper,
                                           _mm512_castps_si512(_mm512_sub_ps(b, second)));
  }
  // The parts of 16 values, twice.
  template <int kParts>
  JAXQ_INLINE static void Split(__m512 a, __m512i upper, __m512i* parts) {
    const __m512 first = Upper(a);
    parts[0] = _mm512_permutexvar_epi16(upper, _mm512_castps_si512(first));
    if constexpr (kParts == 2) parts[1] = _mm512_permutexvar_epi16(upper, _mm512_castps_si512(_mm512_sub_ps(a, first)));
  }

  template <int kParts, bool kNibbles>
  void LookUp(int64_t row, int64_t first, int64_t steps, uint16_t* out) const {
    const __m512 low = _mm512_loadu_ps(values_), high = _mm512_loadu_ps(values_ + 16);
    const __m512i once = once_, twice = twice_;
    const __m512i shifts = shifts_, spread = spread_, second = second_;
    const __mmask64 readable = FirstBytes(step_bytes_);
    const int64_t bytes = step_bytes_, stride = step_halves();
    const int64_t groups = (steps * kStep) >> group_shift_, per_group = group_ / kStep;
    const uint8_t* src = weight_.packed + row * weight_.row_bytes + first * bytes;
    const auto put = [&](const __m512i* tables, bool halves) __attribute__((always_inline)) {
      __m512i codes;
      if constexpr (kNibbles)
        codes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
      else
        codes = _mm512_permutexvar_epi8(spread, _mm512_maskz_loadu_epi8(readable, src));
      __m512i index = _mm512_srlv_epi16(codes, shifts);  // of which the low 5 bits count
      if (halves) index = _mm512_or_si512(_mm512_and_si512(index, _mm512_set1_epi16(15)), second);
      JAXQ_UNROLL
      for (int part = 0; part < kParts; ++part)
        _mm512_store_si512(out + part * 2 * kHalves, _mm512_permutexvar_epi16(index, tables[part]));
      src += bytes, out += stride;
    };
    alignas(64) float scales[kSlabGroups], biases[kSlabGroups];
    LoadGroups(row, (first * kStep) >> group_shift_, groups, scales, biases);
    __m512i tables[kParts];
    if (per_group == 0) {  // 2 groups to a step, 16 entries each
      for (int64_t i = 0; i < groups; i += 2) {
        Split<kParts>(Fma(low, Set1(scales[i]), Set1(biases[i])), Fma(low, Set1(scales[i + 1]), Set1(biases[i + 1])),
                      twice, tables);
        put(tables, true);
      }
      return;
    }
    const bool wide = !kNibbles && bits_ == 5;
    for (int64_t i = 0; i < groups; ++i) {
      const __m512 scale = Set1(scales[i]), bias = Set1(biases[i]);
      if (wide)
        Split<kParts>(Fma(low, scale, bias), Fma(high, scale, bias), twice, tables);
      else
        Split<kParts>(Fma(low, scale, bias), once, tables);
      for (int64_t step = 0; step < per_group; ++step) put(tables, false);
    }
  }

  // Code by code, in their order.
  void Each(int64_t row, int64_t first, int64_t steps, uint16_t* out) const {
    const uint8_t* src = weight_.packed + row * weight_.row_bytes + first * step_bytes_;
    alignas(64) float scales[kSlabGroups], biases[kSlabGroups];
    alignas(64) uint8_t codes[kSlabSteps * kStep + 64];
    LoadGroups(row, (first * kStep) >> group_shift_, (steps * kStep) >> group_shift_, scales, biases);
    UnpackOctets(src, steps * kStep / 8, bits_, steps * step_bytes_, codes);
    WithKind(weight_.kind, [&](auto kind) {
      for (int64_t step = 0; step < steps; ++step) {
        __m512 v[2];
        for (int64_t i = 0; i < 2; ++i) {
          const int64_t at = step * kStep + i * kSide, group = at >> group_shift_;
          v[i] = Fma(Values<decltype(kind)::value>(codes + at), Set1(scales[group]), Set1(biases[group]));
        }
        __m512i parts[2];
        Split<2>(v[0], v[1], twice_, parts);
        for (int64_t part = 0; part < parts_; ++part)
          _mm512_store_si512(out + step * step_halves() + part * 2 * kHalves, parts[part]);
      }
    });
  }

  const Weight& weight_;
  const int64_t parts_, group_, group_shift_;
  const int bits_;
  const int64_t step_bytes_;
  const bool tables_;
  __m512i shifts_, spread_, second_, once_, twice_;
  float values_[32];
};

}  // namespace
}  // namespace JAXQ_ISA
}  // namespace jaxq::cpu

#endif  // JAXQ_KERNELS_CPU_AMX_PARTS_INL_H_
