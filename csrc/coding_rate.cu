// The coding rate on CUDA: the launches of the kernels of coding_rate_device.cuh, and their registration.
//
// Forward: norms, G, determinant and inverse. Backward: the product with the inverse, from which the component along
// the row is then subtracted. Five launches in all for sides up to that of a part, and beyond it three for each part
// rather than one; the host never reads a value back.

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
constexpr size_t kWideBytes = 2 * 4 * kTileSize * sizeof(float);                // two sets of four tiles

// Blocks of 64 x 64.
int64_t wide_blocks(int64_t matrices, int64_t rows, int64_t columns) {
  return matrices * ((rows + kWide - 1) / kWide) * ((columns + kWide - 1) / kWide);
}

// The same, of a symmetric product.
int64_t wide_pairs(int64_t matrices, int64_t side) {
  const int64_t tiles = (side + kWide - 1) / kWide;
  return matrices * tiles * (tiles + 1) / 2;
}

// A block of 64 x 64 reads half as much for a product as blocks of 32 x 32. It pays if every multiprocessor has some.
bool is_enough(int64_t blocks, int device) {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "coding_rate: device attribute");
  return blocks >= 2 * multiprocessors;
}

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
  check(cudaFuncGetAttributes(&code, coding_rate_sweep_kernel<kSide, false>), "coding_rate: kernel attributes");
  available -= static_cast<int>(code.sharedSizeBytes);  // reserved by newer architectures
  if (sweep_bytes<kSide>(tiles) > static_cast<size_t>(available)) return false;
  allow_shared(coding_rate_sweep_kernel<kSide, false>, available);
  allow_shared(coding_rate_sweep_kernel<kSide, true>, available);
  if (kSide == 1) return true;
  int has_clusters = 0;
  check(cudaDeviceGetAttribute(&has_clusters, cudaDevAttrClusterLaunch, device), "coding_rate: device attribute");
  if (!has_clusters || code.ptxVersion < 90) return false;  // code for older architectures has no clusters
  cudaLaunchAttribute cluster[1];
  const cudaLaunchConfig_t config = sweep_config<kSide>(1, tiles, nullptr, cluster);
  int clusters = 0;
  const auto kernel = coding_rate_sweep_kernel<kSide, false>;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) cudaGetLastError();
  return clusters > 0;
}

