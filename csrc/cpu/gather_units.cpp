// Visible units as tiles: cleared, then, row by row, the runs of visible columns are converted.
// Backward sums, for each row of the frames, the tiles that hold it, in order of their
// ids. Bound by writing the tiles; the arithmetic hides behind the stores.
#include "cpu/units.h"

namespace timo {
namespace {

template <class Stored, class Tile>
struct Gather {
  static TIMO_INLINE void run(const GatherArgs& a, const Grid& grid, int64_t b, int64_t k,
                              std::vector<Run>& runs) {
    const Units& u = a.units;
    const int64_t S = a.before + u.unit + a.after;
    const Place p = grid.place(u.ids[b * u.K + k]);
    const int64_t top = p.i * u.unit - a.before, left = p.j * u.unit - a.before;
    const int64_t low = std::max<int64_t>(top, 0), high = std::min(top + S, u.H);
    Tile* tile = static_cast<Tile*>(a.tiles) + (b * u.K + k) * u.C * S * S;
    // All at once, and then over it while it is in the cache: runs leave gaps of a few pixels.
    std::fill(tile, tile + u.C * S * S, Tile{});
    if (!usable_date(u, b, p.t)) return;
    for (int64_t i = low / u.unit; i * u.unit < high; ++i) {
      visible_runs(u, grid, b, p.t, i, std::max<int64_t>(left, 0), std::min(left + S, u.W), runs);
      const int64_t first = std::max(i * u.unit, low), last = std::min((i + 1) * u.unit, high);
      for (int64_t c = 0; c < u.C; ++c) {
        const Affine f = band(u, c);
        for (int64_t y = first; y < last; ++y) {
          Tile* row = tile + (c * S + y - top) * S - left;  // row[x] is column x of the frame
          for (const Run& r : runs)
            load_row(row_at<const Stored>(u, b, p.t, c, y, r.from), r.to - r.from, f,
                     row + r.from);
        }
      }
    }
  }
};

struct Corner {
  int64_t k, top, left;
};

// What one thread of the backward works with.
struct Scratch {
  std::vector<float> sum;  // one row of a frame
  std::vector<Run> runs;
  std::vector<Corner> tiles;  // those that reach the unit row
};

template <class Stored, class Tile>
struct GatherBackward {
  // Rows of unit row i of frame t, all bands.
  static TIMO_INLINE void run(const GatherArgs& a, const Grid& grid, int64_t b, int64_t t,
                              int64_t i, Scratch& s) {
    const Units& u = a.units;
    const int64_t S = a.before + u.unit + a.after;
    const int64_t *ids = u.ids + b * u.K, *end = ids + u.K;
    const int64_t above = std::max<int64_t>(i - ceil_div(a.after, u.unit), 0);
    const int64_t below = std::min(i + ceil_div(a.before, u.unit) + 1, grid.h);
    const int64_t frame = t * grid.h * grid.w;
    const int64_t* from = std::lower_bound(ids, end, frame + above * grid.w);
    const int64_t* to = std::lower_bound(from, end, frame + below * grid.w);
    s.tiles.clear();
    for (const int64_t* id = from; id != to; ++id) {
      const Place p = grid.place(*id);
      s.tiles.push_back({id - ids, p.i * u.unit - a.before, p.j * u.unit - a.before});
    }
    visible_runs(u, grid, b, t, i, 0, u.W, s.runs);
    if (!usable_date(u, b, t)) s.runs.clear();
    for (int64_t c = 0; c < u.C; ++c) {
      const Affine f{band(u, c).scale, -0.0f};
      for (int64_t y = i * u.unit; y < std::min((i + 1) * u.unit, u.H); ++y) {
        const Row<Stored> out = row_at<Stored>(u, b, t, c, y, 0);
        std::fill(out.x, out.x + u.W, Stored{});
        if (s.runs.empty()) continue;
        float* sum = s.sum.data();
        std::fill(sum, sum + u.W, 0.0f);
        for (const Corner& tile : s.tiles) {
          if (y < tile.top || y >= tile.top + S) continue;
          const Tile* row = static_cast<const Tile*>(a.tiles) +
                            (((b * u.K + tile.k) * u.C + c) * S + y - tile.top) * S - tile.left;
          const int64_t last = std::min(tile.left + S, u.W);
          for (int64_t x = std::max<int64_t>(tile.left, 0); x < last; ++x) sum[x] += widen(row[x]);
        }
        for (const Run& r : s.runs) {
          const Row<const float> gradient{sum + r.from, 1,
                                          out.ok ? out.ok + r.from * out.ok_step : nullptr,
                                          out.ok_step};
          load_row(gradient, r.to - r.from, f, out.x + r.from);
        }
      }
    }
  }
};

}  // namespace

void gather_units_cpu(const GatherArgs& a) {
  const Units& u = a.units;
  const Grid grid(u);
  const int level = isa_level();
  with_pixel(u.pixel, [&](auto stored) {
    with_float(a.dtype, [&](auto tile) {
      using Body = Gather<typename decltype(stored)::type, typename decltype(tile)::type>;
#pragma omp parallel if (u.B * u.K > 1)
      {
        std::vector<Run> runs;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < u.B * u.K; ++n) {
          const int64_t b = n / u.K, k = n % u.K;
          Tiers<Body>::call(level, a, grid, b, k, runs);
        }
      }
    });
  });
}

void gather_units_backward_cpu(const GatherArgs& a) {
  const Units& u = a.units;
  const Grid grid(u);
  const int level = isa_level();
  with_float(static_cast<Dtype>(u.pixel), [&](auto stored) {
    with_float(a.dtype, [&](auto tile) {
      using Body = GatherBackward<typename decltype(stored)::type, typename decltype(tile)::type>;
#pragma omp parallel if (u.B * u.T * grid.h > 1)
      {
        Scratch scratch;
        scratch.sum.resize(u.W);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < u.B * u.T * grid.h; ++n) {
          const int64_t b = n / (u.T * grid.h), t = n / grid.h % u.T, i = n % grid.h;
          Tiers<Body>::call(level, a, grid, b, t, i, scratch);
        }
      }
    });
  });
}

}  // namespace timo
