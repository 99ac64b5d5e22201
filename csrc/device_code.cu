// Whether this binary has code for a GPU. Otherwise "no kernel image is available" would appear only during training.

#include "device_code.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace bincomm {
namespace {

__global__ void probe() {}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // reported here; it must not appear again in a later call
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

}  // namespace

std::tuple<int, int, bool> device_code(int device) {
  int previous = 0;
  check(cudaGetDevice(&previous), "cudaGetDevice");
  check(cudaSetDevice(device), "cudaSetDevice");
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe);
  check(cudaSetDevice(previous), "cudaSetDevice");
  check(status, "no kernel image for this GPU");
  // binaryVersion is the GPU's own architecture when the driver compiled the code from PTX of an older one.
  const int version = attributes.binaryVersion;
  return {version / 10, version % 10, attributes.ptxVersion != attributes.binaryVersion};
}

}  // namespace bincomm
