// The Python module bincomm._C. Importing it registers the operations' kernels; its functions report what was built.

#include <string>

#include <pybind11/pybind11.h>

#ifdef USE_CUDA
#include "device_code.h"
#endif

namespace {

namespace py = pybind11;

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::string instruction_set() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd")) {
    return "AVX-512";
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "AVX2";
#endif
  return "baseline";
}

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = compiler();
  facts["torch"] = BINCOMM_TORCH_VERSION;
  facts["instruction_set"] = instruction_set();
  facts["cuda"] = BINCOMM_CUDA_VERSION;
  facts["cuda_architectures"] = BINCOMM_CUDA_ARCHITECTURES;
  facts["no_cuda_reason"] = BINCOMM_NO_CUDA_REASON;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "bincomm's compiled kernels; importing this module registers them with PyTorch's dispatcher.";
  m.def("build_facts", &build_facts,
        "What was built: compiler, torch it was built with, CUDA version and architectures (empty without CUDA), why\n"
        "there is no CUDA code, and the instruction set the CPU kernels use on this machine.");
#ifdef USE_CUDA
  m.def("device_code", &bincomm::device_code, py::arg("device"),
        "Architecture of the machine code this module would run on GPU number `device`, as (major, minor, from_ptx).\n"
        "Raises RuntimeError with CUDA's message if it has none for that GPU.");
#endif
}
