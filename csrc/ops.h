// Functions that bind.cpp exposes. Raw addresses, sizes and strides in elements: no torch headers.
#pragma once
#include <array>
#include <cstdint>

#include "dtype.h"

namespace timo {

using Sizes3 = std::array<int64_t, 3>;
using Sizes4 = std::array<int64_t, 4>;
using Sizes5 = std::array<int64_t, 5>;

// x (B, T, N, H, D) with strides of the first four dimensions, the last one dense; valid (B, T, N)
// bytes with strides, or null; values, indices (B, N, H, D) dense.
struct MedianArgs {
  const void* x;
  Sizes4 stride;
  const uint8_t* valid;
  Sizes3 valid_stride;
  void* values;
  int64_t* indices;
  int64_t B, T, N, H, D;
};

// Instruction sets of the CPU kernels: 0 portable, 1 AVX2, 2 AVX-512, 3 AMX bf16.
int isa_level();
void cap_isa(int level);  // tests force a lower tier; a cap above what the CPU has does nothing

void temporal_median_cpu(const MedianArgs& a, Dtype dtype);
void temporal_median_backward_cpu(const void* grad, const int64_t* indices, void* out,
                                  int64_t bytes, int64_t B, int64_t T, int64_t channels);

// A tensor (B, T, N, H, ...) by the strides of its first four dimensions; further ones are dense.
struct Strided {
  void* data;
  Sizes4 stride;
};

// Gyroscope attention (gyroscope.md): q, k, v, grad, out and their gradients (B, T, N, H, D) of
// `dtype` (float32, float16, bfloat16), medians the same with date stride 0; gate and dgate
// (B, T, N, H) of `gate_dtype`; lse float32 of the same shape, spatial_lse with date stride 0, both
// in base 2. D is a multiple of 8. valid (B, T, N) bytes with strides, or null.
struct GyroscopeArgs {
  Strided q, k, v, q_median, k_median, gate, out, lse, spatial_lse;
  Strided grad, dq, dk, dv, dq_median, dk_median, dgate;  // of the backward alone
  const uint8_t* valid;
  Sizes3 valid_stride;
  int64_t B, T, N, H, D;
  double scale;
  Dtype dtype, gate_dtype;
};

void gyroscope_attention_cpu(const GyroscopeArgs& a);
void gyroscope_attention_backward_cpu(const GyroscopeArgs& a);

// Each launches on `stream` of the current device, checks the launch and throws on an error.
void temporal_median_cuda(const MedianArgs& a, Dtype dtype, void* stream);
void temporal_median_backward_cuda(const void* grad, const int64_t* indices, void* out,
                                   int64_t bytes, int64_t B, int64_t T, int64_t channels,
                                   void* stream);

}  // namespace timo
