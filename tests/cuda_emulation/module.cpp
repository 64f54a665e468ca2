// The entry points of the CPU kernels, run by the CUDA kernels: with bind.cpp and bind_units.cpp a
// module in the place of timo._C.
#include <cuda_runtime.h>

#include "ops.h"

namespace timo {

int isa_level() { return 0; }
void cap_isa(int) {}
bool emulate_amx(bool) { return false; }
void poison_workspace(bool) {}

void temporal_median_cpu(const MedianArgs& a, Dtype dtype) {
  temporal_median_cuda(a, dtype, nullptr);
}
void temporal_median_backward_cpu(const void* grad, const int64_t* indices, void* out,
                                  int64_t bytes, int64_t B, int64_t T, int64_t channels) {
  temporal_median_backward_cuda(grad, indices, out, bytes, B, T, channels, nullptr);
}
void gather_units_cpu(const GatherArgs& a) { gather_units_cuda(a, nullptr); }
void gather_units_backward_cpu(const GatherArgs& a) { gather_units_backward_cuda(a, nullptr); }
void scatter_units_cpu(const ScatterArgs& a) { scatter_units_cuda(a, nullptr); }
void scatter_units_backward_cpu(const ScatterArgs& a) { scatter_units_backward_cuda(a, nullptr); }
void masked_pixel_loss_cpu(const LossArgs& a) { masked_pixel_loss_cuda(a, nullptr); }
void masked_pixel_loss_backward_cpu(const LossArgs& a) {
  masked_pixel_loss_backward_cuda(a, nullptr);
}
void median_deviation_cpu(const DeviationArgs&, Dtype) {
  throw std::logic_error("median_deviation has no CUDA kernel");
}
void median_deviation_backward_cpu(const DeviationArgs&, Dtype) {
  throw std::logic_error("median_deviation has no CUDA kernel");
}
void temporal_maximum_cpu(const MaximumArgs&) {
  throw std::logic_error("temporal_maximum has no CUDA kernel");
}
void temporal_maximum_backward_cpu(const MaximumArgs&) {
  throw std::logic_error("temporal_maximum has no CUDA kernel");
}
void gyroscope_attention_cpu(const GyroscopeArgs&) {
  throw std::logic_error("gyroscope_attention has no CUDA kernel");
}
void gyroscope_attention_backward_cpu(const GyroscopeArgs&) {
  throw std::logic_error("gyroscope_attention has no CUDA kernel");
}

}  // namespace timo

// Order of blocks and threads: 0 forward, 1 reverse, 2 shuffled.
extern "C" __attribute__((visibility("default"))) void cuda_emulation_order(int order) {
  cuda_emulation::order = order;
}
