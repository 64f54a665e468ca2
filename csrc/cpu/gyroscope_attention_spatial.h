// Spatial sums of the forward. Queries lie in lanes, by panels; keys stream past in blocks that stay
// in L1:
//   E[key][query] = keys . queries,  P = exp2(E - reference),
//   S[date, channel][query] += values . P
// Every lane's sums are formed in the order of its keys and nothing depends on its neighbours, so
// results are the same for any number of threads, queries per task and dates per task.
#pragma once
#include "cpu/gyroscope_attention_temporal.h"

namespace timo {
namespace {

constexpr int64_t key_block = 128;               // P of a block and panel: 24 KB with AVX-512
constexpr int64_t group = std::max<int64_t>(rows, pair * depth);  // keys weighed at once
constexpr int64_t sum_bytes = 5 << 18;           // of S per task, for L2
constexpr int64_t forward_workspace = 56 << 20;  // of all threads

// Columns of the values of some dates; as many more hold the mass of the keys that each can use.
constexpr int64_t value_rows(int64_t dates, int64_t D) { return round_up(dates * D, rows); }

// Sizes of a task: `dates` at once, of `queries` positions (whole panels).
struct ForwardPlan {
  int64_t dates, queries, columns, date_tiles, query_tiles;

  ForwardPlan(const GyroscopeArgs& a, int64_t threads) {
    const int64_t room = std::min(sum_bytes, forward_workspace / (2 * threads)) / 4;
    dates = std::clamp<int64_t>(room / (4 * width * a.D), 1, a.T);
    date_tiles = (a.T + dates - 1) / dates;
    dates = (a.T + date_tiles - 1) / date_tiles;
    columns = value_rows(dates, a.D) + (irregular(a) ? dates : 0);
    const int64_t panels = (a.N + width - 1) / width;
    const int64_t fitting = std::max<int64_t>(1, room / (columns * width));
    query_tiles = (panels + fitting - 1) / fitting;
    const int64_t others = a.B * a.H * date_tiles;
    query_tiles = std::max(query_tiles, std::min(panels, (3 * threads + others - 1) / others));
    queries = (panels + query_tiles - 1) / query_tiles * width;
  }
};

// Sums over keys, for queries in lanes: S [panel][column][width]; the rest [panel][width].
struct Sums {
  float *S, *reference, *mass;
};

struct ForwardScratch {
  Index *dates, *positions, *date_keys, *late, *late_at;
  float *queries, *keys, *values, *P;  // operands
  float *E;                            // [key of a group][width]
  float *usable, *usable_mass;         // [date][key of a block], [date][width]
  Sums sums, late_sums;
  float *references;             // [panel][date][width], irregular validity only
  Rows spare;
  float *q, *k, *v, *o, *weight, *share, *live;  // of `finish`, see there
  int64_t query_step, key_step, value_step;  // of a panel, a key, a row of values

