// Hamming distances between messages on CPU, all pairs or the nearest k, without storing the matrix of distances.
//
// A tile of kTile messages of the database is stored word by word, so that one instruction counts the differing bits of
// as many messages as a vector has 64-bit lanes; it stays in the first-level cache while a block of queries uses it.

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "rows.h"

namespace bincomm {
namespace {

constexpr int64_t kTile = 256;      // messages of the database processed at once: 8 KB at 256 bits
constexpr int64_t kScan = 32;       // distances whose minimum is compared first, before each of them
constexpr int64_t kQueries = 64;    // per task: enough to make the time to store a tile negligible
constexpr int64_t kFew = 4;         // queries; for fewer, storing a tile costs more time than it saves
constexpr int64_t kTaskPairs = 1 << 16;  // for fewer, another thread costs more time than it saves

// Messages as rows of 64-bit words; the upper half of the last is empty if the number of 32-bit words is odd.
struct Messages {
  const int32_t* data;
  int64_t count, words, row;  // of 32-bit words

  explicit Messages(const Tensor& x)
      : data(static_cast<const int32_t*>(x.const_data_ptr())), count(x.size(0)), words(x.size(1)), row(x.stride(0)) {}

  int64_t wide() const { return (words + 1) / 2; }

  // Writes a message's wide words `step` apart. Which half comes first does not matter, as long as it is always the same.
  void widen(int64_t message, uint64_t* out, int64_t step) const {
    const int32_t* at = data + message * row;
    for (int64_t w = 0; w < words / 2; ++w) std::memcpy(out + w * step, at + 2 * w, sizeof(uint64_t));
    if (words % 2) out[words / 2 * step] = static_cast<uint32_t>(at[words - 1]);
  }
};

// Words first: tile[w * kTile + j] is word w of message `first + j`. The rest of the tile is not written.
void lay_out(const Messages& messages, int64_t first, int64_t count, uint64_t* tile) {
  for (int64_t j = 0; j < count; ++j) messages.widen(first + j, tile + j, kTile);
}

// Adds the differing bits of N words to the distances of `count` messages, or sets them where these are the first words.
template <int N, class Word>
BINCOMM_INLINE void count_words(const uint64_t* query, int64_t w, int64_t count, Word word, uint64_t* distances) {
  for (int64_t j = 0; j < count; ++j) {
    uint64_t differing = w == 0 ? 0 : distances[j];
    for (int i = 0; i < N; ++i) differing += std::popcount(query[w + i] ^ word(w + i, j));
    distances[j] = differing;
  }
}

// Distances of a query to `count` messages, of which word(w, j) is word w of message j.
template <class Word>
BINCOMM_INLINE void count_all(const uint64_t* query, int64_t wide, int64_t count, Word word, uint64_t* distances) {
  int64_t w = 0;
  for (; w + 4 <= wide; w += 4) count_words<4>(query, w, count, word, distances);
  for (; w < wide; ++w) count_words<1>(query, w, count, word, distances);
}

BINCOMM_INLINE void count_tile(const uint64_t* query, const uint64_t* tile, int64_t wide, uint64_t* distances) {
  count_all(query, wide, kTile, [=](int64_t w, int64_t j) { return tile[w * kTile + j]; }, distances);
}

// From the messages' own memory: for a few queries storing a tile does not pay.
BINCOMM_INLINE void count_rows(const uint64_t* query, const int32_t* data, int64_t row, int64_t words, int64_t count,
                               uint64_t* distances) {
  const auto full_word = [=](int64_t w, int64_t j) {
    uint64_t word;
    std::memcpy(&word, data + j * row + 2 * w, sizeof word);
    return word;
  };
  const auto half_word = [=](int64_t w, int64_t j) { return static_cast<uint64_t>(static_cast<uint32_t>(data[j * row + 2 * w])); };
  count_all(query, words / 2, count, full_word, distances);
  if (words % 2) count_words<1>(query, words / 2, count, half_word, distances);
}

struct Counters {
  void (*tile)(const uint64_t* query, const uint64_t* tile, int64_t wide, uint64_t* distances);
  void (*rows)(const uint64_t* query, const int32_t* data, int64_t row, int64_t words, int64_t count, uint64_t* distances);
};

BINCOMM_CLONES void tile_scalar(const uint64_t* query, const uint64_t* tile, int64_t wide, uint64_t* distances) {
  count_tile(query, tile, wide, distances);
}
BINCOMM_CLONES void rows_scalar(const uint64_t* query, const int32_t* data, int64_t row, int64_t words, int64_t count,
                                uint64_t* distances) {
  count_rows(query, data, row, words, count, distances);
}

// Counting bits in vectors is newer than x86-64-v4, and compilers do not offer it in a set of clones.
#if defined(__x86_64__) && defined(__GNUC__)
#define BINCOMM_VECTOR_POPCOUNT __attribute__((target("arch=x86-64-v4,avx512vpopcntdq")))

BINCOMM_VECTOR_POPCOUNT void tile_vector(const uint64_t* query, const uint64_t* tile, int64_t wide, uint64_t* distances) {
  count_tile(query, tile, wide, distances);
}
BINCOMM_VECTOR_POPCOUNT void rows_vector(const uint64_t* query, const int32_t* data, int64_t row, int64_t words,
                                         int64_t count, uint64_t* distances) {
  count_rows(query, data, row, words, count, distances);
}

Counters choose() {
  __builtin_cpu_init();
  const bool vector = __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return vector ? Counters{tile_vector, rows_vector} : Counters{tile_scalar, rows_scalar};
}

const Counters counters = choose();
#else
const Counters counters = {tile_scalar, rows_scalar};
#endif

// The minimum of each kScan distances of a tile.
BINCOMM_CLONES void minimum_distances(const uint64_t* distances, uint64_t* minima) {
  for (int64_t s = 0; s < kTile / kScan; ++s) {
    uint64_t minimum = distances[s * kScan];
    for (int64_t j = 1; j < kScan; ++j) minimum = std::min(minimum, distances[s * kScan + j]);
    minima[s] = minimum;
  }
}

void check(const Tensor& a, const char* name) {
  STD_TORCH_CHECK(a.dim() == 2 && a.scalar_type() == ScalarType::Int, name, ": expected (N, words) int32");
}

Tensor hamming_distance(Tensor a_, Tensor b_) {
  check(a_, "a");
  check(b_, "b");
  STD_TORCH_CHECK(a_.size(1) == b_.size(1), "b: expected as many words as a");
  const Tensor a_rows = unit_stride(a_), b_rows = unit_stride(b_);
  const Messages a(a_rows), b(b_rows);
  Tensor result = torch::stable::new_empty(a_, {a.count, b.count}, ScalarType::Int);
  int32_t* out = static_cast<int32_t*>(result.mutable_data_ptr());
  const int64_t wide = a.wide();
  const int64_t grain = std::max<int64_t>(kQueries, kTaskPairs / std::max<int64_t>(1, b.count));
  torch::stable::parallel_for(0, a.count, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> tile(wide * kTile), rows((end - begin) * wide);
    uint64_t distances[kTile] = {};
    for (int64_t i = begin; i < end; ++i) a.widen(i, rows.data() + (i - begin) * wide, 1);
    for (int64_t first = 0; first < b.count; first += kTile) {
      const int64_t count = std::min(kTile, b.count - first);
      lay_out(b, first, count, tile.data());
      for (int64_t i = begin; i < end; ++i) {
        counters.tile(rows.data() + (i - begin) * wide, tile.data(), wide, distances);
        for (int64_t j = 0; j < count; ++j) out[i * b.count + first + j] = static_cast<int32_t>(distances[j]);
      }
    }
  });
  return result;
}

// The k nearest so far as a heap of (distance, index), the farthest on top. Equal distances are ordered by index, so the
// order is total and the result the same however the work is divided.
struct Nearest {
  using Candidate = std::pair<uint64_t, int64_t>;  // distance and index
  std::vector<Candidate> heap;
  size_t k;

