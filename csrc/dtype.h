// Dtypes by the numbers that timo.ops.dispatch.dtype_code gives them.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace timo {

enum class Dtype : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

// Of frames, numbered likewise; their float64 is left to the reference.
enum class Pixel : int { f32 = 0, f16 = 2, bf16 = 3, u8 = 4, u16 = 5 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// What numbers of a dtype are widened to, for comparisons and sums.
template <class Stored>
using Wide = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

// Exact widening to it.
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(uint8_t x) { return x; }
inline float widen(uint16_t x) { return x; }
inline float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float widen(f16 x) {
  // Exponent and mantissa into place, then another bias of the exponent. Subnormals get the leading
  // bit of 2^-14, which a subtraction takes off: exact, also while subnormal floats are flushed.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  uint32_t small = rest + 0x38800000u, bits = rest + 0x38000000u;
  float out;
  std::memcpy(&out, &small, 4);
  out -= 0x1p-14f;
  std::memcpy(&small, &out, 4);
  bits += (x.bits & 0x7c00u) == 0x7c00u ? 0x38000000u : 0u;  // infinity and NaN
  bits = (x.bits & 0x7c00u ? bits : small) | sign;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Rounding to nearest, ties to even; NaN stays NaN.
inline float narrow_to(float x, float) { return x; }
inline double narrow_to(double x, double) { return x; }

inline bf16 narrow_to(float x, bf16) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};  // nearest, ties even
}

inline f16 narrow_to(float x, f16) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
  if (bits < 0x38800000) {  // subnormal: let a float addition round at the last place, 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000))};
  }
  const uint32_t rounded = bits - 0x38000000 + 0xfff + (bits >> 13 & 1);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}

}  // namespace timo
