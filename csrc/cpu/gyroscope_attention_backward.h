// Backward in float32. A task owns some keys of one sample and head, in lanes by panels, and walks
// over all queries in blocks; weights are recomputed from the saved logarithms:
//   P[query][key] = exp2(queries . keys - logs),  dv[date, channel][key] += dout . P,
//   dE[query][key] = P * (dout . v - delta),  dk[channel][key] += queries . dE,  dq += dE . keys
// where dout carries each query's share of the spatial part, and -delta follows a date's channels
// of dout as one more, whose value is 1 where the date can use the key. All tasks of a head add to
// the same dq, each block of queries in the order of the tasks: a result never depends on threads.
#pragma once
#include <sched.h>

#include "cpu/gyroscope_attention_temporal.h"

namespace timo {
namespace {

constexpr int64_t query_block = 64;                 // P and dE of a panel: 24 KB with AVX-512
constexpr int64_t channel_block = 128;              // of values of a panel: 24 KB
constexpr int64_t key_bytes = 5 << 18;              // of a task's keys, for L2
constexpr int64_t backward_workspace = 28 << 20;    // of all threads, and as much of a group

struct BackwardPlan {
  int64_t dates, date_tiles, panels, key_tiles, blocks, heads;

  explicit BackwardPlan(const GyroscopeArgs& a) {
    const int64_t room = key_bytes / 4 / width;  // floats of a lane
    dates = std::clamp<int64_t>((room / 4 - 2 * a.D) / (2 * a.D), 1, a.T);
    date_tiles = (a.T + dates - 1) / dates;
    dates = (a.T + date_tiles - 1) / date_tiles;
    const int64_t all = (a.N + width - 1) / width;
    const int64_t fitting = std::max<int64_t>(1, room / (dates * (2 * a.D + 1) + 2 * a.D));
    key_tiles = (all + fitting - 1) / fitting;
    panels = (all + key_tiles - 1) / key_tiles;
    blocks = (a.N + query_block - 1) / query_block;
    const int64_t head_bytes = 4 * a.N * (a.D + 2 * a.T);
    heads = std::clamp<int64_t>(backward_workspace / head_bytes, 1, a.B * a.H);
  }
};

// What the tasks of a group of heads share: dq_median, and per date and query the share of the
// spatial part (own_reference where it must be formed anew) and delta = grad . out.
constexpr float own_reference = -1;

struct Group {
  float *dq, *share, *delta;
  std::atomic<int32_t>* turn;  // [head][block]: how many additions to dq have been made

  Group(const GyroscopeArgs& a, const BackwardPlan& plan, Carve& c) {
    dq = c.take<float>(plan.heads * a.N * a.D);
    share = c.take<float>(plan.heads * a.T * a.N);
    delta = c.take<float>(plan.heads * a.T * a.N);
    turn = c.take<std::atomic<int32_t>>(plan.heads * plan.blocks);
  }
};

// A block of queries: q [query][q_step], dout [query][date][D + 1], dq [query][dq_step]. q carries
// energy_scale as in the forward: energies are then the same to the last bit, and their roundings
// cancel against those of the saved logarithms.
struct Block {
  float *q, *dout, *logs, *dq;
};

struct BackwardScratch {
  Index *dates, *positions, *late;
  float *kT, *dkT, *vT, *dvT;  // [panel][channel][width]; vT with D + 1 channels a date
  float* k;                    // [key][dq_step]
  float *P, *dE;
  Block block, late_block;
  TemporalScratch temporal;
  int64_t q_step, dout_step, dq_step;

