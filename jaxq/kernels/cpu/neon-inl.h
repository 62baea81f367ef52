// The vector type of simd-inl.h on NEON. Included inside the namespace of an Arm instruction set.

constexpr int64_t kLanes = 4, kTileRows = 6, kTileVectors = 4;  // 24 sums, 4 vectors of w and 1 of x in 32 registers
using F = float32x4_t;

JAXQ_INLINE F Zero() { return vdupq_n_f32(0.0f); }
JAXQ_INLINE F Set1(float v) { return vdupq_n_f32(v); }
JAXQ_INLINE F Load(const float* p) { return vld1q_f32(p); }
JAXQ_INLINE void Store(float* p, F v) { vst1q_f32(p, v); }
JAXQ_INLINE F Add(F a, F b) { return vaddq_f32(a, b); }
JAXQ_INLINE F Sub(F a, F b) { return vsubq_f32(a, b); }
JAXQ_INLINE F Mul(F a, F b) { return vmulq_f32(a, b); }
JAXQ_INLINE F Div(F a, F b) { return vdivq_f32(a, b); }
// "nm": of a NaN and a number they give the number.
JAXQ_INLINE F Min(F a, F b) { return vminnmq_f32(a, b); }
JAXQ_INLINE F Max(F a, F b) { return vmaxnmq_f32(a, b); }
JAXQ_INLINE F IfMore(F a, F b, F x, F y) { return vbslq_f32(vcgtq_f32(a, b), x, y); }
JAXQ_INLINE F Round(F a) { return vrndnq_f32(a); }
JAXQ_INLINE F Fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }

JAXQ_INLINE F LoadF16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
JAXQ_INLINE F LoadBf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
JAXQ_INLINE void LoadBf16Pairs(const uint16_t* p, F* even, F* odd) {
  const uint32x4_t words = vreinterpretq_u32_u16(vld1q_u16(p));
  *even = vreinterpretq_f32_u32(vshlq_n_u32(words, 16));
  *odd = vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff0000u)));
}
JAXQ_INLINE void StoreF16(uint16_t* p, F v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
JAXQ_INLINE void StoreBf16(uint16_t* p, F v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v), high = vshrq_n_u32(bits, 16);
  const uint32x4_t half = vaddq_u32(vandq_u32(high, vdupq_n_u32(1)), vdupq_n_u32(0x7fff));
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, half), 16);
  const uint32x4_t number = vceqq_f32(v, v);
  vst1_u16(p, vmovn_u32(vbslq_u32(number, rounded, vorrq_u32(high, vdupq_n_u32(0x40)))));
}

JAXQ_INLINE uint32_t FourBytes(const void* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}
JAXQ_INLINE F FromU8(const uint8_t* p) {
  const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(FourBytes(p)));
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
}
JAXQ_INLINE F FromS8(const int8_t* p) {
  const int8x8_t bytes = vreinterpret_s8_u32(vdup_n_u32(FourBytes(p)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
}
// E4M3 shifted into float16 is 2**-8 of its value, subnormal numbers included. S.1111.111 is NaN.
JAXQ_INLINE F FromE4m3(const uint8_t* p) {
  const uint16x4_t codes = vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(FourBytes(p)))));
  const uint16x4_t size = vand_u16(codes, vdup_n_u16(0x7f)), sign = vshl_n_u16(vbic_u16(codes, size), 8);
  const uint16x4_t half = vorr_u16(vshl_n_u16(size, 7), sign);
  const F values = vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(half)), 256.0f);
  const uint32x4_t nan = vceqq_u32(vmovl_u16(size), vdupq_n_u32(0x7f));
  return vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(values), vandq_u32(nan, vdupq_n_u32(0x7fc00000))));
}
JAXQ_INLINE F FromE8m0(const uint8_t* p) {
  const float values[4] = {FloatOfE8m0(p[0]), FloatOfE8m0(p[1]), FloatOfE8m0(p[2]), FloatOfE8m0(p[3])};
  return vld1q_f32(values);
}
// Every four codes lie in 4 bytes, which end with those of all 16 at the latest.
template <int kBits>
JAXQ_INLINE void FromPacked(const uint8_t* p, F out[4]) {
  static_assert(kBits < 8);
  JAXQ_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int bit = 4 * i * kBits, byte = bit / 8 < 2 * kBits - 4 ? bit / 8 : 2 * kBits - 4, shift = bit - 8 * byte;
    const int32_t left[4] = {-shift, -shift - kBits, -shift - 2 * kBits, -shift - 3 * kBits};
    const uint32x4_t codes = vshlq_u32(vdupq_n_u32(FourBytes(p + byte)), vld1q_s32(left));
    out[i] = vcvtq_f32_u32(vandq_u32(codes, vdupq_n_u32((1u << kBits) - 1)));
  }
}
JAXQ_INLINE void FromPackedE2m1(const uint8_t* p, F out[4]) {
  const uint8x8_t bytes = vld1_u8(p), low = vand_u8(bytes, vdup_n_u8(15)), high = vshr_n_u8(bytes, 4);
  const uint8x16_t codes = vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high));
  int8_t twice[16];
  vst1q_s8(twice, vqtbl1q_s8(vld1q_s8(kTwiceE2m1), codes));
  JAXQ_UNROLL
  for (int i = 0; i < 4; ++i) out[i] = FromS8(twice + 4 * i);
}
JAXQ_INLINE void ToU8(uint8_t* p, const F* v, int most) {
  const uint16x8_t low = vcombine_u16(vqmovn_u32(vcvtnq_u32_f32(v[0])), vqmovn_u32(vcvtnq_u32_f32(v[1])));
  const uint16x8_t high = vcombine_u16(vqmovn_u32(vcvtnq_u32_f32(v[2])), vqmovn_u32(vcvtnq_u32_f32(v[3])));
  const uint8x16_t bytes = vcombine_u8(vqmovn_u16(low), vqmovn_u16(high));
  vst1q_u8(p, vminq_u8(bytes, vdupq_n_u8(static_cast<uint8_t>(most))));
}

