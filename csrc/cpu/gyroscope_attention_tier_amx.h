// Products of pairs of bfloat16 in AMX tiles of 16 rows of 64 bytes, or by a model of the tiles for
// tests on CPUs without them (EMULATE_AMX). Included after the target pragma.
#pragma once
#include "cpu/gyroscope_attention_tier_bf16.h"

#ifdef EMULATE_AMX
namespace timo {
namespace {

struct Tile {
  float row[16][16];
};
thread_local Tile tiles[8];

inline void load_tile(int i, const void* from, int64_t step) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(tiles[i].row[r], static_cast<const char*>(from) + r * step, 64);
}
inline void store_tile(int i, void* to, int64_t step) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(static_cast<char*>(to) + r * step, tiles[i].row[r], 64);
}
inline void multiply_tiles(int c, int a, int b) {
  auto half = [](const float& both, int i) {
    bf16 x;
    std::memcpy(&x, reinterpret_cast<const char*>(&both) + 2 * i, 2);
    return widen(x);
  };
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n)
        for (int i = 0; i < 2; ++i)
          tiles[c].row[m][n] += half(tiles[a].row[m][k], i) * half(tiles[b].row[k][n], i);
}

}  // namespace
}  // namespace timo
#define TILE_ZERO(i) tiles[i] = {}
#define TILE_LOAD(i, from, step) load_tile(i, from, step)
#define TILE_STORE(i, to, step) store_tile(i, to, step)
#define TILE_MULTIPLY(c, a, b) multiply_tiles(c, a, b)
#else
#define TILE_ZERO(i) _tile_zero(i)
#define TILE_LOAD(i, from, step) _tile_loadd(i, from, step)
#define TILE_STORE(i, to, step) _tile_stored(i, to, step)
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

namespace timo {
namespace {

struct Tier : Bf16 {
  static constexpr int rows = 16, depth = 16;
  static constexpr bool tiled = true;

  // Tiles of this thread in their full size.
  struct Session {
#ifndef EMULATE_AMX
    struct __attribute__((packed, aligned(64))) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    Session() {
      static_assert(sizeof(Config) == 64);
      const Config config;
      fence();  // gcc 12 takes the instruction to read 8 bytes
      _tile_loadconfig(&config);
    }
    ~Session() { _tile_release(); }
#endif
  };

  // c = or += a b, M rows of `a` and NV tiles of `b`; steps in floats.
  template <int NV>
  static void multiply(const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t K,
                       int64_t M, float* c, int64_t c_step, bool add) {
    fence();
    int64_t m = 0;
    for (; m + 32 <= M; m += 32)
      block<NV, true>(a + m * a_step, 4 * a_step, b, b_step, K, c + m * c_step, 4 * c_step, add);
    if (m < M)
      block<NV, false>(a + m * a_step, 4 * a_step, b, b_step, K, c + m * c_step, 4 * c_step, add);
    fence();
  }

 private:
  // gcc 12 may move stores to memory behind a load of a tile from there.
  static void fence() { asm volatile("" ::: "memory"); }

  // One or two rows of tiles: sums in 0 to 2 and 3 to 5, `a` in 6, `b` in 7. Steps of a and c in
  // bytes.
  template <int NV, bool two>
  static inline __attribute__((always_inline)) void block(const float* a, int64_t a_step,
                                                          const float* b, int64_t b_step, int64_t K,
                                                          float* c, int64_t c_step, bool add) {
    float* const below = c + 4 * c_step;  // 16 rows
    if (add) {
      TILE_LOAD(0, c, c_step);
      if constexpr (NV > 1) TILE_LOAD(1, c + 16, c_step);
      if constexpr (NV > 2) TILE_LOAD(2, c + 32, c_step);
      if constexpr (two) TILE_LOAD(3, below, c_step);
      if constexpr (two && NV > 1) TILE_LOAD(4, below + 16, c_step);
      if constexpr (two && NV > 2) TILE_LOAD(5, below + 32, c_step);
    } else {
      TILE_ZERO(0);
      if constexpr (NV > 1) TILE_ZERO(1);
      if constexpr (NV > 2) TILE_ZERO(2);
      if constexpr (two) TILE_ZERO(3);
      if constexpr (two && NV > 1) TILE_ZERO(4);
      if constexpr (two && NV > 2) TILE_ZERO(5);
    }
    for (int64_t k = 0; k < K; k += 16, a += 16, b += 16 * b_step) {
      TILE_LOAD(6, a, a_step);
      TILE_LOAD(7, b, 4 * b_step);
      TILE_MULTIPLY(0, 6, 7);
      if constexpr (NV > 1) {
        TILE_LOAD(7, b + 16, 4 * b_step);
        TILE_MULTIPLY(1, 6, 7);
      }
      if constexpr (NV > 2) {
        TILE_LOAD(7, b + 32, 4 * b_step);
        TILE_MULTIPLY(2, 6, 7);
      }
      if constexpr (two) {  // back again: the last tile of `b` is there
        TILE_LOAD(6, a + 4 * a_step, a_step);
        if constexpr (NV > 2) {
          TILE_MULTIPLY(5, 6, 7);
          TILE_LOAD(7, b + 16, 4 * b_step);
        }
        if constexpr (NV > 1) {
          TILE_MULTIPLY(4, 6, 7);
          TILE_LOAD(7, b, 4 * b_step);
        }
        TILE_MULTIPLY(3, 6, 7);
      }
    }
    TILE_STORE(0, c, c_step);
    if constexpr (NV > 1) TILE_STORE(1, c + 16, c_step);
    if constexpr (NV > 2) TILE_STORE(2, c + 32, c_step);
    if constexpr (two) TILE_STORE(3, below, c_step);
    if constexpr (two && NV > 1) TILE_STORE(4, below + 16, c_step);
    if constexpr (two && NV > 2) TILE_STORE(5, below + 32, c_step);
  }
};

}  // namespace
}  // namespace timo
