// Pieces shared by the CUDA kernels of the ops on units: conversions, packs and sums over a block.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>
#include <stdexcept>
#include <string>

#include "launch.h"
#include "ops.h"

namespace timo {
namespace {

constexpr int threads = 256;

__device__ inline float wide(uint8_t x) { return x; }
__device__ inline float wide(uint16_t x) { return x; }
__device__ inline float wide(float x) { return x; }
__device__ inline float wide(__half x) { return __half2float(x); }
__device__ inline float wide(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T narrow(float x) {
  return T(x);
}

// Four neighbours, one load or store where `vector` says that they are aligned.
template <class T>
struct alignas(4 * sizeof(T)) Pack {
  T x[4];
};

template <class T>
__device__ Pack<T> load(const T* p, int64_t step, int n, bool vector) {
  if (vector) return *reinterpret_cast<const Pack<T>*>(p);
  Pack<T> pack;
#pragma unroll
  for (int v = 0; v < 4; ++v) pack.x[v] = v < n ? p[v * step] : T(0);
  return pack;
}

template <class T>
__device__ void store(T* p, const Pack<T>& pack, int n, bool vector) {
  if (vector) {
    *reinterpret_cast<Pack<T>*>(p) = pack;
    return;
  }
#pragma unroll
  for (int v = 0; v < 4; ++v)
    if (v < n) p[v] = pack.x[v];
}

inline bool aligned(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Numbers that kernels divide by are 32 bits wide: wider ones take a call, and registers with it.
inline uint32_t narrow_size(int64_t size, const char* what, int64_t most = INT_MAX) {
  if (size > most)
    throw std::invalid_argument(std::string(what) + " is " + std::to_string(size) +
                                "; the CUDA kernels take at most " + std::to_string(most));
  return static_cast<uint32_t>(size);
}

// Units of a frame, rows by columns, and of a sample.
struct Grid {
  uint32_t h, w, units;
  explicit Grid(const Units& u)
      : h(narrow_size(ceil_div(u.H, u.unit), "rows of units")),
        w(narrow_size(ceil_div(u.W, u.unit), "columns of units")),
        units(narrow_size(u.T * h * w, "number of units")) {}
};

// The place of a unit; `known` is false for ids that no frame has, which read nothing.
struct Place {
  int64_t t, i, j;
  bool known;
};

__device__ inline Place place(const Grid& grid, int64_t id) {
  const bool known = id >= 0 && id < grid.units;
  const uint32_t n = known ? static_cast<uint32_t>(id) : 0;
  return {n / (grid.h * grid.w), n / grid.w % grid.h, n % grid.w, known};
}

__device__ inline const uint8_t* validity_at(const Units& u, int64_t b, int64_t t, int64_t y,
                                             int64_t x) {
  const Sizes4& s = u.valid_stride;
  return u.valid + b * s[0] + t * s[1] + y * s[2] + x * s[3];
}

__device__ inline bool usable(const Units& u, int64_t b, int64_t t, int64_t y, int64_t x) {
  return !u.valid || *validity_at(u, b, t, y, x);
}

template <class Stored>
__device__ const Stored* pixel(const Units& u, int64_t b, int64_t t, int64_t c, int64_t y,
                               int64_t x) {
  const Sizes5& s = u.stride;
  return static_cast<const Stored*>(u.frames) + b * s[0] + t * s[1] + c * s[2] + y * s[3] +
         x * s[4];
}

__device__ inline float scale_of(const Units& u, int64_t c) { return u.scale ? u.scale[c] : 1.0f; }
__device__ inline float offset_of(const Units& u, int64_t c) {
  return u.offset ? u.offset[c] : -0.0f;  // x + -0 keeps the sign of zero
}

// Whether four neighbouring pixels, from a multiple of four on, lie in one unit and aligned word.
template <class Stored>
bool pixel_vectors(const Units& u) {
  const Sizes5& s = u.stride;
  const bool strides = s[4] == 1 && (s[0] | s[1] | s[2] | s[3]) % 4 == 0;
  return strides && u.unit % 4 == 0 && u.W % 4 == 0 && aligned(u.frames, 4 * sizeof(Stored));
}

// Sum over a block in a fixed order; every thread gets it.
template <class T>
__device__ T block_sum(T x) {
  __shared__ T warps[threads / 32];
  for (int step = 16; step; step /= 2) x += __shfl_down_sync(~0u, x, step);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = 0;
  for (int i = 0; i < threads / 32; ++i) sum += warps[i];
  return sum;
}

template <class T>
struct Type {
  using type = T;
};

// f(Type<T>{}) for the type of a dtype.
template <class F>
void with_float(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32: return f(Type<float>{});
    case Dtype::f16: return f(Type<__half>{});
    case Dtype::bf16: return f(Type<__nv_bfloat16>{});
    case Dtype::f64: throw std::invalid_argument("float64 is left to the reference");
  }
}

template <class F>
void with_pixel(Pixel pixel, F f) {
  switch (pixel) {
    case Pixel::u8: return f(Type<uint8_t>{});
    case Pixel::u16: return f(Type<uint16_t>{});
    case Pixel::f16: return f(Type<__half>{});
    case Pixel::bf16: return f(Type<__nv_bfloat16>{});
    case Pixel::f32: return f(Type<float>{});
  }
}

}  // namespace
}  // namespace timo
