// Gradients clipped one tensor at a time, on CUDA: two launches of the kernels of clip_device.cuh for every kGradients
// of them. The host never reads a value back, and what it passes is in the launches' arguments, so that they can be
// captured.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "clip_device.cuh"
#include "dense.h"
#include "launch.h"

namespace bincomm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor clip_gradients_(std::vector<Tensor> gradients, double limit) {
  STD_TORCH_CHECK(!gradients.empty(), "gradients: expected at least one");
  const auto device = gradients[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  std::vector<Tensor> blocks;  // the gradients, or copies of those that do not fill their memory
  std::vector<Gradients> launches;
  int64_t parts = 0;
  for (const Tensor& gradient : gradients) {
    STD_TORCH_CHECK(gradient.scalar_type() == ScalarType::Float && gradient.is_cuda() &&
                        gradient.get_device_index() == device,
                    "gradients: expected float32 on one device");
    const bool copied = gradient.numel() > 0 && !is_dense(gradient);
    const Tensor& block = blocks.emplace_back(copied ? torch::stable::contiguous(gradient) : gradient);
    if (block.numel() == 0) continue;
    if (launches.empty() || launches.back().count == kGradients) launches.emplace_back(Gradients{});
    Gradients& launch = launches.back();
    launch.data[launch.count] = static_cast<float*>(block.mutable_data_ptr());
    launch.size[launch.count] = block.numel();
    const int64_t own = (block.numel() + kPart - 1) / kPart;
    launch.first[launch.count + 1] = static_cast<int>(grid(launch.first[launch.count] + own));
    ++launch.count;
    parts += own;
  }
  Tensor norm = torch::stable::new_empty(gradients[0], {}, ScalarType::Float);
  if (launches.empty()) return torch::stable::zero_(norm);

  const Tensor sums = torch::stable::new_empty(gradients[0], {parts}, ScalarType::Double);
  double* const all = static_cast<double*>(sums.mutable_data_ptr());
  const cudaStream_t stream = stream_of(device);
  // Every number is below infinity: without a limit nothing is scaled.
  const double largest = limit > 0 ? limit : INFINITY;
  double* own = all;
  for (const Gradients& launch : launches) {
    clip_sums_kernel<<<launch.first[launch.count], kClipThreads, kClipBytes, stream>>>(launch, own);
    own += launch.first[launch.count];
  }
  own = all;
  for (const Gradients& launch : launches) {
    float* const to = &launch == &launches.back() ? static_cast<float*>(norm.mutable_data_ptr()) : nullptr;
    const TotalNorm total{all, static_cast<int>(grid(parts)), to};
    clip_scale_kernel<<<launch.first[launch.count], kClipThreads, kClipBytes, stream>>>(launch, own, largest, total);
    own += launch.first[launch.count];
  }
  check(cudaGetLastError(), "clip_gradients_");
  for (size_t g = 0; g < gradients.size(); ++g) {
    if (blocks[g].const_data_ptr() != gradients[g].const_data_ptr()) torch::stable::copy_(gradients[g], blocks[g]);
  }
  return norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bincomm, CUDA, m) { m.impl("clip_gradients_", TORCH_BOX(&clip_gradients_)); }

}  // namespace bincomm