JAXQ_INLINE float Sum(F v) { return vaddvq_f32(v); }
JAXQ_INLINE float MaxOf(F v) { return vmaxnmvq_f32(v); }

template <typename Op>
JAXQ_INLINE F Across(const F* rows, Op&& op) {
  const F a = op(vuzp1q_f32(rows[0], rows[1]), vuzp2q_f32(rows[0], rows[1]));
  const F b = op(vuzp1q_f32(rows[2], rows[3]), vuzp2q_f32(rows[2], rows[3]));
  return op(vuzp1q_f32(a, b), vuzp2q_f32(a, b));
}

JAXQ_INLINE void Transpose(F r[4]) {
  const F a = vtrn1q_f32(r[0], r[1]), b = vtrn2q_f32(r[0], r[1]);
  const F c = vtrn1q_f32(r[2], r[3]), d = vtrn2q_f32(r[2], r[3]);
  r[0] = vcombine_f32(vget_low_f32(a), vget_low_f32(c));
  r[1] = vcombine_f32(vget_low_f32(b), vget_low_f32(d));
  r[2] = vcombine_f32(vget_high_f32(a), vget_high_f32(c));
  r[3] = vcombine_f32(vget_high_f32(b), vget_high_f32(d));
}

// Two octets: each code is cut out of the 16 bits that begin with its first byte.
void UnpackOctetPairs(const uint8_t* src, int64_t pairs, int bits, int64_t readable, uint8_t* dst) {
  uint8_t window[2][16];
  int16_t shift[8];
  for (int i = 0; i < 8; ++i) {
    for (int half = 0; half < 2; ++half) {
      window[half][2 * i] = static_cast<uint8_t>(half * bits + i * bits / 8);
      window[half][2 * i + 1] = static_cast<uint8_t>(window[half][2 * i] + 1);
    }
    shift[i] = static_cast<int16_t>(-(i * bits % 8));
  }
  const uint8x16_t first = vld1q_u8(window[0]), second = vld1q_u8(window[1]);
  const int16x8_t right = vld1q_s16(shift);
  const uint8x16_t mask = vdupq_n_u8(static_cast<uint8_t>((1 << bits) - 1));
  for (int64_t i = 0; i < pairs; ++i, src += 2 * bits, dst += 16, readable -= 2 * bits) {
    uint8x16_t bytes;
    if (readable >= 16) {
      bytes = vld1q_u8(src);
    } else {
      uint8_t tail[16] = {};
      std::memcpy(tail, src, static_cast<size_t>(2 * bits));
      bytes = vld1q_u8(tail);
    }
    const uint16x8_t a = vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(bytes, first)), right);
    const uint16x8_t b = vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(bytes, second)), right);
    vst1q_u8(dst, vandq_u8(vuzp1q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b)), mask));
  }
}

[[maybe_unused]] void UnpackOctets(const uint8_t* src, int64_t octets, int bits, int64_t readable, uint8_t* dst) {
  if (bits == 8) {
    std::memcpy(dst, src, static_cast<size_t>(octets) * 8);
    return;
  }
  int64_t i = 0;
  if (bits == 4) {
    const uint8x16_t mask = vdupq_n_u8(15);
    for (; i + 4 <= octets; i += 4, src += 16, dst += 32) {
      const uint8x16_t bytes = vld1q_u8(src), low = vandq_u8(bytes, mask), high = vshrq_n_u8(bytes, 4);
      vst1q_u8(dst, vzip1q_u8(low, high));
      vst1q_u8(dst + 16, vzip2q_u8(low, high));
    }
  } else {
    const int64_t pairs = octets / 2;
    UnpackOctetPairs(src, pairs, bits, readable, dst);
    i = 2 * pairs, src += i * bits, dst += 8 * i;
  }
  for (; i < octets; ++i, src += bits, dst += 8) {
    const uint64_t octet = LoadOctet(src, bits);
    for (int j = 0; j < 8; ++j) dst[j] = static_cast<uint8_t>(octet >> (j * bits) & ((1u << bits) - 1u));
  }
}

[[maybe_unused]] void PackOctets(const uint8_t* codes, int64_t octets, int bits, uint8_t* dst) {
  // Neighbouring fields are joined three times: bytes to pairs, pairs to fours, fours to one field of 8*bits bits.
  const uint64_t one = 0x0001000100010001u * ((uint64_t{1} << bits) - 1);
  const uint64_t two = 0x0000000100000001u * ((uint64_t{1} << 2 * bits) - 1);
  const uint64_t four = (uint64_t{1} << 4 * bits) - 1;
  for (int64_t i = 0; i < octets; ++i, codes += 8, dst += bits) {
    uint64_t word;
    std::memcpy(&word, codes, 8);
    word = (word & one) | (word >> (8 - bits) & one << bits);
    word = (word & two) | (word >> 2 * (8 - bits) & two << 2 * bits);
    word = (word & four) | (word >> 4 * (8 - bits) & four << 4 * bits);
    std::memcpy(dst, &word, static_cast<size_t>(bits));
  }
}

[[maybe_unused]] void MapE2m1(uint8_t* codes, int64_t count) {
  const uint8x16_t table = vreinterpretq_u8_s8(vld1q_s8(kTwiceE2m1));
  for (int64_t i = 0; i < count; i += 16) vst1q_u8(codes + i, vqtbl1q_u8(table, vld1q_u8(codes + i)));
}
