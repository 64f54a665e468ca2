// Medians and projected deviations in one pass over x: a tile's values are still at hand when its
// medians are found. Backward is one pass too; the gradient of the weight is summed over the
// positions of a chunk, then over the chunks in their order, whatever the number of threads.
#include "cpu/temporal_median.h"

namespace timo {
namespace {

// Sum over n channels of weight * (x - median), in an order that is the tier's.
template <class W, int bytes>
TIMO_INLINE W projected(const W* weight, const W* x, const W* median, int64_t n) {
  using R = Register<W, bytes>;
  typename R::V sum = {}, w, value, middle;
  int64_t c = 0;
  for (; c + R::lanes <= n; c += R::lanes) {
    R::load(w, weight + c), R::load(value, x + c), R::load(middle, median + c);
    sum += w * (value - middle);
  }
  W rest = 0;
  for (; c < n; ++c) rest += weight[c] * (x[c] - median[c]);
  return R::sum(sum) + rest;
}

// Adds a tile's share to the sums (T, H) of its position, head by head.
template <class W, int bytes>
struct AddDeviations {
  const W* weight;
  int64_t H, D;
  W* sums;

  template <class Stored>
  TIMO_INLINE void operator()(const MedianTile<Stored>& tile, int64_t first, int width) const {
    for (int64_t c = first; c < first + width;) {
      const int64_t h = c / D, end = std::min((h + 1) * D, first + width), at = c - first;
      for (size_t i = 0; i < tile.dates.size(); ++i)
        sums[tile.dates[i] * H + h] +=
            projected<W, bytes>(weight + (c - h * D), tile.values.data() + i * tile_lanes + at,
                      tile.median + at, end - c);
      c = end;
    }
  }
};

template <class Stored, int bytes>
struct Deviation {
  using W = Wide<Stored>;
  static TIMO_INLINE void run(const DeviationArgs& args, int64_t b, int64_t n,
                              MedianTile<Stored>& tile, W* sums) {
    const MedianArgs& a = args.median;
    std::fill(sums, sums + a.T * a.H, W{0});
    median_position(a, b, n, tile,
                    AddDeviations<W, bytes>{static_cast<const W*>(args.weight), a.H, a.D, sums});
    W* out = static_cast<W*>(args.deviation);
    for (int64_t t = 0; t < a.T; ++t)
      std::copy(sums + t * a.H, sums + (t + 1) * a.H, out + ((b * a.T + t) * a.N + n) * a.H);
  }
};

// What backward keeps of the positions of a chunk, (median_deviation_chunk, H, D) each: medians, the
// dates that hold them, and the gradient that goes to those dates alone.
template <class Stored>
struct Chunk {
  using Index = typename Columns<Wide<Stored>>::Index;
  std::vector<Wide<Stored>> median, rest;
  std::vector<Index> date;
  explicit Chunk(int64_t channels)
      : median(median_deviation_chunk * channels), rest(median.size()), date(median.size()) {}
};

// Date by date, so that x and dx are read and written in long runs. Loops are told that nothing
// overlaps: a copy for the other case would round otherwise, and results depend on addresses.
template <class Stored>
struct DeviationBackward {
  using W = Wide<Stored>;
  using Index = typename Chunk<Stored>::Index;

  // Writes dx of positions [first, last) of B * N, and their share of dweight to `sums` (D).
  static TIMO_INLINE void run(const DeviationArgs& args, int64_t first, int64_t last,
                              Chunk<Stored>& chunk, W* sums) {
    const MedianArgs& a = args.median;
    std::fill(sums, sums + a.D, W{0});
    for (int64_t i = first; i < last; ++i) prepare(args, i / a.N, i % a.N, i - first, chunk);
    for (int64_t t = 0; t < a.T; ++t)
      for (int64_t i = first; i < last; ++i)
        one_date(args, i / a.N, i % a.N, t, i - first, chunk, sums);
  }

 private:
  static TIMO_INLINE bool usable(const MedianArgs& a, int64_t b, int64_t n, int64_t t) {
    return !a.valid || a.valid[b * a.valid_stride[0] + t * a.valid_stride[1] +
                               n * a.valid_stride[2]];
  }

