// The Python module timo._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops.h"

namespace py = pybind11;
using namespace timo;

namespace timo {
void bind_units(py::module_& m);
}

static MedianArgs median_args(uintptr_t x, Sizes4 stride, uintptr_t valid, Sizes3 valid_stride,
                              uintptr_t values, uintptr_t indices, const Sizes5& size) {
  return {reinterpret_cast<const void*>(x),
          stride,
          reinterpret_cast<const uint8_t*>(valid),
          valid_stride,
          reinterpret_cast<void*>(values),
          reinterpret_cast<int64_t*>(indices),
          size[0], size[1], size[2], size[3], size[4]};
}

// Addresses of maps, valid, values and dates; sizes B, T, C, h, w, factor.
template <void (*run)(const MaximumArgs&)>
static void maximum(const std::array<uintptr_t, 4>& p, Sizes4 valid_stride,
                    const std::array<int64_t, 6>& n, int dtype) {
  const MaximumArgs a{reinterpret_cast<void*>(p[0]), reinterpret_cast<const uint8_t*>(p[1]),
                      valid_stride, reinterpret_cast<void*>(p[2]), reinterpret_cast<int16_t*>(p[3]),
                      n[0], n[1], n[2], n[3], n[4], n[5], static_cast<Dtype>(dtype)};
  py::gil_scoped_release unlocked;
  run(a);
}

template <void (*run)(const DeviationArgs&, Dtype)>
static void deviation(uintptr_t x, Sizes4 stride, int dtype, uintptr_t valid, Sizes3 valid_stride,
                      uintptr_t values, uintptr_t indices, const Sizes5& size,
                      const std::array<uintptr_t, 6>& others) {
  void* p[6];
  for (int i = 0; i < 6; ++i) p[i] = reinterpret_cast<void*>(others[i]);
  const DeviationArgs a{median_args(x, stride, valid, valid_stride, values, indices, size),
                        p[0], p[1], p[2], p[3], p[4], p[5]};
  py::gil_scoped_release unlocked;
  run(a, static_cast<Dtype>(dtype));
}

using Views = std::vector<std::pair<uintptr_t, Sizes4>>;

static GyroscopeArgs gyroscope_args(const Views& views, uintptr_t valid, Sizes3 valid_stride,
                                    const Sizes5& size, double scale, int dtype, int gate_dtype) {
  GyroscopeArgs a{};
  Strided* const fields[] = {&a.q, &a.k, &a.v, &a.q_median, &a.k_median, &a.gate,
                             &a.out, &a.lse, &a.spatial_lse, &a.grad, &a.dq, &a.dk,
                             &a.dv, &a.dq_median, &a.dk_median, &a.dgate};
  for (size_t i = 0; i < views.size() && i < std::size(fields); ++i)
    *fields[i] = {reinterpret_cast<void*>(views[i].first), views[i].second};
  a.valid = reinterpret_cast<const uint8_t*>(valid), a.valid_stride = valid_stride;
  a.B = size[0], a.T = size[1], a.N = size[2], a.H = size[3], a.D = size[4];
  a.scale = scale;
  a.dtype = static_cast<Dtype>(dtype), a.gate_dtype = static_cast<Dtype>(gate_dtype);
  return a;
}

template <void (*run)(const GyroscopeArgs&)>
static void gyroscope(const Views& views, uintptr_t valid, Sizes3 valid_stride, const Sizes5& size,
                      double scale, int dtype, int gate_dtype) {
  const auto a = gyroscope_args(views, valid, valid_stride, size, scale, dtype, gate_dtype);
  py::gil_scoped_release unlocked;
  run(a);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of timo";
#ifdef TIMO_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def("isa_level", &isa_level);
  m.def("cap_isa", &cap_isa);
  m.def("emulate_amx", &emulate_amx);
  m.def("poison_workspace", &poison_workspace);
  m.def("temporal_median_cpu",
        [](uintptr_t x, Sizes4 stride, int dtype, uintptr_t valid, Sizes3 valid_stride,
           uintptr_t values, uintptr_t indices, Sizes5 size) {
          const auto a = median_args(x, stride, valid, valid_stride, values, indices, size);
          py::gil_scoped_release unlocked;
          temporal_median_cpu(a, static_cast<Dtype>(dtype));
        });
  m.def("temporal_median_backward_cpu",
        [](uintptr_t grad, uintptr_t indices, uintptr_t out, int64_t bytes, int64_t B, int64_t T,
           int64_t channels) {
          py::gil_scoped_release unlocked;
          temporal_median_backward_cpu(reinterpret_cast<const void*>(grad),
                                       reinterpret_cast<const int64_t*>(indices),
                                       reinterpret_cast<void*>(out), bytes, B, T, channels);
        });
  m.def("temporal_maximum_cpu", &maximum<temporal_maximum_cpu>);
  m.def("temporal_maximum_backward_cpu", &maximum<temporal_maximum_backward_cpu>);
  m.attr("median_deviation_chunk") = median_deviation_chunk;
  m.def("median_deviation_cpu", &deviation<median_deviation_cpu>);
  m.def("median_deviation_backward_cpu", &deviation<median_deviation_backward_cpu>);
  m.def("gyroscope_attention_cpu", &gyroscope<gyroscope_attention_cpu>);
  m.def("gyroscope_attention_backward_cpu", &gyroscope<gyroscope_attention_backward_cpu>);
  bind_units(m);
#ifdef TIMO_CUDA
  m.def("temporal_median_cuda",
        [](uintptr_t x, Sizes4 stride, int dtype, uintptr_t valid, Sizes3 valid_stride,
           uintptr_t values, uintptr_t indices, Sizes5 size, uintptr_t stream) {
          const auto a = median_args(x, stride, valid, valid_stride, values, indices, size);
          temporal_median_cuda(a, static_cast<Dtype>(dtype), reinterpret_cast<void*>(stream));
        });
  m.def("temporal_median_backward_cuda",
        [](uintptr_t grad, uintptr_t indices, uintptr_t out, int64_t bytes, int64_t B, int64_t T,
           int64_t channels, uintptr_t stream) {
          temporal_median_backward_cuda(reinterpret_cast<const void*>(grad),
                                        reinterpret_cast<const int64_t*>(indices),
                                        reinterpret_cast<void*>(out), bytes, B, T, channels,
                                        reinterpret_cast<void*>(stream));
        });
#endif
}
