// Maximum over dates of bilinearly enlarged maps, and its gradient, channels last.
// Forward: the two rows of the maps that a row of the result lies between are mixed once for all
// dates, for some columns and a block of channels, as many as a cache holds; then every entry takes
// the greatest of its dates. Backward: a row of the maps' gradient gathers, date by date, the rows
// of the result that were mixed from it.
#include <omp.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/tiers.h"
#include "ops.h"

namespace timo {
namespace {

constexpr int64_t block = 64;               // channels at a time
constexpr int64_t mixed_rows = 128 * 1024;  // numbers of mixed rows at a time, about

// Entry i of the result is `first` * entry `low` + `second` * entry `high` of the map.
template <class W>
struct Mix {
  int64_t low, high;
  W first, second;

  W of(int64_t entry) const { return (low == entry ? first : 0) + (high == entry ? second : 0); }
};

template <class W>
std::vector<Mix<W>> mixes(int64_t size, int64_t factor) {
  std::vector<Mix<W>> all;
  for (int64_t i = 0; i < size * factor; ++i) {
    const int64_t twice = std::max<int64_t>(2 * i + 1 - factor, 0), low = twice / (2 * factor);
    // At the border and where a single entry counts, the other has no part, not even as a NaN.
    const double share = low + 1 < size ? (twice % (2 * factor)) / (2.0 * factor) : 0;
    all.push_back({low, share ? low + 1 : low, static_cast<W>(1 - share), static_cast<W>(share)});
  }
  return all;
}

// Entries of the result from which on, and up to which, `entry` of the map may have a part.
struct Span {
  int64_t from, to;
  Span(int64_t entry, int64_t size, int64_t factor)
      : from(std::max<int64_t>(0, (entry - 1) * factor + (factor - 1) / 2 + 1)),
        to(std::min(size * factor, (entry + 1) * factor + factor / 2)) {}
};

template <class W>
struct Plan {
  const MaximumArgs& a;
  std::vector<Mix<W>> rows, columns;

  explicit Plan(const MaximumArgs& args)
      : a(args), rows(mixes<W>(a.h, a.factor)), columns(mixes<W>(a.w, a.factor)) {}
  int64_t columns_at_a_time() const {  // of the map
    return std::min(a.w, std::max<int64_t>(2, mixed_rows / (a.T * block)));
  }
  int64_t height() const { return a.h * a.factor; }
  int64_t width() const { return a.w * a.factor; }
  int64_t entry(int64_t b, int64_t y, int64_t x) const {  // of values and dates
    return ((b * height() + y) * width() + x) * a.C;
  }
  int64_t map_entry(int64_t b, int64_t t, int64_t i, int64_t j) const {
    return (((b * a.T + t) * a.h + i) * a.w + j) * a.C;
  }
  bool usable(int64_t b, int64_t t, int64_t i, int64_t j) const {
    const Sizes4& s = a.valid_stride;
    return !a.valid || a.valid[b * s[0] + t * s[1] + i * s[2] + j * s[3]];
  }
};

// `room`: (T, columns at a time + 2, block) for the mixed rows.
template <class Stored>
struct Forward {
  using W = Wide<Stored>;

  static int64_t rows(const Plan<W>& plan) { return plan.height(); }
  static int64_t room(const Plan<W>& plan) {
    return plan.a.T * (plan.columns_at_a_time() + 2) * block;
  }

  static TIMO_INLINE void mix_rows(const Plan<W>& plan, int64_t b, int64_t y, int64_t from,
                                   int64_t to, int64_t c, int64_t n, W* __restrict room) {
    const MaximumArgs& a = plan.a;
    const Mix<W> mix = plan.rows[y];
    const auto* maps = static_cast<const Stored*>(a.maps);
    for (int64_t t = 0; t < a.T; ++t)
      for (int64_t j = from; j < to; ++j, room += block) {
        const Stored* __restrict low = maps + plan.map_entry(b, t, mix.low, j) + c;
        const Stored* __restrict high = maps + plan.map_entry(b, t, mix.high, j) + c;
        if (mix.second == 0)
          for (int64_t l = 0; l < n; ++l) room[l] = widen(low[l]);
        else
          for (int64_t l = 0; l < n; ++l)
            room[l] = mix.first * widen(low[l]) + mix.second * widen(high[l]);
      }
  }

  // best and date of lanes become those of date t where it is greater, or the first NaN.
  static TIMO_INLINE void compare(const W* __restrict low, const W* __restrict high, Mix<W> mix,
                                  int64_t n, int t, W* __restrict best, int* __restrict date) {
    for (int64_t l = 0; l < n; ++l) {
      const W x = mix.second == 0 ? low[l] : mix.first * low[l] + mix.second * high[l];
      const bool take = !(x <= best[l]) & (best[l] == best[l]);
      best[l] = take ? x : best[l];
      date[l] = take ? t : date[l];
    }
  }

  static TIMO_INLINE void lanes(const Plan<W>& plan, int64_t b, int64_t y, int64_t c, int64_t n,
                                W* __restrict room) {
    const int64_t step = plan.columns_at_a_time() * plan.a.factor;
    for (int64_t left = 0; left < plan.width(); left += step)
      columns(plan, b, y, left, std::min(left + step, plan.width()), c, n, room);
  }

