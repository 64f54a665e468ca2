// Squared error of the masked units against the frames, unit by unit, in double sums of fixed
// lanes. Mean and variance take two passes over a unit, which the second finds in the cache; those
// of the batch are merged from the units'. Partial results are summed in the order of the units,
// so that nothing depends on the number of threads.
#include <cmath>

#include "cpu/units.h"

namespace timo {
namespace {

// Sums in lanes: value i of a row goes to lane i % lanes.
struct Sum {
  double lane[lanes] = {};
  TIMO_INLINE double total() const {
    double sum = 0;
    for (int64_t l = 0; l < lanes; ++l) sum += lane[l];
    return sum;
  }
};

// term(i) of the usable i is added.
template <class Term>
TIMO_INLINE void add_row(Sum& sum, const uint8_t* ok, int64_t ok_step, int64_t n,
                         const Term& term) {
  int64_t i = 0;
  if (!ok)
    for (; i + lanes <= n; i += lanes) {
#pragma GCC ivdep
#pragma GCC unroll 1  // as in load_lanes
      for (int64_t l = 0; l < lanes; ++l) sum.lane[l] += term.at(i + l);
    }
  for (; i < n; ++i)
    if (!ok || ok[i * ok_step]) sum.lane[i % lanes] += term.at(i);
}

struct Value {
  const float* y;
  TIMO_INLINE double at(int64_t i) const { return y[i]; }
};

struct Spread {
  const float* y;
  double mean;
  TIMO_INLINE double at(int64_t i) const { return (y[i] - mean) * (y[i] - mean); }
};

struct Target {
  float mean, rstd;
  TIMO_INLINE float of(float y) const { return (y - mean) * rstd; }
};

template <class Pred>
struct Error {
  const Pred* pred;
  const float* y;
  Target target;
  TIMO_INLINE double at(int64_t i) const {
    const double error = widen(pred[i]) - target.of(y[i]);
    return error * error;
  }
};

// A masked unit: the part of it that lies inside the frame.
struct Box {
  int64_t b, t, top, left, height, width;
  bool usable;
};

inline Box box_of(const Units& u, const Grid& grid, int64_t n) {
  const int64_t b = n / u.K;
  const Place p = grid.place(u.ids[n]);
  const int64_t top = p.i * u.unit, left = p.j * u.unit;
  return {b, p.t, top, left, std::min(u.unit, u.H - top), std::min(u.unit, u.W - left),
          usable_date(u, b, p.t)};
}

inline int64_t count_of(const Units& u, const Box& box) {
  if (!box.usable) return 0;
  const auto row = row_at<const float>(u, box.b, box.t, 0, box.top, box.left);
  if (!row.ok) return u.C * box.height * box.width;
  int64_t count = 0;
  for (int64_t y = 0; y < box.height; ++y)
    for (int64_t x = 0; x < box.width; ++x)
      count += row.ok[y * u.valid_stride[2] + x * row.ok_step] != 0;
  return u.C * count;
}

// What is kept of a unit: number of values, mean, sum of squares about it, squared error.
struct Partial {
  double count, mean, squares, error;
};

inline float rstd_of(double squares, double count) {
  return static_cast<float>(1 / std::sqrt(squares / std::max(count - 1, 1.0) + variance_eps));
}

enum class Pass { mean, squares, error };

template <class Stored, class Pred>
struct Loss {
  template <Pass pass>
  static TIMO_INLINE double sum(const LossArgs& a, const Box& box, int64_t n, double mean,
                                Target target, float* y) {
    const Units& u = a.units;
    Sum sum;
    for (int64_t c = 0; c < u.C; ++c)
      for (int64_t r = 0; r < box.height; ++r) {
        auto row = row_at<const Stored>(u, box.b, box.t, c, box.top + r, box.left);
        const uint8_t* ok = row.ok;
        row.ok = nullptr;
        load_row(row, box.width, band(u, c), y);
        if constexpr (pass == Pass::mean)
          add_row(sum, ok, row.ok_step, box.width, Value{y});
        else if constexpr (pass == Pass::squares)
          add_row(sum, ok, row.ok_step, box.width, Spread{y, mean});
        else
          add_row(sum, ok, row.ok_step, box.width,
                  Error<Pred>{static_cast<const Pred*>(a.pred) + ((n * u.C + c) * u.unit + r) *
                                                                     u.unit, y, target});
      }
    return sum.total();
  }

