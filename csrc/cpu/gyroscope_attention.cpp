// Gyroscope attention on the CPU: which instruction set runs, and zeros where nothing is valid.
#include "cpu/gyroscope_attention.h"

namespace timo {
namespace {

// Entries that no task writes: invalid queries, and medians of positions without a valid date.
template <class Stored>
void clear_invalid(const GyroscopeArgs& a, bool backward) {
  if (!a.valid) return;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < a.B * a.N; ++i) {
    const int64_t b = i / a.N, n = i % a.N;
    const bool ever = usable_ever(a, b, n);
    auto clear = [&](const Strided& x, int64_t t, int64_t h) {
      std::fill_n(at<Stored>(x, b, t, n, h), a.D, Stored{});
    };
    for (int64_t h = 0; h < a.H; ++h) {
      if (!ever && !backward) *at<float>(a.spatial_lse, b, 0, n, h) = infinity;
      if (!ever && backward) clear(a.dq_median, 0, h), clear(a.dk_median, 0, h);
      for (int64_t t = 0; t < a.T; ++t) {
        if (usable(a, b, t, n)) continue;
        if (backward) {
          clear(a.dq, t, h), clear(a.dk, t, h), clear(a.dv, t, h);
          store_scalar(a.dgate, a.gate_dtype, b, t, n, h, 0);
        } else {
          clear(a.out, t, h);
          *at<float>(a.lse, b, t, n, h) = infinity;
        }
      }
    }
  }
}

void clear_invalid(const GyroscopeArgs& a, bool backward) {
  a.dtype == Dtype::f32 ? clear_invalid<float>(a, backward) : clear_invalid<f16>(a, backward);
}

using Kernel = void (*)(const GyroscopeArgs&);

// By instruction set (isa_level); products of bfloat16 need no float32 where the CPU has them.
void run(const GyroscopeArgs& a, const Kernel (&kernels)[5], Kernel emulated) {
  const int level = a.dtype == Dtype::bf16 ? isa_level() : std::min(isa_level(), 2);
  (level == 4 && emulates_amx() ? emulated : kernels[level])(a);
}

}  // namespace

void gyroscope_attention_cpu(const GyroscopeArgs& a) {
  clear_invalid(a, false);
  run(a,
      {gyroscope_forward_portable, gyroscope_forward_avx2, gyroscope_forward_avx512,
       gyroscope_forward_avx512_bf16, gyroscope_forward_amx},
      gyroscope_forward_amx_emulated);
}

void gyroscope_attention_backward_cpu(const GyroscopeArgs& a) {
  clear_invalid(a, true);
  run(a,
      {gyroscope_backward_portable, gyroscope_backward_avx2, gyroscope_backward_avx512,
       gyroscope_backward_avx512_bf16, gyroscope_backward_amx},
      gyroscope_backward_amx_emulated);
}

}  // namespace timo
