// The exponential in arithmetic that every vector type has. Included after the target pragma.
#pragma once

namespace timo {
namespace {

// 2^x = 2^n 2^f with f in [-1/2, 1/2]: minimax polynomial of degree 6, exact at 0, relative error
// 2e-9 before rounding. 0 below the normal range, about 2^127 above it; NaN stays.
template <class F, class I>
inline __attribute__((always_inline)) F power_of_two(F x) {
  constexpr float round = 0x1.8p23f;  // its last place is 1: adding it rounds to a whole number
  x = x > 127.f ? x - x + 127.f : x;
  const F shifted = x + round, f = x - (shifted - round);
  F p = f * 0.0001535336194f + 0.001339887441f;
  p = p * f + 0.009618437357f;
  p = p * f + 0.05550332471f;
  p = p * f + 0.2402264791f;
  p = p * f + 0.6931472029f;
  p = p * f + 1.f;
  const F scaled = (F)((I)p + ((I)shifted << 23));
  return x < -126.f ? F{} : x == x ? scaled : x;
}

}  // namespace
}  // namespace timo