  ForwardScratch(const GyroscopeArgs& a, const ForwardPlan& plan, Carve& c) : spare(a, c) {
    const int64_t late_queries = irregular(a) ? plan.queries : 0, D = a.D;
    dates = c.take<Index>(a.T);
    positions = c.take<Index>(a.N);
    date_keys = c.take<Index>(irregular(a) ? a.N : 0);
    late = c.take<Index>(late_queries);
    late_at = c.take<Index>(late_queries);
    query_step = operands(D) * width, key_step = row_stride(operands(D));
    value_step = row_stride(pair == 1 ? plan.columns + lanes : key_block / pair);
    queries = c.take<float>(plan.queries / width * query_step);
    keys = c.take<float>(key_block * key_step);
    values = c.take<float>((pair == 1 ? key_block : plan.columns) * value_step);
    P = c.take<float>(key_block / pair * width);
    E = c.take<float>(group * width);
    usable = c.take<float>(irregular(a) ? plan.dates * key_block : 0);
    usable_mass = c.take<float>(irregular(a) ? plan.dates * width : 0);
    sums = {c.take<float>(plan.queries * plan.columns), c.take<float>(plan.queries),
            c.take<float>(plan.queries)};
    late_sums = {c.take<float>(late_queries * value_rows(1, D)), c.take<float>(late_queries),
                 c.take<float>(late_queries)};
    references = c.take<float>(late_queries * plan.dates);
    q = c.take<float>(date_block * D * lanes);
    k = c.take<float>(a.T * D * lanes);
    v = c.take<float>(a.T * D * lanes);
    o = c.take<float>(date_block * D * lanes);
    weight = c.take<float>(date_block * a.T * lanes);
    share = c.take<float>(date_block * lanes);
    live = c.take<float>(a.T * lanes);
  }
};

// E of the keys from m on: their products with queries, not scaled yet.
template <int NV>
TIMO_INLINE void form_products(const ForwardScratch& w, int64_t m, int64_t D,
                               const float* queries) {
  energy_products<NV>(w.keys + m * w.key_step, w.key_step, queries, width, operands(D), group, w.E,
                      width);
}

// P of a panel and a block of keys, its row sums and those of the keys that each of `masks` dates
// can use; false where a sum passes the limit.
template <int NV>
TIMO_INLINE bool weigh(const ForwardScratch& w, int64_t count, const float* queries, int64_t D,
                       int64_t masks, float scale, const float* reference, F (&sum)[NV]) {
  F ref[NV];
#pragma GCC unroll 3
  for (int j = 0; j < NV; ++j) sum[j] = F{}, ref[j] = Tier::load(reference + j * lanes);
  std::fill_n(w.usable_mass, masks * width, 0.f);
  for (int64_t m = 0; m < count; m += group) {
    form_products<NV>(w, m, D, queries);
    const int64_t real = std::min(group, count - m), made = std::min(group, filled(real));
    float* to = w.P + m / pair * width;
    for (int64_t i = 0; i < made; i += pair, to += width)
#pragma GCC unroll 3
      for (int j = 0; j < NV; ++j) {
        F x[pair] = {};
        for (int64_t l = 0; l < pair; ++l) {
          if (i + l >= real) continue;
          float* at = w.E + (i + l) * width + j * lanes;
          x[l] = Tier::exp2(energies(at, scale) - ref[j]);
          sum[j] += x[l];
          if (masks > 0) Tier::store(at, x[l]);
        }
        Tier::store(to + j * lanes, Tier::zip(x[0], x[pair - 1]));
      }
    for (int64_t t = 0; t < masks; ++t)
#pragma GCC unroll 3
      for (int j = 0; j < NV; ++j) {
        float* mass = w.usable_mass + t * width + j * lanes;
        F total = Tier::load(mass);
        for (int64_t i = 0; i < real; ++i)
          total += Tier::load(w.E + i * width + j * lanes) * w.usable[t * key_block + m + i];
        Tier::store(mass, total);
      }
  }
  I over = {};
  for (int j = 0; j < NV; ++j) over |= ~(I)(sum[j] <= sum_limit);
  bool good = true;
  for (int i = 0; i < lanes; ++i) good &= over[i] == 0;
  return good;
}

// Greatest energy over a block of keys, from below `top`.
template <int NV>
inline void raise(const ForwardScratch& w, int64_t count, const float* queries, int64_t D,
                  float scale, F (&top)[NV]) {
  for (int64_t m = 0; m < count; m += group) {
    form_products<NV>(w, m, D, queries);
    for (int64_t i = 0; i < std::min(group, count - m); ++i)
      for (int j = 0; j < NV; ++j)
        top[j] = larger(energies(w.E + i * width + j * lanes, scale), top[j]);
  }
}

// One panel against one block of keys. The reference comes from the first keys, without a running
// maximum; lanes whose sum passes the limit take a new one, and what they have is rescaled.
template <int NV>
inline void step(const ForwardScratch& w, int64_t count, int64_t dates, int64_t masks, int64_t D,
                 float scale, const float* queries, bool first, float* S, float* reference,
                 float* mass) {
  const int64_t values = value_rows(dates, D);
  F sum[NV], top[NV];
  if (first) {
    for (int j = 0; j < NV; ++j) top[j] = Tier::set(lowest);
    raise<NV>(w, std::min<int64_t>(count, rows), queries, D, scale, top);
    for (int j = 0; j < NV; ++j) Tier::store(reference + j * lanes, top[j]);
  }
  if (!weigh<NV>(w, count, queries, D, masks, scale, reference, sum)) {
    for (int j = 0; j < NV; ++j) top[j] = Tier::load(reference + j * lanes);
    raise<NV>(w, count, queries, D, scale, top);
    for (int j = 0; j < NV; ++j) {
      const F old = Tier::load(reference + j * lanes);
      const I keep = sum[j] <= sum_limit;
      const F half = keep ? Tier::set(1) : Tier::exp2((old - top[j]) * 0.5f);
      auto rescale = [&](float* x) {  // by halves: a sum of 2^60 outlasts what their product is not
        Tier::store(x, Tier::load(x) * half * half);
      };
      Tier::store(reference + j * lanes, keep ? old : top[j]);
      rescale(mass + j * lanes);
      for (int64_t c = 0; c < values + masks; ++c) rescale(S + c * width + j * lanes);
    }
    weigh<NV>(w, count, queries, D, masks, scale, reference, sum);
  }
  auto add = [](float* to, F x) { Tier::store(to, Tier::load(to) + x); };
  for (int j = 0; j < NV; ++j) {
    add(mass + j * lanes, sum[j]);
    for (int64_t t = 0; t < masks; ++t)
      add(S + (values + t) * width + j * lanes, Tier::load(w.usable_mass + t * width + j * lanes));
  }
  multiply<across, Into::add, NV>(w.values, w.value_step, w.P, width, operands(count), values, S,
                                  width);
}

// A block of keys and their values at `dates`; with `masks`, which keys each date can use.
template <class Stored>
void pack_block(const GyroscopeArgs& a, int64_t b, int64_t h, List keys, List dates, bool masks,
                const ForwardScratch& w) {
  const int64_t D = a.D;
  const auto* zeros = reinterpret_cast<const Stored*>(w.spare.zeros);
  for (int64_t i = 0; i < round_up(keys.count, group); ++i) {
    const int64_t m = keys.at[std::min(i, keys.count - 1)];
    pack_row(at<Stored>(a.k_median, b, 0, m, h), D, w.keys + i * w.key_step);
  }
  for (int64_t j = 0; j < dates.count; ++j) {
    auto value = [&](int64_t i) {
      const bool seen = i < keys.count && (!masks || usable(a, b, dates.at[j], keys.at[i]));
      return seen ? at<Stored>(a.v, b, dates.at[j], keys.at[i], h) : zeros;
    };
    for (int64_t i = 0; masks && i < keys.count; ++i)
      w.usable[j * key_block + i] = value(i) != zeros;
    if constexpr (pair == 1) {
      for (int64_t i = 0; i < keys.count; ++i)
        load_row(value(i), D, w.values + i * w.value_step + j * D);
    } else {
      for (int64_t i = 0; i < keys.count; i += pair * lanes) {
        const Stored* row[pair * lanes];
        for (int64_t l = 0; l < pair * lanes; ++l) row[l] = value(i + l);
        pack_across(row, D, w.values + j * D * w.value_step + i / pair, w.value_step);
      }
    }
  }
  for (int64_t c = dates.count * D; c < value_rows(dates.count, D); ++c)  // of tiles alone
    std::fill_n(w.values + c * w.value_step, key_block / pair, 0.f);
}

// Sums over `keys` for `queries` and `dates`; with `masks`, only the keys that each date can use, and
// their mass beside the values. `complete(panel)` is called as soon as a panel has all its sums.
template <class Stored, class Complete>
void attend(const GyroscopeArgs& a, int64_t b, int64_t h, List queries, List keys, List dates,
            bool masks, const ForwardScratch& w, const Sums& sums, const Complete& complete) {
  const int64_t D = a.D, more = masks ? dates.count : 0;
  const int64_t columns = value_rows(dates.count, D) + more;
  const int64_t panels = (queries.count + width - 1) / width;
  for (int64_t i = 0; i < queries.count; i += lanes) {
    const Stored* row[lanes];
    point(a.q_median, b, 0, h, queries, i, row);
    float* to = w.queries + i / width * w.query_step + i % width;
    pack_columns(row, D, to, width);
    for (int64_t d = 0; pair == 1 && d < D; ++d)
      Tier::store(to + d * width, Tier::load(to + d * width) * query_scale(a));
  }
  std::fill_n(sums.S, panels * columns * width, 0.f);
  std::fill_n(sums.mass, panels * width, 0.f);
  // Blocks differ by a group at most: a short one would cost as much for its sums.
  const int64_t groups = (keys.count + group - 1) / group;
  const int64_t blocks = (keys.count + key_block - 1) / key_block;
  for (int64_t n = 0; n < blocks; ++n) {
    const int64_t m = groups * n / blocks * group;
    const int64_t end = std::min(groups * (n + 1) / blocks * group, keys.count);
    const List block{keys.at + m, end - m};
    pack_block<Stored>(a, b, h, block, dates, masks, w);
    for (int64_t i = 0; i < panels; ++i) {
      const auto run = queries.count - i * width > 2 * lanes ? step<3>
                       : queries.count - i * width > lanes   ? step<2>
                                                             : step<1>;
      run(w, block.count, dates.count, more, D, energy_scale(a), w.queries + i * w.query_step,
          m == 0, sums.S + i * columns * width, sums.reference + i * width, sums.mass + i * width);
      if (end == keys.count) complete(i);
    }
  }
}

// Queries whose usable keys hold next to nothing of a row's sum, date by date: once more, with
// the keys of that date alone. Replaces their columns, mass and reference.
template <class Stored>
void attend_late(const GyroscopeArgs& a, int64_t b, int64_t h, List queries, List keys, List dates,
                 const ForwardScratch& w) {
  const int64_t D = a.D, values = value_rows(dates.count, D), columns = values + dates.count;
  for (int64_t j = 0; j < dates.count; ++j) {
    List late{w.late, 0};
    for (int64_t i = 0; i < queries.count; ++i) {
      const int64_t panel = i / width, lane = i % width;
      w.references[(panel * dates.count + j) * width + lane] = w.sums.reference[i];
      const float mass = w.sums.S[(panel * columns + values + j) * width + lane];
      if (mass >= mass_limit || !usable(a, b, dates.at[j], queries.at[i])) continue;
      w.late[late.count] = queries.at[i];
      w.late_at[late.count++] = static_cast<Index>(i);
    }
    if (late.count == 0) continue;
    List own{w.date_keys, 0};
    for (int64_t m = 0; m < keys.count; ++m)
      if (usable(a, b, dates.at[j], keys.at[m])) w.date_keys[own.count++] = keys.at[m];
    attend<Stored>(a, b, h, late, own, {dates.at + j, 1}, false, w, w.late_sums, [](int64_t) {});
    for (int64_t i = 0; i < late.count; ++i) {
      const int64_t to = w.late_at[i], panel = to / width, lane = to % width;
      float* S = w.sums.S + panel * columns * width + lane;
      const float* from = w.late_sums.S + i / width * value_rows(1, D) * width + i % width;
      for (int64_t d = 0; d < D; ++d) S[(j * D + d) * width] = from[d * width];
      S[(values + j) * width] = w.late_sums.mass[i];
      w.references[(panel * dates.count + j) * width + lane] = w.late_sums.reference[i];
    }
  }
}

}  // namespace
}  // namespace timo
