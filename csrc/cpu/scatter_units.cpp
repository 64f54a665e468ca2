// Visible tokens at their places, the mask token elsewhere, plus position: one pass, row by row.
// Backward copies the rows of visible units and sums the others in chunks of fixed size.
#include "cpu/units.h"

namespace timo {
namespace {

// Index of the token at place l of sample b, or -1.
inline int64_t token_at(const ScatterArgs& a, int64_t b, int64_t l) {
  const int64_t *ids = a.ids + b * a.K, *end = ids + a.K;
  const int64_t* found = std::lower_bound(ids, end, l);
  return found != end && *found == l ? found - ids : -1;
}

template <class Stored>
TIMO_INLINE Stored* token(const ScatterArgs& a, int64_t b, int64_t k) {
  return static_cast<Stored*>(a.tokens) + b * a.stride[0] + k * a.stride[1];
}

template <class Stored>
struct Scatter {
  template <class Source>
  static TIMO_INLINE void add(const Source* __restrict x, const float* __restrict position,
                              Stored* __restrict out, int64_t D) {
    for (int64_t d = 0; d < D; ++d) out[d] = narrow_to(widen(x[d]) + position[d], Stored{});
  }
  static TIMO_INLINE void run(const ScatterArgs& a, int64_t b, int64_t l) {
    const float* position = a.position + l * a.D;
    Stored* out = static_cast<Stored*>(a.sequence) + (b * a.L + l) * a.D;
    const int64_t k = token_at(a, b, l);
    if (k >= 0)
      add(token<const Stored>(a, b, k), position, out, a.D);
    else
      add<float>(a.mask_token, position, out, a.D);
  }
};

template <class Stored>
struct ScatterBackward {
  static TIMO_INLINE void run(const ScatterArgs& a, int64_t chunk) {
    float* __restrict sum = a.partial + chunk * a.D;
    std::fill(sum, sum + a.D, 0.0f);
    const int64_t last = std::min((chunk + 1) * scatter_units_chunk, a.B * a.L);
    for (int64_t row = chunk * scatter_units_chunk; row < last; ++row) {
      const int64_t b = row / a.L, k = token_at(a, b, row % a.L);
      const Stored* grad = static_cast<const Stored*>(a.sequence) + row * a.D;
      if (k >= 0)
        std::copy(grad, grad + a.D, token<Stored>(a, b, k));
      else
        for (int64_t d = 0; d < a.D; ++d) sum[d] += widen(grad[d]);
    }
  }
};

}  // namespace

void scatter_units_cpu(const ScatterArgs& a) {
  const int level = isa_level();
  with_float(a.dtype, [&](auto stored) {
    using Body = Scatter<typename decltype(stored)::type>;
#pragma omp parallel for schedule(static) if (a.B * a.L > 1)
    for (int64_t row = 0; row < a.B * a.L; ++row) {
      const int64_t b = row / a.L, l = row % a.L;
      Tiers<Body>::call(level, a, b, l);
    }
  });
}

void scatter_units_backward_cpu(const ScatterArgs& a) {
  const int level = isa_level();
  const int64_t chunks = ceil_div(a.B * a.L, scatter_units_chunk);
  with_float(a.dtype, [&](auto stored) {
    using Body = ScatterBackward<typename decltype(stored)::type>;
#pragma omp parallel for schedule(static) if (chunks > 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) Tiers<Body>::call(level, a, chunk);
  });
  for (int64_t d = 0; d < a.D; ++d) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += a.partial[chunk * a.D + d];
    a.mask_token[d] = static_cast<float>(sum);
  }
}

}  // namespace timo