  BackwardScratch(const GyroscopeArgs& a, const BackwardPlan& plan, Carve& c)
      : temporal(a, plan.dates, c) {
    const int64_t keys = plan.panels * width, D = a.D;
    q_step = row_stride(D), dq_step = round_up(D, lanes);
    dout_step = row_stride(plan.dates * (D + 1) + lanes);
    dates = c.take<Index>(a.T);
    positions = c.take<Index>(a.N);
    late = c.take<Index>(query_block);
    kT = c.take<float>(keys * D);
    vT = c.take<float>(keys * plan.dates * (D + 1));
    dkT = c.take<float>(keys * D);
    dvT = c.take<float>(keys * plan.dates * D);
    k = c.take<float>(keys * dq_step);
    P = c.take<float>(query_block * width);
    dE = c.take<float>(query_block * width);
    for (Block* x : {&block, &late_block})
      *x = {c.take<float>(query_block * q_step), c.take<float>(query_block * dout_step),
            c.take<float>(query_block), c.take<float>(query_block * dq_step)};
  }
};

// One block of queries against one panel of keys.
template <int NV>
inline void sweep(const BackwardScratch& w, const Block& x, int64_t count, int64_t keys, int64_t D,
                  int64_t dates, const float* kT, const float* vT, float* dkT, float* dvT,
                  const float* k) {
  const F reach = Tier::set(60);  // of keys that weigh nothing (padding) the energy may be any
  for (int64_t n = 0; n < count; n += rows) {
    F acc[rows][NV];
    clear(acc);
    product<Walk::along_rows, NV>(x.q + n * w.q_step, w.q_step, kT, width, D, acc);
    float* to = w.P + n * width;
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < NV; ++j) Tier::store(to + i * width + j * lanes, acc[i][j]);
    for (int i = 0; i < rows; ++i) {
      const F logs = Tier::set(x.logs[n + i]);
#pragma GCC unroll 3
      for (int j = 0; j < NV; ++j) {
        float* p = to + i * width + j * lanes;
        const F energy = Tier::load(p) - logs;
        Tier::store(p, Tier::exp2(energy > reach ? reach : energy));
      }
    }
  }
  for (int64_t t = 0; t < dates; ++t)
    for (int64_t d = 0; d < D; d += rows)
      add_product<Walk::across_rows, NV>(x.dout + t * (D + 1) + d, w.dout_step, w.P, width, count,
                                         dvT + (t * D + d) * width, width);
  const int64_t channels = dates * (D + 1);
  const int64_t part = std::max<int64_t>(1, channel_block / (D + 1)) * (D + 1);  // stays in L1
  for (int64_t c = 0; c < channels; c += part)
    for (int64_t n = 0; n < count; n += rows) {
      const int64_t some = std::min(part, channels - c);
      const bool last = c + some == channels;
      F acc[rows][NV];
      clear(acc);
      const float* dout = x.dout + n * w.dout_step;
      product<Walk::along_rows, NV>(dout + c, w.dout_step, vT + c * width, width, some, acc);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) {
          const int64_t at = (n + i) * width + j * lanes;
          F sum = acc[i][j];
          if (c > 0) sum += Tier::load(w.dE + at);
          Tier::store(w.dE + at, last ? Tier::load(w.P + at) * sum : sum);
        }
    }
  for (int64_t d = 0; d < D; d += rows)
    add_product<Walk::across_rows, NV>(x.q + d, w.q_step, w.dE, width, count, dkT + d * width,
                                       width);
  for (int64_t n = 0; n < count; n += rows)
    for (int64_t d = 0; d < w.dq_step; d += 2 * lanes) {
      const float* a = w.dE + n * width;
      float* to = x.dq + n * w.dq_step + d;
      if (w.dq_step - d > lanes)
        add_product<Walk::along_rows, 2>(a, width, k + d, w.dq_step, keys, to, w.dq_step);
      else
        add_product<Walk::along_rows, 1>(a, width, k + d, w.dq_step, keys, to, w.dq_step);
    }
}

