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

// Instruction sets of the CPU kernels: 0 portable, 1 AVX2, 2 AVX-512, 3 AVX512-BF16 where it is
// faster than float32, 4 AMX bf16.
int isa_level();
void cap_isa(int level);  // tests force a lower tier; a cap above what the CPU has does nothing

// Tests run the kernels of AMX on a model of its tiles; false where not even AVX-512 is there.
bool emulate_amx(bool on);
bool emulates_amx();

// Tests let workspaces start as NaN.
void poison_workspace(bool on);
bool poisons_workspace();

void temporal_median_cpu(const MedianArgs& a, Dtype dtype);
void temporal_median_backward_cpu(const void* grad, const int64_t* indices, void* out,
                                  int64_t bytes, int64_t B, int64_t T, int64_t channels);

// Medians of x and every date's projected deviation from them: weight (D), deviation (B, T, N, H),
// both dense float64 if x is, else float32. Backward reads all of these but `deviation`, and its
// gradient in place of it; dvalues as values; it writes dx (B, T, N, H, D) dense, and dweight like
// weight through `partial`: (chunks, D), one row for each `median_deviation_chunk` of B * N.
struct DeviationArgs {
  MedianArgs median;
  const void* weight;
  void* deviation;
  const void* dvalues;
  void *dx, *dweight, *partial;
};

constexpr int64_t median_deviation_chunk = 16;
void median_deviation_cpu(const DeviationArgs& a, Dtype dtype);
void median_deviation_backward_cpu(const DeviationArgs& a, Dtype dtype);

// Maps (B, T, h, w, C), values and dates (B, factor * h, factor * w, C), all dense; valid
// (B, T, h, w) bytes with strides, or null. Forward reads maps and writes values and dates; backward
// reads the gradient of values in their place, and dates, and writes that of maps.
struct MaximumArgs {
  void* maps;
  const uint8_t* valid;
  Sizes4 valid_stride;
  void* values;
  int16_t* dates;
  int64_t B, T, C, h, w, factor;
  Dtype dtype;
};

void temporal_maximum_cpu(const MaximumArgs& a);
void temporal_maximum_backward_cpu(const MaximumArgs& a);

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

// Which units of which frames (units.md): frames (B, T, C, H, W) by strides; valid (B, T, H, W)
// bytes by strides, or null; scale and offset (C), or null; ids (B, K) dense, ascending.
struct Units {
  void* frames;
  Sizes5 stride;
  const uint8_t* valid;
  Sizes4 valid_stride;
  const float *scale, *offset;
  const int64_t* ids;
  int64_t B, T, C, H, W, K, unit;
  Pixel pixel;  // dtype of the frames
};

// tiles (B, K, C, S, S) dense, S = before + unit + after. Forward reads frames and writes tiles;
// backward reads tiles and writes every element of frames, through scale and without offset.
struct GatherArgs {
  Units units;
  void* tiles;
  Dtype dtype;  // of the tiles
  int64_t before, after;
};

void gather_units_cpu(const GatherArgs& a);
void gather_units_backward_cpu(const GatherArgs& a);

// tokens (B, K, D) with strides of the first two dimensions, sequence (B, L, D) dense, both of
// `dtype`; ids (B, K) dense, ascending; mask_token (D) and position (L, D) dense float32. Backward
// reads sequence, its gradient, and writes tokens and mask_token, through `partial`: (chunks, D)
// float32, one row for each `scatter_units_chunk` rows of the sequence.
struct ScatterArgs {
  void* tokens;
  std::array<int64_t, 2> stride;
  const int64_t* ids;
  float* mask_token;
  const float* position;
  void* sequence;
  float* partial;
  int64_t B, K, L, D;
  Dtype dtype;
};

constexpr int64_t scatter_units_chunk = 64;
void scatter_units_cpu(const ScatterArgs& a);
void scatter_units_backward_cpu(const ScatterArgs& a);

// pred and, of the backward, its gradient dpred (B, K, C * unit * unit) dense of `dtype`; mean and
// rstd (B, K), loss and grad () float32; count () int64; `partial` (B * K, 4) float64 of workspace.
enum class Norm : int { none = 0, patch = 1, batch = 2 };
constexpr double variance_eps = 1e-6;

struct LossArgs {
  Units units;
  const void* pred;
  Dtype dtype;
  Norm norm;
  float *mean, *rstd, *loss;
  int64_t* count;
  double* partial;
  const float* grad;
  void* dpred;
};

void masked_pixel_loss_cpu(const LossArgs& a);
void masked_pixel_loss_backward_cpu(const LossArgs& a);

// Each launches on `stream` of the current device, checks the launch and throws on an error.
void temporal_median_cuda(const MedianArgs& a, Dtype dtype, void* stream);
void temporal_median_backward_cuda(const void* grad, const int64_t* indices, void* out,
                                   int64_t bytes, int64_t B, int64_t T, int64_t channels,
                                   void* stream);
void gather_units_cuda(const GatherArgs& a, void* stream);
void gather_units_backward_cuda(const GatherArgs& a, void* stream);
void scatter_units_cuda(const ScatterArgs& a, void* stream);
void scatter_units_backward_cuda(const ScatterArgs& a, void* stream);
void masked_pixel_loss_cuda(const LossArgs& a, void* stream);
void masked_pixel_loss_backward_cuda(const LossArgs& a, void* stream);

}  // namespace timo
