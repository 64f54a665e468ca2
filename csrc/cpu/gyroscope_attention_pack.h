// Rows of channels in the caller's memory and what the kernels make of them: vectors of positions,
// and operands of products (Tier::pair): floats, or pairs of bfloat16 as they are.
#pragma once
#include "cpu/gyroscope_attention_kernel.h"

namespace timo {
namespace {

// Two bfloat16, moved as a float; any memory may be read so.
struct __attribute__((packed, may_alias)) Pair {
  float both;
};
inline float widen(Pair x) { return x.both; }

// How an input is read as operands.
template <class Stored>
using Operand = std::conditional_t<pair == 1, Stored, Pair>;

// A number inside an operand that the kernels form.
using Packed = std::conditional_t<pair == 1, float, bf16>;

// Operands in which n numbers of a summed dimension lie, and numbers that fill them.
constexpr int64_t operands(int64_t n) { return round_up(n, pair * depth) / pair; }
constexpr int64_t filled(int64_t n) { return round_up(n, pair * depth); }

// Rows of D channels, one per lane -> to[d * step + lane]. The rows are read as `As`.
template <class As, class Stored>
inline void load_transposed_as(const Stored* const* row, int64_t D, float* to, int64_t step) {
  F r[lanes];
  auto from = [&](int i, int64_t d) { return reinterpret_cast<const As*>(row[i]) + d; };
  int64_t d = 0;
  for (; d + lanes <= D; d += lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) r[i] = Tier::load(from(i, d));
    Tier::transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) Tier::store(to + (d + i) * step, r[i]);
  }
  if (d == D) return;
  for (int i = 0; i < lanes; ++i) r[i] = load_part(from(i, d), D - d);
  Tier::transpose(r);
  for (int i = 0; i < D - d; ++i) Tier::store(to + (d + i) * step, r[i]);
}

template <class Stored>
inline void load_transposed(const Stored* const* row, int64_t D, float* to, int64_t step) {
  load_transposed_as<Stored>(row, D, to, step);
}

// from[d * step + lane] -> rows of D channels, one per lane.
template <class Stored>
inline void store_transposed(const float* from, int64_t step, int64_t D, Stored* const* row) {
  F r[lanes];
  int64_t d = 0;
  for (; d + lanes <= D; d += lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) r[i] = Tier::load(from + (d + i) * step);
    Tier::transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) Tier::store(row[i] + d, r[i]);
  }
  if (d == D) return;
  for (int i = 0; i < lanes; ++i) r[i] = i < D - d ? Tier::load(from + (d + i) * step) : F{};
  Tier::transpose(r);
  for (int i = 0; i < lanes; ++i) store_part(row[i] + d, r[i], D - d);
}

// A row of D channels in float32, padded with zeros to whole vectors.
template <class Stored>
TIMO_INLINE void load_row(const Stored* row, int64_t D, float* to) {
  int64_t d = 0;
  for (; d + lanes <= D; d += lanes) Tier::store(to + d, Tier::load(row + d));
  if (d < D) Tier::store(to + d, load_part(row + d, D - d));
}

// A row of D channels as operands, padded with zeros to whole vectors: of the left factor.
template <class Stored>
TIMO_INLINE void pack_row(const Stored* row, int64_t D, float* to) {
  load_row(reinterpret_cast<const Operand<Stored>*>(row), D / pair, to);
}

// Rows of D channels, one per lane, as operands that lie below each other and zeros down to a
// multiple of `depth`: of the right factor.
template <class Stored>
inline void pack_columns(const Stored* const* row, int64_t D, float* to, int64_t step) {
  load_transposed_as<Operand<Stored>>(row, D / pair, to, step);
  for (int64_t d = D / pair; d < operands(D); ++d) Tier::store(to + d * step, F{});
}

// A row of operands, each of one channel of all `pair` rows, padded with zeros to whole vectors:
// of the right factor, or of the left one where it is walked across its rows.
template <class Stored>
TIMO_INLINE void pack_rows(const Stored* const* row, int64_t D, float* to) {
  for (int64_t d = 0; d < D; d += lanes)
    Tier::store(to + d,
                Tier::zip(load_part(row[0] + d, D - d), load_part(row[pair - 1] + d, D - d)));
}

// Channels of `pair * lanes` rows as operands to[d * step + row / pair]: of a left factor that sums
// over rows, where it is walked along its own rows.
template <class Stored>
inline void pack_across(const Stored* const* row, int64_t D, float* to, int64_t step) {
  F r[lanes];
  for (int64_t d = 0; d < D; d += lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      r[i] = Tier::zip(load_part(row[2 * i] + d, D - d), load_part(row[2 * i + 1] + d, D - d));
    Tier::transpose(r);
    for (int64_t i = 0; i < std::min<int64_t>(lanes, D - d); ++i)
      Tier::store(to + (d + i) * step, r[i]);
  }
}

}  // namespace
}  // namespace timo
