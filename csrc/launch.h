// What every launch on a GPU needs.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>

namespace bincomm {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) cudaGetLastError();  // reported here; it must not appear again in a later call
  STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

inline cudaStream_t stream_of(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Number of blocks in the type that CUDA expects.
inline unsigned grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "expected less work in a launch, got ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

}  // namespace bincomm
