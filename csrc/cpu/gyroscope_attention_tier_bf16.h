// Products of pairs of bfloat16 with AVX512-BF16; where EMULATE_AMX is defined, its rounding alone,
// with AVX-512. Included after the target pragma.
#pragma once
#include "cpu/gyroscope_attention_tier_avx512.h"

namespace timo {
namespace {

struct Bf16 : Avx512 {
  static constexpr int pair = 2;

  using Avx512::load;
  template <class Both>
  static F load(const Both* p) {
    return _mm512_loadu_ps(reinterpret_cast<const float*>(p));
  }
  // Pairs (lower[i], upper[i]), rounded.
  static F zip(F lower, F upper) {
#ifndef EMULATE_AMX
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(upper, lower);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both));
#else
    const __m512i high = _mm512_slli_epi32(upper_half(upper), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(high, upper_half(lower)));
#endif
  }
#ifndef EMULATE_AMX
  static F multiply_add(F sum, F x, F y) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }
#endif
};

}  // namespace
}  // namespace timo
