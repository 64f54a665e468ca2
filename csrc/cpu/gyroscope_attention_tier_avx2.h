// Vectors of 8 floats, for gyroscope_attention_kernel.h. Included after the target pragma.
#pragma once
#include <immintrin.h>

#include "cpu/gyroscope_attention_exp2.h"

namespace timo {
namespace {

struct Tier {
  using F = __m256;
  typedef int32_t I __attribute__((vector_size(32)));
  static constexpr int lanes = 8, rows = 4, pair = 1, depth = 1;
  static constexpr bool fused = true, tiled = false;

  struct Session {};

  static F zip(F x, F) { return x; }
  static F multiply_add(F sum, F x, F y) { return sum + x * y; }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static F load(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void store(bf16* p, F x) {
    for (int i = 0; i < lanes; ++i) p[i] = narrow_to(x[i], bf16{});
  }
  static void store(f16* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, 0));
  }

  static F exp2(F x) { return power_of_two<F, I>(x); }

  static void transpose(F (&r)[8]) {
    F t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
        r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
      }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }
};

}  // namespace
}  // namespace timo
