// The coding rate on CUDA: the launches of the kernels of coding_rate_device.cuh, and their registration.
//
// Forward: norms, G, determinant and inverse. Backward: the product with the inverse, from which the component along
// the row is then subtracted. Five launches in all; the host never reads a value back.

#include "coding_rate.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>

#include "coding_rate_device.cuh"
#include "launch.h"

namespace bincomm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr int kRowsPerBlock = 8;  // of the kernels that give a row to a warp
constexpr size_t kProductBytes = 2 * kProductWarps * kTileSize * sizeof(float);  // two tiles a warp

template <typename Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "shared memory");
}

// ---- sweep

template <int kSide>
size_t sweep_bytes(int tiles) {
  return SweepMemory<kSide>(tiles).size(tiles) * sizeof(float);
}

template <int kSide>
cudaLaunchConfig_t sweep_config(int64_t matrices, int tiles, cudaStream_t stream, cudaLaunchAttribute* cluster) {
  constexpr int kBlocks = kSide * kSide;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid(matrices * kBlocks));
  config.blockDim = dim3(kSweepThreads);
  config.dynamicSmemBytes = sweep_bytes<kSide>(tiles);
  config.stream = stream;
  if (kSide > 1) {
    cluster->id = cudaLaunchAttributeClusterDimension;
    cluster->val.clusterDim = {kBlocks, 1, 1};
    config.attrs = cluster;
    config.numAttrs = 1;
  }
  return config;
}

// Whether the current device can run it: enough shared memory, and room for a cluster of that size.
template <int kSide>
bool can_sweep(int device, int tiles) {
  int available = 0;
  check(cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "coding_rate: device attribute");
  cudaFuncAttributes code{};
  check(cudaFuncGetAttributes(&code, coding_rate_sweep_kernel<kSide>), "coding_rate: kernel attributes");
  available -= static_cast<int>(code.sharedSizeBytes);  // reserved by newer architectures
  if (sweep_bytes<kSide>(tiles) > static_cast<size_t>(available)) return false;
  allow_shared(coding_rate_sweep_kernel<kSide>, available);
  if (kSide == 1) return true;
  int has_clusters = 0;
  check(cudaDeviceGetAttribute(&has_clusters, cudaDevAttrClusterLaunch, device), "coding_rate: device attribute");
  if (!has_clusters || code.ptxVersion < 90) return false;  // code for older architectures has no clusters
  check(cudaFuncSetAttribute(coding_rate_sweep_kernel<kSide>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "cluster size");
  cudaLaunchAttribute cluster[1];
  const cudaLaunchConfig_t config = sweep_config<kSide>(1, tiles, nullptr, cluster);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, coding_rate_sweep_kernel<kSide>, &config) != cudaSuccess) {
    cudaGetLastError();
  }
  return clusters > 0;
}

// Blocks along a side of the cluster for matrices with this number of tiles per side, 0 if none fits. Four blocks are
// faster as soon as each has a few tiles; sixteen wait longer for each other.
int choose_cluster_side(int device, int tiles) {
  if (tiles <= 4 && can_sweep<1>(device, tiles)) return 1;
  if (can_sweep<2>(device, tiles)) return 2;
  if (can_sweep<1>(device, tiles)) return 1;
  return can_sweep<4>(device, tiles) ? 4 : 0;
}

// The same, computed once for a device and a size.
int cluster_side(int device, int tiles) {
  static std::mutex mutex;
  static std::map<std::pair<int, int>, int> cache;
  const std::lock_guard lock(mutex);
  const auto entry = cache.find({device, tiles});
  if (entry != cache.end()) return entry->second;
  return cache.emplace(std::pair(device, tiles), choose_cluster_side(device, tiles)).first->second;
}

