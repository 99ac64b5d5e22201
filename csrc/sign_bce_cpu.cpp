// Binary cross-entropy between a student's logits and the signs of a teacher's, on CPU.
//
// With c_v the number of teachers paired with view v, S_v the sum of their bits at an element and a the logit,
//
//     loss     = sum_v [ c_v softplus(a) - S_v a ] / (pairs n K)
//     gradient = [ c_v sigmoid(a) - S_v ] / (pairs n K)
//
// which is computed without cancellation from e = exp(-|a|) and the weight w = (a > 0 ? c_v - S_v : S_v):
//
//     c softplus(a) - S a  =  w |a| + c log(1 + e)          c sigmoid(a) - S  =  sgn(a) (w - c e / (1 + e))
//
// A task is one image and kChunk bits of it: the teacher's bits are read once and serve all V views.
// The loss's log is taken once per kBlocks elements: p <- p + e + p e gives prod(1 + e) - 1, accurate for tiny e too.

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "rows.h"

namespace bincomm {
namespace {

constexpr int64_t kLanes = 32;
constexpr int64_t kBlocks = 32;           // of kLanes logits that share one log: prod(1 + e) stays below 2^32
constexpr int64_t kTaskElements = 16384;  // for fewer, another thread costs more time than it saves

// Losses of logits that are paired with the same number c of teachers, summed lane by lane.
struct Lanes {
  float linear[kLanes] = {};
  float product[kLanes] = {};  // prod(1 + e) - 1
  int64_t blocks = 0;
};

// Adds `padded` logits x with summed bits; the padding has x very negative and a sum of 0: no loss.
BINCOMM_CLONES void add_losses(const float* x, const float* sums, float c, int64_t padded, Lanes& lanes) {
  Lanes l = lanes;  // a copy, which stays in registers
  for (int64_t block = 0; block < padded; block += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const float a = x[block + j];
      const float s = sums[block + j];
      const float magnitude = std::fabs(a);
      const float w = a > 0.0f ? c - s : s;
      const float e = exp_of_minus(magnitude);
      const float more = w * magnitude + l.linear[j];
      l.linear[j] = w == 0.0f ? l.linear[j] : more;  // an infinite logit of the correct sign costs nothing, not inf * 0
      l.product[j] += e * (1.0f + l.product[j]);
    }
  }
  lanes = l;
}

// The sum of the lanes, which are then empty.
BINCOMM_CLONES double sum_and_clear(Lanes& lanes, float c) {
  double total[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) {
    total[j] = static_cast<double>(lanes.linear[j]) + static_cast<double>(c * log1p_nonnegative(lanes.product[j]));
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) total[j] += total[j + width];
  }
  lanes = Lanes();
  return total[0];
}

BINCOMM_CLONES void gradient_of_chunk(const float* x, const float* sums, float c, float scale, int64_t padded, float* out) {
  for (int64_t j = 0; j < padded; ++j) {
    const float a = x[j];
    const float s = sums[j];
    const float e = exp_of_minus(std::fabs(a));
    const float w = a > 0.0f ? c - s : s;
    const float magnitude = w - c * (e / (1.0f + e));
    out[j] = magnitude * (a > 0.0f ? scale : -scale);
  }
}

// 1 for a positive logit, 0 for another, NaN for NaN: a NaN of the teacher must show in the loss.
BINCOMM_CLONES void bits_of_logits(const float* logits, int64_t count, float* bits) {
  for (int64_t j = 0; j < count; ++j) {
    const float bit = logits[j] > 0.0f ? 1.0f : 0.0f;
    bits[j] = logits[j] == logits[j] ? bit : logits[j];
  }
}

BINCOMM_CLONES void bits_of_words(const int32_t* words, int64_t count, float* bits) {
  for (int64_t j = 0; j < count; ++j) {
    bits[j] = static_cast<float>((static_cast<uint32_t>(words[j / 32]) >> (j % 32)) & 1u);
  }
}

BINCOMM_CLONES void add(const float* a, const float* b, int64_t count, float* out) {
  for (int64_t j = 0; j < count; ++j) out[j] = a[j] + b[j];
}

BINCOMM_CLONES void subtract(const float* a, const float* b, int64_t count, float* out) {
  for (int64_t j = 0; j < count; ++j) out[j] = a[j] - b[j];
}

enum class Pairs { cross, all, matched };

int64_t round_up_to_lanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

struct Problem {
  int64_t views, teachers, images, bits, words, chunks;
  Pairs pairs;
  double terms;  // pairs * n * K, the divisor of the mean

