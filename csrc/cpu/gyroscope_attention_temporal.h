// The temporal part in float32, positions in lanes: products over dates for both directions, and
// the backward, which is that of ordinary attention over dates.
#pragma once
#include "cpu/gyroscope_attention_pack.h"

namespace timo {
namespace {

constexpr int64_t date_block = 4;  // dates whose vectors are combined at once

// Rows that stand in for those of dead lanes: zeros to read, and one to write that nobody reads.
struct Rows {
  float *zeros, *sink;

  Rows(const GyroscopeArgs& a, Carve& c)
      : zeros(c.take<float>(a.D)), sink(c.take<float>(a.D)) {}
  void clear(int64_t D) const { std::fill_n(zeros, D, 0.f); }
};

// Products of vectors of D channels: to[i * step + j * lanes] = x[i] . y[j]. Sums of 8 channels are
// added up, which loses less than one long sum.
inline void dots(const float* x, int64_t x_count, const float* y, int64_t y_count, int64_t D,
                 float* to, int64_t step) {
  for (int64_t i = 0; i < x_count; i += 2)
    for (int64_t j = 0; j < y_count; j += 4) {
      const float *u[2], *v[4];
      for (int k = 0; k < 2; ++k) u[k] = x + std::min(i + k, x_count - 1) * D * lanes;
      for (int k = 0; k < 4; ++k) v[k] = y + std::min(j + k, y_count - 1) * D * lanes;
      F sum[2][4] = {};
      for (int64_t d0 = 0; d0 < D; d0 += 8) {
        F part[2][4] = {};
        for (int64_t d = d0 * lanes; d < (d0 + 8) * lanes; d += lanes) {
          const F u0 = Tier::load(u[0] + d), u1 = Tier::load(u[1] + d);
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) {
            const F other = Tier::load(v[k] + d);
            part[0][k] += u0 * other, part[1][k] += u1 * other;
          }
        }
#pragma GCC unroll 2
        for (int l = 0; l < 2; ++l)
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) sum[l][k] += part[l][k];
      }
      for (int64_t l = 0; l < std::min<int64_t>(2, x_count - i); ++l)
        for (int64_t k = 0; k < std::min<int64_t>(4, y_count - j); ++k)
          Tier::store(to + (i + l) * step + (j + k) * lanes, sum[l][k]);
    }
}

// Sums over dates s: to[i][channel] += factor * weight[i, s] * x[s][channel], with weight[i, s] at
// weight[i * i_step + s * s_step]. At most date_block rows i.
inline void combine(const float* weight, int64_t i_step, int64_t s_step, int64_t count,
                    const float* x, int64_t dates, int64_t D, float factor, float* to) {
  const float* w[date_block];
  for (int i = 0; i < date_block; ++i) w[i] = weight + std::min<int64_t>(i, count - 1) * i_step;
  for (int64_t d = 0; d < D; d += 4) {
    F acc[date_block][4] = {};
    for (int64_t s = 0; s < dates; ++s) {
      F value[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) value[k] = Tier::load(x + (s * D + d + k) * lanes);
#pragma GCC unroll 4
      for (int i = 0; i < date_block; ++i) {
        const F share = Tier::load(w[i] + s * s_step);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) acc[i][k] += share * value[k];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < date_block; ++i)
      for (int k = 0; i < count && k < 4; ++k) {
        float* at = to + (i * D + d + k) * lanes;
        Tier::store(at, Tier::load(at) + acc[i][k] * factor);
      }
  }
}

// [date][channel][lanes] and [date][lanes]; q in units of energy_scale. Weights and gradients of
// energies [query][key][lanes], once for the queries and once for the keys of a tile of dates.
struct TemporalScratch {
  Rows spare;
  float *q, *k, *v, *dout, *live, *logs, *delta, *result;
  float *weight[2], *denergy[2];

  TemporalScratch(const GyroscopeArgs& a, int64_t tile_dates, Carve& c) : spare(a, c) {
    for (float** x : {&q, &k, &v, &dout}) *x = c.take<float>(a.T * a.D * lanes);
    for (float** x : {&live, &logs, &delta}) *x = c.take<float>(a.T * lanes);
    for (float** x : {&weight[0], &weight[1], &denergy[0], &denergy[1]})
      *x = c.take<float>(a.T * tile_dates * lanes);
    result = c.take<float>(date_block * a.D * lanes);
  }
};

// Weights of the temporal keys `first_key` on for the queries `first_query` on, and gradients of
// their energies; both [query][key][lanes].
inline void soften(const TemporalScratch& w, int64_t first_query, int64_t queries,
                   int64_t first_key, int64_t keys, int64_t D, float* weight, float* denergy) {
  const int64_t q = first_query * D * lanes, k = first_key * D * lanes, step = keys * lanes;
  dots(w.q + q, queries, w.k + k, keys, D, weight, step);
  dots(w.dout + q, queries, w.v + k, keys, D, denergy, step);
  for (int64_t i = 0; i < queries; ++i) {
    const F logs = Tier::load(w.logs + (first_query + i) * lanes);
    const F delta = Tier::load(w.delta + (first_query + i) * lanes);
    for (int64_t j = 0; j < keys; ++j) {
      float* at = weight + i * step + j * lanes;
      const F live = Tier::load(w.live + (first_key + j) * lanes);
      const bool self = first_query + i == first_key + j;
      const F p = Tier::exp2(Tier::load(at) - logs);
      const F usable = !self && live > 0.f ? p : F{};
      Tier::store(at, usable);
      float* to = denergy + i * step + j * lanes;
      Tier::store(to, usable * (Tier::load(to) - delta));
    }
  }
}