// Delta, share and zeros in dq of the vector of positions from n0 on.
template <class Stored>
void prepare(const GyroscopeArgs& a, const Group& g, const TemporalScratch& w, int64_t head,
             int64_t b, int64_t h, int64_t n0) {
  const int64_t D = a.D, count = std::min<int64_t>(lanes, a.N - n0);
  std::fill_n(g.dq + (head * a.N + n0) * D, count * D, 0.f);
  for (int64_t t = 0; t < a.T; ++t) {
    alignas(64) float gate[lanes] = {}, spatial[lanes] = {}, logs[lanes] = {}, delta[lanes];
    alignas(64) float exponent[lanes], share[lanes];
    const Stored *out[lanes], *grad[lanes];
    for (int64_t i = 0; i < lanes; ++i) {
      out[i] = grad[i] = reinterpret_cast<const Stored*>(w.rows.zeros);
      if (i >= count || !usable(a, b, t, n0 + i)) continue;
      out[i] = at<Stored>(a.out, b, t, n0 + i, h);
      grad[i] = at<Stored>(a.grad, b, t, n0 + i, h);
      gate[i] = load_scalar(a.gate, a.gate_dtype, b, t, n0 + i, h);
      spatial[i] = *at<float>(a.spatial_lse, b, 0, n0 + i, h);
      logs[i] = *at<float>(a.lse, b, t, n0 + i, h);
    }
    load_transposed(out, D, w.q, lanes);
    load_transposed(grad, D, w.dout, lanes);
    F sum = {};
    for (int64_t d0 = 0; d0 < D * lanes; d0 += 8 * lanes) {  // as in `dots`
      F part = {};
      for (int64_t d = d0; d < d0 + 8 * lanes; d += lanes)
        part += Tier::load(w.q + d) * Tier::load(w.dout + d);
      sum += part;
    }
    Tier::store(delta, sum);
    const F raised = Tier::load(gate) * static_cast<float>(log2e) + Tier::load(spatial);
    Tier::store(exponent, raised - Tier::load(logs));
    Tier::store(share, Tier::exp2(Tier::load(exponent)));
    for (int64_t i = 0; i < count; ++i) {
      if (!usable(a, b, t, n0 + i)) share[i] = exponent[i] = 0;
      const int64_t at = (head * a.T + t) * a.N + n0 + i;
      g.share[at] = irregular(a) && exponent[i] > share_limit ? own_reference : share[i];
      g.delta[at] = delta[i];
    }
  }
}

// Keys of a task and the values of a tile of dates, transposed.
template <class Stored>
void load_keys(const GyroscopeArgs& a, const BackwardScratch& w, int64_t b, int64_t h, List keys,
               List dates) {
  const int64_t D = a.D, channels = dates.count * (D + 1);
  const auto* zeros = reinterpret_cast<const Stored*>(w.temporal.rows.zeros);
  for (int64_t i = 0; i < keys.count; ++i)
    load_row(at<Stored>(a.k_median, b, 0, keys.at[i], h), D, w.k + i * w.dq_step);
  for (int64_t i = 0; i < round_up(keys.count, width); i += lanes) {
    const int64_t panel = i / width, lane = i % width;
    const Stored* row[lanes];
    auto load = [&](const Strided& x, int64_t t, float* to) {
      for (int64_t j = 0; j < lanes; ++j) {
        const bool real = i + j < keys.count && usable(a, b, t, keys.at[i + j]);
        row[j] = real || (i + j < keys.count && &x == &a.k_median)
                     ? at<Stored>(x, b, t, keys.at[i + j], h)
                     : zeros;
      }
      load_transposed(row, D, to, width);
    };
    load(a.k_median, 0, w.kT + panel * D * width + lane);
    float* vT = w.vT + panel * channels * width + lane;
    for (int64_t j = 0; j < dates.count; ++j, vT += (D + 1) * width) {
      load(a.v, dates.at[j], vT);
      for (int64_t l = 0; l < lanes; ++l) vT[D * width + l] = row[l] != zeros;
    }
  }
}

