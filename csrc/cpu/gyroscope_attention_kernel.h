// Vectors and the one matrix product of the kernels. Included by each instruction set after its
// target pragma and its `Tier`, so everything here is compiled for that set:
//   Tier::F               vector of Tier::lanes floats
//   Tier::pair            numbers in an operand of products, which is 32 bits: 1 float, or 2
//                         bfloat16 that lie side by side in the summed dimension
//   Tier::rows, depth     products come in multiples of so many rows, and of so many operands
//   Tier::fused           whether it has fused multiply-add
//   Tier::tiled           whether it multiplies tiles in memory (`Tier::multiply`), not vectors
//   Tier::multiply_add    sum + x y of vectors of operands
//   Tier::zip             operands from vectors of their `pair` numbers
//   Tier::load, store     float, and bfloat16 and float16 widened or rounded; any address
//   Tier::exp2            2^x; 0 below the normal range, more than sum_limit above 2^60
//   Tier::transpose       lanes x lanes
#pragma once
#define TIMO_INLINE inline __attribute__((always_inline))

namespace timo {
namespace {

using F = Tier::F;
constexpr int lanes = Tier::lanes, rows = Tier::rows, pair = Tier::pair, depth = Tier::depth;
constexpr int64_t width = 3 * lanes;  // a panel: positions side by side in lanes

typedef int32_t I __attribute__((vector_size(sizeof(F))));

TIMO_INLINE F larger(F a, F b) { return a > b ? a : b; }

// Energies are products of queries and keys by `energy_scale`: floats carry it as queries, pairs
// are multiplied as they are and their products scaled. Both round before anything is subtracted,
// so that forward and backward round alike and this cancels against the saved logarithms.
inline float query_scale(const GyroscopeArgs& a) { return pair == 1 ? energy_scale(a) : 1; }

TIMO_INLINE F energies(const float* products, float scale) {
  F energy = Tier::load(products);
  if (pair == 1) return energy;
  energy *= scale;
  asm("" : "+v"(energy));  // no fused multiply-subtract
  return energy;
}

// Logarithm to base 2 of positive normal numbers; infinity and NaN are returned.
TIMO_INLINE F log2(F x) {
  const I exponent = ((I)x - 0x3f3504f3) >> 23;     // so that the mantissa is near 1
  const F mantissa = (F)((I)x - (exponent << 23));  // sqrt(1/2) to sqrt(2)
  const F s = (mantissa - 1.f) / (mantissa + 1.f), y = s * s;
  const F series = (((y * (1 / 9.f) + 1 / 7.f) * y + 1 / 5.f) * y + 1 / 3.f) * y + 1.f;
  const F value = __builtin_convertvector(exponent, F) + s * series * static_cast<float>(2 * log2e);
  return x < Tier::set(infinity) ? value : x;
}

// The first `count` of a vector's lanes; the others are 0 and not read.
template <class Stored>
TIMO_INLINE F load_part(const Stored* p, int64_t count) {
  if (count >= lanes) return Tier::load(p);
  alignas(64) float part[lanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = widen(p[i]);
  return Tier::load(part);
}

template <class Stored>
TIMO_INLINE void store_part(Stored* p, F x, int64_t count) {
  if (count >= lanes) return Tier::store(p, x);
  alignas(64) float part[lanes];
  Tier::store(part, x);
  for (int64_t i = 0; i < count; ++i) p[i] = narrow_to(part[i], Stored{});
}

template <int NV>
TIMO_INLINE void clear(F (&acc)[rows][NV]) {
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) acc[i][j] = F{};
}

enum class Walk { along_rows, across_rows };
constexpr Walk across = pair == 1 ? Walk::across_rows : Walk::along_rows;  // of sums over rows

// acc[i] += sum over k < K of A[i, k] * b[k * b_step + lanes of vector j]: the register block of
// every product here. `a` points to rows `a_step` apart: along them, A[i, k] = a[i * a_step + k];
// across them, A[i, k] = a[k * a_step + i].
template <Walk walk, int NV>
TIMO_INLINE void long_product(const float* a, int64_t a_step, const float* b, int64_t b_step,
                              int64_t K, F (&acc)[rows][NV]) {
  for (int64_t k = 0; k < K; ++k, b += b_step) {
    F y[NV];
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) y[j] = Tier::load(b + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const F x = Tier::set(walk == Walk::along_rows ? a[i * a_step + k] : a[k * a_step + i]);
#pragma GCC unroll 3
      for (int j = 0; j < NV; ++j) acc[i][j] = Tier::multiply_add(acc[i][j], x, y[j]);
    }
  }
}

// The same; without fused multiply-add in shorter sums, which lose less.
template <Walk walk, int NV>
TIMO_INLINE void product(const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t K,
                         F (&acc)[rows][NV]) {
  if (Tier::fused || walk == Walk::across_rows)
    return long_product<walk, NV>(a, a_step, b, b_step, K, acc);
  for (int64_t k = 0; k < K; k += 8) {
    F part[rows][NV] = {};
    long_product<walk, NV>(a + k, a_step, b + k * b_step, b_step, std::min<int64_t>(8, K - k),
                           part);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < NV; ++j) acc[i][j] += part[i][j];
  }
}

