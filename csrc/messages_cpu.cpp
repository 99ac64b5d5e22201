// Messages on CPU: the signs of logits as bits, 32 an int32 (bit j of word w is the sign of logit 32 w + j), and back.

#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "rows.h"

namespace bincomm {
namespace {

constexpr int64_t kRowElements = 65536;  // of logits; for fewer, another thread costs more time than it saves

std::vector<int64_t> shape_with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) shape.push_back(x.size(d));
  shape.push_back(last);
  return shape;
}

Tensor pack_signs(Tensor logits_) {
  STD_TORCH_CHECK(logits_.dim() >= 1, "logits: expected at least one dimension");
  const Tensor logits = torch::stable::contiguous(logits_);
  const Load load = storage_of(logits.scalar_type(), "logits").load;
  const int64_t bits = logits.size(logits.dim() - 1);
  const int64_t words = (bits + 31) / 32;
  Tensor messages = torch::stable::new_empty(logits, shape_with_last(logits, words), ScalarType::Int);
  const void* in = logits.const_data_ptr();
  int32_t* out = static_cast<int32_t*>(messages.mutable_data_ptr());
  const int64_t rows = words ? messages.numel() / words : 0;
  const int64_t grain = std::max<int64_t>(1, kRowElements / std::max<int64_t>(1, bits));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    float chunk[kChunk];
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t first = 0; first < bits; first += kChunk) {
        const int64_t count = std::min(kChunk, bits - first);
        load(in, row * bits + first, count, chunk);
        pack_chunk(chunk, count, out + row * words + first / 32);
      }
    }
  });
  return messages;
}

Tensor unpack_signs(Tensor messages_, int64_t bits) {
  STD_TORCH_CHECK(messages_.dim() >= 1 && messages_.scalar_type() == ScalarType::Int, "messages: expected int32");
  const Tensor messages = torch::stable::contiguous(messages_);
  const int64_t words = messages.size(messages.dim() - 1);
  STD_TORCH_CHECK(bits >= 0 && words == (bits + 31) / 32, "bits: ", bits, " do not fit ", words, " words");
  Tensor signs = torch::stable::new_empty(messages, shape_with_last(messages, bits), ScalarType::Bool);
  const int32_t* in = static_cast<const int32_t*>(messages.const_data_ptr());
  uint8_t* out = static_cast<uint8_t*>(signs.mutable_data_ptr());
  const int64_t rows = words ? messages.numel() / words : 0;
  const int64_t grain = std::max<int64_t>(1, kRowElements / std::max<int64_t>(1, bits));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t j = 0; j < bits; ++j) {
        out[row * bits + j] = (static_cast<uint32_t>(in[row * words + j / 32]) >> (j % 32)) & 1u;
      }
    }
  });
  return signs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bincomm, CPU, m) {
  m.impl("pack_signs", TORCH_BOX(&pack_signs));
  m.impl("unpack_signs", TORCH_BOX(&unpack_signs));
}

}  // namespace bincomm