// A block of queries of the list: medians, and weighted cotangents with -delta after each date's.
template <class Stored>
void load_queries(const GyroscopeArgs& a, const BackwardScratch& w, const Group& g, int64_t head,
                  int64_t b, int64_t h, List queries, List dates) {
  const int64_t D = a.D;
  const float scale = energy_scale(a);
  for (int64_t i = 0; i < round_up(queries.count, rows); ++i) {
    const int64_t n = queries.at[std::min(i, queries.count - 1)];
    float* q = w.block.q + i * w.q_step;
    load_row(at<Stored>(a.q_median, b, 0, n, h), D, q);
    for (int64_t d = 0; d < D; ++d) q[d] *= scale;
    w.block.logs[i] = *at<float>(a.spatial_lse, b, 0, n, h);
    float* to = w.block.dout + i * w.dout_step;
    for (int64_t j = 0; j < dates.count; ++j, to += D + 1) {
      const int64_t t = dates.at[j], scalar = (head * a.T + t) * a.N + n;
      const float share = std::max(g.share[scalar], 0.f);
      if (share > 0) {
        const Stored* grad = at<Stored>(a.grad, b, t, n, h);
        for (int64_t d = 0; d < D; d += lanes)
          Tier::store(to + d, load_part(grad + d, D - d) * share);
      } else {
        std::fill_n(to, D, 0.f);
      }
      to[D] = -share * g.delta[scalar];
    }
  }
}

// The queries of a block whose part of date t needs a reference of its own; returns how many.
template <class Stored>
int64_t load_late(const GyroscopeArgs& a, const BackwardScratch& w, const Group& g, int64_t head,
                  int64_t b, int64_t h, List queries, int64_t t) {
  int64_t count = 0;
  for (int64_t i = 0; i < queries.count; ++i) {
    const int64_t n = queries.at[i], scalar = (head * a.T + t) * a.N + n;
    if (g.share[scalar] != own_reference) continue;
    const Block& x = w.late_block;
    w.late[count] = static_cast<Index>(i);
    std::copy_n(w.block.q + i * w.q_step, a.D, x.q + count * w.q_step);
    x.logs[count] = *at<float>(a.lse, b, t, n, h) - load_scalar(a.gate, a.gate_dtype, b, t, n, h) *
                                                        static_cast<float>(log2e);
    load_row(at<Stored>(a.grad, b, t, n, h), a.D, x.dout + count * w.dout_step);
    x.dout[count * w.dout_step + a.D] = -g.delta[scalar];
    ++count;
  }
  return count;
}

template <class Stored>
void backward_task(const GyroscopeArgs& a, const BackwardPlan& plan, const BackwardScratch& w,
                   const Group& g, int64_t head, int64_t bh, int64_t tile) {
  const int64_t b = bh / a.H, h = bh % a.H, D = a.D;
  const List dates = list_dates(a, b, w.dates), queries = list_positions(a, b, w.positions);
  const int64_t first = tile * plan.panels * width;
  const List keys{queries.at + first, std::min(plan.panels * width, queries.count - first)};
  if (dates.count == 0 || keys.count <= 0) return;
  const int64_t panels = (keys.count + width - 1) / width;
  const int64_t tiles = (dates.count + plan.dates - 1) / plan.dates;
  std::fill_n(w.dkT, panels * D * width, 0.f);
  for (int64_t part = 0; part < tiles; ++part) {
    const int64_t from = part * plan.dates;
    const List own{dates.at + from, std::min(plan.dates, dates.count - from)};
    std::fill_n(w.dvT, panels * own.count * D * width, 0.f);
    load_keys<Stored>(a, w, b, h, keys, own);
    auto pass = [&](const Block& x, int64_t count, int64_t j, int64_t some) {
      std::fill_n(x.dq, round_up(count, rows) * w.dq_step, 0.f);
      for (int64_t i = 0; i < panels; ++i) {
        const int64_t left = std::min(width, keys.count - i * width);
        const auto run = left > 2 * lanes ? sweep<3> : left > lanes ? sweep<2> : sweep<1>;
        run(w, x, count, left, D, some, w.kT + i * D * width,
            w.vT + (i * own.count + j) * (D + 1) * width, w.dkT + i * D * width,
            w.dvT + (i * own.count + j) * D * width, w.k + i * width * w.dq_step);
      }
    };
    for (int64_t n0 = 0; n0 < queries.count; n0 += query_block) {
      const List block{queries.at + n0, std::min(query_block, queries.count - n0)};
      load_queries<Stored>(a, w, g, head, b, h, block, own);
      pass(w.block, block.count, 0, own.count);
      for (int64_t j = 0; irregular(a) && j < own.count; ++j) {
        const int64_t count = load_late<Stored>(a, w, g, head, b, h, block, own.at[j]);
        if (count == 0) continue;
        pass(w.late_block, count, j, 1);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t d = 0; d < D; ++d)
            w.block.dq[w.late[i] * w.dq_step + d] += w.late_block.dq[i * w.dq_step + d];
      }
      auto& turn = g.turn[head * plan.blocks + n0 / query_block];
      while (turn.load(std::memory_order_acquire) != tile * tiles + part) sched_yield();
      for (int64_t i = 0; i < block.count; ++i)
        for (int64_t d = 0; d < D; ++d)
          g.dq[(head * a.N + block.at[i]) * D + d] += w.block.dq[i * w.dq_step + d];
      turn.fetch_add(1, std::memory_order_release);
    }
    for (int64_t i = 0; i < keys.count; i += lanes) {
      const int64_t panel = i / width, lane = i % width;
      float* dkT = w.dkT + panel * D * width + lane;
      temporal_backward<Stored>(a, w.temporal, b, h, keys, i, dates, from, own.count,
                                w.dvT + panel * own.count * D * width + lane,
                                g.delta + head * a.T * a.N);
      if (part + 1 < tiles) continue;
      for (int64_t d = 0; d < D; ++d)
        Tier::store(dkT + d * width, Tier::load(dkT + d * width) * static_cast<float>(1 / log2e));
      Stored* row[lanes];
      for (int64_t j = 0; j < lanes; ++j)
        row[j] = i + j < keys.count ? at<Stored>(a.dk_median, b, 0, keys.at[i + j], h)
                                    : reinterpret_cast<Stored*>(w.temporal.rows.sink);
      store_transposed(dkT, width, D, row);
    }
  }
}