  int64_t tasks() const { return images * chunks; }
  int64_t grain() const { return std::max<int64_t>(1, kTaskElements / (kChunk * std::max<int64_t>(1, views))); }
};

Problem problem(const Tensor& student, const Tensor& teacher, const std::string& pairs) {
  STD_TORCH_CHECK(student.dim() == 3 && teacher.dim() == 3, "student and teacher: expected three dimensions each");
  Problem p;
  p.views = student.size(0);
  p.images = student.size(1);
  p.bits = student.size(2);
  p.teachers = teacher.size(0);
  p.words = (p.bits + 31) / 32;
  p.chunks = (p.bits + kChunk - 1) / kChunk;
  const int64_t width = teacher.scalar_type() == ScalarType::Int ? p.words : p.bits;
  STD_TORCH_CHECK(teacher.size(1) == p.images && teacher.size(2) == width, "teacher: its shape does not fit student's");
  double count;
  if (pairs == "cross") {
    STD_TORCH_CHECK(p.teachers <= p.views, "teacher: pairs='cross' needs a student view for every teacher view");
    p.pairs = Pairs::cross;
    count = static_cast<double>(p.teachers) * static_cast<double>(p.views - 1);
  } else if (pairs == "all") {
    p.pairs = Pairs::all;
    count = static_cast<double>(p.teachers) * static_cast<double>(p.views);
  } else {
    STD_TORCH_CHECK(pairs == "matched", "pairs: expected 'cross', 'all' or 'matched', got '", pairs, "'");
    STD_TORCH_CHECK(p.teachers == p.views, "teacher: pairs='matched' needs as many teacher as student views");
    p.pairs = Pairs::matched;
    count = static_cast<double>(p.views);
  }
  p.terms = count * static_cast<double>(p.images) * static_cast<double>(p.bits);
  return p;
}

// The bits of all teachers for one image and chunk: each separately and summed, padded with zeros to full lanes.
struct Bits {
  std::vector<float> each;
  float sum[kChunk];
  float paired[kChunk];
  int64_t padded = 0;

  explicit Bits(const Problem& p) : each(p.teachers * kChunk, 0.0f) {}

  float* of(int64_t teacher) { return each.data() + teacher * kChunk; }

  void accumulate(const Problem& p, int64_t count) {
    padded = round_up_to_lanes(count);
    std::fill(sum, sum + padded, 0.0f);
    for (int64_t u = 0; u < p.teachers; ++u) {
      std::fill(of(u) + count, of(u) + padded, 0.0f);
      add(sum, of(u), padded, sum);
    }
  }

  // (S_v, c_v): the summed bits of the teachers view v is paired with, and how many they are.
  std::pair<const float*, float> of_view(const Problem& p, int64_t view) {
    if (p.pairs == Pairs::matched) return {of(view), 1.0f};
    if (p.pairs == Pairs::all || view >= p.teachers) return {sum, static_cast<float>(p.teachers)};
    subtract(sum, of(view), padded, paired);
    return {paired, static_cast<float>(p.teachers - 1)};
  }
};

// Prefetches the next view's logits while this one's are processed: they are pages apart, beyond hardware prefetching.
void prefetch(const void* data, int64_t offset, int64_t count, int64_t size) {
  const char* at = static_cast<const char*>(data) + offset * size;
  for (int64_t byte = 0; byte < count * size; byte += 64) __builtin_prefetch(at + byte);
}

// The row's chunk as fp32 in full lanes: in its own memory, or converted and padded in `chunk`.
const float* padded_chunk(const Storage& storage, const void* data, int64_t offset, int64_t count, float* chunk) {
  const int64_t padded = round_up_to_lanes(count);
  if (storage.is_float && padded == count) return static_cast<const float*>(data) + offset;
  storage.load(data, offset, count, chunk);
  std::fill(chunk + count, chunk + padded, std::numeric_limits<float>::lowest());
  return chunk;
}

