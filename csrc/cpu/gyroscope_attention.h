// What the instruction sets of CPU gyroscope attention share: addresses, lists of usable dates and
// positions, scratch memory, rounding. Included before any target pragma.
#pragma once
#include <omp.h>
#include <xmmintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "ops.h"

namespace timo {

// One entry point per instruction set; each takes float32, float16 and bfloat16, those of bf16
// products bfloat16 alone.
void gyroscope_forward_portable(const GyroscopeArgs& a);
void gyroscope_forward_avx2(const GyroscopeArgs& a);
void gyroscope_forward_avx512(const GyroscopeArgs& a);
void gyroscope_forward_avx512_bf16(const GyroscopeArgs& a);
void gyroscope_forward_amx(const GyroscopeArgs& a);
void gyroscope_forward_amx_emulated(const GyroscopeArgs& a);
void gyroscope_backward_portable(const GyroscopeArgs& a);
void gyroscope_backward_avx2(const GyroscopeArgs& a);
void gyroscope_backward_avx512(const GyroscopeArgs& a);
void gyroscope_backward_avx512_bf16(const GyroscopeArgs& a);
void gyroscope_backward_amx(const GyroscopeArgs& a);
void gyroscope_backward_amx_emulated(const GyroscopeArgs& a);

namespace {

constexpr double log2e = 1.4426950408889634;
constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float lowest = std::numeric_limits<float>::lowest();

// Energies are in powers of two, and weights relative to a reference near the row's greatest
// energy. A row whose sum passes `sum_limit` gets a new reference; a date that holds less than
// `mass_limit` of a row's sum, because it cannot use the greatest keys, gets a reference of its own
// (backward: where its share of the spatial part passes 2^share_limit). What then underflows is
// below 2^-60 of the result.
constexpr float sum_limit = 0x1p60f, mass_limit = 0x1p-60f, share_limit = 60;

using Index = int32_t;  // of a position or a date within a sample

struct List {
  const Index* at;
  int64_t count;
};

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Rows an odd number of cache lines apart, so that a column of them spreads over all sets of L1.
constexpr int64_t row_stride(int64_t floats) { return (round_up(floats, 16) / 16 | 1) * 16; }

template <class Stored>
inline Stored* at(const Strided& x, int64_t b, int64_t t, int64_t n, int64_t h) {
  return static_cast<Stored*>(x.data) + b * x.stride[0] + t * x.stride[1] + n * x.stride[2] +
         h * x.stride[3];
}

inline bool usable(const GyroscopeArgs& a, int64_t b, int64_t t, int64_t n) {
  return !a.valid || a.valid[b * a.valid_stride[0] + t * a.valid_stride[1] + n * a.valid_stride[2]];
}

// Whether validity differs between the positions of a date.
inline bool irregular(const GyroscopeArgs& a) { return a.valid && a.valid_stride[2] != 0; }

inline bool usable_ever(const GyroscopeArgs& a, int64_t b, int64_t n) {
  for (int64_t t = 0; t < a.T; ++t)
    if (usable(a, b, t, n)) return true;
  return false;
}

// Dates and positions that take part in a sample. Those that never do are left out of the lists,
// so that padding changes no bit of a result, but for dq_median's, whose sums are grouped by how many
// keys a task owns at all T dates. Irregular validity keeps all dates.
inline List list_dates(const GyroscopeArgs& a, int64_t b, Index* out) {
  int64_t count = 0;
  for (int64_t t = 0; t < a.T; ++t)
    if (irregular(a) || usable(a, b, t, 0)) out[count++] = static_cast<Index>(t);
  return {out, count};
}

inline List list_positions(const GyroscopeArgs& a, int64_t b, Index* out) {
  int64_t count = 0;
  for (int64_t n = 0; n < a.N; ++n)
    if (!irregular(a) || usable_ever(a, b, n)) out[count++] = static_cast<Index>(n);
  return {out, count};
}

// Gates are scalars of a dtype of their own.
inline float load_scalar(const Strided& x, Dtype dtype, int64_t b, int64_t t, int64_t n,
                         int64_t h) {
  switch (dtype) {
    case Dtype::f32: return *at<float>(x, b, t, n, h);
    case Dtype::f64: return static_cast<float>(*at<double>(x, b, t, n, h));
    case Dtype::f16: return widen(*at<f16>(x, b, t, n, h));
    case Dtype::bf16: return widen(*at<bf16>(x, b, t, n, h));
  }
  return 0;
}

// Factor of products of queries and keys, so that energies are in powers of two.
inline float energy_scale(const GyroscopeArgs& a) { return static_cast<float>(a.scale * log2e); }

inline void store_scalar(const Strided& x, Dtype dtype, int64_t b, int64_t t, int64_t n, int64_t h,
                         float value) {
  switch (dtype) {
    case Dtype::f32: *at<float>(x, b, t, n, h) = value; break;
    case Dtype::f64: *at<double>(x, b, t, n, h) = value; break;
    case Dtype::f16: *at<f16>(x, b, t, n, h) = narrow_to(value, f16{}); break;
    case Dtype::bf16: *at<bf16>(x, b, t, n, h) = narrow_to(value, bf16{}); break;
  }
}

// Denormal weights would cost about 150 cycles per product.
struct FlushDenormals {
  const unsigned old = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(old | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(old); }
};

// Memory of one call, in equal parts of which each thread carves its own.
class Workspace {
 public:
  Workspace(int64_t parts, int64_t bytes) : bytes_(round_up(bytes, 4096)) {
    data_.reset(static_cast<char*>(std::aligned_alloc(4096, parts * bytes_)));
    if (!data_) throw std::bad_alloc();
    if (poisons_workspace()) std::memset(data_.get(), 0xff, parts * bytes_);
  }
  char* part(int64_t i) const { return data_.get() + i * bytes_; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t bytes_;
};

// Takes aligned pieces off a part; with a null address it only counts what they need.
struct Carve {
  char* next;
  template <class X>
  X* take(int64_t count) {
    char* piece = next;
    next += round_up(count * static_cast<int64_t>(sizeof(X)), 64);
    return reinterpret_cast<X*>(piece);
  }
  int64_t counted() const { return reinterpret_cast<int64_t>(next); }
};

}  // namespace
}  // namespace timo
