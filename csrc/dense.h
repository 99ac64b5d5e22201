#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace bincomm {

// Whether the elements fill a block of memory, in whatever order.
inline bool is_dense(const torch::stable::Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> steps;  // strides and sizes
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != 1) steps.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(steps.begin(), steps.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : steps) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

}  // namespace bincomm
