// Vectors of 16 floats, for gyroscope_attention_kernel.h. Included after the target pragma; whoever
// includes it defines Tier.
#pragma once
#include <immintrin.h>

namespace timo {
namespace {

struct Avx512 {
  using F = __m512;
  static constexpr int lanes = 16, rows = 8, pair = 1, depth = 1;
  static constexpr bool fused = true, tiled = false;

  struct Session {};

  static F zip(F x, F) { return x; }
  static F multiply_add(F sum, F x, F y) { return sum + x * y; }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static F load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(bf16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(upper_half(x)));
  }
  static void store(f16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, 0));
  }

  // bfloat16 nearest to each float, ties to even, in the lower half of its lane; NaN stays NaN.
  static __m512i upper_half(F x) {
    const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  }

  // Minimax polynomial of degree 6 on [0, 1), exact at 0: relative error 2e-9 before rounding.
  static F exp2(F x) {
    const F f = _mm512_reduce_ps(x, 0x09);  // x - floor(x); 0 of infinities
    F p = set(0.0002161291498f);
    p = p * f + 0.001246784644f;
    p = p * f + 0.009675451568f;
    p = p * f + 0.05548528062f;
    p = p * f + 0.2402293056f;
    p = p * f + 0.6931470444f;
    p = p * f + 1.f;
    return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
  }

  static void transpose(F (&r)[16]) {
    F t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
        r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
      }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const F a = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      const F b = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      const F c = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
      const F d = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
      t[i] = _mm512_shuffle_f32x4(a, c, 0x88);
      t[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
      t[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }
};

}  // namespace
}  // namespace timo
