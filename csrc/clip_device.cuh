// Device code of the clipping of gradients, each by its own norm, many in a launch. The tests also run this file on a
// CPU.
//
// Gradients are cut into parts, and a block takes one. The first kernel adds the squares of each part; in the second
// every block adds those of its gradient, and scales its part where the norm is above the limit. What is within the
// limit is read once and not written.
#pragma once

#include <cmath>
#include <cstdint>

#include "device.cuh"

namespace bincomm {

constexpr int kPart = 16384;  // elements
constexpr int kClipThreads = 256;
constexpr int kGradients = 192;  // at most, in a launch, whose arguments may take 4 KiB
constexpr int kClipBytes = kClipThreads / kWarp * sizeof(double);  // of shared memory

// Gradients that are not empty, and their parts.
struct Gradients {
  float* data[kGradients];
  int64_t size[kGradients];
  int first[kGradients + 1];  // part of each gradient, and the number of all
  int count;
};
static_assert(sizeof(Gradients) <= 4000);

// A block's part.
struct Part {
  int gradient;
  float* data;
  int size, wide;  // elements, and how many of them are read 16 bytes at once

  __device__ explicit Part(const Gradients& gradients) {
    const int block = blockIdx.x;
    int low = 0, high = gradients.count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (gradients.first[middle] <= block) low = middle;
      else high = middle - 1;
    }
    gradient = low;
    const int64_t start = static_cast<int64_t>(block - gradients.first[low]) * kPart;
    const int64_t rest = gradients.size[low] - start;
    data = gradients.data[low] + start;
    size = rest < kPart ? static_cast<int>(rest) : kPart;
    wide = reinterpret_cast<uintptr_t>(data) % 16 == 0 ? size / 4 * 4 : 0;
  }
};

// The sum over a block, for every thread.
__device__ __forceinline__ double sum_of_block(double x) {
  double* const sums = reinterpret_cast<double*>(shared_memory());
  x = sum_of_lanes(x);
  __syncthreads();  // an earlier sum has been read
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0.0;
  for (int w = 0; w < kClipThreads / kWarp; ++w) sum += sums[w];
  return sum;
}

// In double precision no square of a float overflows or vanishes.
__device__ __forceinline__ double square(float x) { return static_cast<double>(x) * x; }

// sums[part]: the sum of its squares.
__global__ void __launch_bounds__(kClipThreads) clip_sums_kernel(Gradients gradients, double* sums) {
  const Part part(gradients);
  const int thread = threadIdx.x;
  double sum = 0.0;
#pragma unroll 4
  for (int e = 4 * thread; e < part.wide; e += 4 * kClipThreads) {
    const float4 f = *reinterpret_cast<const float4*>(part.data + e);
    sum += square(f.x) + square(f.y) + (square(f.z) + square(f.w));
  }
  for (int e = part.wide + thread; e < part.size; e += kClipThreads) sum += square(part.data[e]);
  sum = sum_of_block(sum);
  if (thread == 0) sums[blockIdx.x] = sum;
}

// The norm of the gradients of all launches, from their `parts` sums; a null pointer for all launches but one.
struct TotalNorm {
  const double* sums;
  int parts;
  float* norm;
};

// Gradients that are not finite stay as they are.
__global__ void __launch_bounds__(kClipThreads)
    clip_scale_kernel(Gradients gradients, const double* sums, double limit, TotalNorm total) {
  const Part part(gradients);
  const int thread = threadIdx.x;
  double sum = 0.0;
  const int end = gradients.first[part.gradient + 1];
  for (int p = gradients.first[part.gradient] + thread; p < end; p += kClipThreads) sum += sums[p];
  const double norm = sqrt(sum_of_block(sum));
  if (norm > limit && norm < INFINITY) {
    const double factor = limit / norm;
#pragma unroll 4
    for (int e = 4 * thread; e < part.wide; e += 4 * kClipThreads) {
      float4& f = *reinterpret_cast<float4*>(part.data + e);
      f = make_float4(static_cast<float>(f.x * factor), static_cast<float>(f.y * factor),
                      static_cast<float>(f.z * factor), static_cast<float>(f.w * factor));
    }
    for (int e = part.wide + thread; e < part.size; e += kClipThreads) {
      part.data[e] = static_cast<float>(part.data[e] * factor);
    }
  }
  if (total.norm != nullptr && blockIdx.x == 0) {
    double all = 0.0;
    for (int p = thread; p < total.parts; p += kClipThreads) all += total.sums[p];
    const double whole = sqrt(sum_of_block(all));
    // A finite norm stays finite, also beyond fp32's largest number.
    const double largest = whole < INFINITY ? 3.40282347e38 : INFINITY;
    if (thread == 0) *total.norm = static_cast<float>(whole > largest ? largest : whole);
  }
}

}  // namespace bincomm
