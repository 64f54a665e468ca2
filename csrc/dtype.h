// Floating dtypes by the numbers that timo.ops.dispatch.dtype_code gives them.
#pragma once
#include <cstdint>
#include <cstring>

namespace timo {

enum class Dtype : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Exact widening to the type that comparisons are made in.
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float widen(f16 x) {
  // Shift exponent and mantissa into place, then rescale by 2^112: exact, subnormals included,
  // and plain integer and float lanes on every instruction set.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  float out;
  std::memcpy(&out, &rest, 4);
  out *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &out, 4);
  bits |= (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN keep their exponent
  bits |= sign;
  std::memcpy(&out, &bits, 4);
  return out;
}

}  // namespace timo
