// Visible units as tiles. A block makes some bands of one tile: it finds the visible neighbours by
// looking through the ids around its own. A thread takes four pixels of a row at a time, in all
// these bands: where they lie and which of them count is the same in each. A tile's rows begin at
// any address, so the bands are put together in shared memory and written from there, 16 bytes a
// thread. Backward: a block per unit and band of the frames sums, for each pixel, the tiles that
// hold it, in order of their places.
#include <cstring>

#include "units.h"

namespace timo {
namespace {

constexpr int gather_threads = 64;  // few: a block's preparations serve many pixels a thread
constexpr int gather_blocks = 16;   // side by side; for more, loads would wait for each other
constexpr int64_t most_staged = 20480, most_shared = 49152;  // bytes: then ten blocks fit

// Units (i - above + r, j - above + c) around unit (i, j), r < side, c < side.
struct Window {
  int above, side;
  int64_t count() const { return static_cast<int64_t>(side) * side; }
};

inline Window window(int64_t before, int64_t after, int64_t unit) {
  const int64_t above = ceil_div(before, unit);
  return {static_cast<int>(above), static_cast<int>(above + 1 + ceil_div(after, unit))};
}

// slots[r * side + c] is the index of that unit among ids `from` to `to` of the sample, or -1.
__device__ void find_slots(const Units& u, const Grid& grid, const Window& window, int64_t b,
                           const Place& p, int64_t from, int64_t to, int* slots) {
  for (int e = threadIdx.x; e < window.side * window.side; e += blockDim.x) slots[e] = -1;
  __syncthreads();
  const uint32_t frame = grid.h * grid.w;
#pragma unroll 1
  for (int64_t k = from + threadIdx.x; k < to; k += blockDim.x) {
    const uint64_t d = static_cast<uint64_t>(u.ids[b * u.K + k]) - p.t * frame;
    if (d >= frame) continue;
    const uint32_t n = static_cast<uint32_t>(d);
    const int64_t r = n / grid.w - p.i + window.above, c = n % grid.w - p.j + window.above;
    if (r >= 0 && r < window.side && c >= 0 && c < window.side)
      slots[r * window.side + c] = static_cast<int>(k);
  }
}

// Row or column of the window, around row or column `at` of units, that each of `count` lines of
// pixels lies in; below 0 beyond the window and the frame.
__device__ void find_lines(int* lines, int count, int64_t first, uint32_t unit, int64_t size,
                           const Window& window, int64_t at) {
  for (int y = threadIdx.x; y < count; y += blockDim.x) {
    const int64_t line = first + y;
    int place = -1;
    if (line >= 0 && line < size)
      place = static_cast<int>(static_cast<uint32_t>(line) / unit - at + window.above);
    lines[y] = place < window.side ? place : -1;
  }
}

struct alignas(16) Chunk {
  uint32_t words[4];
};

struct Linear {
  float scale, offset;
};

// What validity there is: none, by date, or by pixel, maybe with that of four pixels in a word.
enum class Validity { none, dates, pixels, words };

// What a block makes of a tile: `bands` of it, or `rows` of one band where that is too large.
struct Part {
  int bands, rows, groups, pieces;  // groups of bands, pieces of rows
  int fours, lead;  // fours of pixels in a row; the first begins `lead` before the unit
};

// Four pixels of a row: which of them are in a visible unit, which valid too, which in the tile.
struct Four {
  bool visible[4], ok[4], inside[4];
};

// Their bits as they come from memory: whole until they are used, so that those of a band which is
// not there are a register or two.
template <class T>
struct alignas(4 * sizeof(T)) Raw {
  uint32_t words[sizeof(T)];
};

// The four of `bands` bands from `from` to `to`, where a band takes `area`.
template <bool vector, class Stored, class Tile>
__device__ void convert(const Stored* from, int64_t step, int64_t next_band, const Linear* linear,
                        const Four& four, Tile* to, int bands, int area) {
  constexpr int together = vector ? 4 : 1;  // bands that are on their way at a time
  const int there = four.visible[0] ? bands : 0;  // of a vector
#pragma unroll 1
  for (int c = 0; c < bands; c += together) {
    Raw<Stored> raw[together]{};
#pragma unroll
    for (int i = 0; i < together; ++i, from += next_band) {
      if (vector) {
        if (c + i < there) raw[i] = *reinterpret_cast<const Raw<Stored>*>(from);
        continue;
      }
      Pack<Stored> pixels{};
#pragma unroll
      for (int v = 0; v < 4; ++v)
        if (four.visible[v]) pixels.x[v] = from[v * step];
      memcpy(&raw[i], &pixels, sizeof(pixels));
    }
#pragma unroll
    for (int i = 0; i < together; ++i, to += area) {
      if (c + i >= bands) break;
      Pack<Stored> pixels;
      memcpy(&pixels, &raw[i], sizeof(pixels));
      const auto [scale, offset] = linear[c + i];
      Tile value[4];
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const float physical = wide(pixels.x[v]) * scale + offset;
        value[v] = narrow<Tile>(four.ok[v] ? physical : 0.0f);
      }
#pragma unroll
      for (int v = 0; v < 4; ++v)
        if (four.inside[v]) to[v] = value[v];
    }
  }
}

// Elements from shared memory, where they lie as far beyond 16 bytes as in the tiles.
template <class Tile>
__device__ void write(Tile* out, const Chunk* staged, int shift, int count) {
  constexpr int most = 16 / sizeof(Tile);
  const int last = shift + count;
  for (int e = threadIdx.x * most; e < last; e += gather_threads * most) {
    Tile* to = out + (e - shift);
    if (e >= shift && e + most <= last) {
      *reinterpret_cast<Chunk*>(to) = staged[e / most];
      continue;
    }
    const Tile* from = reinterpret_cast<const Tile*>(staged) + e;
#pragma unroll
    for (int v = 0; v < most; ++v)
      if (e + v >= shift && e + v < last) to[v] = from[v];
  }
}

// Block (tile, part of it). Shared memory: `staged` chunks of the tile, then tables.
template <class Stored, class Tile, bool vector>
__global__ void __launch_bounds__(gather_threads, gather_blocks)
    gather_kernel(GatherArgs a, Grid grid, Window window, Part part, int staged,
                  Validity validity) {
  extern __shared__ Chunk memory[];
  const Units& u = a.units;
  const int S = static_cast<int>(a.before + u.unit + a.after);
  const int64_t n = blockIdx.x, b = blockIdx.x / static_cast<uint32_t>(u.K), k = n - b * u.K;
  const int64_t c0 = static_cast<int64_t>(blockIdx.y / part.pieces) * part.bands;
  const int bands = static_cast<int>(min(u.C - c0, static_cast<int64_t>(part.bands)));
  const int first = blockIdx.y % part.pieces * part.rows, height = min(S - first, part.rows);

  auto* linear = reinterpret_cast<Linear*>(memory + staged);
  int* slots = reinterpret_cast<int*>(linear + part.bands);
  int *rows = slots + window.side * window.side, *columns = rows + part.rows;
  const Place p = place(grid, u.ids[n]);
  const bool any = p.known && (validity != Validity::dates || usable(u, b, p.t, 0, 0));
  const int64_t top = p.i * u.unit - a.before + first, left = p.j * u.unit - part.lead;
  const uint32_t unit = static_cast<uint32_t>(u.unit);
  // Ids ascend: one that is so many units away is no further in the list.
  const int64_t back = window.above * (grid.w + int64_t{1});
  const int64_t ahead = (window.side - 1 - window.above) * (grid.w + int64_t{1});
  find_slots(u, grid, window, b, p, max(k - back, int64_t{0}), min(k + ahead + 1, u.K), slots);
  find_lines(rows, height, top, unit, any ? u.H : 0, window, p.i);
  find_lines(columns, 4 * part.fours, left, unit, u.W, window, p.j);
#pragma unroll 1
  for (int c = threadIdx.x; c < bands; c += gather_threads)
    linear[c] = {scale_of(u, c0 + c), offset_of(u, c0 + c)};
  __syncthreads();

  Tile* out = static_cast<Tile*>(a.tiles) + ((n * u.C + c0) * S + first) * S;
  const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(out) % 16 / sizeof(Tile));
  Tile* tile = reinterpret_cast<Tile*>(memory) + shift;  // [bands, height, S]
  const Stored* corner = pixel<Stored>(u, b, p.t, c0, top, left);
  const uint8_t* valid = validity_at(u, b, p.t, top, left);
  const int begin = static_cast<int>(a.before) - part.lead;  // column of the first four
  const int dy = gather_threads / part.fours, dx = gather_threads % part.fours;
  int y = threadIdx.x / part.fours, i = threadIdx.x % part.fours;
#pragma unroll 1
  for (int e = threadIdx.x; e < height * part.fours; e += gather_threads) {
    const int x = 4 * i, row = rows[y];
    Four four;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int column = columns[x + v];
      const bool same = vector && v;  // as the first
      four.visible[v] = same ? four.visible[0]
                             : row >= 0 && column >= 0 && slots[row * window.side + column] >= 0;
      four.ok[v] = four.visible[v];
      four.inside[v] = static_cast<unsigned>(begin + x + v) < static_cast<unsigned>(S);
    }
    if (validity == Validity::words && four.visible[0]) {
      const auto word = *reinterpret_cast<const uint32_t*>(valid + y * u.valid_stride[2] + x);
#pragma unroll
      for (int v = 0; v < 4; ++v) four.ok[v] = word >> 8 * v & 0xff;
    } else if (validity == Validity::pixels) {
      const uint8_t* from = valid + y * u.valid_stride[2] + x * u.valid_stride[3];
#pragma unroll
      for (int v = 0; v < 4; ++v) four.ok[v] = four.ok[v] && from[v * u.valid_stride[3]];
    }
    const Stored* from = corner + y * u.stride[3] + (vector ? x : x * u.stride[4]);
    convert<vector>(from, u.stride[4], u.stride[2], linear, four, tile + y * S + begin + x, bands,
                    height * S);
    y += dy, i += dx;
    if (i >= part.fours) i -= part.fours, ++y;
  }
  __syncthreads();
  write(out, memory, shift, bands * height * S);
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
  find_slots(u, grid, window, b, p, 0, u.K, slots);
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
  if (ints * 4 > most_shared)
    throw std::invalid_argument(std::string(what) + ": unit and halo need " +
                                std::to_string(ints * 4) + " bytes of shared memory, at most " +
                                std::to_string(most_shared));
  return ints * 4;
}