  // Columns [left, right) of row y of the result.
  static TIMO_INLINE void columns(const Plan<W>& plan, int64_t b, int64_t y, int64_t left,
                                  int64_t right, int64_t c, int64_t n, W* __restrict room) {
    const MaximumArgs& a = plan.a;
    const int64_t from = plan.columns[left].low, to = plan.columns[right - 1].high + 1;
    mix_rows(plan, b, y, from, to, c, n, room);
    W best[block];
    int date[block];
    for (int64_t x = left; x < right; ++x) {
      const Mix<W> mix = plan.columns[x];
      std::fill(best, best + block, W{0});
      std::fill(date, date + block, -1);
      bool any = false;
      for (int64_t t = 0; t < a.T; ++t) {
        if (!plan.usable(b, t, y / a.factor, x / a.factor)) continue;
        if (!any) std::fill(best, best + block, -std::numeric_limits<W>::infinity());
        if (!any) std::fill(date, date + block, static_cast<int>(t));
        any = true;
        const W* row = room + (t * (to - from) - from) * block;
        compare(row + mix.low * block, row + mix.high * block, mix, n, static_cast<int>(t), best,
                date);
      }
      Stored* __restrict value = static_cast<Stored*>(a.values) + plan.entry(b, y, x) + c;
      int16_t* __restrict at = a.dates + plan.entry(b, y, x) + c;
      for (int64_t l = 0; l < n; ++l) value[l] = narrow_to(best[l], Stored{});
      for (int64_t l = 0; l < n; ++l) at[l] = static_cast<int16_t>(date[l]);
    }
  }

  static TIMO_INLINE void run(const Plan<W>& plan, int64_t b, int64_t y, W* room) {
    int64_t c = 0;
    for (; c + block <= plan.a.C; c += block) lanes(plan, b, y, c, block, room);
    if (c < plan.a.C) lanes(plan, b, y, c, plan.a.C - c, room);
  }
};

// `room`: (fw, block) for a row of the result's gradient, mixed back to a row of the map.
template <class Stored>
struct Backward {
  using W = Wide<Stored>;

  static int64_t rows(const Plan<W>& plan) { return plan.a.h; }
  static int64_t room(const Plan<W>& plan) { return plan.width() * block; }

  static TIMO_INLINE void lanes(const Plan<W>& plan, int64_t b, int64_t i, int64_t c, int64_t n,
                                W* __restrict room) {
    const MaximumArgs& a = plan.a;
    const auto* grads = static_cast<const Stored*>(a.values);
    const Span ys(i, a.h, a.factor);
    for (int t = 0; t < a.T; ++t) {
      std::fill(room, room + plan.width() * block, W{0});
      for (int64_t y = ys.from; y < ys.to; ++y) {
        const W weight = plan.rows[y].of(i);
        for (int64_t x = 0; x < plan.width(); ++x) {
          const Stored* __restrict grad = grads + plan.entry(b, y, x) + c;
          const int16_t* __restrict date = a.dates + plan.entry(b, y, x) + c;
          W* __restrict sum = room + x * block;
          for (int64_t l = 0; l < n; ++l) sum[l] += date[l] == t ? weight * widen(grad[l]) : 0;
        }
      }
      for (int64_t j = 0; j < a.w; ++j) {
        W sum[block] = {};
        const Span xs(j, a.w, a.factor);
        for (int64_t x = xs.from; x < xs.to; ++x) {
          const W weight = plan.columns[x].of(j);
          for (int64_t l = 0; l < n; ++l) sum[l] += weight * room[x * block + l];
        }
        Stored* __restrict out = static_cast<Stored*>(a.maps) + plan.map_entry(b, t, i, j) + c;
        for (int64_t l = 0; l < n; ++l) out[l] = narrow_to(sum[l], Stored{});
      }
    }
  }

  static TIMO_INLINE void run(const Plan<W>& plan, int64_t b, int64_t i, W* room) {
    int64_t c = 0;
    for (; c + block <= plan.a.C; c += block) lanes(plan, b, i, c, block, room);
    if (c < plan.a.C) lanes(plan, b, i, c, plan.a.C - c, room);
  }
};

// Body::run for each of its rows of every sample.
template <class Body>
void over_rows(const MaximumArgs& a) {
  using W = typename Body::W;
  const Plan<W> plan(a);
  const int level = isa_level();
  const int64_t rows = Body::rows(plan), size = Body::room(plan);
  const int64_t whole = size * omp_get_max_threads();
  const std::unique_ptr<W[]> rooms(new W[whole]);
  if (poisons_workspace())
    std::fill(rooms.get(), rooms.get() + whole, std::numeric_limits<W>::quiet_NaN());
#pragma omp parallel for schedule(static) if (a.B * rows > 1)
  for (int64_t row = 0; row < a.B * rows; ++row) {
    const int64_t b = row / rows, y = row % rows;
    W* room = rooms.get() + size * omp_get_thread_num();
    Tiers<Body>::call(level, plan, b, y, room);
  }
}

template <template <class> class Body>
void of_dtype(const MaximumArgs& a) {
  switch (a.dtype) {
    case Dtype::f32: return over_rows<Body<float>>(a);
    case Dtype::f64: return over_rows<Body<double>>(a);
    case Dtype::f16: return over_rows<Body<f16>>(a);
    case Dtype::bf16: return over_rows<Body<bf16>>(a);
  }
}

}  // namespace

void temporal_maximum_cpu(const MaximumArgs& a) { of_dtype<Forward>(a); }
void temporal_maximum_backward_cpu(const MaximumArgs& a) { of_dtype<Backward>(a); }

}  // namespace timo
