// Kernels with the faults that the emulation must find, for test_cuda_emulated.py.
#include <cuda_runtime.h>

namespace {

__global__ void sound(int* out) {
  extern __shared__ int memory[];
  memory[threadIdx.x] = threadIdx.x;
  __syncthreads();
  int x = memory[blockDim.x - 1 - threadIdx.x];
  for (int step = 16; step; step /= 2) x += __shfl_down_sync(~0u, x, step);
  const unsigned votes = __ballot_sync(~0u, threadIdx.x % 2);
  if (threadIdx.x == 0) *out = x + static_cast<int>(votes & 2);
}

__global__ void branch(int*) {
  if (threadIdx.x < 3)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void leaves(int*) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void half_a_warp(int* out) {
  if (threadIdx.x < 16) *out = __shfl_down_sync(~0u, 1, 1);
}

__global__ void beyond_shared(int*) {
  extern __shared__ int memory[];
  memory[threadIdx.x + 1] = 1;
}

__global__ void beyond_array(int* out) {
  __shared__ int memory[4];
  memory[threadIdx.x % 8] = 1;
  *out = memory[0];
}

struct alignas(16) Four {
  int x[4];
};

__global__ void misaligned(int* out) { *reinterpret_cast<Four*>(out + 1) = Four{}; }

__global__ void nowhere(int*) { *reinterpret_cast<volatile int*>(64) = 1; }

__global__ void overflow(int* out) { *out = *out + 0x7fffffff; }

// Thread i reads what its neighbour may not have written yet.
__global__ void race(int* out) {
  extern __shared__ int memory[];
  memory[threadIdx.x] = threadIdx.x;
  const int neighbour = memory[(threadIdx.x + 1) % blockDim.x];
  __syncthreads();
  if (threadIdx.x == 7) *out = neighbour;
}

}  // namespace

// 0, 1 if the launch was refused, or -1 with what was thrown in `said`.
extern "C" __attribute__((visibility("default"))) int run_fault(int which, int order, int threads,
                                                                int blocks_y, int* out,
                                                                char* said) {
  using Kernel = void (*)(int*);
  const Kernel kernels[] = {sound,      branch,  leaves,   half_a_warp, beyond_shared, beyond_array,
                            misaligned, nowhere, overflow, race};
  const Kernel kernel = kernels[which];
  cuda_emulation::order = order;
  try {
    kernel<<<dim3(1, blocks_y), threads, threads * 4>>>(out);
  } catch (const std::exception& error) {
    std::strncpy(said, error.what(), 255);
    return -1;
  }
  return cudaGetLastError() != cudaSuccess;
}
