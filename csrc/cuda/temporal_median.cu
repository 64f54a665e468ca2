// Lower median over dates, one thread per channel. Each thread keeps its dates in its own column
// of shared memory (no bank conflicts, no synchronisation) and counts, for each date, how many
// are smaller and how many are not larger. Bound by reading x once and writing values and indices.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>

#include "launch.h"
#include "ops.h"

namespace timo {
namespace {

__device__ inline float wide(float x) { return x; }
__device__ inline double wide(double x) { return x; }
__device__ inline float wide(__half x) { return __half2float(x); }
__device__ inline float wide(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class Stored, class Compared>
__global__ void median_kernel(MedianArgs a) {
  extern __shared__ unsigned char memory[];
  auto* column = reinterpret_cast<Compared*>(memory) + threadIdx.x;  // stride blockDim.x
  const int64_t channels = a.N * a.H * a.D, total = a.B * channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < total;
       i += step) {
    const int64_t b = i / channels, d = i % a.D, h = i / a.D % a.H, n = i / (a.D * a.H) % a.N;
    const Stored* x = static_cast<const Stored*>(a.x) + b * a.stride[0] + n * a.stride[2] +
                      h * a.stride[3] + d;
    const uint8_t* valid =
        a.valid ? a.valid + b * a.valid_stride[0] + n * a.valid_stride[2] : nullptr;
    int count = 0;
    int64_t chosen = -1;
    bool broken = false;
    for (int64_t t = 0; t < a.T; ++t) {
      if (valid && !valid[t * a.valid_stride[1]]) continue;
      const Compared value = wide(x[t * a.stride[1]]);
      if (value != value && !broken) broken = true, chosen = t;  // the first NaN is the answer
      column[count++ * blockDim.x] = value;
    }
    int rank_date = 0;  // of valid dates, counts up to the date in x
    const int middle = (count - 1) / 2;
    for (int64_t t = 0; t < a.T && chosen < 0 && count > 0; ++t) {
      if (valid && !valid[t * a.valid_stride[1]]) continue;
      const Compared value = column[rank_date++ * blockDim.x];
      int less = 0, not_more = 0;
      for (int j = 0; j < count; ++j) {
        const Compared other = column[j * blockDim.x];
        less += other < value;
        not_more += other <= value;
      }
      if (less <= middle && middle < not_more) chosen = t;
    }
    a.indices[i] = chosen;
    static_cast<Stored*>(a.values)[i] = chosen < 0 ? Stored(0.0f) : x[chosen * a.stride[1]];
  }
}

template <class Word>
__global__ void scatter_kernel(const Word* grad, const int64_t* indices, Word* out, int64_t T,
                               int64_t channels, int64_t total) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < total;
       i += step) {
    const int64_t b = i / channels, c = i % channels, chosen = indices[i];
    for (int64_t t = 0; t < T; ++t)
      out[(b * T + t) * channels + c] = chosen == t ? grad[i] : Word(0);
  }
}

int blocks(int64_t total, int threads) {
  return static_cast<int>(std::min<int64_t>((total + threads - 1) / threads, INT_MAX));
}

template <class Stored, class Compared>
void launch(const MedianArgs& a, cudaStream_t stream) {
  // 48 KiB of shared memory need no opt-in; at T = 192 in float64 a warp of columns fits.
  const int64_t fit = 49152 / (a.T * static_cast<int64_t>(sizeof(Compared)));
  const int threads = static_cast<int>(std::min<int64_t>(256, fit / 32 * 32));
  if (threads == 0) throw std::invalid_argument("temporal_median (cuda): T is at most 192");
  const size_t shared = threads * a.T * sizeof(Compared);
  const int64_t total = a.B * a.N * a.H * a.D;
  median_kernel<Stored, Compared><<<blocks(total, threads), threads, shared, stream>>>(a);
  check(cudaGetLastError(), "temporal_median (cuda)");
}

template <class Word>
void scatter(const void* grad, const int64_t* indices, void* out, int64_t B, int64_t T,
             int64_t channels, cudaStream_t stream) {
  const int64_t total = B * channels;
  scatter_kernel<Word><<<blocks(total, 256), 256, 0, stream>>>(
      static_cast<const Word*>(grad), indices, static_cast<Word*>(out), T, channels, total);
  check(cudaGetLastError(), "temporal_median_backward (cuda)");
}

}  // namespace

void temporal_median_cuda(const MedianArgs& a, Dtype dtype, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case Dtype::f32: return launch<float, float>(a, s);
    case Dtype::f64: return launch<double, double>(a, s);
    case Dtype::f16: return launch<__half, float>(a, s);
    case Dtype::bf16: return launch<__nv_bfloat16, float>(a, s);
  }
}

void temporal_median_backward_cuda(const void* grad, const int64_t* indices, void* out,
                                   int64_t bytes, int64_t B, int64_t T, int64_t channels,
                                   void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (bytes == 2) return scatter<uint16_t>(grad, indices, out, B, T, channels, s);
  if (bytes == 4) return scatter<uint32_t>(grad, indices, out, B, T, channels, s);
  scatter<uint64_t>(grad, indices, out, B, T, channels, s);
}

}  // namespace timo
