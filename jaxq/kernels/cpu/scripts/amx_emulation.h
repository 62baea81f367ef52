// The tile instructions that amx.cc uses, in plain C++, after the operations in Intel's Instruction Set Reference:
// LDTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILESTORED, TDPBF16PS and TDPBSSD. For tests alone, where
// JAXQ_EMULATE_AMX is defined: amx.cc is compiled as it is, over these. Included inside its namespace.
//
// Using a tile while none is configured ends the process, as it does on the real thing.

struct EmulatedTiles {
  bool configured;
  int bytes[8], rows[8];
  uint8_t data[8][16][64];
};

inline EmulatedTiles& Emulated() {
  static thread_local EmulatedTiles tiles = {};
  return tiles;
}

inline EmulatedTiles& ConfiguredTiles() {
  if (!Emulated().configured) __builtin_trap();
  return Emulated();
}

inline void ConfigureTiles(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  EmulatedTiles& tiles = Emulated();
  if (bytes[0] != 1) __builtin_trap();
  std::memset(&tiles, 0, sizeof tiles);
  for (int i = 0; i < 8; ++i) {
    tiles.bytes[i] = bytes[16 + 2 * i] + 256 * bytes[17 + 2 * i], tiles.rows[i] = bytes[48 + i];
    if (tiles.bytes[i] > 64 || tiles.rows[i] > 16) __builtin_trap();
  }
  tiles.configured = true;
}

inline void ReleaseTiles() { Emulated().configured = false; }

template <int kTile>
void ZeroTile() {
  std::memset(ConfiguredTiles().data[kTile], 0, sizeof Emulated().data[kTile]);
}

template <int kTile>
void LoadTile(const void* from) {
  EmulatedTiles& tiles = ConfiguredTiles();
  ZeroTile<kTile>();
  for (int row = 0; row < tiles.rows[kTile]; ++row)
    std::memcpy(tiles.data[kTile][row], static_cast<const char*>(from) + 64 * row,
                static_cast<size_t>(tiles.bytes[kTile]));
}

template <int kTile>
void StoreTile(void* to) {
  EmulatedTiles& tiles = ConfiguredTiles();
  for (int row = 0; row < tiles.rows[kTile]; ++row)
    std::memcpy(static_cast<char*>(to) + 64 * row, tiles.data[kTile][row], static_cast<size_t>(tiles.bytes[kTile]));
}

// Subnormal numbers are zeros, as operands and as results.
inline float Flushed(float value) { return __builtin_fabsf(value) < 0x1p-126f ? 0.0f * value : value; }

// Even and odd depths are summed apart, each with one rounding a product; then both sums join the result.
template <int kC, int kA, int kB>
void DotTiles() {
  EmulatedTiles& tiles = ConfiguredTiles();
  const int depth = tiles.bytes[kA] / 4, columns = tiles.bytes[kC] / 4;
  for (int m = 0; m < tiles.rows[kC]; ++m) {
    float sums[2][16] = {};
    for (int k = 0; k < depth; ++k) {
      uint16_t a[2], b[16][2];
      std::memcpy(a, tiles.data[kA][m] + 4 * k, 4);
      std::memcpy(b, tiles.data[kB][k], 64);
      for (int half = 0; half < 2; ++half) {
        const float left = Flushed(FloatOfBf16(a[half]));
        for (int n = 0; n < columns; ++n)
          sums[half][n] = Flushed(__builtin_fmaf(left, Flushed(FloatOfBf16(b[n][half])), sums[half][n]));
      }
    }
    float c[16];
    std::memcpy(c, tiles.data[kC][m], 64);
    for (int n = 0; n < columns; ++n) c[n] = Flushed(Flushed(c[n]) + Flushed(sums[0][n] + sums[1][n]));
    std::memcpy(tiles.data[kC][m], c, 64);
  }
}

template <int kC, int kA, int kB>
void DotByteTiles() {
  EmulatedTiles& tiles = ConfiguredTiles();
  const int depth = tiles.bytes[kA], columns = tiles.bytes[kC] / 4;
  for (int m = 0; m < tiles.rows[kC]; ++m) {
    int32_t c[16];
    std::memcpy(c, tiles.data[kC][m], 64);
    for (int k = 0; k < depth; ++k) {
      const int32_t left = static_cast<int8_t>(tiles.data[kA][m][k]);
      for (int n = 0; n < columns; ++n) c[n] += left * static_cast<int8_t>(tiles.data[kB][k / 4][4 * n + k % 4]);
    }
    std::memcpy(tiles.data[kC][m], c, 64);
  }
}