Part parts(const GatherArgs& a, const Window& window, int64_t bytes) {
  const int64_t S = a.before + a.units.unit + a.after, C = a.units.C;
  const int64_t lead = ceil_div(a.before, 4) * 4;
  const int64_t fours = ceil_div(lead + a.units.unit + a.after, 4);
  const int64_t tables = 4 * (window.count() + S + 4 * fours) + 64;
  const int64_t row = S * bytes, band = S * row + static_cast<int64_t>(sizeof(Linear));
  const int64_t room = std::max(std::min(most_staged, most_shared - tables), row);
  const int64_t groups = ceil_div(C, std::max(room / band, int64_t{1}));
  const int64_t rows = std::min(S, room / row);
  return {static_cast<int>(ceil_div(C, groups)), static_cast<int>(rows), static_cast<int>(groups),
          static_cast<int>(ceil_div(S, rows)), static_cast<int>(fours), static_cast<int>(lead)};
}

Validity validity_of(const Units& u, bool vector) {
  const Sizes4& s = u.valid_stride;
  if (!u.valid) return Validity::none;
  if (s[2] == 0 && s[3] == 0) return Validity::dates;
  const bool words = vector && s[3] == 1 && (s[0] | s[1] | s[2]) % 4 == 0 && aligned(u.valid, 4);
  return words ? Validity::words : Validity::pixels;
}

}  // namespace