std::tuple<Tensor, Tensor> sign_bce(Tensor student_, Tensor teacher_, std::string pairs) {
  const Problem p = problem(student_, teacher_, pairs);
  const Tensor student = unit_stride(student_);
  const Tensor teacher = unit_stride(teacher_);
  const bool packed = teacher.scalar_type() == ScalarType::Int;
  const Storage storage = storage_of(student.scalar_type(), "student");
  const Load load_teacher = packed ? nullptr : storage_of(teacher.scalar_type(), "teacher").load;
  const void* x = student.const_data_ptr();
  const int64_t size = storage.is_float ? 4 : 2;
  const void* t = teacher.const_data_ptr();

  Tensor messages = packed ? torch::stable::new_empty(student, {0}, ScalarType::Int)
                           : torch::stable::new_empty(student, {p.teachers, p.images, p.words}, ScalarType::Int);
  int32_t* message = packed ? nullptr : static_cast<int32_t*>(messages.mutable_data_ptr());
  std::vector<double> partial(p.tasks());

  torch::stable::parallel_for(0, p.tasks(), p.grain(), [&](int64_t begin, int64_t end) {
    Bits bits(p);
    float chunk[kChunk];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / p.chunks;
      const int64_t first = task % p.chunks * kChunk;
      const int64_t count = std::min(kChunk, p.bits - first);
      for (int64_t u = 0; u < p.teachers; ++u) {
        const int64_t row = u * teacher.stride(0) + image * teacher.stride(1);
        if (packed) {
          bits_of_words(static_cast<const int32_t*>(t) + row + first / 32, count, bits.of(u));
        } else {
          load_teacher(t, row + first, count, chunk);
          bits_of_logits(chunk, count, bits.of(u));
          pack_chunk(chunk, count, message + (u * p.images + image) * p.words + first / 32);
        }
      }
      bits.accumulate(p, count);
      double total = 0.0;
      Lanes lanes;
      float before = 0.0f;
      for (int64_t v = 0; v < p.views; ++v) {
        const auto [sums, c] = bits.of_view(p, v);
        if (c == 0.0f) continue;
        if (c != before || lanes.blocks + bits.padded / kLanes > kBlocks) total += sum_and_clear(lanes, before);
        const int64_t row = v * student.stride(0) + image * student.stride(1);
        if (v + 1 < p.views) prefetch(x, row + student.stride(0) + first, count, size);
        add_losses(padded_chunk(storage, x, row + first, count, chunk), sums, c, bits.padded, lanes);
        lanes.blocks += bits.padded / kLanes;
        before = c;
      }
      partial[task] = total + sum_and_clear(lanes, before);
    }
  });

  double total = 0.0;  // in the tasks' order, so that the number of threads does not show
  for (double part : partial) total += part;
  Tensor loss = torch::stable::new_empty(student, {}, ScalarType::Float);
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total / p.terms);
  return {loss, messages};
}

Tensor sign_bce_backward(Tensor grad, Tensor student_, Tensor messages_, std::string pairs) {
  const Problem p = problem(student_, messages_, pairs);
  STD_TORCH_CHECK(messages_.scalar_type() == ScalarType::Int, "messages: expected int32");
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.numel() == 1, "grad: expected one float32");
  const Tensor student = unit_stride(student_);
  const Tensor messages = unit_stride(messages_);
  const Storage storage = storage_of(student.scalar_type(), "student");
  const void* x = student.const_data_ptr();
  const int64_t size = storage.is_float ? 4 : 2;
  const int32_t* message = static_cast<const int32_t*>(messages.const_data_ptr());
  const float scale = static_cast<float>(*static_cast<const float*>(grad.const_data_ptr()) / p.terms);

  Tensor gradient = torch::stable::new_empty(student, {p.views, p.images, p.bits});
  void* out = gradient.mutable_data_ptr();

  torch::stable::parallel_for(0, p.tasks(), p.grain(), [&](int64_t begin, int64_t end) {
    Bits bits(p);
    float chunk[kChunk];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / p.chunks;
      const int64_t first = task % p.chunks * kChunk;
      const int64_t count = std::min(kChunk, p.bits - first);
      for (int64_t u = 0; u < p.teachers; ++u) {
        const int64_t row = u * messages.stride(0) + image * messages.stride(1);
        bits_of_words(message + row + first / 32, count, bits.of(u));
      }
      bits.accumulate(p, count);
      for (int64_t v = 0; v < p.views; ++v) {
        const auto [sums, c] = bits.of_view(p, v);
        const int64_t row = v * student.stride(0) + image * student.stride(1);
        if (v + 1 < p.views) prefetch(x, row + student.stride(0) + first, count, size);
        const float* logits = padded_chunk(storage, x, row + first, count, chunk);
        const int64_t offset = (v * p.images + image) * p.bits + first;
        if (storage.is_float && bits.padded == count) {
          gradient_of_chunk(logits, sums, c, scale, count, static_cast<float*>(out) + offset);
        } else {
          gradient_of_chunk(logits, sums, c, scale, bits.padded, chunk);
          storage.store(chunk, count, out, offset);
        }
      }
    }
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bincomm, CPU, m) {
  m.impl("sign_bce", TORCH_BOX(&sign_bce));
  m.impl("sign_bce_backward", TORCH_BOX(&sign_bce_backward));
}

}  // namespace bincomm