enum class Into { set, add };

// c[i * c_step + lanes of vector j] = or += the same for M rows i, a multiple of `rows`; K is one
// of `depth`. Each call's sum is formed on its own first: shorter sums lose less.
template <Walk walk, Into into, int NV, class X = Tier>
TIMO_INLINE void multiply(const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t K,
                          int64_t M, float* c, int64_t c_step) {
  if constexpr (X::tiled) {
    X::template multiply<NV>(a, a_step, b, b_step, K, M, c, c_step, into == Into::add);
  } else {
    for (int64_t m = 0; m < M; m += rows, c += rows * c_step) {
      F acc[rows][NV];
      clear(acc);
      product<walk, NV>(a + m * (walk == Walk::along_rows ? a_step : 1), a_step, b, b_step, K, acc);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) {
          float* to = c + i * c_step + j * lanes;
          Tier::store(to, into == Into::add ? Tier::load(to) + acc[i][j] : acc[i][j]);
        }
    }
  }
}

// Products of queries and keys over K operands: sums of 32 are added up, which loses less than one
// long sum where a channel outweighs the others. Forward and backward round alike.
template <int NV>
TIMO_INLINE void energy_products(const float* a, int64_t a_step, const float* b, int64_t b_step,
                                 int64_t K, int64_t M, float* c, int64_t c_step) {
  multiply<Walk::along_rows, Into::set, NV>(a, a_step, b, b_step, std::min<int64_t>(K, 32), M, c,
                                            c_step);
  for (int64_t k = 32; k < K; k += 32)
    multiply<Walk::along_rows, Into::add, NV>(a + k, a_step, b + k * b_step, b_step,
                                              std::min<int64_t>(K - k, 32), M, c, c_step);
}

// Positions of `list` from `first` on, one row pointer per lane; lanes past the end repeat the
// last one.
template <class Stored>
TIMO_INLINE void point(const Strided& x, int64_t b, int64_t t, int64_t h, List list, int64_t first,
                       const Stored** row) {
  for (int i = 0; i < lanes; ++i)
    row[i] = at<Stored>(x, b, t, list.at[std::min(first + i, list.count - 1)], h);
}

// The same where `live` is not 0; other lanes point to `none`.
template <class Stored>
TIMO_INLINE void point_live(const Strided& x, int64_t b, int64_t t, int64_t h,
                            const Index* position, const float* live, Stored* none,
                            Stored** row) {
  Stored* const base = at<Stored>(x, b, t, 0, h);
  for (int i = 0; i < lanes; ++i)
    row[i] = live[i] != 0 ? base + position[i] * x.stride[2] : none;
}

// Rows that are read soon: they lie far apart, so that the processor does not foresee them.
template <class Stored>
TIMO_INLINE void fetch(const Strided& x, int64_t b, int64_t t, int64_t h, const Index* position,
                       int64_t count, int64_t D) {
  const Stored* const base = at<Stored>(x, b, t, 0, h);
  for (int64_t i = 0; i < count; ++i) {
    const Stored* const row = base + position[i] * x.stride[2];
    for (int64_t d = 0; d < D; d += 64 / sizeof(Stored)) __builtin_prefetch(row + d, 0, 2);
  }
}

}  // namespace
}  // namespace timo
