// The coding rate's kernels on a GPU without torch, for NVIDIA's sanitizers; csrc/coding_rate.cu launches them alike.
//
// Every array has an allocation of its own, so that an access beyond its ends is seen. The rates and gradients are
// compared with the definition in double precision on the host. The status is 1 where they differ.

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "coding_rate_device.cuh"

using namespace bincomm;

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(2);
}

template <class T>
struct Array {
  T* data = nullptr;
  int64_t size;

  explicit Array(int64_t size) : size(size) {
    check(cudaMalloc(&data, size * sizeof(T)));
    check(cudaMemset(data, 0xff, size * sizeof(T)));  // NaN
  }
  explicit Array(const std::vector<T>& values) : Array(static_cast<int64_t>(values.size())) {
    check(cudaMemcpy(data, values.data(), size * sizeof(T), cudaMemcpyHostToDevice));
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(data); }

  std::vector<T> values() const {
    std::vector<T> result(size);
    check(cudaMemcpy(result.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost));
    return result;
  }
};

template <int kSide>
void launch_sweep(const SweepArguments& arguments, int views) {
  const int tiles = static_cast<int>(tiles_of(arguments.n));
  const size_t bytes = SweepMemory<kSide>(tiles).size(tiles) * sizeof(float);
  const auto kernel = arguments.n < arguments.side ? coding_rate_sweep_kernel<kSide, true>
                                                   : coding_rate_sweep_kernel<kSide, false>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  cudaLaunchAttribute cluster[1];
  cluster[0].id = cudaLaunchAttributeClusterDimension;
  cluster[0].val.clusterDim = {kSide * kSide, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(views * kSide * kSide);
  config.blockDim = dim3(kSweepThreads);
  config.dynamicSmemBytes = bytes;
  if (kSide > 1) {
    config.attrs = cluster;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, arguments));
}

// Rate, and gradient of the rate, of one view in double precision, by I + alpha z^T z or I + alpha z z^T.
double expected(const std::vector<float>& a, int64_t start, int n, int bits, double alpha, bool of_images,
                std::vector<double>& gradient) {
  const int m = of_images ? n : bits, depth = of_images ? bits : n;
  std::vector<double> z(static_cast<size_t>(n) * bits), norms(n), matrix(static_cast<size_t>(m) * m, 0.0), inverse;
  for (int i = 0; i < n; ++i) {
    double sum = 0.0;
    for (int b = 0; b < bits; ++b) sum += static_cast<double>(a[start + i * bits + b]) * a[start + i * bits + b];
    norms[i] = std::sqrt(sum);
    for (int b = 0; b < bits; ++b) z[i * bits + b] = a[start + i * bits + b] / norms[i];
  }
  const auto at = [&](int row, int s) { return of_images ? z[row * bits + s] : z[s * bits + row]; };
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j <= i; ++j) {
      double sum = i == j;
      for (int s = 0; s < depth; ++s) sum += alpha * at(i, s) * at(j, s);
      matrix[i * m + j] = matrix[j * m + i] = sum;
    }
  }
  // Gauss-Jordan elimination: every pivot is at least 1.
  inverse.assign(matrix.size(), 0.0);
  for (int i = 0; i < m; ++i) inverse[i * m + i] = 1.0;
  double rate = 0.0;
  for (int k = 0; k < m; ++k) {
    const double pivot = matrix[k * m + k];
    rate += std::log(pivot) / 2;
    for (int c = 0; c < m; ++c) matrix[k * m + c] /= pivot, inverse[k * m + c] /= pivot;
    for (int i = 0; i < m; ++i) {
      const double factor = matrix[i * m + k];
      if (i == k || factor == 0.0) continue;
      for (int c = 0; c < m; ++c) {
        matrix[i * m + c] -= factor * matrix[k * m + c];
        inverse[i * m + c] -= factor * inverse[k * m + c];
      }
    }
  }
  for (int i = 0; i < n; ++i) {
    std::vector<double> g(bits, 0.0);
    double along = 0.0;
    for (int b = 0; b < bits; ++b) {
      for (int s = 0; s < m; ++s) g[b] += of_images ? inverse[i * m + s] * z[s * bits + b] : z[i * bits + s] * inverse[s * m + b];
      along += g[b] * z[i * bits + b];
    }
    for (int b = 0; b < bits; ++b) gradient[start + i * bits + b] = alpha * (g[b] - along * z[i * bits + b]) / norms[i];
  }
  return rate;
}

constexpr size_t kWideBytes = 8 * kTileSize * sizeof(float);

int wide_of(int side) { return (side + kWide - 1) / kWide; }

template <int kSide>
void sweep_parts(SweepArguments sweep, int views) {
  if (sweep.side <= sweep.part) return launch_sweep<kSide>(sweep, views);
  const int64_t part = sweep.part;
  const Array<float> factor(views * part * part), panels(views * part * sweep.side);
  float* const to = sweep.to;
  sweep.to = factor.data;
  for (sweep.k = 0; sweep.k < sweep.side; sweep.k += sweep.part, sweep.from = to) {
    sweep.n = std::min(sweep.part, sweep.side - sweep.k);
    const int width = static_cast<int>(tiles_of(sweep.n)) * kTile, wide = wide_of(sweep.side);
    launch_sweep<kSide>(sweep, views);
    coding_rate_panel_kernel<<<views * wide * wide_of(width), kProductThreads<true>, kWideBytes>>>(
        {sweep.from, factor.data, panels.data, sweep.side, sweep.part, sweep.k, width});
    coding_rate_update_kernel<<<views * wide * (wide + 1) / 2, kProductThreads<true>, kWideBytes>>>(
        {sweep.from, to, panels.data, sweep.side, sweep.part, sweep.k, width});
  }
  check(cudaDeviceSynchronize());  // before the arrays go
}

