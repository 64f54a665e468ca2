// Backward. A task owns some keys of one sample and head, in lanes by panels, and walks over all
// queries in blocks; weights are recomputed from the saved logarithms:
//   P[query][key] = exp2(queries . keys - logs),  dv[date, channel][key] += dout . P,
//   dE[query][key] = P * (dout . v - delta),  dk[channel][key] += queries . dE,  dq += dE . keys
// where dout and delta carry each query's share of the spatial part, and delta counts the dates
// that can use the key. All tasks of a head add to the same dq, each block of queries in the order
// of the tasks: a result never depends on threads.
#pragma once
#include <sched.h>

#include <numeric>

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

// The left factor of a sum over rows: those rows, walked across, or their transpose.
struct Across {
  float* data;
  int64_t step;
};

// A block of queries: operands q [query][q_step] and dout [query][dout_step]; the same for sums over
// queries; delta [query][date] and its sum over dates; dq [query][dq_step].
struct Block {
  float *q, *dout, *logs, *delta, *total, *dq;
  Across q_across, dout_across;
};

struct BackwardScratch {
  Index *dates, *positions, *late;
  float *kT, *vT, *k;     // operands: [panel][k_size], [panel][date][v_size], [key][dq_step]
  float *dkT, *dvT;       // [panel][dk_size], [panel][date][D][width]
  float* seen;            // [panel][date][width]: 1 where the date can use the key
  float *P, *dE;          // [query][width]
  float *P_across, *dE_across, *dE_along;  // operands of them, for sums over queries and over keys
  Block block, late_block;
  TemporalScratch temporal;
  int64_t k_size, v_size, dk_size, q_step, dout_step, delta_step, dq_step, dE_step;

  BackwardScratch(const GyroscopeArgs& a, const BackwardPlan& plan, Carve& c)
      : temporal(a, plan.dates, c) {
    const int64_t D = a.D, tile = plan.dates, panels = plan.panels;
    k_size = operands(D) * width, v_size = D / pair * width, dk_size = round_up(D, rows) * width;
    q_step = row_stride(operands(D)), dout_step = row_stride(operands(tile * D) + lanes);
    delta_step = tile, dq_step = round_up(D, lanes), dE_step = pair == 1 ? width : operands(width);
    dates = c.take<Index>(a.T);
    positions = c.take<Index>(a.N);
    late = c.take<Index>(query_block);
    kT = c.take<float>(panels * k_size);
    vT = c.take<float>(panels * tile * v_size + depth * width);
    k = c.take<float>(operands((panels + 1) * width) * dq_step);
    dkT = c.take<float>(panels * dk_size);
    dvT = c.take<float>(panels * tile * D * width + rows * width);
    seen = c.take<float>(irregular(a) ? panels * tile * width : 0);
    P = c.take<float>(query_block * width);
    dE = c.take<float>(query_block * width);
    P_across = pair == 1 ? P : c.take<float>(query_block / pair * width);
    dE_across = pair == 1 ? dE : c.take<float>(query_block / pair * width);
    dE_along = pair == 1 ? dE : c.take<float>(query_block * dE_step);
    for (Block* x : {&block, &late_block}) {
      x->q = c.take<float>(query_block * q_step);
      x->dout = c.take<float>(query_block * dout_step);
      x->logs = c.take<float>(query_block);
      x->delta = c.take<float>(query_block * delta_step);
      x->total = c.take<float>(query_block);
      x->dq = c.take<float>(query_block * dq_step);
      const int64_t step = row_stride(query_block / pair);
      auto transpose = [&](int64_t channels) {
        return Across{c.take<float>(round_up(channels, rows) * step), step};
      };
      x->q_across = pair == 1 ? Across{x->q, q_step} : transpose(D);
      x->dout_across = pair == 1 ? Across{x->dout, dout_step} : transpose(tile * D);
    }
  }

};

