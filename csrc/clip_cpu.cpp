// Gradients clipped one tensor at a time, on CPU.
//
// A first pass over memory computes all norms, a second changes only the gradients whose norm is above the limit. The
// gradients are cut into parts that do not depend on the number of threads, and a norm adds its parts in their order.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "dense.h"
#include "rows.h"

namespace bincomm {
namespace {

constexpr int64_t kPart = 16384;   // elements
constexpr int64_t kGrain = 65536;  // elements; for fewer, another thread costs more time than it saves

BINCOMM_CLONES double part_sum(const float* x, int64_t count) { return sum_of_squares(x, count); }

BINCOMM_CLONES void scale(float* x, int64_t count, double factor) {
  for (int64_t j = 0; j < count; ++j) x[j] = static_cast<float>(x[j] * factor);
}

struct Part {
  size_t gradient;
  float* data;
  int64_t count;
  int64_t before;  // elements of all parts before this one
};

// Calls f(index, part) for all parts, on threads that get about equal numbers of elements.
template <typename F>
void for_each_part(const std::vector<Part>& parts, const F& f) {
  const int64_t elements = parts.empty() ? 0 : parts.back().before + parts.back().count;
  torch::stable::parallel_for(0, elements, kGrain, [&](int64_t begin, int64_t end) {
    const auto is_before = [](const Part& part, int64_t element) { return part.before < element; };
    auto part = std::lower_bound(parts.begin(), parts.end(), begin, is_before);
    for (; part != parts.end() && part->before < end; ++part) f(part - parts.begin(), *part);
  });
}

Tensor clip_gradients_(std::vector<Tensor> gradients, double limit) {
  STD_TORCH_CHECK(!gradients.empty(), "gradients: expected at least one");
  std::vector<Tensor> blocks;  // the gradients, or copies of those that do not fill their memory
  std::vector<Part> parts;
  int64_t before = 0;
  for (const Tensor& gradient : gradients) {
    STD_TORCH_CHECK(gradient.scalar_type() == ScalarType::Float, "gradients: expected float32");
    const Tensor& block = blocks.emplace_back(
        gradient.numel() == 0 || is_dense(gradient) ? gradient : torch::stable::contiguous(gradient));
    float* data = static_cast<float*>(block.mutable_data_ptr());
    for (int64_t first = 0; first < block.numel(); first += kPart) {
      const int64_t count = std::min(kPart, block.numel() - first);
      parts.push_back({blocks.size() - 1, data + first, count, before});
      before += count;
    }
  }

  std::vector<double> sums(parts.size());
  for_each_part(parts, [&](int64_t index, const Part& part) { sums[index] = part_sum(part.data, part.count); });

  std::vector<double> squares(gradients.size());
  double total = 0.0;
  for (size_t index = 0; index < parts.size(); ++index) squares[parts[index].gradient] += sums[index];
  for (double square : squares) total += square;

  std::vector<Part> long_parts;  // of gradients to be scaled; those that are not finite stay as they are
  before = 0;
  const auto is_long = [&](size_t g) {
    return limit > 0 && std::isfinite(squares[g]) && std::sqrt(squares[g]) > limit;
  };
  for (const Part& part : parts) {
    if (!is_long(part.gradient)) continue;
    long_parts.push_back({part.gradient, part.data, part.count, before});
    before += part.count;
  }
  for_each_part(long_parts, [&](int64_t, const Part& part) {
    scale(part.data, part.count, limit / std::sqrt(squares[part.gradient]));
  });
  for (size_t g = 0; g < gradients.size(); ++g) {
    if (blocks[g].const_data_ptr() != gradients[g].const_data_ptr() && is_long(g)) {
      torch::stable::copy_(gradients[g], blocks[g]);
    }
  }

  Tensor norm = torch::stable::new_empty(gradients[0], {}, ScalarType::Float);
  // A finite norm stays finite, also beyond fp32's largest number.
  const double largest = std::isfinite(total) ? std::numeric_limits<float>::max() : total;
  *static_cast<float*>(norm.mutable_data_ptr()) = static_cast<float>(std::min(std::sqrt(total), largest));
  return norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bincomm, CPU, m) { m.impl("clip_gradients_", TORCH_BOX(&clip_gradients_)); }

}  // namespace bincomm
