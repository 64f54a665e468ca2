// Squared error of the masked units against the frames: a block per unit, four pixels a thread,
// sums of a block in float, of all units in double, in a fixed order and without atomics. Mean and
// variance take two passes over a unit, which the second finds in the cache; those of the batch are
// merged from the units' in one block.
#include "units.h"

namespace timo {
namespace {

// What is kept of a unit: number of values, mean, sum of squares about it, squared error.
struct Partial {
  double count, mean, squares, error;
};

__device__ inline float rstd_of(double squares, double count) {
  return static_cast<float>(rsqrt(squares / max(count - 1, 1.0) + variance_eps));
}

// Four neighbouring pixels of a unit through scale and offset.
struct Four {
  float y[4];
  bool ok[4];
  int n;          // inside the unit
  int64_t start;  // of the first in pred
};

// f(four) for each four of unit n that thread has; those beyond the frame are not ok.
template <class Stored, class F>
__device__ void each_four(const LossArgs& a, int64_t n, const Place& p, bool vector, F& f) {
  const Units& u = a.units;
  const int64_t b = static_cast<uint32_t>(n) / static_cast<uint32_t>(u.K), left = p.j * u.unit;
  const int unit = static_cast<int>(u.unit), fours = (unit + 3) / 4;
  const int count = static_cast<int>(u.C) * unit * fours;
#pragma unroll 1
  for (int e = threadIdx.x; e < count; e += threads) {
    const int row = e / fours, x = 4 * (e % fours);
    const int64_t c = row / unit, y = p.i * u.unit + row % unit;
    Four four;
    four.n = min(unit - x, 4), four.start = (n * u.C * unit + row) * unit + x;
    const int inside = p.known && y < u.H
                           ? static_cast<int>(min(u.W - left - x, static_cast<int64_t>(four.n)))
                           : 0;
    Pack<Stored> pixels{};
    if (inside > 0)
      pixels = load(pixel<Stored>(u, b, p.t, c, y, left + x), u.stride[4], inside, vector);
    const float scale = scale_of(u, c), offset = offset_of(u, c);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      four.y[v] = wide(pixels.x[v]) * scale + offset;
      four.ok[v] = v < inside && usable(u, b, p.t, y, left + x + v);
    }
    f(four);
  }
}

struct Mean {
  float sum = 0;
  int count = 0;
  __device__ void operator()(const Four& four) {
#pragma unroll
    for (int v = 0; v < 4; ++v)
      if (four.ok[v]) sum += four.y[v], ++count;
  }
};

// A sum that takes off what rounding added: frames hold few different numbers, and equal terms are
// all rounded the same way, in all threads.
struct Sum {
  float value = 0, excess = 0;
  __device__ void add(float x) {
    const float term = x - excess, next = value + term;
    excess = (next - value) - term;
    value = next;
  }
};

// About a mean that has been rounded; `rest` is what takes the rounding off again.
struct Squares {
  float mean;
  Sum sum, rest;
  __device__ void operator()(const Four& four) {
    float squares = 0, deviations = 0;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const float d = four.y[v] - mean;
      if (four.ok[v]) squares += d * d, deviations += d;
    }
    sum.add(squares), rest.add(deviations);
  }
};

template <class Pred>
struct Error {
  const Pred* pred;
  float mean, rstd;
  bool vector;
  float sum = 0;
  int count = 0;
  __device__ void operator()(const Four& four) {
    const Pack<Pred> guess = load(pred + four.start, 1, four.n, vector);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const float error = wide(guess.x[v]) - (four.y[v] - mean) * rstd;
      if (four.ok[v]) sum += error * error, ++count;
    }
  }
};

template <class Pred>
struct Gradient {
  const Pred* pred;
  Pred* out;
  float mean, rstd, factor;
  bool vector;
  __device__ void operator()(const Four& four) {
    const Pack<Pred> guess = load(pred + four.start, 1, four.n, vector);
    Pack<Pred> gradient;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const float error = wide(guess.x[v]) - (four.y[v] - mean) * rstd;
      gradient.x[v] = narrow<Pred>(four.ok[v] ? error * factor : 0.0f);
    }
    store(out + four.start, gradient, four.n, vector);
  }
};

// Statistics of each unit, its error, or, with patch normalisation, both.
template <class Stored, class Pred>
__global__ void __launch_bounds__(threads)
    loss_kernel(LossArgs a, Grid grid, bool statistics, bool error, bool vector) {
  const int64_t n = blockIdx.x;
  const Place p = place(grid, a.units.ids[n]);
  Partial& part = reinterpret_cast<Partial*>(a.partial)[n];
  const bool first = threadIdx.x == 0;
  float mean = 0, rstd = 1;
  if (statistics) {
    Mean sum;
    each_four<Stored>(a, n, p, vector, sum);
    const int count = block_sum(sum.count);
    mean = block_sum(sum.sum) / max(count, 1);
    Squares spread{mean};
    each_four<Stored>(a, n, p, vector, spread);
    const float rest = block_sum(spread.rest.value), shift = rest / max(count, 1);
    const float squares = max(block_sum(spread.sum.value) - rest * shift, 0.0f);
    mean += shift;
    rstd = __frsqrt_rn(squares / max(count - 1, 1) + static_cast<float>(variance_eps));
    if (first) part.count = count, part.mean = mean, part.squares = squares;
  } else if (a.norm == Norm::batch) {
    mean = a.mean[n], rstd = a.rstd[n];
  }
  if (error) {
    Error<Pred> miss{static_cast<const Pred*>(a.pred), mean, rstd, vector};
    each_four<Stored>(a, n, p, vector, miss);
    const float sum = block_sum(miss.sum);
    const int count = block_sum(miss.count);
    if (first) part.error = sum, part.count = count;
  }
  if (first && a.norm != Norm::batch) a.mean[n] = mean, a.rstd[n] = rstd;
}