  // Position n of sample b, the chunk's `place`.
  static TIMO_INLINE void prepare(const DeviationArgs& args, int64_t b, int64_t n, int64_t place,
                                  Chunk<Stored>& chunk) {
    const MedianArgs& a = args.median;
    const W* __restrict weight = static_cast<const W*>(args.weight);
    for (int64_t h = 0; h < a.H; ++h) {
      W total = 0;  // a median moves the deviations of all dates
      for (int64_t t = 0; t < a.T; ++t)
        if (usable(a, b, n, t))
          total += static_cast<const W*>(args.deviation)[((b * a.T + t) * a.N + n) * a.H + h];
      const int64_t from = ((b * a.N + n) * a.H + h) * a.D, to = (place * a.H + h) * a.D;
      const auto* __restrict values = static_cast<const Stored*>(a.values) + from;
      const auto* __restrict dvalues = static_cast<const Stored*>(args.dvalues) + from;
      const int64_t* __restrict indices = a.indices + from;
      W* __restrict median = chunk.median.data() + to;
      W* __restrict rest = chunk.rest.data() + to;
      Index* __restrict date = chunk.date.data() + to;
#pragma GCC ivdep
      for (int64_t d = 0; d < a.D; ++d) {
        median[d] = widen(values[d]);
        rest[d] = widen(dvalues[d]) - weight[d] * total;
        date[d] = static_cast<Index>(indices[d]);
      }
    }
  }

  static TIMO_INLINE void one_date(const DeviationArgs& args, int64_t b, int64_t n, int64_t t,
                                   int64_t place, const Chunk<Stored>& chunk, W* __restrict sums) {
    const MedianArgs& a = args.median;
    const int64_t row = ((b * a.T + t) * a.N + n) * a.H;
    auto* __restrict dx = static_cast<Stored*>(args.dx) + row * a.D;
    if (!usable(a, b, n, t)) {
      std::fill(dx, dx + a.H * a.D, Stored{});
      return;
    }
    const auto* __restrict x = static_cast<const Stored*>(a.x) + b * a.stride[0] +
                               t * a.stride[1] + n * a.stride[2];
    const W* __restrict weight = static_cast<const W*>(args.weight);
    const W* __restrict grads = static_cast<const W*>(args.deviation) + row;
    const W* __restrict median = chunk.median.data() + place * a.H * a.D;
    const W* __restrict rest = chunk.rest.data() + place * a.H * a.D;
    const Index* __restrict date = chunk.date.data() + place * a.H * a.D;
    const Index here = static_cast<Index>(t);
    for (int64_t h = 0; h < a.H; ++h) {
      const W grad = grads[h];
#pragma GCC ivdep
      for (int64_t d = 0; d < a.D; ++d) {
        const W moved = date[d] == here ? rest[d] : W{0};
        dx[d] = narrow_to(weight[d] * grad + moved, Stored{});
        sums[d] += grad * (widen(x[d]) - median[d]);
      }
      dx += a.D, x += a.stride[3], median += a.D, rest += a.D, date += a.D;
    }
  }
};

template <class Stored>
void forward(const DeviationArgs& args) {
  const MedianArgs& a = args.median;
  const int level = isa_level();
#pragma omp parallel if (a.B * a.N > 1)
  {
    MedianTile<Stored> tile(a.T, level);
    std::vector<Wide<Stored>> room(a.T * a.H);
    auto* sums = room.data();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.B * a.N; ++i) {
      const int64_t b = i / a.N, n = i % a.N;
      call_tier<Deviation, Stored>(level, args, b, n, tile, sums);
    }
  }
}

template <class Stored>
void backward(const DeviationArgs& args) {
  using W = Wide<Stored>;
  const MedianArgs& a = args.median;
  const int level = isa_level();
  const int64_t positions = a.B * a.N;
  const int64_t chunks = (positions + median_deviation_chunk - 1) / median_deviation_chunk;
  W* const partial = static_cast<W*>(args.partial);
#pragma omp parallel if (chunks > 1)
  {
    Chunk<Stored> room(a.H * a.D);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = chunk * median_deviation_chunk;
      const int64_t last = std::min(first + median_deviation_chunk, positions);
      W* sums = partial + chunk * a.D;
      Tiers<DeviationBackward<Stored>>::call(level, args, first, last, room, sums);
    }
  }
  for (int64_t d = 0; d < a.D; ++d) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * a.D + d];
    static_cast<W*>(args.dweight)[d] = static_cast<W>(sum);
  }
}

}  // namespace

void median_deviation_cpu(const DeviationArgs& a, Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return forward<float>(a);
    case Dtype::f64: return forward<double>(a);
    case Dtype::f16: return forward<f16>(a);
    case Dtype::bf16: return forward<bf16>(a);
  }
}

void median_deviation_backward_cpu(const DeviationArgs& a, Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return backward<float>(a);
    case Dtype::f64: return backward<double>(a);
    case Dtype::f16: return backward<f16>(a);
    case Dtype::bf16: return backward<bf16>(a);
  }
}

}  // namespace timo