template <int kSide>
void launch_sweep(const SweepArguments& arguments, int64_t matrices, cudaStream_t stream) {
  cudaLaunchAttribute cluster[1];
  const auto config = sweep_config<kSide>(matrices, static_cast<int>(tiles_of(arguments.n)), stream, cluster);
  check(cudaLaunchKernelEx(&config, coding_rate_sweep_kernel<kSide>, arguments), "coding_rate: sweep");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> coding_rate_sweep(Tensor gram_) {
  const Tensor gram = torch::stable::contiguous(gram_);
  STD_TORCH_CHECK(gram.dim() == 3 && gram.size(1) == gram.size(2) && gram.scalar_type() == ScalarType::Float,
                  "gram: expected (V, m, m) float32");
  const int64_t matrices = gram.size(0), n = gram.size(1);
  const DeviceGuard guard(gram.get_device_index());
  Tensor rate = torch::stable::new_empty(gram, {matrices});
  Tensor inverse = torch::stable::new_empty(gram, {matrices, n, n});
  Tensor smallest = torch::stable::new_empty(gram, {matrices});
  Tensor clamped = torch::stable::new_empty(gram, {matrices}, ScalarType::Int);
  if (matrices > 0) {
    const SweepArguments arguments{static_cast<const float*>(gram.const_data_ptr()),
                                   static_cast<float*>(inverse.mutable_data_ptr()),
                                   static_cast<float*>(rate.mutable_data_ptr()),
                                   static_cast<float*>(smallest.mutable_data_ptr()),
                                   static_cast<int*>(clamped.mutable_data_ptr()),
                                   static_cast<int>(n)};
    const cudaStream_t stream = stream_of(gram.get_device_index());
    switch (cluster_side(gram.get_device_index(), static_cast<int>(tiles_of(n)))) {
      case 1: launch_sweep<1>(arguments, matrices, stream); break;
      case 2: launch_sweep<2>(arguments, matrices, stream); break;
      case 4: launch_sweep<4>(arguments, matrices, stream); break;
      default: STD_TORCH_CHECK(false, "gram: a side of ", n, " is too large for the CUDA kernel on this GPU");
    }
  }
  return {rate, inverse, smallest, clamped};
}

// ---- Logits

template <typename T>
Logits<T> view_of(const Tensor& logits, const float* reciprocal) {
  const T* const data = static_cast<const T*>(logits.const_data_ptr());
  constexpr int64_t kWidth = 16 / sizeof(T);
  const bool wide = reinterpret_cast<uintptr_t>(data) % 16 == 0 && logits.stride(2) == 1 &&
                    logits.stride(0) % kWidth == 0 && logits.stride(1) % kWidth == 0;
  return {data, reciprocal, logits.stride(0), logits.stride(1), logits.stride(2), static_cast<int>(logits.size(1)),
          static_cast<int>(logits.size(2)), wide};
}

// Calls `function` with a null pointer of the type the logits are stored in.
template <typename Function>
void with_type(const Tensor& logits, const Function& function) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  STD_TORCH_CHECK(logits.dim() == 3 && logits.size(1) <= kMost && logits.size(2) <= kMost,
                  "logits: expected (V, n, K)");
  switch (logits.scalar_type()) {
    case ScalarType::Float: function(static_cast<float*>(nullptr)); break;
    case ScalarType::Half: function(static_cast<__half*>(nullptr)); break;
    case ScalarType::BFloat16: function(static_cast<__nv_bfloat16*>(nullptr)); break;
    default: STD_TORCH_CHECK(false, "logits: expected float32, float16 or bfloat16");
  }
}

// Threads and shared memory of a product that sums over `depth` terms: no more warps than tiles of them.
struct ProductShape {
  int threads;
  size_t bytes;

  explicit ProductShape(int64_t depth) {
    const int warps = static_cast<int>(std::min<int64_t>(kProductWarps, tiles_of(depth)));
    threads = warps * kTile;
    bytes = 2 * warps * kTileSize * sizeof(float);
  }
};

std::tuple<Tensor, Tensor> coding_rate_gram(Tensor logits, double alpha, bool of_images) {
  const int64_t views = logits.size(0), n = logits.size(1), bits = logits.size(2);
  const int64_t side = of_images ? n : bits;
  const DeviceGuard guard(logits.get_device_index());
  Tensor out = torch::stable::new_empty(logits, {views, side, side}, ScalarType::Float);
  Tensor reciprocal = torch::stable::new_empty(logits, {views, n}, ScalarType::Float);
  if (views == 0) return {out, reciprocal};
  with_type(logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const cudaStream_t stream = stream_of(logits.get_device_index());
    float* const r = static_cast<float*>(reciprocal.mutable_data_ptr());
    const Logits<T> a = view_of<T>(logits, r);
    const unsigned row_blocks = grid((views * n + kRowsPerBlock - 1) / kRowsPerBlock);
    coding_rate_reciprocal_norms_kernel<<<row_blocks, kRowsPerBlock * kTile, 0, stream>>>(a, r, views * n);
    const auto kernel = of_images ? coding_rate_gram_kernel<T, true> : coding_rate_gram_kernel<T, false>;
    const ProductShape shape(of_images ? bits : n);
    allow_shared(kernel, kProductBytes);
    const int64_t tiles = tiles_of(side);
    kernel<<<grid(views * tiles * (tiles + 1) / 2), shape.threads, shape.bytes, stream>>>(
        a, static_cast<float>(alpha), static_cast<float*>(out.mutable_data_ptr()));
    check(cudaGetLastError(), "coding_rate: gram");
  });
  return {out, reciprocal};
}