template <class Stored, class Pred>
__global__ void __launch_bounds__(threads) loss_backward_kernel(LossArgs a, Grid grid,
                                                                       bool vector) {
  const int64_t n = blockIdx.x;
  const float factor = 2 * *a.grad / static_cast<float>(max(*a.count, int64_t{1}));
  Gradient<Pred> gradient{static_cast<const Pred*>(a.pred), static_cast<Pred*>(a.dpred),
                          a.mean[n], a.rstd[n], factor, vector};
  each_four<Stored>(a, n, place(grid, a.units.ids[n]), vector, gradient);
}

// Mean and variance of the batch from those of the units: their mean, then the squares about it.
__global__ void __launch_bounds__(threads) merge_kernel(LossArgs a) {
  const auto* parts = reinterpret_cast<const Partial*>(a.partial);
  const int64_t units = a.units.B * a.units.K;
  double count = 0, mean = 0, squares = 0;
  for (int64_t n = threadIdx.x; n < units; n += threads)
    count += parts[n].count, mean += parts[n].count * parts[n].mean;
  count = block_sum(count);
  mean = block_sum(mean) / max(count, 1.0);
  for (int64_t n = threadIdx.x; n < units; n += threads) {
    const double apart = parts[n].mean - mean;
    squares += parts[n].squares + parts[n].count * apart * apart;
  }
  squares = block_sum(squares);
  for (int64_t n = threadIdx.x; n < units; n += threads)
    a.mean[n] = static_cast<float>(mean), a.rstd[n] = rstd_of(squares, count);
}

__global__ void __launch_bounds__(threads) total_kernel(LossArgs a) {
  const auto* parts = reinterpret_cast<const Partial*>(a.partial);
  double count = 0, error = 0;
  for (int64_t n = threadIdx.x; n < a.units.B * a.units.K; n += threads)
    count += parts[n].count, error += parts[n].error;
  count = block_sum(count), error = block_sum(error);
  if (threadIdx.x) return;
  *a.loss = static_cast<float>(error / max(count, 1.0));
  *a.count = static_cast<int64_t>(count);
}

// Whether every four pixels of frames, pred and its gradient lie in one aligned word.
template <class Stored, class Pred>
bool vectors(const LossArgs& a) {
  return pixel_vectors<Stored>(a.units) && aligned(a.pred, 4 * sizeof(Pred)) &&
         aligned(a.dpred, 4 * sizeof(Pred));
}

}  // namespace

void masked_pixel_loss_cuda(const LossArgs& a, void* stream) {
  const Units& u = a.units;
  const Grid grid(u);
  const uint32_t blocks = narrow_size(u.B * u.K, "number of masked units");
  narrow_size(u.C * u.unit * u.unit, "number of values of a unit");
  const auto s = static_cast<cudaStream_t>(stream);
  with_pixel(u.pixel, [&](auto stored) {
    with_float(a.dtype, [&](auto pred) {
      using Stored = typename decltype(stored)::type;
      using Pred = typename decltype(pred)::type;
      const auto launch = [&](bool statistics, bool error) {
        loss_kernel<Stored, Pred><<<blocks, threads, 0, s>>>(
            a, grid, statistics, error, vectors<Stored, Pred>(a));
        check(cudaGetLastError(), "masked_pixel_loss (cuda)");
      };
      if (a.norm == Norm::batch) {
        launch(true, false);
        merge_kernel<<<1, threads, 0, s>>>(a);
        check(cudaGetLastError(), "masked_pixel_loss (cuda)");
      }
      launch(a.norm == Norm::patch, true);
    });
  });
  total_kernel<<<1, threads, 0, s>>>(a);
  check(cudaGetLastError(), "masked_pixel_loss (cuda)");
}

void masked_pixel_loss_backward_cuda(const LossArgs& a, void* stream) {
  const Units& u = a.units;
  const Grid grid(u);
  const uint32_t blocks = narrow_size(u.B * u.K, "number of masked units");
  narrow_size(u.C * u.unit * u.unit, "number of values of a unit");
  const auto s = static_cast<cudaStream_t>(stream);
  with_pixel(u.pixel, [&](auto stored) {
    with_float(a.dtype, [&](auto pred) {
      using Stored = typename decltype(stored)::type;
      using Pred = typename decltype(pred)::type;
      loss_backward_kernel<Stored, Pred>
          <<<blocks, threads, 0, s>>>(a, grid, vectors<Stored, Pred>(a));
    });
  });
  check(cudaGetLastError(), "masked_pixel_loss_backward (cuda)");
}

}  // namespace timo
