// Vectors of 4 floats without intrinsics, for gyroscope_attention_kernel.h.
#pragma once
#include "cpu/gyroscope_attention_exp2.h"

namespace timo {
namespace {

struct Tier {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  static constexpr int lanes = 4, rows = 4, pair = 1, depth = 1;
  static constexpr bool fused = false, tiled = false;

  struct Session {};

  static F zip(F x, F) { return x; }
  static F multiply_add(F sum, F x, F y) { return sum + x * y; }
  static F set(float x) { return F{x, x, x, x}; }
  template <class Stored>
  static F load(const Stored* p) {
    F x;
    for (int i = 0; i < lanes; ++i) x[i] = widen(p[i]);
    return x;
  }
  template <class Stored>
  static void store(Stored* p, F x) {
    for (int i = 0; i < lanes; ++i) p[i] = narrow_to(x[i], Stored{});
  }

  static F exp2(F x) { return power_of_two<F, I>(x); }

  static void transpose(F (&r)[4]) {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < i; ++j) {
        const float x = r[i][j];
        r[i][j] = r[j][i];
        r[j][i] = x;
      }
  }
};

}  // namespace
}  // namespace timo
