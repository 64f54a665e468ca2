// Lower median over dates of 64 channels at once, for temporal_median and median_deviation. The
// valid dates are sorted, in lanes and without branches, by those steps of a sorting network on
// which the middle depends (Batcher, 1968; Knuth, TAOCP 3, 5.2.2 M); then the first date that holds
// the middle value is looked up. Up to `unrolled_dates` the network is known to the compiler and
// its rows stay in registers.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/tiers.h"
#include "ops.h"

namespace timo {
namespace {

constexpr int tile_lanes = 64;
constexpr int unrolled_dates = 12;

constexpr int middle_of(int count) { return (count - 1) / 2; }

// Rows `low` and `high` become their minimum and their maximum, as far as anything reads them.
struct Comparator {
  int low, high;
  bool minimum, maximum;
};

// Calls f(low, high) for every step of a network that sorts `count` rows.
template <class F>
constexpr void sorting_steps(int count, F f) {
  for (int p = 1; p < count; p *= 2)
    for (int k = p; k >= 1; k /= 2)
      for (int j = k % p; j + k < count; j += 2 * k)
        for (int i = j; i < std::min(j + k, count - k); ++i)
          if (i / (2 * p) == (i + k) / (2 * p)) f(i, i + k);
}

// Marks what the middle of `count` rows depends on; `read` is room for `count` flags.
template <class Steps, class Read>
constexpr void mark_needed(Steps& steps, int size, int count, Read& read) {
  read[middle_of(count)] = true;
  for (int s = size - 1; s >= 0; --s) {
    Comparator& step = steps[s];
    step.minimum = read[step.low], step.maximum = read[step.high];
    if (step.minimum || step.maximum) read[step.low] = read[step.high] = true;
  }
}

inline std::vector<Comparator> median_network(int count) {
  std::vector<Comparator> steps;
  sorting_steps(count, [&](int low, int high) { steps.push_back({low, high, false, false}); });
  std::vector<char> read(count);
  mark_needed(steps, static_cast<int>(steps.size()), count, read);
  return steps;
}

template <int count>
struct FixedNetwork {
  static constexpr int size() {
    int steps = 0;
    sorting_steps(count, [&](int, int) { ++steps; });
    return steps;
  }
  static constexpr std::array<Comparator, size()> make() {
    std::array<Comparator, size()> steps{};
    int n = 0;
    sorting_steps(count, [&](int low, int high) { steps[n++] = {low, high, false, false}; });
    std::array<bool, count> read{};
    mark_needed(steps, size(), count, read);
    return steps;
  }
  static constexpr auto steps = make();
};

// What a thread needs to find medians of up to T dates, and the last tile that it found them of.
template <class W>
struct Columns {
  using Index = std::conditional_t<std::is_same_v<W, double>, int64_t, int32_t>;
  std::vector<Index> dates;        // the valid ones
  std::vector<W> values, sorted;   // (dates, tile_lanes)
  std::vector<std::vector<Comparator>> networks;  // by number of dates, made when needed
  W median[tile_lanes];
  Index index[tile_lanes];

  explicit Columns(int64_t T)
      : values(T * tile_lanes), sorted(T * tile_lanes), networks(T + 1) {
    dates.reserve(T);
  }
};

// A vector register of a tier, `bytes` wide.
template <class W, int bytes>
struct Register {
  typedef W V __attribute__((vector_size(bytes)));
  typedef typename Columns<W>::Index I __attribute__((vector_size(bytes)));
  static constexpr int lanes = bytes / sizeof(W);

  static TIMO_INLINE void load(V& to, const W* from) { std::memcpy(&to, from, bytes); }

  template <class Step>
  static TIMO_INLINE void compare(V& low, V& high, Step step) {
    const V a = low, b = high;
    if (step.minimum) low = b < a ? b : a;
    if (step.maximum) high = b < a ? a : b;
  }

  // The sum of all lanes, in a fixed order; by 2 * half of them.
  template <int half = lanes / 2>
  static TIMO_INLINE W sum(V& v) {
    if constexpr (half > 0) {
      I other;
      for (int l = 0; l < lanes; ++l) other[l] = l ^ half;
      v += __builtin_shuffle(v, other);
      return sum<half / 2>(v);
    }
    return v[0];
  }

