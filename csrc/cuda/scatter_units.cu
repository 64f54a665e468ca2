// Visible tokens at their places, the mask token elsewhere, plus position: a warp per row of the
// sequence finds its token with one vote for 32 ids. Backward copies the rows of visible units and
// sums the others, in chunks of fixed size whose sums are added in double.
#include "units.h"

namespace timo {
namespace {

template <class Stored>
__global__ void __launch_bounds__(threads) scatter_kernel(ScatterArgs a, bool vector) {
  const int lane = threadIdx.x % 32;
  const uint32_t rows = static_cast<uint32_t>(a.B * a.L), places = static_cast<uint32_t>(a.L);
  const uint32_t warps = gridDim.x * (threads / 32);
  for (uint32_t row = blockIdx.x * (threads / 32) + threadIdx.x / 32; row < rows; row += warps) {
    const int64_t b = row / places, l = row % places;
    int64_t k = -1;
    for (int64_t first = 0; first < a.K && k < 0; first += 32) {
      const bool here = first + lane < a.K && a.ids[b * a.K + first + lane] == l;
      const unsigned votes = __ballot_sync(~0u, here);
      if (votes) k = first + __ffs(votes) - 1;
    }
    const Stored* token =
        static_cast<const Stored*>(a.tokens) + b * a.stride[0] + max(k, int64_t{0}) * a.stride[1];
    Stored* out = static_cast<Stored*>(a.sequence) + row * a.D;
#pragma unroll 1
    for (int64_t d = 4 * lane; d < a.D; d += 128) {
      const int n = static_cast<int>(min(a.D - d, int64_t{4}));
      const Pack<float> position = load(a.position + l * a.D + d, 1, n, vector);
      Pack<float> source;
      if (k < 0) {
        source = load<float>(a.mask_token + d, 1, n, vector);
      } else {
        const Pack<Stored> narrowed = load(token + d, 1, n, vector);
#pragma unroll
        for (int v = 0; v < 4; ++v) source.x[v] = wide(narrowed.x[v]);
      }
      Pack<Stored> sum;
#pragma unroll
      for (int v = 0; v < 4; ++v) sum.x[v] = narrow<Stored>(source.x[v] + position.x[v]);
      store(out + d, sum, n, vector);
    }
  }
}

constexpr int chunk = scatter_units_chunk;

// Block (chunk of rows, 4 * threads channels): copies visible rows, sums the others into partial.
template <class Stored>
__global__ void __launch_bounds__(threads) scatter_backward_kernel(ScatterArgs a, bool vector) {
  __shared__ int slots[chunk];
  const int64_t first = blockIdx.x * static_cast<int64_t>(chunk);
  const int rows = static_cast<int>(min(a.B * a.L - first, int64_t{chunk}));
  for (int r = threadIdx.x; r < chunk; r += threads) slots[r] = -1;
  __syncthreads();
  const uint32_t places = static_cast<uint32_t>(a.L), row0 = static_cast<uint32_t>(first);
  for (int64_t b = row0 / places; b * a.L < first + rows; ++b)
    for (int64_t k = threadIdx.x; k < a.K; k += threads) {
      const int64_t id = a.ids[b * a.K + k], row = b * a.L + id - first;
      if (id >= 0 && id < a.L && row >= 0 && row < rows) slots[row] = static_cast<int>(k);
    }
  __syncthreads();
  for (int64_t d = 4 * (blockIdx.y * static_cast<int64_t>(threads) + threadIdx.x); d < a.D;
       d += 4 * static_cast<int64_t>(threads) * gridDim.y) {
    const int n = static_cast<int>(min(a.D - d, int64_t{4}));
    Pack<float> sum{};
#pragma unroll 2
    for (int r = 0; r < rows; ++r) {
      const int64_t row = first + r, b = (row0 + r) / places;
      const Pack<Stored> grad =
          load(static_cast<const Stored*>(a.sequence) + row * a.D + d, 1, n, vector);
      if (slots[r] >= 0) {
        Stored* out = static_cast<Stored*>(a.tokens) + b * a.stride[0] + slots[r] * a.stride[1];
        store(out + d, grad, n, vector);
      } else {
#pragma unroll
        for (int v = 0; v < 4; ++v) sum.x[v] += wide(grad.x[v]);
      }
    }
    store(a.partial + blockIdx.x * a.D + d, sum, n, vector);
  }
}

// 32 channels a block; warp i sums chunks i, i + 8, ...
__global__ void __launch_bounds__(threads) mask_token_kernel(ScatterArgs a, int64_t chunks) {
  __shared__ double sums[threads / 32][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t d = blockIdx.x * int64_t{32} + lane;
  double sum = 0;
  if (d < a.D)
    for (int64_t i = warp; i < chunks; i += threads / 32) sum += a.partial[i * a.D + d];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp || d >= a.D) return;
  for (int i = 1; i < threads / 32; ++i) sum += sums[i][lane];
  a.mask_token[d] = static_cast<float>(sum);
}

template <class Stored>
bool vectors(const ScatterArgs& a) {
  const size_t bytes = 4 * sizeof(Stored);
  return a.D % 4 == 0 && a.stride[0] % 4 == 0 && a.stride[1] % 4 == 0 && aligned(a.tokens, bytes) &&
         aligned(a.sequence, bytes) && aligned(a.mask_token, 16) && aligned(a.position, 16) &&
         aligned(a.partial, 16);
}

}  // namespace

void scatter_units_cuda(const ScatterArgs& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t rows = narrow_size(a.B * a.L, "number of rows");
  const auto blocks = static_cast<unsigned>(ceil_div(rows, threads / 32));
  with_float(a.dtype, [&](auto stored) {
    using Stored = typename decltype(stored)::type;
    scatter_kernel<Stored>
        <<<blocks, threads, 0, s>>>(a, vectors<Stored>(a));
  });
  check(cudaGetLastError(), "scatter_units (cuda)");
}

void scatter_units_backward_cuda(const ScatterArgs& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t chunks = ceil_div(narrow_size(a.B * a.L, "number of rows"), chunk);
  const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(
                                      std::min<int64_t>(ceil_div(a.D, 4 * threads), 65535)));
  with_float(a.dtype, [&](auto stored) {
    using Stored = typename decltype(stored)::type;
    scatter_backward_kernel<Stored><<<grid, threads, 0, s>>>(a, vectors<Stored>(a));
  });
  check(cudaGetLastError(), "scatter_units_backward (cuda)");
  mask_token_kernel<<<static_cast<unsigned>(ceil_div(a.D, 32)), threads, 0, s>>>(a, chunks);
  check(cudaGetLastError(), "scatter_units_backward (cuda)");
}

}  // namespace timo