template <class Stored>
void backward(const GyroscopeArgs& a) {
  const BackwardPlan plan(a);
  Carve need{nullptr}, shared{nullptr};
  (void)BackwardScratch(a, plan, need);
  (void)Group(a, plan, shared);
  const int64_t threads = std::clamp<int64_t>(backward_workspace / need.counted(), 1,
                                              omp_get_max_threads());
  const Workspace space(threads, need.counted()), group_space(1, shared.counted());
  Carve group_carve{group_space.part(0)};
  const Group group(a, plan, group_carve);
  for (int64_t first = 0; first < a.B * a.H; first += plan.heads) {
    const int64_t heads = std::min(plan.heads, a.B * a.H - first);
    for (int64_t i = 0; i < heads * plan.blocks; ++i) new (group.turn + i) std::atomic<int32_t>(0);
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    {
      const FlushDenormals flush;
      Carve carve{space.part(omp_get_thread_num())};
      const BackwardScratch w(a, plan, carve);
      w.temporal.rows.clear(a.D);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < heads * ((a.N + lanes - 1) / lanes); ++i) {
        const int64_t head = i % heads, bh = first + head;
        prepare<Stored>(a, group, w.temporal, head, bh / a.H, bh % a.H, i / heads * lanes);
      }
      // Tasks are taken in order, so the one whose turn it is never waits for a later one.
      for (int64_t task; (task = next.fetch_add(1)) < heads * plan.key_tiles;)
        backward_task<Stored>(a, plan, w, group, task % heads, first + task % heads, task / heads);
#pragma omp barrier
#pragma omp for schedule(static)
      for (int64_t i = 0; i < heads * a.N; ++i) {
        const int64_t n = i / heads, head = i % heads, bh = first + head;
        const float* dq = group.dq + (head * a.N + n) * a.D;
        Stored* to = at<Stored>(a.dq_median, bh / a.H, 0, n, bh % a.H);
        for (int64_t d = 0; d < a.D; d += lanes)
          store_part(to + d, load_part(dq + d, a.D - d) * static_cast<float>(a.scale), a.D - d);
      }
    }
  }
}

}  // namespace
}  // namespace timo
