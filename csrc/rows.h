// Rows of logits in any storage type, as padded blocks of fp32, and the bits of a message.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "vector_math.h"

namespace bincomm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements processed at once: they stay in the first-level cache; a multiple of 32, the bits of a message word.
constexpr int64_t kChunk = 512;

using Load = void (*)(const void* row, int64_t offset, int64_t count, float* out);
using Store = void (*)(const float* in, int64_t count, void* row, int64_t offset);

struct Storage {
  Load load;
  Store store;
  bool is_float;
};

// The conversions for a dtype; raises for anything but fp32, fp16 and bf16.
Storage storage_of(ScalarType dtype, const char* argument);

// x with unit stride along its last dimension: x itself, or a copy if it has another stride.
inline Tensor unit_stride(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.stride(last) == 1 || x.size(last) <= 1 ? x : torch::stable::contiguous(x);
}

// Sign bits of up to kChunk logits, 32 a word; the bits beyond `count` are 0.
BINCOMM_INLINE void pack_chunk(const float* logits, int64_t count, int32_t* words) {
  for (int64_t w = 0; w * 32 < count; ++w) {
    const int64_t inside = std::min<int64_t>(32, count - w * 32);
    uint32_t word = 0;
    for (int64_t j = 0; j < inside; ++j) word |= static_cast<uint32_t>(logits[w * 32 + j] > 0.0f) << j;
    words[w] = static_cast<int32_t>(word);
  }
}

}  // namespace bincomm
