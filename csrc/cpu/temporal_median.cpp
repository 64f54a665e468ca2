// Lower median over dates, position by position; backward moves gradients to the selected dates.
#include "cpu/temporal_median.h"

namespace timo {
namespace {

struct MedianAlone {
  template <class Stored>
  TIMO_INLINE void operator()(const MedianTile<Stored>&, int64_t, int) const {}
};

template <class Stored>
struct Median {
  static TIMO_INLINE void run(const MedianArgs& a, int64_t b, int64_t n,
                              MedianTile<Stored>& tile) {
    median_position(a, b, n, tile, MedianAlone{});
  }
};

template <class Stored>
void median(const MedianArgs& a) {
  const int level = isa_level();
#pragma omp parallel if (a.B * a.N > 1)
  {
    MedianTile<Stored> tile(a.T, level);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.B * a.N; ++i) {
      const int64_t b = i / a.N, n = i % a.N;
      Tiers<Median<Stored>>::call(level, a, b, n, tile);
    }
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
