// Visible units as tiles. A block makes one band of one tile: it finds the visible neighbours by
// looking through the sample's ids once, then writes the tile in order. A tile's rows begin at any
// address, so stores are single elements side by side. Backward: a block per unit and band of the
// frames sums, for each pixel, the tiles that hold it, in order of their places.
#include "units.h"

namespace timo {
namespace {

// Units (i - above + r, j - above + c) around unit (i, j), r < side, c < side.
struct Window {
  int above, side;
  __host__ __device__ int64_t count() const { return static_cast<int64_t>(side) * side; }
};

inline Window window(int64_t before, int64_t after, int64_t unit) {
  const int64_t above = ceil_div(before, unit);
  return {static_cast<int>(above), static_cast<int>(above + 1 + ceil_div(after, unit))};
}

// slots[r * side + c] is the index of that unit among the sample's ids, or -1.
__device__ void find_slots(const Units& u, const Grid& grid, const Window& window, int64_t b,
                           const Place& p, int* slots) {
  for (int e = threadIdx.x; e < window.count(); e += threads) slots[e] = -1;
  __syncthreads();
  const uint32_t frame = grid.h * grid.w;
  for (int64_t k = threadIdx.x; k < u.K; k += threads) {
    const int64_t d = u.ids[b * u.K + k] - p.t * frame;
    if (d < 0 || d >= frame) continue;
    const uint32_t n = static_cast<uint32_t>(d);
    const int64_t r = n / grid.w - p.i + window.above, c = n % grid.w - p.j + window.above;
    if (r >= 0 && r < window.side && c >= 0 && c < window.side)
      slots[r * window.side + c] = static_cast<int>(k);
  }
}

// Row or column of the window that each of a tile's rows or columns lies in; -1 beyond the frame.
__device__ void find_lines(int* lines, int64_t first, uint32_t unit, int64_t size, int above,
                           int64_t at, int S) {
  for (int y = threadIdx.x; y < S; y += threads) {
    const int64_t line = first + y;
    const bool inside = line >= 0 && line < size;
    lines[y] = inside ? static_cast<int>(static_cast<uint32_t>(line) / unit - at + above) : -1;
  }
}

template <class Stored, class Tile>
__global__ void __launch_bounds__(threads) gather_kernel(GatherArgs a, Grid grid, Window window) {
  extern __shared__ int memory[];
  const Units& u = a.units;
  const int S = static_cast<int>(a.before + u.unit + a.after), dy = threads / S, dx = threads % S;
  int *slots = memory, *rows = slots + window.count(), *columns = rows + S;
  const uint32_t bands = static_cast<uint32_t>(u.C), n = blockIdx.x / bands;
  const int64_t c = blockIdx.x % bands, b = n / static_cast<uint32_t>(u.K);
  const Place p = place(grid, u.ids[n]);
  const int64_t top = p.i * u.unit - a.before, left = p.j * u.unit - a.before;
  const uint32_t unit = static_cast<uint32_t>(u.unit);
  find_slots(u, grid, window, b, p, slots);
  find_lines(rows, top, unit, p.known ? u.H : 0, window.above, p.i, S);
  find_lines(columns, left, unit, u.W, window.above, p.j, S);
  __syncthreads();
  const float scale = scale_of(u, c), offset = offset_of(u, c);
  const int area = S * S;
  Tile* plane = static_cast<Tile*>(a.tiles) + blockIdx.x * static_cast<int64_t>(area);
  int y = threadIdx.x / S, x = threadIdx.x % S;
#pragma unroll 2
  for (int e = threadIdx.x; e < area; e += threads) {
    const int row = rows[y], column = columns[x];
    float value = 0;
    if (row >= 0 && column >= 0 && slots[row * window.side + column] >= 0 &&
        usable(u, b, p.t, top + y, left + x))
      value = wide(*pixel<Stored>(u, b, p.t, c, top + y, left + x)) * scale + offset;
    plane[e] = narrow<Tile>(value);
    y += dy, x += dx;
    if (x >= S) x -= S, ++y;
  }
}

template <class Stored, class Tile>
__global__ void __launch_bounds__(threads)
    gather_backward_kernel(GatherArgs a, Grid grid, Window window) {
  extern __shared__ int slots[];
  const Units& u = a.units;
  const int unit = static_cast<int>(u.unit);
  const int before = static_cast<int>(a.before), after = static_cast<int>(a.after);
  const int64_t S = before + unit + after;
  const uint32_t frame = grid.h * grid.w, bands = static_cast<uint32_t>(u.C);
  const uint32_t n = blockIdx.x / frame, dates = static_cast<uint32_t>(u.T);
  const Place p{n / bands % dates, blockIdx.x / grid.w % grid.h, blockIdx.x % grid.w, true};
  const int64_t c = n % bands, b = n / bands / dates;
  find_slots(u, grid, window, b, p, slots);
  __syncthreads();
  const bool visible = slots[window.above * window.side + window.above] >= 0;
  const float scale = scale_of(u, c);
  const int64_t top = p.i * unit, left = p.j * unit;
  const int height = static_cast<int>(min(static_cast<int64_t>(unit), u.H - top));
  const int width = static_cast<int>(min(static_cast<int64_t>(unit), u.W - left));
#pragma unroll 1
  for (int e = threadIdx.x; e < height * width; e += threads) {
    const int y = e / width, x = e % width;
    float sum = 0;
    if (visible && usable(u, b, p.t, top + y, left + x)) {
      // The tile of the unit r rows below reaches up to here if r * unit - before <= y, ...
#pragma unroll 1
      for (int r = -((unit + after - 1 - y) / unit); r <= (y + before) / unit; ++r)
#pragma unroll 1
        for (int s = -((unit + after - 1 - x) / unit); s <= (x + before) / unit; ++s) {
          const int k = slots[(r + window.above) * window.side + s + window.above];
          if (k < 0) continue;
          const int64_t row = y - r * unit + before, column = x - s * unit + before;
          sum += wide(static_cast<const Tile*>(
              a.tiles)[(((b * u.K + k) * u.C + c) * S + row) * S + column]);
        }
    }
    auto* out = const_cast<Stored*>(pixel<Stored>(u, b, p.t, c, top + y, left + x));
    *out = narrow<Stored>(sum * scale);
  }
}

size_t shared_bytes(int64_t ints, const char* what) {
  if (ints * 4 > 49152)
    throw std::invalid_argument(std::string(what) + ": unit and halo need " +
                                std::to_string(ints * 4) + " bytes of shared memory, at most 49152");
  return ints * 4;
}

}  // namespace

void gather_units_cuda(const GatherArgs& a, void* stream) {
  const Units& u = a.units;
  const Grid grid(u);
  const Window around = window(a.before, a.after, u.unit);
  const int64_t S = a.before + u.unit + a.after;
  const size_t shared = shared_bytes(around.count() + 2 * S, "gather_units (cuda)");
  const uint32_t blocks = narrow_size(u.B * u.K * u.C, "number of tiles times bands");
  const auto s = static_cast<cudaStream_t>(stream);
  with_pixel(u.pixel, [&](auto stored) {
    with_float(a.dtype, [&](auto tile) {
      gather_kernel<typename decltype(stored)::type, typename decltype(tile)::type>
          <<<blocks, threads, shared, s>>>(a, grid, around);
    });
  });
  check(cudaGetLastError(), "gather_units (cuda)");
}

void gather_units_backward_cuda(const GatherArgs& a, void* stream) {
  const Units& u = a.units;
  const Grid grid(u);
  const Window around = window(a.after, a.before, u.unit);
  const size_t shared = shared_bytes(around.count(), "gather_units_backward (cuda)");
  narrow_size(u.unit * u.unit, "number of pixels of a unit");
  const uint32_t blocks = narrow_size(u.B * u.C * grid.units, "number of units times bands");
  const auto s = static_cast<cudaStream_t>(stream);
  with_float(static_cast<Dtype>(u.pixel), [&](auto stored) {
    with_float(a.dtype, [&](auto tile) {
      gather_backward_kernel<typename decltype(stored)::type, typename decltype(tile)::type>
          <<<blocks, threads, shared, s>>>(a, grid, around);
    });
  });
  check(cudaGetLastError(), "gather_units_backward (cuda)");
}

}  // namespace timo
