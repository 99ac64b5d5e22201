// Hamming distances between messages on CPU, all pairs or the nearest k, without storing the matrix of distances.
//
// A tile of kTile messages of the database is laid out word by word, so that one instruction counts the differing bits of
// as many messages as a vector has 64-bit lanes; it stays in the first-level cache while a block of queries passes over it.

#include <algorithm>
#include <bit>
#include <limits>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "rows.h"

namespace bincomm {
namespace {

constexpr int64_t kTile = 256;      // messages of the database worked on at once: 8 KB at 256 bits
constexpr int64_t kScan = 32;       // distances of which the least is compared before each is looked at
constexpr int64_t kQueries = 64;    // of a task: enough for a tile's layout to cost nothing beside its use
constexpr int64_t kTaskPairs = 1 << 20;  // below which another thread costs more than it brings

// Messages as rows of whole 64-bit words; the last is half empty where their 32-bit words are odd in number.
struct Messages {
  const int32_t* data;
  int64_t count, words, row;  // of 32-bit words

  explicit Messages(const Tensor& x)
      : data(static_cast<const int32_t*>(x.const_data_ptr())), count(x.size(0)), words(x.size(1)), row(x.stride(0)) {}

  int64_t wide() const { return (words + 1) / 2; }

  uint64_t word(int64_t message, int64_t w) const {
    const int32_t* at = data + message * row + 2 * w;
    const uint64_t low = static_cast<uint32_t>(at[0]);
    return 2 * w + 1 < words ? low | static_cast<uint64_t>(static_cast<uint32_t>(at[1])) << 32 : low;
  }
};

// Words first: tile[w * kTile + j] is word w of message `first + j`.
void lay_out(const Messages& messages, int64_t first, int64_t count, uint64_t* tile) {
  for (int64_t w = 0; w < messages.wide(); ++w) {
    for (int64_t j = 0; j < count; ++j) tile[w * kTile + j] = messages.word(first + j, w);
    std::fill(tile + w * kTile + count, tile + (w + 1) * kTile, 0);
  }
}

// Adds the differing bits of N words to the distances, or sets them where these are the first words.
template <int N>
BINCOMM_INLINE void count_words(const uint64_t* query, const uint64_t* tile, bool first, uint64_t* distances) {
  for (int64_t j = 0; j < kTile; ++j) {
    uint64_t differing = first ? 0 : distances[j];
    for (int w = 0; w < N; ++w) differing += std::popcount(query[w] ^ tile[w * kTile + j]);
    distances[j] = differing;
  }
}

// Distances of one query to the kTile messages of a tile.
BINCOMM_INLINE void count_tile(const uint64_t* query, const uint64_t* tile, int64_t wide, uint64_t* distances) {
  int64_t w = 0;
  for (; w + 4 <= wide; w += 4) count_words<4>(query + w, tile + w * kTile, w == 0, distances);
  for (; w < wide; ++w) count_words<1>(query + w, tile + w * kTile, w == 0, distances);
}

using CountTile = void (*)(const uint64_t* query, const uint64_t* tile, int64_t wide, uint64_t* distances);

BINCOMM_CLONES void count_tile_scalar(const uint64_t* query, const uint64_t* tile, int64_t wide, uint64_t* distances) {
  count_tile(query, tile, wide, distances);
}

// Counting bits in vectors came after x86-64-v4, and compilers do not offer it in a set of clones.
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("arch=x86-64-v4,avx512vpopcntdq"))) void count_tile_vector(const uint64_t* query, const uint64_t* tile,
                                                                                 int64_t wide, uint64_t* distances) {
  count_tile(query, tile, wide, distances);
}

const CountTile tile_distances =
    (__builtin_cpu_init(), __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vl") &&
                               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
        ? count_tile_vector
        : count_tile_scalar;
#else
const CountTile tile_distances = count_tile_scalar;
#endif

BINCOMM_CLONES uint64_t least(const uint64_t* distances) {
  uint64_t found = distances[0];
  for (int64_t j = 1; j < kScan; ++j) found = std::min(found, distances[j]);
  return found;
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
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t w = 0; w < wide; ++w) rows[(i - begin) * wide + w] = a.word(i, w);
    }
    for (int64_t first = 0; first < b.count; first += kTile) {
      const int64_t count = std::min(kTile, b.count - first);
      lay_out(b, first, count, tile.data());
      for (int64_t i = begin; i < end; ++i) {
        tile_distances(rows.data() + (i - begin) * wide, tile.data(), wide, distances);
        for (int64_t j = 0; j < count; ++j) out[i * b.count + first + j] = static_cast<int32_t>(distances[j]);
      }
    }
  });
  return result;
}

// The k nearest so far as a heap of (distance, index), the farthest on top. Equal distances are ordered by index, so the
// order is total and the result the same however the work is divided.
struct Nearest {
  using Found = std::pair<uint64_t, int64_t>;
  std::vector<Found> heap;
  size_t k;

  explicit Nearest(int64_t k_) : k(static_cast<size_t>(k_)) { heap.reserve(k); }

  // Distances from here on do not enter: a tie is lost to what was found before, which has the smaller index.
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

  // Where the queries alone are too few to keep every thread at work, the database is cut into slices too.
  const int64_t blocks = (queries.count + kQueries - 1) / kQueries;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most = std::max<int64_t>(1, database.count / std::max(kTile, k));
  const int64_t slices = std::min(most, (threads + blocks - 1) / blocks);
  const int64_t slice = ((database.count + slices - 1) / slices + kTile - 1) / kTile * kTile;
  std::vector<Nearest> nearest(queries.count * slices, Nearest(k));
  const int64_t pairs = std::max<int64_t>(1, std::min(kQueries, queries.count) * slice);

  torch::stable::parallel_for(0, blocks * slices, std::max<int64_t>(1, kTaskPairs / pairs), [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> tile(wide * kTile), rows(kQueries * wide);
    uint64_t found[kTile] = {};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t from = task / slices * kQueries, to = std::min(from + kQueries, queries.count);
      const int64_t part = task % slices, last = std::min((part + 1) * slice, database.count);
      for (int64_t i = from; i < to; ++i) {
        for (int64_t w = 0; w < wide; ++w) rows[(i - from) * wide + w] = queries.word(i, w);
      }
      for (int64_t first = part * slice; first < last; first += kTile) {
        const int64_t count = std::min(kTile, last - first);
        lay_out(database, first, count, tile.data());
        for (int64_t i = from; i < to; ++i) {
          Nearest& best = nearest[i * slices + part];
          tile_distances(rows.data() + (i - from) * wide, tile.data(), wide, found);
          std::fill(found + count, found + kTile, std::numeric_limits<uint64_t>::max());
          for (int64_t scan = 0; scan < kTile; scan += kScan) {
            if (least(found + scan) >= best.limit()) continue;
            for (int64_t j = scan; j < scan + kScan; ++j) {
              if (found[j] < best.limit()) best.add(found[j], first + j);
            }
          }
        }
      }
    }
  });

  torch::stable::parallel_for(0, queries.count, kQueries, [&](int64_t begin, int64_t end) {
    std::vector<Nearest::Found> all;
    for (int64_t i = begin; i < end; ++i) {
      all.clear();
      for (int64_t part = 0; part < slices; ++part) {
        const Nearest& some = nearest[i * slices + part];
        all.insert(all.end(), some.heap.begin(), some.heap.end());
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
