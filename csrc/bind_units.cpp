// The ops on units of frames, for bind.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops.h"

namespace py = pybind11;

namespace timo {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// name(arguments...) runs `run` on make(arguments...).
template <class Args, class... In>
void def(py::module_& m, const char* name, Args (*make)(In...), void (*run)(const Args&)) {
  m.def(name, [make, run](In... in) {
    const Args a = make(in...);
    py::gil_scoped_release unlocked;
    run(a);
  });
}

// The same with a stream behind the arguments.
template <class Args, class... In>
[[maybe_unused]] void def(py::module_& m, const char* name, Args (*make)(In...),
                          void (*launch)(const Args&, void*)) {
  m.def(name, [make, launch](In... in, uintptr_t stream) { launch(make(in...), at<void>(stream)); });
}

// Addresses of frames, valid, scale, offset and ids; sizes B, T, C, H, W, K, unit.
using UnitsIn = std::tuple<std::array<uintptr_t, 5>, Sizes5, Sizes4, std::array<int64_t, 7>, int>;

Units units(const UnitsIn& in) {
  const auto& [p, stride, valid_stride, n, pixel] = in;
  return {at<void>(p[0]), stride, at<const uint8_t>(p[1]), valid_stride, at<const float>(p[2]),
          at<const float>(p[3]), at<const int64_t>(p[4]), n[0], n[1], n[2], n[3], n[4], n[5], n[6],
          static_cast<Pixel>(pixel)};
}

GatherArgs gather(const UnitsIn& in, uintptr_t tiles, int dtype, int64_t before, int64_t after) {
  return {units(in), at<void>(tiles), static_cast<Dtype>(dtype), before, after};
}

// Addresses of tokens, ids, mask_token, position, sequence and partial; sizes B, K, L, D.
ScatterArgs scatter(const std::array<uintptr_t, 6>& p, std::array<int64_t, 2> stride,
                    const Sizes4& n, int dtype) {
  return {at<void>(p[0]), stride, at<const int64_t>(p[1]), at<float>(p[2]), at<const float>(p[3]),
          at<void>(p[4]), at<float>(p[5]), n[0], n[1], n[2], n[3], static_cast<Dtype>(dtype)};
}

// Addresses of pred, mean, rstd, loss, count, partial, grad and dpred.
LossArgs loss(const UnitsIn& in, const std::array<uintptr_t, 8>& p, int dtype, int norm) {
  return {units(in), at<const void>(p[0]), static_cast<Dtype>(dtype), static_cast<Norm>(norm),
          at<float>(p[1]), at<float>(p[2]), at<float>(p[3]), at<int64_t>(p[4]), at<double>(p[5]),
          at<const float>(p[6]), at<void>(p[7])};
}

}  // namespace

void bind_units(py::module_& m) {
  m.attr("scatter_units_chunk") = scatter_units_chunk;
  def(m, "gather_units_cpu", gather, gather_units_cpu);
  def(m, "gather_units_backward_cpu", gather, gather_units_backward_cpu);
  def(m, "scatter_units_cpu", scatter, scatter_units_cpu);
  def(m, "scatter_units_backward_cpu", scatter, scatter_units_backward_cpu);
  def(m, "masked_pixel_loss_cpu", loss, masked_pixel_loss_cpu);
  def(m, "masked_pixel_loss_backward_cpu", loss, masked_pixel_loss_backward_cpu);
#ifdef TIMO_CUDA
  def(m, "gather_units_cuda", gather, gather_units_cuda);
  def(m, "gather_units_backward_cuda", gather, gather_units_backward_cuda);
  def(m, "scatter_units_cuda", scatter, scatter_units_cuda);
  def(m, "scatter_units_backward_cuda", scatter, scatter_units_backward_cuda);
  def(m, "masked_pixel_loss_cuda", loss, masked_pixel_loss_cuda);
  def(m, "masked_pixel_loss_backward_cuda", loss, masked_pixel_loss_backward_cuda);
#endif
}

}  // namespace timo
