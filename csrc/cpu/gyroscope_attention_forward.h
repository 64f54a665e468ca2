// Forward. A task owns some queries of one sample and head, and some dates: it forms their spatial
// sums, and merges them with the temporal part.
#pragma once
#include "cpu/gyroscope_attention_spatial.h"

namespace timo {
namespace {

// Temporal part and merge for the vector of queries from `first` on, positions in lanes.
// S, reference and mass are this vector's; those of date j lie j * date_step further. `logs` is
// the logarithm of the spatial sum over all keys.
template <class Stored>
void finish(const GyroscopeArgs& a, int64_t b, int64_t h, List queries, int64_t first, List dates,
            int64_t tile, int64_t tile_dates, const ForwardScratch& w, const float* S,
            const float* reference, const float* mass, int64_t date_step, F logs) {
  const int64_t D = a.D, T = dates.count, count = std::min<int64_t>(lanes, queries.count - first);
  const bool others = T > 1;  // a date alone has no temporal part
  const float scale = energy_scale(a);
  const Index* position = queries.at + first;
  auto load = [&](const Strided& x, int64_t t, float* to) {
    const Stored* row[lanes];
    point_live(x, b, dates.at[t], h, position, w.live + t * lanes,
               reinterpret_cast<const Stored*>(w.spare.zeros), row);
    load_transposed(row, D, to, lanes);
  };
  auto soon = [&](const Strided& x, int64_t t) {
    if (others) fetch<Stored>(x, b, dates.at[t], h, position, count, D);
  };
  for (int64_t s = 0; s < T; ++s) {  // keys and values of all dates, 0 where not usable
    if (s + 1 < T) soon(a.k, s + 1), soon(a.v, s + 1);
    else soon(a.q, tile);
    for (int i = 0; i < lanes; ++i)
      w.live[s * lanes + i] = i < count && usable(a, b, dates.at[s], position[i]);
    if (others) load(a.k, s, w.k + s * D * lanes), load(a.v, s, w.v + s * D * lanes);
  }
  alignas(64) float text[lanes];
  for (int64_t j0 = 0; j0 < tile_dates; j0 += date_block) {
    const int64_t some = std::min(date_block, tile_dates - j0);
    for (int64_t j = 0; others && j < some; ++j) {
      float* q = w.q + j * D * lanes;
      if (j0 + j + 1 < tile_dates) soon(a.q, tile + j0 + j + 1);
      load(a.q, tile + j0 + j, q);
      for (int64_t d = 0; d < D; ++d) Tier::store(q + d * lanes, Tier::load(q + d * lanes) * scale);
    }
    if (others) dots(w.q, some, w.k, T, D, w.weight, T * lanes);
    for (int64_t j = 0; j < some; ++j) {
      const int64_t here = tile + j0 + j, t = dates.at[here];
      const float* live = w.live + here * lanes;
      float* weight = w.weight + j * T * lanes;
      for (int i = 0; i < lanes; ++i)
        text[i] = live[i] != 0 ? load_scalar(a.gate, a.gate_dtype, b, t, position[i], h) : 0;
      const F sums = Tier::load(mass + (j0 + j) * date_step);
      const F spatial = Tier::load(text) * static_cast<float>(log2e) +
                        Tier::load(reference + (j0 + j) * date_step);
      F top = spatial + log2(sums);
      for (int64_t s = 0; s < T; ++s) {
        F energy = Tier::load(weight + s * lanes);
        energy = s != here && Tier::load(w.live + s * lanes) > 0.f ? energy : Tier::set(lowest);
        Tier::store(weight + s * lanes, energy);
        top = larger(energy, top);
      }
      const F share = Tier::exp2(spatial - top);
      F sum = share * sums;
      for (int64_t s = 0; s < T; ++s) {
        const F x = Tier::exp2(Tier::load(weight + s * lanes) - top);
        Tier::store(weight + s * lanes, x);
        sum += x;
      }
      const F inverse = 1.f / sum;
      for (int64_t s = 0; s < T; ++s)
        Tier::store(weight + s * lanes, Tier::load(weight + s * lanes) * inverse);
      Tier::store(w.share + j * lanes, share * inverse);
      Tier::store(text, top + log2(sum));
      for (int i = 0; i < lanes; ++i)
        if (live[i] != 0) *at<float>(a.lse, b, t, position[i], h) = text[i];
    }
    for (int64_t j = 0; j < some * D; ++j)
      Tier::store(w.o + j * lanes, Tier::load(w.share + j / D * lanes) *
                                       Tier::load(S + (j0 * D + j) * width));
    if (others) combine(w.weight, T * lanes, lanes, some, w.v, T, D, 1, w.o);
    for (int64_t j = 0; j < some; ++j) {
      Stored* row[lanes];
      const int64_t here = tile + j0 + j;
      point_live(a.out, b, dates.at[here], h, position, w.live + here * lanes,
                 reinterpret_cast<Stored*>(w.spare.sink), row);
      store_transposed(w.o + j * D * lanes, lanes, D, row);
    }
  }
  if (tile > 0) return;
  Tier::store(text, logs);
  for (int64_t i = 0; i < count; ++i) *at<float>(a.spatial_lse, b, 0, position[i], h) = text[i];
}

template <class Stored>
void forward_task(const GyroscopeArgs& a, const ForwardPlan& plan, const ForwardScratch& w,
                  int64_t task) {
  const int64_t h = task % a.H, tile = task / a.H % plan.date_tiles * plan.dates;
  const int64_t part = task / (a.H * plan.date_tiles) % plan.query_tiles;
  const int64_t b = task / (a.H * plan.date_tiles * plan.query_tiles);
  const bool masks = irregular(a);
  const List dates = list_dates(a, b, w.dates), keys = list_positions(a, b, w.positions);
  const List own{dates.at + tile, std::min(plan.dates, dates.count - tile)};
  const List queries{keys.at + part * plan.queries,
                     std::min(plan.queries, keys.count - part * plan.queries)};
  if (own.count <= 0 || queries.count <= 0) return;
  const int64_t values = value_rows(own.count, a.D), columns = values + (masks ? own.count : 0);
  auto merge = [&](int64_t panel) {
    const int64_t end = std::min(queries.count, (panel + 1) * width);
    for (int64_t i = panel * width; i < end; i += lanes) {
      const int64_t lane = i % width;
      const float* S = w.sums.S + panel * columns * width + lane;
      const F logs = Tier::load(w.sums.reference + i) + log2(Tier::load(w.sums.mass + i));
      const float* references = masks ? w.references + panel * own.count * width + lane
                                      : w.sums.reference + i;
      const float* mass = masks ? S + values * width : w.sums.mass + i;
      finish<Stored>(a, b, h, queries, i, dates, tile, own.count, w, S, references, mass,
                     masks ? width : 0, logs);
    }
  };
  attend<Stored>(a, b, h, queries, keys, own, masks, w, w.sums, [&](int64_t panel) {
    if (!masks) merge(panel);  // while its sums are in the caches
  });
  if (!masks) return;
  attend_late<Stored>(a, b, h, queries, keys, own, w);
  for (int64_t panel = 0; panel * width < queries.count; ++panel) merge(panel);
}

template <class Stored>
void forward(const GyroscopeArgs& a) {
  const ForwardPlan plan(a, omp_get_max_threads());
  Carve need{nullptr};
  (void)ForwardScratch(a, plan, need);
  const int64_t threads =
      std::clamp<int64_t>(forward_workspace / need.counted(), 1, omp_get_max_threads());
  const Workspace space(threads, need.counted());
  const int64_t tasks = a.B * a.H * plan.date_tiles * plan.query_tiles;
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    [[maybe_unused]] const Tier::Session session;
    Carve carve{space.part(omp_get_thread_num())};
    const ForwardScratch w(a, plan, carve);
    w.spare.clear(a.D);
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) forward_task<Stored>(a, plan, w, task);
  }
}

}  // namespace
}  // namespace timo