// A larger matrix is swept in parts of this side; `kWideBlocks` has blocks of 2 x 2 tiles.
template <int kSide, bool kOfImages, bool kWideBlocks = false>
bool run(int views, int n, int bits, int part = 256) {
  const double alpha = bits / (n * 0.05);
  const int m = kOfImages ? n : bits;
  const int64_t rows = static_cast<int64_t>(views) * n, tiles = tiles_of(m);
  const int64_t bit_tiles = tiles_of(bits), row_tiles = tiles_of(n);
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(rows * bits), ones(views, 1.0f);
  for (float& value : values) value = normal(generator);
  const Array<float> a(values), grad(ones), reciprocal(rows), gram(views * static_cast<int64_t>(m) * m);
  const Array<float> inverse(gram.size), rate(views), smallest(views), out(rows * bits), radial(rows * bit_tiles);
  const Array<int> clamped(views);
  const Logits<float> logits{a.data, reciprocal.data, static_cast<int64_t>(n) * bits, bits, 1, n, bits,
                             bits % 4 == 0};
  const auto warps = [](int depth) { return static_cast<int>(std::min<int64_t>(kProductWarps, tiles_of(depth))); };
  const auto bytes = [](int warps) { return 2 * warps * kTileSize * sizeof(float); };
  const auto allow = [](auto kernel) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               2 * kProductWarps * kTileSize * static_cast<int>(sizeof(float))));
  };
  const unsigned row_blocks = (rows + kProductWarps - 1) / kProductWarps;

  coding_rate_reciprocal_norms_kernel<<<row_blocks, kProductWarps * kTile>>>(logits, reciprocal.data, rows);
  const auto gram_kernel = coding_rate_gram_kernel<float, kOfImages, kWideBlocks>;
  const auto direction_kernel = coding_rate_direction_kernel<float, kOfImages, kWideBlocks>;
  const SweepArguments sweep{gram.data, inverse.data, rate.data, smallest.data, clamped.data, m, part, 0, m};
  if (kWideBlocks) {
    const int wide = wide_of(m);
    gram_kernel<<<views * wide * (wide + 1) / 2, kProductThreads<true>, kWideBytes>>>(logits, alpha, gram.data);
    sweep_parts<kSide>(sweep, views);
    direction_kernel<<<views * wide_of(n) * wide_of(bits), kProductThreads<true>, kWideBytes>>>(logits, inverse.data,
                                                                                              out.data, radial.data);
  } else {
    allow(gram_kernel);
    allow(direction_kernel);
    int depth = warps(kOfImages ? bits : n);
    gram_kernel<<<views * tiles * (tiles + 1) / 2, depth * kTile, bytes(depth)>>>(logits, alpha, gram.data);
    sweep_parts<kSide>(sweep, views);
    depth = warps(m);
    direction_kernel<<<views * row_tiles * bit_tiles, depth * kTile, bytes(depth)>>>(logits, inverse.data, out.data,
                                                                                    radial.data);
  }
  coding_rate_gradient_kernel<float, false><<<row_blocks, kProductWarps * kTile>>>(
      logits, Arriving{grad.data, 1, nullptr, 1.0f}, static_cast<float>(alpha), out.data, radial.data, out.data, rows);
  check(cudaGetLastError());
  check(cudaDeviceSynchronize());

  const std::vector<float> rates = rate.values(), gradients = out.values();
  std::vector<double> exact(rows * bits);
  bool right = true;
  for (int view = 0; view < views; ++view) {
    const double value = expected(values, static_cast<int64_t>(view) * n * bits, n, bits, alpha, kOfImages, exact);
    right &= std::abs(rates[view] - value) < 1e-5 * value;
  }
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < exact.size(); ++i) {
    error += (gradients[i] - exact[i]) * (gradients[i] - exact[i]);
    norm += exact[i] * exact[i];
  }
  right &= std::sqrt(error) < 1e-4 * std::sqrt(norm);
  std::printf("%d x %d blocks, parts of %d, %s, %d x %d x %d: %s\n", kSide, kSide, part,
              kOfImages ? "images" : "bits", views, n, bits, right ? "right" : "WRONG");
  return right;
}

int main() {
  bool right = run<1, false>(2, 70, 33);
  right &= run<1, true>(2, 45, 100);
  right &= run<1, true>(1, 1, 3);
  right &= run<1, true, true>(2, 100, 140, 64);
  int device = 0, clusters = 0;
  check(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device));
  if (clusters) {
    right &= run<2, false>(2, 200, 150);
    right &= run<2, true>(1, 130, 200);
    right &= run<2, false, true>(1, 230, 200, 64);
  }
  return !right;
}