  // Of lanes from c on: the lowest date that holds `middle`, or before it one that holds a NaN.
  static TIMO_INLINE void look_up(Columns<W>& columns, int c, const V& middle) {
    I index = {}, broken = index - 1;
    V median = {};
    for (int i = static_cast<int>(columns.dates.size()) - 1; i >= 0; --i) {
      V value;
      load(value, columns.values.data() + i * tile_lanes + c);
      const I date = I{} + columns.dates[i];
      index = value == middle ? date : index;
      median = value == middle ? value : median;  // tells 0 from -0
      broken = value != value ? date : broken;
    }
    index = broken >= 0 ? broken : index;
    median = broken >= 0 ? V{} + std::numeric_limits<W>::quiet_NaN() : median;
    std::memcpy(columns.index + c, &index, bytes);
    std::memcpy(columns.median + c, &median, bytes);
  }
};

template <class W, int bytes, int count>
struct FewDates {
  using R = Register<W, bytes>;
  template <size_t... i, size_t... s>
  static TIMO_INLINE void all(Columns<W>& columns, std::index_sequence<i...>,
                              std::index_sequence<s...>) {
    [[maybe_unused]] constexpr auto steps = FixedNetwork<count>::steps;
    for (int c = 0; c < tile_lanes; c += R::lanes) {
      typename R::V row[count];
      (R::load(row[i], columns.values.data() + i * tile_lanes + c), ...);
      (R::compare(row[steps[s].low], row[steps[s].high], steps[s]), ...);
      R::look_up(columns, c, row[middle_of(count)]);
    }
  }
  static TIMO_INLINE void run(Columns<W>& columns) {
    all(columns, std::make_index_sequence<count>(),
        std::make_index_sequence<FixedNetwork<count>::size()>());
  }
};

template <class W, int bytes>
struct ManyDates {
  using R = Register<W, bytes>;
  template <bool minimum, bool maximum>
  static TIMO_INLINE void compare(W* low, W* high) {
    for (int c = 0; c < tile_lanes; c += R::lanes) {
      typename R::V a, b;
      R::load(a, low + c), R::load(b, high + c);
      R::compare(a, b, Comparator{0, 0, minimum, maximum});
      if (minimum) std::memcpy(low + c, &a, bytes);
      if (maximum) std::memcpy(high + c, &b, bytes);
    }
  }
  static TIMO_INLINE void run(Columns<W>& columns) {
    const int count = static_cast<int>(columns.dates.size());
    auto& network = columns.networks[count];
    if (network.empty()) network = median_network(count);
    W* sorted = columns.sorted.data();
    std::copy(columns.values.data(), columns.values.data() + count * tile_lanes, sorted);
    for (const Comparator& step : network) {
      W *low = sorted + step.low * tile_lanes, *high = sorted + step.high * tile_lanes;
      if (step.minimum && step.maximum)
        compare<true, true>(low, high);
      else if (step.minimum)
        compare<true, false>(low, high);
      else if (step.maximum)
        compare<false, true>(low, high);
    }
    for (int c = 0; c < tile_lanes; c += R::lanes) {
      typename R::V middle;
      R::load(middle, sorted + middle_of(count) * tile_lanes + c);
      R::look_up(columns, c, middle);
    }
  }
};

// Body with registers of its tier's width, and called at that tier.
template <template <class, int> class Body, class Stored, class... A>
void call_tier(int level, A&... a) {
  level >= 2   ? Tiers<Body<Stored, 64>>::avx512(a...)
  : level == 1 ? Tiers<Body<Stored, 32>>::avx2(a...)
               : Tiers<Body<Stored, 16>>::portable(a...);
}

// Medians of the columns of a tile, by the number of dates: [0] is for more than are listed.
template <class W>
using Kernels = std::array<void (*)(Columns<W>&), unrolled_dates + 1>;

template <class W, size_t... n>
Kernels<W> kernels(int level, std::index_sequence<n...>) {
  if (level >= 2)
    return {Tiers<ManyDates<W, 64>>::template avx512<Columns<W>>,
            Tiers<FewDates<W, 64, n + 1>>::template avx512<Columns<W>>...};
  if (level == 1)
    return {Tiers<ManyDates<W, 32>>::template avx2<Columns<W>>,
            Tiers<FewDates<W, 32, n + 1>>::template avx2<Columns<W>>...};
  return {Tiers<ManyDates<W, 16>>::template portable<Columns<W>>,
          Tiers<FewDates<W, 16, n + 1>>::template portable<Columns<W>>...};
}

template <class Stored>
struct MedianTile : Columns<Wide<Stored>> {
  using W = Wide<Stored>;
  Kernels<W> kernel;

  MedianTile(int64_t T, int level)
      : Columns<W>(T), kernel(kernels<W>(level, std::make_index_sequence<unrolled_dates>())) {}

  void choose_dates(const MedianArgs& a, int64_t b, int64_t n) {
    this->dates.clear();
    const uint8_t* valid =
        a.valid ? a.valid + b * a.valid_stride[0] + n * a.valid_stride[2] : nullptr;
    for (int64_t t = 0; t < a.T; ++t)
      if (!valid || valid[t * a.valid_stride[1]]) this->dates.push_back(t);
  }

  // `width` channels at x; at least one date is valid. Lanes beyond `width` are 0.
  TIMO_INLINE void find(const Stored* x, int64_t date_stride, int width) {
    const size_t count = this->dates.size();
    for (size_t i = 0; i < count; ++i) {
      const Stored* __restrict row = x + this->dates[i] * date_stride;
      W* __restrict to = this->values.data() + i * tile_lanes;
      if (width == tile_lanes)
        for (int c = 0; c < tile_lanes; ++c) to[c] = widen(row[c]);
      else
        for (int c = 0; c < tile_lanes; ++c) to[c] = c < width ? widen(row[c]) : W{0};
    }
    kernel[count <= unrolled_dates ? count : 0](*this);
  }

  // Stores what `find` found.
  TIMO_INLINE void store(int width, Stored* __restrict values, int64_t* __restrict indices) const {
    if (width == tile_lanes)
      for (int c = 0; c < tile_lanes; ++c)
        values[c] = narrow_to(this->median[c], Stored{}), indices[c] = this->index[c];
    else
      for (int c = 0; c < width; ++c)
        values[c] = narrow_to(this->median[c], Stored{}), indices[c] = this->index[c];
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
