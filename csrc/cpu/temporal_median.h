// Lower median over dates of 64 channels at once, for temporal_median and median_deviation. The
// valid dates are sorted, in lanes and without branches, by those steps of a sorting network on
// which the middle depends (Batcher, 1968; Knuth, TAOCP 3, 5.2.2 M); the first date that holds the
// middle value is looked up after it.
#pragma once
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/tiers.h"
#include "ops.h"

namespace timo {
namespace {

constexpr int tile_lanes = 64;

template <class Stored>
using Wide = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

inline double narrow_to(double x, double) { return x; }

// Rows `low` and `high` become their minimum and their maximum, as far as anything reads them.
struct Comparator {
  int low, high;
  bool minimum, maximum;
};

inline std::vector<Comparator> median_network(int count) {
  std::vector<Comparator> steps;
  for (int p = 1; p < count; p *= 2)
    for (int k = p; k >= 1; k /= 2)
      for (int j = k % p; j + k < count; j += 2 * k)
        for (int i = j; i < std::min(j + k, count - k); ++i)
          if (i / (2 * p) == (i + k) / (2 * p)) steps.push_back({i, i + k, false, false});
  std::vector<bool> read(count);
  read[(count - 1) / 2] = true;
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    step->minimum = read[step->low], step->maximum = read[step->high];
    if (step->minimum || step->maximum) read[step->low] = read[step->high] = true;
  }
  steps.erase(std::remove_if(steps.begin(), steps.end(),
                             [](const Comparator& c) { return !c.minimum && !c.maximum; }),
              steps.end());
  return steps;
}

// What a thread needs to find medians of up to T dates, and the last tile that it found them of.
template <class Stored>
struct MedianTile {
  using W = Wide<Stored>;
  using Index = std::conditional_t<std::is_same_v<W, double>, int64_t, int32_t>;
  std::vector<int64_t> dates;                      // the valid ones
  std::vector<std::vector<Comparator>> networks;  // by number of dates, made when needed
  std::vector<W> values, sorted;                   // (dates, tile_lanes)
  W median[tile_lanes];
  Index index[tile_lanes];

  explicit MedianTile(int64_t T)
      : networks(T + 1), values(T * tile_lanes), sorted(T * tile_lanes) {
    dates.reserve(T);
  }

  void choose_dates(const MedianArgs& a, int64_t b, int64_t n) {
    dates.clear();
    const uint8_t* valid =
        a.valid ? a.valid + b * a.valid_stride[0] + n * a.valid_stride[2] : nullptr;
    for (int64_t t = 0; t < a.T; ++t)
      if (!valid || valid[t * a.valid_stride[1]]) dates.push_back(t);
    auto& network = networks[dates.size()];
    if (dates.size() > 1 && network.empty()) network = median_network(dates.size());
  }

  // `width` channels at x; at least one date is valid. Lanes beyond `width` are 0.
  TIMO_INLINE void find(const Stored* x, int64_t date_stride, int width) {
    const int count = static_cast<int>(dates.size());
    for (int i = 0; i < count; ++i) {
      const Stored* row = x + dates[i] * date_stride;
      W* __restrict to = values.data() + i * tile_lanes;
      if (width == tile_lanes)
        for (int c = 0; c < tile_lanes; ++c) to[c] = widen(row[c]);
      else
        for (int c = 0; c < tile_lanes; ++c) to[c] = c < width ? widen(row[c]) : W{0};
    }
    std::copy(values.data(), values.data() + count * tile_lanes, sorted.data());
    for (const Comparator& step : networks[count]) {
      W* __restrict low = sorted.data() + step.low * tile_lanes;
      W* __restrict high = sorted.data() + step.high * tile_lanes;
      if (step.minimum && step.maximum)
        for (int c = 0; c < tile_lanes; ++c) {
          const W a = low[c], b = high[c];
          low[c] = b < a ? b : a;
          high[c] = a < b ? b : a;
        }
      else if (step.minimum)
        for (int c = 0; c < tile_lanes; ++c) low[c] = high[c] < low[c] ? high[c] : low[c];
      else
        for (int c = 0; c < tile_lanes; ++c) high[c] = high[c] < low[c] ? low[c] : high[c];
    }
    const W* __restrict middle = sorted.data() + (count - 1) / 2 * tile_lanes;
    Index broken[tile_lanes];  // the first date that holds a NaN
    for (int c = 0; c < tile_lanes; ++c) index[c] = 0, broken[c] = -1, median[c] = 0;
    for (int i = count - 1; i >= 0; --i) {  // downwards, so that the lowest date is kept
      const W* __restrict value = values.data() + i * tile_lanes;
      const Index date = static_cast<Index>(dates[i]);
      for (int c = 0; c < tile_lanes; ++c) {
        index[c] = value[c] == middle[c] ? date : index[c];
        median[c] = value[c] == middle[c] ? value[c] : median[c];  // tells 0 from -0
        broken[c] = value[c] != value[c] ? date : broken[c];
      }
    }
    for (int c = 0; c < tile_lanes; ++c) {
      index[c] = broken[c] >= 0 ? broken[c] : index[c];
      median[c] = broken[c] >= 0 ? std::numeric_limits<W>::quiet_NaN() : median[c];
    }
  }

  // Stores what `find` found.
  TIMO_INLINE void store(int width, Stored* to_values, int64_t* to_indices) const {
    if (width == tile_lanes)
      for (int c = 0; c < tile_lanes; ++c)
        to_values[c] = narrow_to(median[c], Stored{}), to_indices[c] = index[c];
    else
      for (int c = 0; c < width; ++c)
        to_values[c] = narrow_to(median[c], Stored{}), to_indices[c] = index[c];
  }
};

// Medians of position n of sample b, tile by tile; use(tile, first channel of H * D, width) of each.
template <class Stored, class Use>
TIMO_INLINE void median_position(const MedianArgs& a, int64_t b, int64_t n,
                                 MedianTile<Stored>& tile, const Use& use) {
  tile.choose_dates(a, b, n);
  const int64_t out = (b * a.N + n) * a.H * a.D;
  auto* values = static_cast<Stored*>(a.values) + out;
  int64_t* indices = a.indices + out;
  if (tile.dates.empty()) {
    std::fill(values, values + a.H * a.D, Stored{});
    std::fill(indices, indices + a.H * a.D, int64_t{-1});
    return;
  }
  const auto* x = static_cast<const Stored*>(a.x) + b * a.stride[0] + n * a.stride[2];
  // Heads that lie side by side are one run of channels.
  const bool dense = a.stride[3] == a.D;
  const int64_t runs = dense ? 1 : a.H, channels = dense ? a.H * a.D : a.D;
  for (int64_t r = 0; r < runs; ++r)
    for (int64_t c = 0; c < channels; c += tile_lanes) {
      const int width = static_cast<int>(std::min<int64_t>(tile_lanes, channels - c));
      tile.find(x + r * a.stride[3] + c, a.stride[1], width);
      tile.store(width, values + r * a.D + c, indices + r * a.D + c);
      use(tile, r * a.D + c, width);
    }
}

}  // namespace
}  // namespace timo