  // Statistics of unit n, its error, or, with patch normalisation, both.
  static TIMO_INLINE void run(const LossArgs& a, const Grid& grid, int64_t n, bool statistics,
                              bool error, float* y) {
    Partial& part = reinterpret_cast<Partial*>(a.partial)[n];
    const Box box = box_of(a.units, grid, n);
    const int64_t count = count_of(a.units, box);
    if (statistics) {
      double mean = 0, squares = 0;
      if (count) {
        mean = sum<Pass::mean>(a, box, n, 0, {}, y) / count;
        squares = sum<Pass::squares>(a, box, n, mean, {}, y);
      }
      part.mean = mean, part.squares = squares;
      a.mean[n] = static_cast<float>(mean), a.rstd[n] = rstd_of(squares, count);
    }
    part.count = count;
    if (error)
      part.error = count ? sum<Pass::error>(a, box, n, 0, {a.mean[n], a.rstd[n]}, y) : 0;
  }
};

template <class Stored, class Pred>
struct LossBackward {
  static TIMO_INLINE void run(const LossArgs& a, const Grid& grid, int64_t n, float factor,
                              float* y) {
    const Units& u = a.units;
    const Box box = box_of(u, grid, n);
    const Target target{a.mean[n], a.rstd[n]};
    for (int64_t c = 0; c < u.C; ++c)
      for (int64_t r = 0; r < u.unit; ++r) {
        const int64_t start = ((n * u.C + c) * u.unit + r) * u.unit;
        const Pred* __restrict pred = static_cast<const Pred*>(a.pred) + start;
        Pred* __restrict out = static_cast<Pred*>(a.dpred) + start;
        int64_t written = 0;
        if (box.usable && r < box.height) {
          auto row = row_at<const Stored>(u, box.b, box.t, c, box.top + r, box.left);
          const uint8_t* ok = row.ok;
          row.ok = nullptr;
          load_row(row, box.width, band(u, c), y);
          written = box.width;
          for (int64_t x = 0; x < written; ++x)
            out[x] = narrow_to((widen(pred[x]) - target.of(y[x])) * factor, Pred{});
          if (ok)
            for (int64_t x = 0; x < written; ++x) out[x] = ok[x * row.ok_step] ? out[x] : Pred{};
        }
        std::fill(out + written, out + u.unit, Pred{});
      }
  }
};

// Mean and variance of the batch from those of the units (Chan, Golub and LeVeque, 1979).
void merge(const LossArgs& a, const Partial* parts, int64_t units) {
  double count = 0, mean = 0, squares = 0;
  for (int64_t n = 0; n < units; ++n) {
    if (parts[n].count == 0) continue;
    const double together = count + parts[n].count, apart = parts[n].mean - mean;
    squares += parts[n].squares + apart * apart * count * parts[n].count / together;
    mean += apart * parts[n].count / together;
    count = together;
  }
  std::fill(a.mean, a.mean + units, static_cast<float>(mean));
  std::fill(a.rstd, a.rstd + units, rstd_of(squares, count));
}

}  // namespace

void masked_pixel_loss_cpu(const LossArgs& a) {
  const Units& u = a.units;
  const Grid grid(u);
  const int level = isa_level();
  const int64_t units = u.B * u.K;
  auto* parts = reinterpret_cast<Partial*>(a.partial);
  with_pixel(u.pixel, [&](auto stored) {
    with_float(a.dtype, [&](auto pred) {
      using Body = Loss<typename decltype(stored)::type, typename decltype(pred)::type>;
      const auto every_unit = [&](const bool statistics, const bool error) {
#pragma omp parallel if (units > 1)
        {
          std::vector<float> row(u.unit);
          float* y = row.data();
#pragma omp for schedule(static)
          for (int64_t n = 0; n < units; ++n)
            Tiers<Body>::call(level, a, grid, n, statistics, error, y);
        }
      };
      if (a.norm == Norm::none) {
        std::fill(a.mean, a.mean + units, 0.0f);
        std::fill(a.rstd, a.rstd + units, 1.0f);
      }
      if (a.norm == Norm::batch) {
        every_unit(true, false);
        merge(a, parts, units);
      }
      every_unit(a.norm == Norm::patch, true);
    });
  });
  double error = 0, count = 0;
  for (int64_t n = 0; n < units; ++n) error += parts[n].error, count += parts[n].count;
  *a.loss = static_cast<float>(error / std::max(count, 1.0));
  *a.count = static_cast<int64_t>(count);
}

void masked_pixel_loss_backward_cpu(const LossArgs& a) {
  const Units& u = a.units;
  const Grid grid(u);
  const int level = isa_level();
  const float factor = 2 * *a.grad / static_cast<float>(std::max<int64_t>(*a.count, 1));
  with_pixel(u.pixel, [&](auto stored) {
    with_float(a.dtype, [&](auto pred) {
      using Body = LossBackward<typename decltype(stored)::type, typename decltype(pred)::type>;
#pragma omp parallel if (u.B * u.K > 1)
      {
        std::vector<float> row(u.unit);
        float* y = row.data();
#pragma omp for schedule(static)
        for (int64_t n = 0; n < u.B * u.K; ++n) Tiers<Body>::call(level, a, grid, n, factor, y);
      }
    });
  });
}

}  // namespace timo