// The product with the inverse, and from it the gradient, which is stored, or added to what `out` holds.
template <bool kAdd>
void launch_backward(const Arriving& arriving, const Tensor& logits, const Tensor& inverse_, const Tensor& reciprocal_,
                     double alpha, bool of_images, Tensor& out) {
  const int64_t views = logits.size(0), n = logits.size(1), bits = logits.size(2);
  if (views == 0) return;
  const Tensor inverse = torch::stable::contiguous(inverse_);
  const Tensor reciprocal = torch::stable::contiguous(reciprocal_);
  Tensor g = !kAdd && logits.scalar_type() == ScalarType::Float
                 ? out
                 : torch::stable::new_empty(logits, {views, n, bits}, ScalarType::Float);
  const int64_t tiles = tiles_of(bits);
  Tensor radial = torch::stable::new_empty(logits, {views, n, tiles}, ScalarType::Float);
  with_type(logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const cudaStream_t stream = stream_of(logits.get_device_index());
    const Logits<T> a = view_of<T>(logits, static_cast<const float*>(reciprocal.const_data_ptr()));
    const auto kernel = of_images ? coding_rate_direction_kernel<T, true> : coding_rate_direction_kernel<T, false>;
    const ProductShape shape(of_images ? n : bits);
    allow_shared(kernel, kProductBytes);
    float* const g_data = static_cast<float*>(g.mutable_data_ptr());
    float* const radial_data = static_cast<float*>(radial.mutable_data_ptr());
    kernel<<<grid(views * tiles_of(n) * tiles), shape.threads, shape.bytes, stream>>>(
        a, static_cast<const float*>(inverse.const_data_ptr()), g_data, radial_data);
    const unsigned row_blocks = grid((views * n + kRowsPerBlock - 1) / kRowsPerBlock);
    coding_rate_gradient_kernel<T, kAdd><<<row_blocks, kRowsPerBlock * kTile, 0, stream>>>(
        a, arriving, static_cast<float>(alpha), g_data, radial_data, static_cast<T*>(out.mutable_data_ptr()),
        views * n);
    check(cudaGetLastError(), "coding_rate: gradient");
  });
}

Tensor coding_rate_backward(Tensor grad, Tensor logits, Tensor inverse, Tensor reciprocal, double alpha,
                            bool of_images) {
  const DeviceGuard guard(logits.get_device_index());
  const Arriving arriving{static_cast<const float*>(grad.const_data_ptr()), grad.stride(0), nullptr, 1.0f};
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), logits.size(1), logits.size(2)});
  launch_backward<false>(arriving, logits, inverse, reciprocal, alpha, of_images, out);
  return out;
}

void coding_rate_add_gradient_(Tensor gradient, Tensor grad, Tensor factor_of_grad, double weight, Tensor logits,
                               Tensor inverse, Tensor reciprocal, double alpha, bool of_images) {
  STD_TORCH_CHECK(gradient.is_contiguous() && gradient.numel() == logits.numel() &&
                      gradient.scalar_type() == logits.scalar_type(),
                  "gradient: expected contiguous, of the logits' shape and dtype");
  const DeviceGuard guard(logits.get_device_index());
  const Arriving arriving{static_cast<const float*>(grad.const_data_ptr()), grad.stride(0),
                          static_cast<const float*>(factor_of_grad.const_data_ptr()), static_cast<float>(weight)};
  launch_backward<true>(arriving, logits, inverse, reciprocal, alpha, of_images, gradient);
}

}  // namespace

int largest_side(int device) {
  const DeviceGuard guard(device);
  int tiles = 0;
  while (cluster_side(device, tiles + 1) > 0) ++tiles;
  return tiles * kTile;
}

STABLE_TORCH_LIBRARY_IMPL(bincomm, CUDA, m) {
  m.impl("coding_rate_gram", TORCH_BOX(&coding_rate_gram));
  m.impl("coding_rate_sweep", TORCH_BOX(&coding_rate_sweep));
  m.impl("coding_rate_backward", TORCH_BOX(&coding_rate_backward));
  m.impl("coding_rate_add_gradient_", TORCH_BOX(&coding_rate_add_gradient_));
}

}  // namespace bincomm
