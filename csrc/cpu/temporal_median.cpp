// Lower median over dates. Per position and 64 channels: copy the valid dates into a tile, count
// for each date how many are smaller and how many are not larger; the first date whose range of
// ranks holds the middle is the answer. T*T comparisons per channel, all in lanes, no branches.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "ops.h"

namespace timo {
namespace {

constexpr int lanes = 64;
#define TIMO_INLINE inline __attribute__((always_inline))

template <class Stored>
using Compared = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

// One tile of `width` channels: dates[i] is the date of tile row i.
template <class Stored>
TIMO_INLINE void median_tile(const Stored* x, int64_t date_stride, const std::vector<int64_t>& dates,
                             int width, Compared<Stored>* tile, Stored* values, int64_t* indices) {
  using C = Compared<Stored>;
  const int count = static_cast<int>(dates.size()), middle = (count - 1) / 2;
  for (int i = 0; i < count; ++i) {
    const Stored* row = x + dates[i] * date_stride;
    for (int c = 0; c < width; ++c) tile[i * lanes + c] = widen(row[c]);
    for (int c = width; c < lanes; ++c) tile[i * lanes + c] = 0;
  }
  int32_t chosen[lanes], broken[lanes];
  for (int c = 0; c < lanes; ++c) chosen[c] = 0, broken[c] = -1;
  for (int i = count - 1; i >= 0; --i) {  // downwards, so that the lowest date is kept
    const C* xi = tile + i * lanes;
    int32_t less[lanes] = {}, not_more[lanes] = {};
    for (int j = 0; j < count; ++j) {
      const C* xj = tile + j * lanes;
      for (int c = 0; c < lanes; ++c) {
        less[c] += xj[c] < xi[c];
        not_more[c] += xj[c] <= xi[c];
      }
    }
    for (int c = 0; c < lanes; ++c) {
      chosen[c] = (less[c] <= middle) & (middle < not_more[c]) ? i : chosen[c];
      broken[c] = xi[c] != xi[c] ? i : broken[c];
    }
  }
  for (int c = 0; c < width; ++c) {
    const int64_t date = dates[broken[c] >= 0 ? broken[c] : chosen[c]];
    values[c] = x[date * date_stride + c];
    indices[c] = date;
  }
}

template <class Stored>
TIMO_INLINE void median_position(const MedianArgs& a, int64_t b, int64_t n,
                                 std::vector<int64_t>& dates,
                                 std::vector<Compared<Stored>>& tile) {
  dates.clear();
  for (int64_t t = 0; t < a.T; ++t) {
    const bool usable = !a.valid || a.valid[b * a.valid_stride[0] + t * a.valid_stride[1] +
                                            n * a.valid_stride[2]];
    if (usable) dates.push_back(t);
  }
  const int64_t out = (b * a.N + n) * a.H * a.D;
  auto* values = static_cast<Stored*>(a.values) + out;
  int64_t* indices = a.indices + out;
  if (dates.empty()) {
    std::fill(values, values + a.H * a.D, Stored{});
    std::fill(indices, indices + a.H * a.D, int64_t{-1});
    return;
  }
  const auto* x = static_cast<const Stored*>(a.x) + b * a.stride[0] + n * a.stride[2];
  for (int64_t h = 0; h < a.H; ++h)
    for (int64_t d = 0; d < a.D; d += lanes)
      median_tile<Stored>(x + h * a.stride[3] + d, a.stride[1], dates,
                          static_cast<int>(std::min<int64_t>(lanes, a.D - d)), tile.data(),
                          values + h * a.D + d, indices + h * a.D + d);
}

// The same body for every tier: the compiler vectorises it for the function it is inlined into.
template <class Stored>
struct Tier {
  using Tile = std::vector<Compared<Stored>>;
  static void portable(const MedianArgs& a, int64_t b, int64_t n, std::vector<int64_t>& dates,
                       Tile& tile) {
    median_position<Stored>(a, b, n, dates, tile);
  }
  __attribute__((target("avx2,fma"))) static void avx2(const MedianArgs& a, int64_t b, int64_t n,
                                                       std::vector<int64_t>& dates, Tile& tile) {
    median_position<Stored>(a, b, n, dates, tile);
  }
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))) static void avx512(
      const MedianArgs& a, int64_t b, int64_t n, std::vector<int64_t>& dates, Tile& tile) {
    median_position<Stored>(a, b, n, dates, tile);
  }
};

template <class Stored>
void median(MedianArgs a) {
  if (a.stride[3] == a.D) a.D *= a.H, a.H = 1;  // heads lie side by side: one run of channels
  const int level = isa_level();
  const auto position = level >= 2   ? Tier<Stored>::avx512
                        : level == 1 ? Tier<Stored>::avx2
                                     : Tier<Stored>::portable;
#pragma omp parallel if (a.B * a.N > 1)
  {
    std::vector<int64_t> dates;
    std::vector<Compared<Stored>> tile(a.T * lanes);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.B * a.N; ++i) position(a, i / a.N, i % a.N, dates, tile);
  }
}

template <class Word>
void scatter(const void* grad, const int64_t* indices, void* out, int64_t B, int64_t T,
             int64_t channels) {
  const auto* g = static_cast<const Word*>(grad);
  auto* o = static_cast<Word*>(out);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < B * T; ++row) {
    const int64_t b = row / T, t = row % T;
    for (int64_t c = 0; c < channels; ++c)
      o[row * channels + c] = indices[b * channels + c] == t ? g[b * channels + c] : Word{0};
  }
}

}  // namespace

void temporal_median_cpu(const MedianArgs& a, Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return median<float>(a);
    case Dtype::f64: return median<double>(a);
    case Dtype::f16: return median<f16>(a);
    case Dtype::bf16: return median<bf16>(a);
  }
}

void temporal_median_backward_cpu(const void* grad, const int64_t* indices, void* out,
                                  int64_t bytes, int64_t B, int64_t T, int64_t channels) {
  // Gradients are only moved, so words of their size serve every dtype.
  if (bytes == 2) return scatter<uint16_t>(grad, indices, out, B, T, channels);
  if (bytes == 4) return scatter<uint32_t>(grad, indices, out, B, T, channels);
  scatter<uint64_t>(grad, indices, out, B, T, channels);
}

}  // namespace timo