// dq, dk, dv and dgate of the vector of positions from `first` on, of tile_dates dates from `tile`
// on. dvT [date of the tile][channel][width] holds the spatial part of dv; delta is [T][N].
template <class Stored>
void temporal_backward(const GyroscopeArgs& a, const TemporalScratch& w, int64_t b, int64_t h,
                       List positions, int64_t first, List dates, int64_t tile, int64_t tile_dates,
                       const float* dvT, const float* delta) {
  const int64_t D = a.D, T = dates.count, count = std::min<int64_t>(lanes, positions.count - first);
  const bool others = T > 1;  // a date alone has no temporal part
  const Index* position = positions.at + first;
  const float scale = energy_scale(a);
  const auto* zeros = reinterpret_cast<const Stored*>(w.spare.zeros);
  for (int64_t t = 0; t < T; ++t) {
    const int64_t date = dates.at[t];
    float* live = w.live + t * lanes;
    for (int64_t i = 0; i < lanes; ++i) {
      live[i] = i < count && usable(a, b, date, position[i]);
      w.logs[t * lanes + i] = live[i] != 0 ? *at<float>(a.lse, b, date, position[i], h) : 0;
      w.delta[t * lanes + i] = live[i] != 0 ? delta[date * a.N + position[i]] : 0;
    }
    auto load = [&](const Strided& x, float* to) {
      const Stored* row[lanes];
      point_live(x, b, date, h, position, live, zeros, row);
      load_transposed(row, D, to + t * D * lanes, lanes);
    };
    if (!others) break;
    for (const Strided* x : {&a.q, &a.k, &a.v, &a.grad})
      if (t + 1 < T) fetch<Stored>(*x, b, dates.at[t + 1], h, position, count, D);
    load(a.q, w.q), load(a.k, w.k), load(a.v, w.v), load(a.grad, w.dout);
    for (int64_t d = t * D; d < (t + 1) * D; ++d)
      Tier::store(w.q + d * lanes, Tier::load(w.q + d * lanes) * scale);
  }
  // Dates of the tile as queries [tile_dates][T], and as keys [T][tile_dates]: the same where the
  // tile holds all dates.
  const int as_keys = tile_dates == T ? 0 : 1;
  if (others) soften(w, tile, tile_dates, 0, T, D, w.weight[0], w.denergy[0]);
  if (as_keys) soften(w, 0, T, tile, tile_dates, D, w.weight[1], w.denergy[1]);
  auto store = [&](const Strided& x, int64_t t, int64_t some) {
    for (int64_t i = 0; i < some; ++i) {
      Stored* row[lanes];
      point_live(x, b, dates.at[t + i], h, position, w.live + (t + i) * lanes,
                 reinterpret_cast<Stored*>(w.spare.sink), row);
      store_transposed(w.result + i * D * lanes, lanes, D, row);
    }
  };
  auto clear = [&](int64_t some) { std::fill_n(w.result, some * D * lanes, 0.f); };
  for (int64_t i = 0; i < tile_dates; i += date_block) {
    const int64_t t = tile + i, some = std::min(date_block, tile_dates - i);
    const int64_t row = T * lanes, across = tile_dates * lanes;
    for (int64_t j = 0; j < some * D; ++j)
      std::copy_n(dvT + (i * D + j) * width, lanes, w.result + j * lanes);
    if (others)
      combine(w.weight[as_keys] + i * lanes, lanes, across, some, w.dout, T, D, 1, w.result);
    store(a.dv, t, some);
    clear(some);
    if (others)
      combine(w.denergy[as_keys] + i * lanes, lanes, across, some, w.q, T, D,
              static_cast<float>(1 / log2e), w.result);
    store(a.dk, t, some);
    if (others) {
      clear(some);
      combine(w.denergy[0] + i * row, row, lanes, some, w.k, T, D, static_cast<float>(a.scale),
              w.result);
    }
    store(a.dq, t, some);
    // The gradients of one softmax's energies sum to zero and the gate moves all spatial ones, so
    // the temporal ones alone give its gradient.
    for (int64_t j = 0; j < some; ++j) {
      F dgate = {};
      for (int64_t s = 0; others && s < T; ++s)
        dgate -= Tier::load(w.denergy[0] + (i + j) * row + s * lanes);
      for (int64_t l = 0; l < count; ++l)
        if (w.live[(t + j) * lanes + l] != 0)
          store_scalar(a.dgate, a.gate_dtype, b, dates.at[t + j], position[l], h, dgate[l]);
    }
  }
}

}  // namespace
}  // namespace timo