void gather_units_cuda(const GatherArgs& a, void* stream) {
  const Units& u = a.units;
  if (u.B * u.K * u.C == 0) return;
  const Grid grid(u);
  narrow_size(std::max(u.H, u.W), "rows or columns of a frame", UINT32_MAX);
  const Window around = window(a.before, a.after, u.unit);
  const auto s = static_cast<cudaStream_t>(stream);
  with_pixel(u.pixel, [&](auto stored) {
    with_float(a.dtype, [&](auto tile) {
      using Stored = typename decltype(stored)::type;
      using Tile = typename decltype(tile)::type;
      const Part part = parts(a, around, sizeof(Tile));
      const int64_t S = a.before + u.unit + a.after;
      const int64_t chunks = ceil_div(part.bands * part.rows * S * sizeof(Tile), 16) + 1;
      const size_t shared = shared_bytes(
          4 * chunks + 2 * part.bands + around.count() + part.rows + 4 * part.fours,
          "gather_units (cuda)");
      const dim3 blocks(narrow_size(u.B * u.K, "number of tiles"),
                        narrow_size(part.groups * part.pieces, "number of parts of a tile", 65535));
      const bool vector = pixel_vectors<Stored>(u);
      const auto kernel = vector ? gather_kernel<Stored, Tile, true>
                                 : gather_kernel<Stored, Tile, false>;
      kernel<<<blocks, gather_threads, shared, s>>>(a, grid, around, part, static_cast<int>(chunks),
                                                    validity_of(u, vector));
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
