// Tile registers for amx.cc. Included inside its namespace.
//
// Tiles are numbers known at compile time; their rows are 64 bytes apart in memory. The instructions are written out:
// gcc's intrinsics take only literal numbers, and gcc 12 drops stores to a configuration that only they read. Every one
// that touches memory says so, so that the compiler moves no store of ours across it.

#ifndef JAXQ_EMULATE_AMX

template <int kTile>
JAXQ_INLINE void ZeroTile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
JAXQ_INLINE void LoadTile(const void* from) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t{64}), "i"(kTile) : "memory");
}
template <int kTile>
JAXQ_INLINE void StoreTile(void* to) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t{64}), "i"(kTile) : "memory");
}
// kC[m][n] += sum over k of kA[m][k] * kB[k/2][n][k%2]: 16 by 16 floats and 32 bfloat16 of depth.
template <int kC, int kA, int kB>
JAXQ_INLINE void DotTiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}
// kC[m][n] += sum over k of kA[m][k] * kB[k/4][n][k%4]: 16 by 16 32-bit integers and 64 signed bytes of depth.
template <int kC, int kA, int kB>
JAXQ_INLINE void DotByteTiles() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}
JAXQ_INLINE void ConfigureTiles(const void* config) {
  asm volatile("ldtilecfg %0" ::"m"(*static_cast<const uint8_t(*)[64]>(config)) : "memory");
}
JAXQ_INLINE void ReleaseTiles() { asm volatile("tilerelease" ::: "memory"); }

#else  // a build for tests on machines without AMX
#include "scripts/amx_emulation.h"
#endif

// Tiles are configured from its beginning to its end; one for each task. Those from `first_left` on are left operands,
// of 16 rows of `bytes` bytes, and those from `first_right` on right ones, of bytes/4 rows; all before are results of 16
// rows and columns.
class TileScope {
 public:
  explicit TileScope(int64_t bytes = 64, int first_left = 4, int first_right = 6) {
    alignas(64) uint8_t config[64] = {1};  // the palette
    for (int i = 0; i < 8; ++i) {
      const bool left = i >= first_left && i < first_right;
      config[16 + 2 * i] = static_cast<uint8_t>(left ? bytes : 64);
      config[48 + i] = static_cast<uint8_t>(i < first_right ? 16 : bytes / 4);
    }
    ConfigureTiles(config);
  }
  ~TileScope() { ReleaseTiles(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};