// Blocks along a side of the cluster for matrices with this number of tiles per side, 0 if none fits. Four blocks are
// faster as soon as each has a few tiles.
int choose_cluster_side(int device, int tiles) {
  if (tiles <= 4 && can_sweep<1>(device, tiles)) return 1;
  if (can_sweep<2>(device, tiles)) return 2;
  return can_sweep<1>(device, tiles) ? 1 : 0;
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

// The side of the parts of a matrix that are swept, multiples of `kWide`: of larger ones the products take longer in
// few blocks than in all of `update`.
int part_side(int device) {
  for (const int side : {256, 192, 128, 64}) {
    if (cluster_side(device, side / kTile) > 0) return side;
  }
  STD_TORCH_CHECK(false, "coding_rate: this GPU has less shared memory than the kernel for the inverse needs");
}

template <int kSide>
void launch_sweep(const SweepArguments& arguments, int64_t matrices, cudaStream_t stream) {
  cudaLaunchAttribute cluster[1];
  const auto config = sweep_config<kSide>(matrices, static_cast<int>(tiles_of(arguments.n)), stream, cluster);
  const auto kernel = arguments.n < arguments.side ? coding_rate_sweep_kernel<kSide, true>
                                                   : coding_rate_sweep_kernel<kSide, false>;
  check(cudaLaunchKernelEx(&config, kernel, arguments), "coding_rate: sweep");
}

void launch_sweep(const SweepArguments& arguments, int64_t matrices, int device, cudaStream_t stream) {
  if (cluster_side(device, static_cast<int>(tiles_of(arguments.n))) == 1) {
    launch_sweep<1>(arguments, matrices, stream);
  } else {
    launch_sweep<2>(arguments, matrices, stream);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> coding_rate_sweep(Tensor gram_) {
  const Tensor gram = torch::stable::contiguous(gram_);
  STD_TORCH_CHECK(gram.dim() == 3 && gram.size(1) == gram.size(2) && gram.scalar_type() == ScalarType::Float &&
                      gram.size(1) <= std::numeric_limits<int>::max() - kWide,
                  "gram: expected (V, m, m) float32");
  const int64_t matrices = gram.size(0), n = gram.size(1);
  const int device = gram.get_device_index();
  const DeviceGuard guard(device);
  Tensor rate = torch::stable::new_empty(gram, {matrices});
  Tensor inverse = torch::stable::new_empty(gram, {matrices, n, n});
  Tensor smallest = torch::stable::new_empty(gram, {matrices});
  Tensor clamped = torch::stable::new_empty(gram, {matrices}, ScalarType::Int);
  if (matrices == 0) return {rate, inverse, smallest, clamped};
  const cudaStream_t stream = stream_of(device);
  const int side = static_cast<int>(n), part = part_side(device);
  float* const to = static_cast<float*>(inverse.mutable_data_ptr());
  SweepArguments sweep{static_cast<const float*>(gram.const_data_ptr()),
                       to,
                       static_cast<float*>(rate.mutable_data_ptr()),
                       static_cast<float*>(smallest.mutable_data_ptr()),
                       static_cast<int*>(clamped.mutable_data_ptr()),
                       side,
                       part,
                       0,
                       side};
  if (side <= part) {
    launch_sweep(sweep, matrices, device, stream);
    return {rate, inverse, smallest, clamped};
  }
  Tensor factor = torch::stable::new_empty(gram, {matrices, part, part});
  Tensor panels = torch::stable::new_empty(gram, {matrices, n, part});
  sweep.to = static_cast<float*>(factor.mutable_data_ptr());
  float* const r = static_cast<float*>(panels.mutable_data_ptr());
  for (sweep.k = 0; sweep.k < side; sweep.k += part, sweep.from = to) {
    sweep.n = std::min(part, side - sweep.k);
    const int width = static_cast<int>(tiles_of(sweep.n)) * kTile;
    launch_sweep(sweep, matrices, device, stream);
    const PanelArguments panel{sweep.from, sweep.to, r, side, part, sweep.k, width};
    coding_rate_panel_kernel<<<grid(wide_blocks(matrices, side, width)), kProductThreads<true>, kWideBytes, stream>>>(
        panel);
    const UpdateArguments update{sweep.from, to, r, side, part, sweep.k, width};
    coding_rate_update_kernel<<<grid(wide_pairs(matrices, side)), kProductThreads<true>, kWideBytes, stream>>>(update);
    check(cudaGetLastError(), "coding_rate: update");
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
    float* const to = static_cast<float*>(out.mutable_data_ptr());
    if (const int64_t blocks = wide_pairs(views, side); is_enough(blocks, logits.get_device_index())) {
      const auto kernel = of_images ? coding_rate_gram_kernel<T, true, true> : coding_rate_gram_kernel<T, false, true>;
      kernel<<<grid(blocks), kProductThreads<true>, kWideBytes, stream>>>(a, static_cast<float>(alpha), to);
    } else {
      const auto kernel = of_images ? coding_rate_gram_kernel<T, true, false> : coding_rate_gram_kernel<T, false, false>;
      const ProductShape shape(of_images ? bits : n);
      allow_shared(kernel, kProductBytes);
      const int64_t tiles = tiles_of(side);
      kernel<<<grid(views * tiles * (tiles + 1) / 2), shape.threads, shape.bytes, stream>>>(
          a, static_cast<float>(alpha), to);
    }
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
    const float* const m = static_cast<const float*>(inverse.const_data_ptr());
    float* const g_data = static_cast<float*>(g.mutable_data_ptr());
    float* const radial_data = static_cast<float*>(radial.mutable_data_ptr());
    if (const int64_t blocks = wide_blocks(views, n, bits); is_enough(blocks, logits.get_device_index())) {
      const auto kernel =
          of_images ? coding_rate_direction_kernel<T, true, true> : coding_rate_direction_kernel<T, false, true>;
      kernel<<<grid(blocks), kProductThreads<true>, kWideBytes, stream>>>(a, m, g_data, radial_data);
    } else {
      const auto kernel =
          of_images ? coding_rate_direction_kernel<T, true, false> : coding_rate_direction_kernel<T, false, false>;
      const ProductShape shape(of_images ? n : bits);
      allow_shared(kernel, kProductBytes);
      kernel<<<grid(views * tiles_of(n) * tiles), shape.threads, shape.bytes, stream>>>(a, m, g_data, radial_data);
    }
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

STABLE_TORCH_LIBRARY_IMPL(bincomm, CUDA, m) {
  m.impl("coding_rate_gram", TORCH_BOX(&coding_rate_gram));
  m.impl("coding_rate_sweep", TORCH_BOX(&coding_rate_sweep));
  m.impl("coding_rate_backward", TORCH_BOX(&coding_rate_backward));
  m.impl("coding_rate_add_gradient_", TORCH_BOX(&coding_rate_add_gradient_));
}

}  // namespace bincomm
