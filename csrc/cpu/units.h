// Pieces shared by the CPU kernels of gather_units and masked_pixel_loss: which columns of a frame
// are visible, rows of pixels to float32 and back.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cpu/tiers.h"
#include "ops.h"

namespace timo {
namespace {

constexpr int64_t lanes = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Place {
  int64_t t, i, j;
};

struct Grid {
  int64_t h, w;
  explicit Grid(const Units& u) : h(ceil_div(u.H, u.unit)), w(ceil_div(u.W, u.unit)) {}
  Place place(int64_t id) const { return {id / (h * w), id / w % h, id % w}; }
};

struct Run {
  int64_t from, to;
};

// Columns [from, to) of unit row i in frame t that lie in visible units, as runs that do not touch.
inline void visible_runs(const Units& u, const Grid& grid, int64_t b, int64_t t, int64_t i,
                         int64_t from, int64_t to, std::vector<Run>& runs) {
  runs.clear();
  const int64_t first = (t * grid.h + i) * grid.w;  // id of the row's first unit
  const int64_t *ids = u.ids + b * u.K, *end = ids + u.K;
  for (const int64_t* id = std::lower_bound(ids, end, first + from / u.unit); id != end; ++id) {
    const int64_t left = (*id - first) * u.unit;
    if (left >= to) break;
    const Run run{std::max(left, from), std::min(left + u.unit, to)};
    if (!runs.empty() && runs.back().to == run.from)
      runs.back().to = run.to;
    else
      runs.push_back(run);
  }
}

// A row of pixels in the frames and which of them are usable (null: all).
template <class Stored>
struct Row {
  Stored* x;
  int64_t step;
  const uint8_t* ok;
  int64_t ok_step;
};

template <class Stored>
TIMO_INLINE Row<Stored> row_at(const Units& u, int64_t b, int64_t t, int64_t c, int64_t y,
                               int64_t x) {
  auto* p = static_cast<Stored*>(u.frames) + b * u.stride[0] + t * u.stride[1] +
            c * u.stride[2] + y * u.stride[3] + x * u.stride[4];
  const Sizes4& s = u.valid_stride;
  // Validity of whole dates is asked once a unit, by usable_date.
  const bool by_date = !u.valid || (s[2] == 0 && s[3] == 0);
  const uint8_t* ok =
      by_date ? nullptr : u.valid + b * s[0] + t * s[1] + y * s[2] + x * s[3];
  return {p, u.stride[4], ok, s[3]};
}

// False where the whole of frame t is invalid because validity is by date.
inline bool usable_date(const Units& u, int64_t b, int64_t t) {
  const Sizes4& s = u.valid_stride;
  return !u.valid || s[2] || s[3] || u.valid[b * s[0] + t * s[1]];
}

// Identity is x * 1 + -0: it keeps the sign of zero.
struct Affine {
  float scale, offset;
};

inline Affine band(const Units& u, int64_t c) {
  return {u.scale ? u.scale[c] : 1.0f, u.offset ? u.offset[c] : -0.0f};
}

template <class Stored, class Out>
TIMO_INLINE void load_lanes(const Stored* __restrict x, Affine f, Out* __restrict y) {
#pragma GCC ivdep
#pragma GCC unroll 1  // unrolled before it is vectorised, it would be assembled from scalars
  for (int64_t l = 0; l < lanes; ++l) y[l] = narrow_to(widen(x[l]) * f.scale + f.offset, Out{});
}

// y[0..n) = pixels through scale and offset, 0 where not usable. n >= 1.
template <class Stored, class Out>
TIMO_INLINE void load_row(Row<Stored> r, int64_t n, Affine f, Out* y) {
  int64_t i = 0;
  if (r.step == 1) {
    for (; i + lanes <= n; i += lanes) load_lanes(r.x + i, f, y + i);
    if (i < n && n >= lanes) load_lanes(r.x + n - lanes, f, y + n - lanes), i = n;  // overlaps
  }
  for (; i < n; ++i) y[i] = narrow_to(widen(r.x[i * r.step]) * f.scale + f.offset, Out{});
  if (r.ok)
    for (i = 0; i < n; ++i) y[i] = r.ok[i * r.ok_step] ? y[i] : Out{};
}

template <class T>
struct Type {
  using type = T;
};

// f(Type<T>{}) for the type of a dtype.
template <class F>
void with_pixel(Pixel pixel, F f) {
  switch (pixel) {
    case Pixel::u8: return f(Type<uint8_t>{});
    case Pixel::u16: return f(Type<uint16_t>{});
    case Pixel::f16: return f(Type<f16>{});
    case Pixel::bf16: return f(Type<bf16>{});
    case Pixel::f32: return f(Type<float>{});
  }
}

template <class F>
void with_float(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32: return f(Type<float>{});
    case Dtype::f16: return f(Type<f16>{});
    case Dtype::bf16: return f(Type<bf16>{});
    case Dtype::f64: throw std::invalid_argument("float64 is left to the reference");
  }
}

}  // namespace
}  // namespace timo
