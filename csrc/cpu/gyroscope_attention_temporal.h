// Gradient of the temporal part, float32, positions in lanes: ordinary attention over dates.
#pragma once
#include "cpu/gyroscope_attention_kernel.h"

namespace timo {
namespace {

// [date][channel][lanes] and [date][lanes]; q in units of energy_scale.
struct TemporalScratch {
  float *q, *k, *v, *dout, *live, *logs, *delta, *weight, *denergy, *result;

  TemporalScratch(const GyroscopeArgs& a, Carve& c) {
    for (float** x : {&q, &k, &v, &dout}) *x = c.take<float>(a.T * a.D * lanes);
    for (float** x : {&live, &logs, &delta, &weight, &denergy}) *x = c.take<float>(a.T * lanes);
    result = c.take<float>(a.D * lanes);
  }
};

// Products of one date's vectors with those of all dates: to[date] = moving[date] . fixed.
inline void dots(const float* moving, const float* fixed, int64_t T, int64_t D, float* to) {
  for (int64_t t = 0; t < T; t += 4) {
    const float* x[4];
    for (int i = 0; i < 4; ++i) x[i] = moving + std::min(t + i, T - 1) * D * lanes;
    F acc[4];
    dot<4>(x, fixed, D, acc);
    for (int64_t i = t; i < std::min(t + 4, T); ++i) Tier::store(to + i * lanes, acc[i - t]);
  }
}

// to[channel] = start + sum over dates of weight[date] * x[date][channel].
inline void weighted(const float* x, const float* weight, int64_t T, int64_t D, float factor,
                     const float* start, int64_t start_step, float* to) {
  for (int64_t d = 0; d < D; d += 4) {
    F acc[4] = {};
    for (int64_t t = 0; t < T; ++t) {
      const F w = Tier::load(weight + t * lanes);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[i] += w * Tier::load(x + (t * D + d + i) * lanes);
    }
    for (int i = 0; i < 4; ++i) {
      const F more = start ? Tier::load(start + (d + i) * start_step) : F{};
      Tier::store(to + (d + i) * lanes, acc[i] * factor + more);
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
  const Index* position = positions.at + first;
  const float scale = energy_scale(a);
  const Stored* row[lanes];
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t i = 0; i < lanes; ++i) {
      const int64_t n = position[std::min(i, count - 1)], date = dates.at[t];
      const bool live = i < count && usable(a, b, date, n);
      w.live[t * lanes + i] = live;
      w.logs[t * lanes + i] = live ? *at<float>(a.lse, b, date, n, h) : 0;
      w.delta[t * lanes + i] = live ? delta[date * a.N + n] : 0;
    }
    auto load = [&](const Strided& x, float* to) {
      point(x, b, dates.at[t], h, positions, first, row);
      for (int i = 0; i < lanes; ++i)
        if (w.live[t * lanes + i] == 0) row[i] = nullptr;
      load_transposed(row, D, to + t * D * lanes, lanes);
    };
    load(a.q, w.q), load(a.k, w.k), load(a.v, w.v), load(a.grad, w.dout);
    for (int64_t d = t * D; d < (t + 1) * D; ++d)
      Tier::store(w.q + d * lanes, Tier::load(w.q + d * lanes) * scale);
  }
  // From products to weights and gradients of energies. `moving` is the date of the products,
  // `logs` and `delta` those of the query's date.
  auto soften = [&](int64_t fixed, const float* logs, const float* delta, int64_t step) {
    for (int64_t s = 0; s < T; ++s) {
      const F energy = Tier::load(w.weight + s * lanes) - Tier::load(logs + s * step);
      const F weight = Tier::exp2(energy);
      const bool self = s == fixed;
      const F p = self ? F{} : Tier::load(w.live + s * lanes) > 0.f ? weight : F{};
      Tier::store(w.weight + s * lanes, p);
      Tier::store(w.denergy + s * lanes,
                  p * (Tier::load(w.denergy + s * lanes) - Tier::load(delta + s * step)));
    }
  };
  Stored* to[lanes];
  auto store = [&](const Strided& x, int64_t t) {
    for (int64_t i = 0; i < lanes; ++i)
      to[i] = w.live[t * lanes + i] != 0 ? at<Stored>(x, b, dates.at[t], position[i], h) : nullptr;
    store_transposed(w.result, lanes, D, to);
  };
  for (int64_t t = tile; t < tile + tile_dates; ++t) {
    const int64_t here = t * D * lanes;
    // Date t as key of the others.
    dots(w.q, w.k + here, T, D, w.weight);
    dots(w.dout, w.v + here, T, D, w.denergy);
    soften(t, w.logs, w.delta, lanes);
    weighted(w.dout, w.weight, T, D, 1, dvT + (t - tile) * D * width, width, w.result);
    store(a.dv, t);
    weighted(w.q, w.denergy, T, D, static_cast<float>(1 / log2e), nullptr, 0, w.result);
    store(a.dk, t);
    // Date t as query. The gradients of one softmax's energies sum to zero and the gate moves all
    // spatial ones, so the temporal ones alone give its gradient.
    dots(w.k, w.q + here, T, D, w.weight);
    dots(w.v, w.dout + here, T, D, w.denergy);
    soften(t, w.logs + t * lanes, w.delta + t * lanes, 0);
    weighted(w.k, w.denergy, T, D, static_cast<float>(a.scale), nullptr, 0, w.result);
    store(a.dq, t);
    F dgate = {};
    for (int64_t s = 0; s < T; ++s) dgate -= Tier::load(w.denergy + s * lanes);
    for (int64_t i = 0; i < count; ++i)
      if (w.live[t * lanes + i] != 0)
        store_scalar(a.dgate, a.gate_dtype, b, dates.at[t], position[i], h, dgate[i]);
  }
}

}  // namespace
}  // namespace timo