  explicit Nearest(int64_t k_) : k(static_cast<size_t>(k_)) { heap.reserve(k); }

  // Distances from this one on are not added: of equal distances the earlier one, with the smaller index, stays.
  uint64_t limit() const { return heap.size() < k ? std::numeric_limits<uint64_t>::max() : heap.front().first; }

  void add(uint64_t distance, int64_t index) {
    if (heap.size() == k) {
      std::pop_heap(heap.begin(), heap.end());
      heap.pop_back();
    }
    heap.emplace_back(distance, index);
    std::push_heap(heap.begin(), heap.end());
  }
};

std::tuple<Tensor, Tensor> hamming_topk(Tensor queries_, Tensor database_, int64_t k) {
  check(queries_, "queries");
  check(database_, "database");
  STD_TORCH_CHECK(queries_.size(1) == database_.size(1), "database: expected as many words as queries");
  STD_TORCH_CHECK(0 <= k && k <= database_.size(0), "k: expected from 0 to the database's size");
  const Tensor query_rows = unit_stride(queries_), database_rows = unit_stride(database_);
  const Messages queries(query_rows), database(database_rows);
  Tensor distances = torch::stable::new_empty(queries_, {queries.count, k}, ScalarType::Int);
  Tensor indices = torch::stable::new_empty(queries_, {queries.count, k}, ScalarType::Long);
  if (queries.count == 0 || k == 0) return {distances, indices};
  int32_t* out_distances = static_cast<int32_t*>(distances.mutable_data_ptr());
  int64_t* out_indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  const int64_t wide = queries.wide();

  // If the queries are too few to keep all threads busy, the database is cut into slices too.
  const int64_t blocks = (queries.count + kQueries - 1) / kQueries;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most = std::max<int64_t>(1, database.count / std::max(kTile, k));
  const int64_t slices = std::min(most, (threads + blocks - 1) / blocks);
  const int64_t slice = ((database.count + slices - 1) / slices + kTile - 1) / kTile * kTile;
  std::vector<Nearest> nearest(queries.count * slices, Nearest(k));
  const int64_t pairs = std::max<int64_t>(1, std::min(kQueries, queries.count) * slice);

  torch::stable::parallel_for(0, blocks * slices, std::max<int64_t>(1, kTaskPairs / pairs), [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> tile(wide * kTile), rows(kQueries * wide);
    uint64_t tile_distances[kTile] = {}, minima[kTile / kScan];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t from = task / slices * kQueries, to = std::min(from + kQueries, queries.count);
      const int64_t part = task % slices, last = std::min((part + 1) * slice, database.count);
      for (int64_t i = from; i < to; ++i) queries.widen(i, rows.data() + (i - from) * wide, 1);
      for (int64_t first = part * slice; first < last; first += kTile) {
        const int64_t count = std::min(kTile, last - first);
        const bool few = to - from < kFew;
        if (!few) lay_out(database, first, count, tile.data());
        for (int64_t i = from; i < to; ++i) {
          Nearest& best = nearest[i * slices + part];
          const uint64_t* query = rows.data() + (i - from) * wide;
          if (few) {
            counters.rows(query, database.data + first * database.row, database.row, database.words, count,
                          tile_distances);
          } else {
            counters.tile(query, tile.data(), wide, tile_distances);
          }
          std::fill(tile_distances + count, tile_distances + kTile, std::numeric_limits<uint64_t>::max());
          minimum_distances(tile_distances, minima);
          for (int64_t scan = 0; scan < kTile; scan += kScan) {
            if (minima[scan / kScan] >= best.limit()) continue;
            for (int64_t j = scan; j < scan + kScan; ++j) {
              if (tile_distances[j] < best.limit()) best.add(tile_distances[j], first + j);
            }
          }
        }
      }
    }
  });

  torch::stable::parallel_for(0, queries.count, kQueries, [&](int64_t begin, int64_t end) {
    std::vector<Nearest::Candidate> all;
    for (int64_t i = begin; i < end; ++i) {
      all.clear();
      for (int64_t part = 0; part < slices; ++part) {
        const std::vector<Nearest::Candidate>& heap = nearest[i * slices + part].heap;
        all.insert(all.end(), heap.begin(), heap.end());
      }
      std::partial_sort(all.begin(), all.begin() + k, all.end());
      for (int64_t j = 0; j < k; ++j) {
        out_distances[i * k + j] = static_cast<int32_t>(all[j].first);
        out_indices[i * k + j] = all[j].second;
      }
    }
  });
  return {distances, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bincomm, CPU, m) {
  m.impl("hamming_distance", TORCH_BOX(&hamming_distance));
  m.impl("hamming_topk", TORCH_BOX(&hamming_topk));
}

}  // namespace bincomm