// One block of queries against one panel of keys; `seen` is null where all dates use all keys.
template <int NV>
inline void sweep(const BackwardScratch& w, const Block& x, int64_t count, int64_t keys, int64_t D,
                  int64_t dates, float scale, const float* kT, const float* vT, const float* seen,
                  const float* k, float* dkT, float* dvT) {
  const F reach = Tier::set(60);  // of keys that weigh nothing (padding) the energy may be any
  const int64_t all = round_up(count, rows), made = filled(count);
  energy_products<NV>(x.q, w.q_step, kT, width, operands(D), all, w.P, width);
  for (int64_t n = 0; n < made; n += pair)
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) {
      F p[pair] = {};
#pragma GCC unroll 2
      for (int64_t l = 0; l < pair; ++l) {
        if (n + l >= count) continue;
        float* at = w.P + (n + l) * width + j * lanes;
        const F energy = energies(at, scale) - x.logs[n + l];
        p[l] = Tier::exp2(energy > reach ? reach : energy);
        Tier::store(at, p[l]);
      }
      if (pair > 1)
        Tier::store(w.P_across + n / pair * width + j * lanes, Tier::zip(p[0], p[pair - 1]));
    }
  multiply<across, Into::add, NV>(x.dout_across.data, x.dout_across.step, w.P_across, width,
                                  operands(count), round_up(dates * D, rows), dvT, width);
  const int64_t channels = operands(dates * D);
  for (int64_t c = 0; c < channels; c += channel_block) {
    const auto run = c == 0 ? multiply<Walk::along_rows, Into::set, NV>
                            : multiply<Walk::along_rows, Into::add, NV>;
    run(x.dout + c, w.dout_step, vT + c * width, width, std::min(channel_block, channels - c), all,
        w.dE, width);
  }
  for (int64_t n = 0; n < made; n += pair)
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) {
      F de[pair] = {};
#pragma GCC unroll 2
      for (int64_t l = 0; l < pair; ++l) {
        if (n + l >= count) continue;
        const int64_t at = (n + l) * width + j * lanes;
        const float* delta = x.delta + (n + l) * w.delta_step;
        F total = seen ? F{} : Tier::set(x.total[n + l]);
        for (int64_t t = 0; seen && t < dates; ++t)
          total += Tier::load(seen + t * width + j * lanes) * delta[t];
        de[l] = Tier::load(w.P + at) * (Tier::load(w.dE + at) - total);
        Tier::store(reinterpret_cast<Packed*>(w.dE_along + (n + l) * w.dE_step) + j * lanes, de[l]);
      }
      if (pair > 1)
        Tier::store(w.dE_across + n / pair * width + j * lanes, Tier::zip(de[0], de[pair - 1]));
    }
  multiply<across, Into::add, NV>(x.q_across.data, x.q_across.step, w.dE_across, width,
                                  operands(count), round_up(D, rows), dkT, width);
  for (int64_t d = 0; d < w.dq_step; d += 2 * lanes) {
    const auto run = w.dq_step - d > lanes ? multiply<Walk::along_rows, Into::add, 2>
                                           : multiply<Walk::along_rows, Into::add, 1>;
    run(w.dE_along, w.dE_step, k + d, w.dq_step, operands(keys), all, x.dq + d, w.dq_step);
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
      out[i] = grad[i] = reinterpret_cast<const Stored*>(w.spare.zeros);
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

// Keys of a task and the values of a tile of dates.
template <class Stored>
void load_keys(const GyroscopeArgs& a, const BackwardScratch& w, int64_t b, int64_t h, List keys,
               List dates) {
  const int64_t D = a.D;
  const auto* zeros = reinterpret_cast<const Stored*>(w.temporal.spare.zeros);
  const Stored* row[lanes];
  for (int64_t i = 0; i < round_up(keys.count, width) + depth * pair; i += pair) {
    for (int64_t l = 0; l < pair; ++l)
      row[l] = i + l < keys.count ? at<Stored>(a.k_median, b, 0, keys.at[i + l], h) : zeros;
    pack_rows(row, D, w.k + i / pair * w.dq_step);
  }
  const int64_t panels = (keys.count + width - 1) / width;
  std::fill_n(w.vT + panels * dates.count * w.v_size, depth * width, 0.f);
  for (int64_t i = 0; i < panels * width; i += lanes) {
    const int64_t panel = i / width, lane = i % width;
    for (int64_t l = 0; l < lanes; ++l)
      row[l] = i + l < keys.count ? at<Stored>(a.k_median, b, 0, keys.at[i + l], h) : zeros;
    pack_columns(row, D, w.kT + panel * w.k_size + lane, width);
    for (int64_t j = 0; j < dates.count; ++j) {
      for (int64_t l = 0; l < lanes; ++l) {
        const bool real = i + l < keys.count && usable(a, b, dates.at[j], keys.at[i + l]);
        row[l] = real ? at<Stored>(a.v, b, dates.at[j], keys.at[i + l], h) : zeros;
        if (irregular(a)) w.seen[(panel * dates.count + j) * width + lane + l] = real;
      }
      load_transposed_as<Operand<Stored>>(
          row, D / pair, w.vT + (panel * dates.count + j) * w.v_size + lane, width);
    }
  }
}

// The transpose of `count` rows of channels, for sums over them. Channels that fill it up are 0;
// rows that do repeat the last one.
inline void turn(const float* from, int64_t step, int64_t count, int64_t channels,
                 const Across& to) {
  for (int64_t i = 0; i < count; i += pair * lanes) {
    const Packed* row[pair * lanes];
    for (int64_t l = 0; l < pair * lanes; ++l)
      row[l] = reinterpret_cast<const Packed*>(from + std::min(i + l, count - 1) * step);
    pack_across(row, channels, to.data + i / pair, to.step);
    for (int64_t c = channels; c < round_up(channels, rows); ++c)
      Tier::store(to.data + c * to.step + i / pair, F{});
  }
}

inline void turn(const BackwardScratch& w, const Block& x, int64_t count, int64_t D,
                 int64_t dates) {
  if (pair == 1) return;
  turn(x.q, w.q_step, count, D, x.q_across);
  turn(x.dout, w.dout_step, count, dates * D, x.dout_across);
}

// A block of queries of the list: medians, and cotangents and delta by their share.
template <class Stored>
void load_queries(const GyroscopeArgs& a, const BackwardScratch& w, const Group& g, int64_t head,
                  int64_t b, int64_t h, List queries, List dates) {
  const int64_t D = a.D;
  const Block& x = w.block;
  for (int64_t i = 0; i < round_up(queries.count, rows); ++i) {
    const int64_t n = queries.at[std::min(i, queries.count - 1)];
    float* q = x.q + i * w.q_step;
    pack_row(at<Stored>(a.q_median, b, 0, n, h), D, q);
    for (int64_t d = 0; pair == 1 && d < D; ++d) q[d] *= query_scale(a);
    x.logs[i] = *at<float>(a.spatial_lse, b, 0, n, h);
    auto* to = reinterpret_cast<Packed*>(x.dout + i * w.dout_step);
    for (int64_t j = 0; j < dates.count; ++j) {
      const int64_t t = dates.at[j], scalar = (head * a.T + t) * a.N + n;
      const float share = std::max(g.share[scalar], 0.f);
      const Stored* grad = share > 0 ? at<Stored>(a.grad, b, t, n, h)
                                     : reinterpret_cast<const Stored*>(w.temporal.spare.zeros);
      for (int64_t d = 0; d < D; d += lanes)
        Tier::store(to + j * D + d, load_part(grad + d, D - d) * share);
      x.delta[i * w.delta_step + j] = share * g.delta[scalar];
    }
    const int64_t used = dates.count * D;
    std::memset(to + used, 0, (filled(used) - used) * sizeof(Packed));
    const float* delta = x.delta + i * w.delta_step;
    x.total[i] = std::accumulate(delta, delta + dates.count, 0.f);
  }
  turn(w, x, queries.count, D, dates.count);
}

// The queries of a block whose part of date t needs a reference of its own; returns how many.
template <class Stored>
int64_t load_late(const GyroscopeArgs& a, const BackwardScratch& w, const Group& g, int64_t head,
                  int64_t b, int64_t h, List queries, int64_t t) {
  int64_t count = 0;
  const Block& x = w.late_block;
  for (int64_t i = 0; i < queries.count; ++i) {
    const int64_t n = queries.at[i], scalar = (head * a.T + t) * a.N + n;
    if (g.share[scalar] != own_reference) continue;
    w.late[count] = static_cast<Index>(i);
    std::copy_n(w.block.q + i * w.q_step, operands(a.D), x.q + count * w.q_step);
    x.logs[count] = *at<float>(a.lse, b, t, n, h) - load_scalar(a.gate, a.gate_dtype, b, t, n, h) *
                                                        static_cast<float>(log2e);
    pack_row(at<Stored>(a.grad, b, t, n, h), a.D, x.dout + count * w.dout_step);
    x.delta[count * w.delta_step] = g.delta[scalar];
    ++count;
  }
  turn(w, x, count, a.D, 1);
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
  std::fill_n(w.dkT, panels * w.dk_size, 0.f);
  // What fills up operands is multiplied, by zeros: it must not be another sample's NaN.
  std::fill_n(w.dE_along, query_block * w.dE_step, 0.f);
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
        const int64_t date = i * own.count + j;
        run(w, x, count, left, D, some, energy_scale(a), w.kT + i * w.k_size,
            w.vT + date * w.v_size, irregular(a) ? w.seen + date * width : nullptr,
            w.k + i * width / pair * w.dq_step, w.dkT + i * w.dk_size, w.dvT + date * D * width);
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
      float* dkT = w.dkT + panel * w.dk_size + lane;
      const auto dk_scale = static_cast<float>(pair == 1 ? 1 / log2e : a.scale);
      temporal_backward<Stored>(a, w.temporal, b, h, keys, i, dates, from, own.count,
                                w.dvT + panel * own.count * D * width + lane,
                                g.delta + head * a.T * a.N);
      if (part + 1 < tiles) continue;
      for (int64_t d = 0; d < D; ++d)
        Tier::store(dkT + d * width, Tier::load(dkT + d * width) * dk_scale);
      Stored* row[lanes];
      for (int64_t j = 0; j < lanes; ++j)
        row[j] = i + j < keys.count ? at<Stored>(a.dk_median, b, 0, keys.at[i + j], h)
                                    : reinterpret_cast<Stored*>(w.temporal.spare.sink);
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
      [[maybe_unused]] const Tier::Session session;
      Carve carve{space.part(omp_get_thread_num())};
      const BackwardScratch w(a, plan, carve);
      w.temporal.spare.clear(a.D);
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
