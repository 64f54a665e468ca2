// Gyroscope attention, float32 products with AVX-512.
#include <immintrin.h>

#include "cpu/gyroscope_attention.h"

// gcc 12 takes the undefined operands inside its own intrinsics for mistakes (PR 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,bmi2")
#include "cpu/gyroscope_attention_tier_avx512.h"

namespace timo {
namespace {
using Tier = Avx512;
}  // namespace
}  // namespace timo

#include "cpu/gyroscope_attention_backward.h"
#include "cpu/gyroscope_attention_forward.h"

namespace timo {

void gyroscope_forward_avx512(const GyroscopeArgs& a) {
  switch (a.dtype) {
    case Dtype::f32: return forward<float>(a);
    case Dtype::f16: return forward<f16>(a);
    default: return forward<bf16>(a);
  }
}

void gyroscope_backward_avx512(const GyroscopeArgs& a) {
  switch (a.dtype) {
    case Dtype::f32: return backward<float>(a);
    case Dtype::f16: return backward<f16>(a);
    default: return backward<bf16>(a);
  }
}

}  // namespace timo
#pragma GCC pop_options
