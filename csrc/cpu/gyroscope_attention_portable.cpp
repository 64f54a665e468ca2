// Gyroscope attention, float32 products for any CPU.
#include "cpu/gyroscope_attention.h"

#include "cpu/gyroscope_attention_tier_portable.h"

#include "cpu/gyroscope_attention_backward.h"
#include "cpu/gyroscope_attention_forward.h"

namespace timo {

void gyroscope_forward_portable(const GyroscopeArgs& a) {
  switch (a.dtype) {
    case Dtype::f32: return forward<float>(a);
    case Dtype::f16: return forward<f16>(a);
    default: return forward<bf16>(a);
  }
}

void gyroscope_backward_portable(const GyroscopeArgs& a) {
  switch (a.dtype) {
    case Dtype::f32: return backward<float>(a);
    case Dtype::f16: return backward<f16>(a);
    default: return backward<bf16>(a);
  }
}

}  // namespace timo
