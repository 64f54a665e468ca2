// Gyroscope attention, float32 products with AVX2.
#include <immintrin.h>

#include "cpu/gyroscope_attention.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#include "cpu/gyroscope_attention_tier_avx2.h"

#include "cpu/gyroscope_attention_backward.h"
#include "cpu/gyroscope_attention_forward.h"

namespace timo {

void gyroscope_forward_avx2(const GyroscopeArgs& a) {
  switch (a.dtype) {
    case Dtype::f32: return forward<float>(a);
    case Dtype::f16: return forward<f16>(a);
    default: return forward<bf16>(a);
  }
}

void gyroscope_backward_avx2(const GyroscopeArgs& a) {
  switch (a.dtype) {
    case Dtype::f32: return backward<float>(a);
    case Dtype::f16: return backward<f16>(a);
    default: return backward<bf16>(a);
  }
}

}  // namespace timo
#pragma GCC pop_options
