// What the device code of several operations uses. The tests compile it for a CPU, after fibers.h.
#pragma once

#ifndef __CUDACC__
#include "fibers.h"
#endif

namespace bincomm {

constexpr int kWarp = 32;
constexpr unsigned kEveryLane = 0xffffffffu;

#ifdef __CUDACC__
__device__ __forceinline__ float* shared_memory() {
  extern __shared__ float4 memory[];
  return reinterpret_cast<float*>(memory);
}
#else
inline float* shared_memory() { return fibers::shared(); }
#endif

// The sum over a warp, for every lane.
template <typename T>
__device__ __forceinline__ T sum_of_lanes(T x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kEveryLane, x, step);
  return x;
}

}  // namespace bincomm
