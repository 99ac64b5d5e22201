// Coding rate on CPU: the Gram matrix A of logits with rows of unit length, R = 1/2 logdet(I + A) by Cholesky
// factorization, (I + A)^-1 from the factor, and the gradient.
//
// Matrices are processed as tiles of 32 x 32, each contiguous, so that no row stride can make lines of one tile compete
// for the same cache sets. With I + A = U^T U, tile by tile:
//
//     factor     W_k = U_kk^-T                     C_ki = (I + A)_ki - sum_{k' < k} U_k'k^T U_k'i,   U_ki = W_k C_ki
//     inverse    M_ij = W_i^T ([i = j] W_i - sum_{k > i} U_ik M_kj),   i from last to first, j >= i,   M_ji = M_ij^T
//
// The factor's tile at (i, i) is -W_i, because the products subtract. U_ki is stored at (i, k), so that the columns
// that the factorization reads are contiguous, and also at (k, i), so that the rows that the inverse reads are contiguous.
// A tile that is cut by the edge keeps only the inside; beyond the edge the matrix continues as the identity.
//
// A tile is computed from beginning to end by one thread, in an order that does not depend on their number.

#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "rows.h"

namespace bincomm {
namespace {

constexpr int kTile = 32;
constexpr int kTileSize = kTile * kTile;
constexpr int64_t kTaskProducts = 8;     // of tiles; for fewer, another thread costs more time than it saves
constexpr int64_t kSharedTiles = 8;      // per side of a matrix, from which threads share one
constexpr int64_t kRowElements = 32768;  // the same for the rows' elements
constexpr double kNormEps = 1e-12;       // smallest norm a row is divided by, as in torch.nn.functional.normalize

// ---- Rows of unit length

BINCOMM_CLONES double norm(const float* x, int64_t count) { return std::sqrt(sum_of_squares(x, count)); }

BINCOMM_CLONES void scale(const float* x, float factor, int64_t count, float* out) {
  for (int64_t j = 0; j < count; ++j) out[j] = x[j] * factor;
}

// Writes a row of unit length and returns the reciprocal of its previous norm.
float unit_row(const Storage& storage, const void* in, int64_t offset, int64_t bits, float* to) {
  if (!storage.is_float) storage.load(in, offset, bits, to);
  const float* a = storage.is_float ? static_cast<const float*>(in) + offset : to;
  const double length = norm(a, bits);
  const float reciprocal = static_cast<float>(1.0 / (length < kNormEps ? kNormEps : length));  // a NaN stays one
  scale(a, reciprocal, bits, to);
  return reciprocal;
}

std::tuple<Tensor, Tensor> coding_rate_rows(Tensor logits_) {
  STD_TORCH_CHECK(logits_.dim() == 3, "logits: expected three dimensions");
  const Tensor logits = unit_stride(logits_);
  const Storage storage = storage_of(logits.scalar_type(), "logits");
  const int64_t views = logits.size(0), images = logits.size(1), bits = logits.size(2);
  Tensor z = torch::stable::new_empty(logits, {views, images, bits}, ScalarType::Float);
  Tensor reciprocal = torch::stable::new_empty(logits, {views, images}, ScalarType::Float);
  const void* in = logits.const_data_ptr();
  float* out = static_cast<float*>(z.mutable_data_ptr());
  float* reciprocals = static_cast<float*>(reciprocal.mutable_data_ptr());

  const int64_t grain = std::max<int64_t>(1, kRowElements / std::max<int64_t>(1, bits));
  torch::stable::parallel_for(0, views * images, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t offset = row / images * logits.stride(0) + row % images * logits.stride(1);
      reciprocals[row] = unit_row(storage, in, offset, bits, out + row * bits);
    }
  });
  return {z, reciprocal};
}

// g.z of a row, z = a r.
BINCOMM_CLONES float along_row(const float* g, const float* a, float r, int64_t count) {
  constexpr int kLanes = 32;
  float lanes[kLanes] = {};
  const int64_t full = count / kLanes * kLanes;
  for (int64_t first = 0; first < full; first += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += g[first + j] * (a[first + j] * r);
  }
  for (int64_t j = full; j < count; ++j) lanes[j - full] += g[j] * (a[j] * r);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

// (g - along z) scale, clamped to the limit.
BINCOMM_CLONES void gradient_of_row(const float* g, const float* a, float r, float along, float scale, float limit,
                                    int64_t count, float* out) {
  for (int64_t j = 0; j < count; ++j) {
    const float x = (g[j] - along * (a[j] * r)) * scale;
    out[j] = x < -limit ? -limit : (x > limit ? limit : x);
  }
}

float largest_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return 65504.0f;
    case ScalarType::BFloat16:
      return 3.38953139e38f;
    default:
      return std::numeric_limits<float>::max();
  }
}

// dR/da from g, which is dR/dz / alpha, and the incoming gradient of each view.
Tensor coding_rate_gradient(Tensor grad_, Tensor g_, Tensor logits_, Tensor reciprocal_, double alpha) {
  const Tensor logits = unit_stride(logits_);
  const Tensor grad = torch::stable::contiguous(grad_);
  const Tensor g = torch::stable::contiguous(g_);
  const Tensor reciprocal = torch::stable::contiguous(reciprocal_);
  const Storage storage = storage_of(logits.scalar_type(), "logits");
  const int64_t views = logits.size(0), images = logits.size(1), bits = logits.size(2);
  STD_TORCH_CHECK(g.numel() == logits.numel() && g.scalar_type() == ScalarType::Float, "g: expected (V, n, K) float32");
  STD_TORCH_CHECK(reciprocal.numel() == views * images && reciprocal.scalar_type() == ScalarType::Float,
                  "reciprocal: expected (V, n) float32");
  STD_TORCH_CHECK(grad.numel() == views && grad.scalar_type() == ScalarType::Float,
                  "grad: expected (V,) float32");
  Tensor gradient = torch::stable::new_empty(logits, {views, images, bits});
  const void* in = logits.const_data_ptr();
  const float* directions = static_cast<const float*>(g.const_data_ptr());
  const float* reciprocals = static_cast<const float*>(reciprocal.const_data_ptr());
  const float* grads = static_cast<const float*>(grad.const_data_ptr());
  const float largest = largest_of(logits.scalar_type());
  void* out = gradient.mutable_data_ptr();

  const int64_t grain = std::max<int64_t>(1, kRowElements / std::max<int64_t>(1, bits));
  torch::stable::parallel_for(0, views * images, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> wide(storage.is_float ? 0 : 2 * bits);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t offset = row / images * logits.stride(0) + row % images * logits.stride(1);
      if (!storage.is_float) storage.load(in, offset, bits, wide.data());
      const float* a = storage.is_float ? static_cast<const float*>(in) + offset : wide.data();
      float* to = storage.is_float ? static_cast<float*>(out) + row * bits : wide.data() + bits;
      const float* direction = directions + row * bits;
      const float r = reciprocals[row], incoming = grads[row / images];
      // Through z = a r a gradient g becomes (g - (g.z) z) r; a norm clamped to its minimum is a constant.
      const float along = r >= static_cast<float>(1.0 / kNormEps) ? 0.0f : along_row(direction, a, r, bits);
      // Numbers beyond the type's range become its largest number. But if the incoming gradient is large, as that of a
      // scaled loss, they become infinite, which shows that the scale is too large.
      const float limit = std::fabs(incoming) <= 1.0f ? largest : std::numeric_limits<float>::infinity();
      gradient_of_row(direction, a, r, along, incoming * static_cast<float>(alpha) * r, limit, bits, to);
      if (!storage.is_float) storage.store(to, bits, out, row * bits);
    }
  });
  return gradient;
}

// ---- Tiles

typedef float Vector16 __attribute__((vector_size(64)));
typedef float Vector8 __attribute__((vector_size(32)));
typedef float Vector4 __attribute__((vector_size(16)));

// Floats in a register of the clones that this processor runs.
int register_floats() {
#if defined(__x86_64__) && defined(__gnu_linux__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vl")) return 16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
  return 4;
}

const int kRegisterFloats = register_floats();

// Runs a statement with `Vector` as the type of a full register.
#define BINCOMM_WITH_VECTOR(...)      \
  if (kRegisterFloats == 16) {        \
    using Vector = Vector16;          \
    __VA_ARGS__;                      \
  } else if (kRegisterFloats == 8) {  \
    using Vector = Vector8;           \
    __VA_ARGS__;                      \
  } else {                            \
    using Vector = Vector4;           \
    __VA_ARGS__;                      \
  }

template <class Vector>
constexpr int kLanes = sizeof(Vector) / sizeof(float);
template <class Vector>
constexpr int kVectors = kTile / kLanes<Vector>;  // in a row of a tile
template <class Vector>
constexpr int kRows = kLanes<Vector> == 16 ? 8 : 2;  // of a product computed at once: their sums stay in registers

// Arrays of vectors become registers when every index is a constant, so loops over them are unrolled.
#define BINCOMM_UNROLL _Pragma("GCC unroll 8")

template <class Vector>
BINCOMM_INLINE void load(const float* row, int v, Vector& to) {
  std::memcpy(&to, row + v * kLanes<Vector>, sizeof(Vector));
}

template <class Vector>
BINCOMM_INLINE void store(const Vector& from, float* row, int v) {
  std::memcpy(row + v * kLanes<Vector>, &from, sizeof(Vector));
}

// kRows rows of -X Y, or of -X^T Y, summed over the terms from `begin` to `end`; `x` points to the first row.
template <class Vector, bool kTransposed>
BINCOMM_INLINE void minus_product(const float* x, const float* y, int begin, int end,
                                  Vector (&sum)[kRows<Vector>][kVectors<Vector>]) {
  BINCOMM_UNROLL
  for (int r = 0; r < kRows<Vector>; ++r) {
    BINCOMM_UNROLL
    for (int v = 0; v < kVectors<Vector>; ++v) sum[r][v] = Vector{};
  }
  for (int s = begin; s < end; ++s) {
    Vector row[kVectors<Vector>];
    BINCOMM_UNROLL
    for (int v = 0; v < kVectors<Vector>; ++v) load(y + s * kTile, v, row[v]);
    BINCOMM_UNROLL
    for (int r = 0; r < kRows<Vector>; ++r) {
      const float factor = kTransposed ? x[s * kTile + r] : x[r * kTile + s];
      BINCOMM_UNROLL
      for (int v = 0; v < kVectors<Vector>; ++v) sum[r][v] -= factor * row[v];
    }
  }
}

// Each tile is summed by itself: the sums of long rows then round less often.
template <class Vector, bool kTransposed>
BINCOMM_INLINE void subtract_products_by(const float* x, const float* y, int64_t count, float* c) {
  for (int64_t k = 0; k < count; ++k) {
    for (int first = 0; first < kTile; first += kRows<Vector>) {
      const float* rows = x + k * kTileSize + (kTransposed ? first : first * kTile);
      Vector sum[kRows<Vector>][kVectors<Vector>];
      minus_product<Vector, kTransposed>(rows, y + k * kTileSize, 0, kTile, sum);
      BINCOMM_UNROLL
      for (int r = 0; r < kRows<Vector>; ++r) {
        BINCOMM_UNROLL
        for (int v = 0; v < kVectors<Vector>; ++v) {
          Vector row;
          load(c + (first + r) * kTile, v, row);
          store(row + sum[r][v], c + (first + r) * kTile, v);
        }
      }
    }
  }
}

template <class Vector, bool kTransposed>
BINCOMM_INLINE void triangular_product_by(const float* minus_w, const float* c, float* out) {
  for (int first = 0; first < kTile; first += kRows<Vector>) {
    const float* rows = minus_w + (kTransposed ? first : first * kTile);
    const int begin = kTransposed ? first : 0;
    const int end = kTransposed ? kTile : first + kRows<Vector>;
    Vector sum[kRows<Vector>][kVectors<Vector>];
    minus_product<Vector, kTransposed>(rows, c, begin, end, sum);
    BINCOMM_UNROLL
    for (int r = 0; r < kRows<Vector>; ++r) {
      BINCOMM_UNROLL
      for (int v = 0; v < kVectors<Vector>; ++v) store(sum[r][v], out + (first + r) * kTile, v);
    }
  }
}

// C -= sum of X_k Y_k over `count` tiles that follow each other.
BINCOMM_CLONES void subtract_products(const float* x, const float* y, int64_t count, float* c) {
  BINCOMM_WITH_VECTOR(subtract_products_by<Vector, false>(x, y, count, c))
}

// C -= sum of X_k^T Y_k.
BINCOMM_CLONES void subtract_transposed_products(const float* x, const float* y, int64_t count, float* c) {
  BINCOMM_WITH_VECTOR(subtract_products_by<Vector, true>(x, y, count, c))
}

// W C of a lower triangular W, given -W.
BINCOMM_CLONES void triangular_product(const float* minus_w, const float* c, float* out) {
  BINCOMM_WITH_VECTOR(triangular_product_by<Vector, false>(minus_w, c, out))
}

// W^T C of a lower triangular W, given -W.
BINCOMM_CLONES void transposed_triangular_product(const float* minus_w, const float* c, float* out) {
  BINCOMM_WITH_VECTOR(triangular_product_by<Vector, true>(minus_w, c, out))
}

BINCOMM_INLINE float clamped_pivot(float pivot) { return pivot < 1.0f ? 1.0f : pivot; }  // a NaN stays one

// Replaces a symmetric tile, of which the upper triangle is read, by -W = -U^-T. Gaussian elimination without square
// roots, which would delay the next pivot: they are computed at the end. The columns before the pivot hold the identity,
// to which the same steps are applied, so one row holds both.
template <class Vector>
BINCOMM_INLINE void eliminate_by(float* x, float* pivots) {
  float numbers[kTile];
  for (int c = 0; c < kTile; ++c) numbers[c] = static_cast<float>(c);
  Vector lane[kVectors<Vector>];
  BINCOMM_UNROLL
  for (int v = 0; v < kVectors<Vector>; ++v) load(numbers, v, lane[v]);
  const Vector zero = {};

  for (int j = 0; j < kTile; ++j) {
    pivots[j] = x[j * kTile + j];
    const float inverse = 1.0f / clamped_pivot(pivots[j]);
    const float number = static_cast<float>(j);
    Vector scaled[kVectors<Vector>];
    BINCOMM_UNROLL
    for (int v = 0; v < kVectors<Vector>; ++v) {
      load(x + j * kTile, v, scaled[v]);
      scaled[v] = (lane[v] == number ? zero + 1.0f : scaled[v]) * inverse;
    }
    for (int r = j + 1; r < kTile; ++r) {
      const float factor = x[j * kTile + r];
      BINCOMM_UNROLL
      for (int v = 0; v < kVectors<Vector>; ++v) {
        Vector row;
        load(x + r * kTile, v, row);
        row = (lane[v] == number ? zero : row) - factor * scaled[v];
        store(row, x + r * kTile, v);
      }
    }
  }
  for (int r = 0; r < kTile; ++r) {
    const float root = -1.0f / std::sqrt(clamped_pivot(pivots[r]));
    const float number = static_cast<float>(r);
    BINCOMM_UNROLL
    for (int v = 0; v < kVectors<Vector>; ++v) {
      Vector row;
      load(x + r * kTile, v, row);
      row = lane[v] < number ? row * root : (lane[v] == number ? zero + root : zero);
      store(row, x + r * kTile, v);
    }
  }
}

BINCOMM_CLONES void eliminate(float* x, float* pivots) { BINCOMM_WITH_VECTOR(eliminate_by<Vector>(x, pivots)) }

BINCOMM_CLONES void transpose(const float* x, float* out) {
  for (int r = 0; r < kTile; ++r) {
    for (int c = 0; c < kTile; ++c) out[c * kTile + r] = x[r * kTile + c];
  }
}

// ---- Matrices

// Sides of a square matrix in elements and tiles, the last of which may be cut.
struct Side {
  int64_t size, tiles;

  explicit Side(int64_t size) : size(size), tiles((size + kTile - 1) / kTile) {}
  int64_t inside(int64_t tile) const { return std::min<int64_t>(kTile, size - tile * kTile); }
  bool cut() const { return size % kTile != 0; }
  int64_t elements() const { return size * size; }
  int64_t padded_elements() const { return tiles * tiles * kTileSize; }
  int64_t offset(int64_t i, int64_t j) const { return (i * tiles + j) * kTileSize; }
};

void copy(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * to_stride, from + r * from_stride, columns * sizeof(float));
}

// Between full tiles and cut ones, which have the same order and hold only the inside of the matrix.
void cut_tiles(const Side& side, const float* tiles, float* cut) {
  for (int64_t i = 0; i < side.tiles; ++i) {
    for (int64_t j = 0; j < side.tiles; ++j) {
      const int64_t rows = side.inside(std::min(i, j)), columns = side.inside(std::max(i, j));
      copy(tiles + side.offset(i, j), kTile, rows, columns, cut, columns);
      cut += rows * columns;
    }
  }
}

void pad_tiles(const Side& side, const float* cut, float* tiles) {
  for (int64_t i = 0; i < side.tiles; ++i) {
    for (int64_t j = 0; j < side.tiles; ++j) {
      const int64_t rows = side.inside(std::min(i, j)), columns = side.inside(std::max(i, j));
      float* tile = tiles + side.offset(i, j);
      std::fill(tile, tile + kTileSize, 0.0f);
      copy(cut, columns, rows, columns, tile, kTile);
      cut += rows * columns;
    }
  }
}

// Uninitialized memory that begins with a cache line.
struct Free {
  void operator()(float* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<float[], Free>;

Memory memory_of(int64_t elements) {
  return Memory(static_cast<float*>(::operator new(elements * sizeof(float), std::align_val_t(64))));
}

// Calls work(first, last) for ranges of matrices: one at a time for as many as keep all threads busy, and the rest
// together, whose tiles the threads share. (parallel_for inside of parallel_for stays on its thread.)
template <class Work>
void for_matrices(int64_t matrices, const Side& side, const Work& work) {
  if (side.tiles == 0) return;
  const int64_t products = side.tiles * side.tiles * side.tiles / 3 + 2 * side.tiles;
  const int64_t shared = side.tiles < kSharedTiles ? 0 : matrices % torch::stable::get_num_threads();
  const int64_t grain = (kTaskProducts + products - 1) / products;
  torch::stable::parallel_for(0, matrices - shared, grain, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) work(v, v + 1);
  });
  if (shared > 0) work(matrices - shared, matrices);
}

// Calls work(v, i) for all i from first to last and all matrices v; each call computes `products` products of tiles.
template <class Work>
void for_tiles(int64_t matrices, int64_t first, int64_t last, int64_t products, const Work& work) {
  const int64_t count = last - first;
  const int64_t grain = (kTaskProducts + products - 1) / std::max<int64_t>(1, products);  // 0 where an input is empty
  torch::stable::parallel_for(0, matrices * count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) work(task / count, first + task % count);
  });
}

struct Pivots {
  double log = 0.0;
  float smallest = std::numeric_limits<float>::infinity();
  int32_t clamped = 0;

  void add(const float* pivots, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      smallest = pivots[j] < smallest || pivots[j] != pivots[j] ? pivots[j] : smallest;
      clamped += pivots[j] < 1.0f;
    }
    for (int64_t j = 0; j < count; j += 4) {  // four at a time: their product never overflows
      double product = 1.0;
      for (int64_t l = j; l < std::min(j + 4, count); ++l) product *= clamped_pivot(pivots[l]);
      log += std::log(product);
    }
  }
};

// Tile (i, j), i <= j, of I + A.
void read_tile(const float* a, const Side& side, int64_t i, int64_t j, float* tile) {
  const int64_t rows = side.inside(i), columns = side.inside(j);
  if (rows < kTile || columns < kTile) std::fill(tile, tile + kTileSize, 0.0f);
  copy(a + i * kTile * side.size + j * kTile, side.size, rows, columns, tile, kTile);
  if (i == j) {
    for (int r = 0; r < kTile; ++r) tile[r * kTile + r] += 1.0f;
  }
}

void write_tile(const float* tile, const Side& side, int64_t i, int64_t j, float* matrix) {
  copy(tile, kTile, side.inside(i), side.inside(j), matrix + (i * side.size + j) * kTile, side.size);
}

// Factors `count` consecutive matrices A.
void factor(const float* a, const Side& side, int64_t count, float* factors, Pivots* pivots) {
  Memory memory = side.cut() ? memory_of(count * side.padded_elements()) : nullptr;
  float* all = memory ? memory.get() : factors;

  const auto diagonal_tile = [&](int64_t v, int64_t k) {
    float* u = all + v * side.padded_elements();
    float* tile = u + side.offset(k, k);
    read_tile(a + v * side.elements(), side, k, k, tile);
    subtract_transposed_products(u + side.offset(k, 0), u + side.offset(k, 0), k, tile);
    float tile_pivots[kTile];
    eliminate(tile, tile_pivots);
    pivots[v].add(tile_pivots, side.inside(k));
  };
  for_tiles(count, 0, 1, 1, diagonal_tile);
  for (int64_t k = 0; k + 1 < side.tiles; ++k) {
    for_tiles(count, k + 1, side.tiles, k + 1, [&](int64_t v, int64_t i) {
      float* u = all + v * side.padded_elements();
      alignas(64) float c[kTileSize];
      read_tile(a + v * side.elements(), side, k, i, c);
      subtract_transposed_products(u + side.offset(k, 0), u + side.offset(i, 0), k, c);
      triangular_product(u + side.offset(k, k), c, u + side.offset(i, k));
      std::memcpy(u + side.offset(k, i), u + side.offset(i, k), kTileSize * sizeof(float));
      if (i == k + 1) diagonal_tile(v, i);  // its inputs are complete, and the next step needs it first
    });
  }
  if (memory) {
    for_tiles(count, 0, 1, 1, [&](int64_t v, int64_t) {
      cut_tiles(side, all + v * side.padded_elements(), factors + v * side.elements());
    });
  }
}

// Inverts `count` consecutive matrices, given by their factors.
void invert(const float* factors, const Side& side, int64_t count, float* inverses) {
  Memory memory = memory_of(count * side.padded_elements());
  Memory padded = side.cut() ? memory_of(count * side.padded_elements()) : nullptr;
  if (padded) {
    for_tiles(count, 0, 1, 1, [&](int64_t v, int64_t) {
      pad_tiles(side, factors + v * side.elements(), padded.get() + v * side.padded_elements());
    });
  }
  const float* all = padded ? padded.get() : factors;

  // M_kj is stored at (j, k): columns are contiguous.
  const auto diagonal_tile = [&](int64_t v, int64_t i) {
    const float* u = all + v * side.padded_elements();
    const float* minus_w = u + side.offset(i, i);
    float* m = memory.get() + v * side.padded_elements();
    float* tile = m + side.offset(i, i);
    alignas(64) float c[kTileSize];
    for (int e = 0; e < kTileSize; ++e) c[e] = -minus_w[e];
    subtract_products(u + side.offset(i, i + 1), m + side.offset(i, i + 1), side.tiles - 1 - i, c);
    transposed_triangular_product(minus_w, c, tile);
    for (int r = 0; r < kTile; ++r) {
      for (int s = 0; s < r; ++s) tile[r * kTile + s] = tile[s * kTile + r];
    }
    write_tile(tile, side, i, i, inverses + v * side.elements());
  };
  for (int64_t i = side.tiles - 2; i >= 0; --i) {
    for_tiles(count, i + 1, side.tiles, side.tiles - i, [&](int64_t v, int64_t j) {
      if (j == i + 1) diagonal_tile(v, j);  // depends on all of the previous step, and only this thread needs it
      const float* u = all + v * side.padded_elements();
      float* m = memory.get() + v * side.padded_elements();
      alignas(64) float c[kTileSize] = {};
      subtract_products(u + side.offset(i, i + 1), m + side.offset(j, i + 1), side.tiles - 1 - i, c);
      transposed_triangular_product(u + side.offset(i, i), c, m + side.offset(j, i));
      transpose(m + side.offset(j, i), m + side.offset(i, j));
      write_tile(m + side.offset(j, i), side, i, j, inverses + v * side.elements());
      write_tile(m + side.offset(i, j), side, j, i, inverses + v * side.elements());
    });
  }
  for_tiles(count, 0, 1, side.tiles, diagonal_tile);
}

// alpha z^T z, or alpha z z^T `of_images`. z is stored as tiles whose rows are the dimension of the sum; only products
// of tiles on and above the diagonal are computed, half of a full product of matrices.
std::tuple<Tensor, Tensor> coding_rate_gram(Tensor logits_, double alpha, bool of_images) {
  STD_TORCH_CHECK(logits_.dim() == 3, "logits: expected three dimensions");
  const Tensor logits = unit_stride(logits_);
  const Storage storage = storage_of(logits.scalar_type(), "logits");
  const int64_t views = logits.size(0), images = logits.size(1), bits = logits.size(2);
  const int64_t image_tiles = Side(images).tiles, bit_tiles = Side(bits).tiles;
  const Side side(of_images ? images : bits);
  const int64_t depth = of_images ? bit_tiles : image_tiles;
  Tensor out = torch::stable::new_empty(logits, {views, side.size, side.size}, ScalarType::Float);
  Tensor reciprocal = torch::stable::new_empty(logits, {views, images}, ScalarType::Float);
  const void* in = logits.const_data_ptr();
  float* gram = static_cast<float*>(out.mutable_data_ptr());
  float* reciprocals = static_cast<float*>(reciprocal.mutable_data_ptr());
  Memory memory = memory_of(views * image_tiles * bit_tiles * kTileSize);
  // The tiles of one i are consecutive, in the order of the sum.
  const auto tile_of = [&](int64_t v, int64_t i, int64_t k) {
    return memory.get() + ((v * side.tiles + i) * depth + k) * kTileSize;
  };

  for_tiles(views, 0, image_tiles, bit_tiles, [&](int64_t v, int64_t block) {
    const int64_t first = block * kTile, rows = std::min<int64_t>(kTile, images - first);
    std::vector<float> z(kTile * bit_tiles * kTile, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t offset = v * logits.stride(0) + (first + r) * logits.stride(1);
      reciprocals[v * images + first + r] = unit_row(storage, in, offset, bits, z.data() + r * bit_tiles * kTile);
    }
    for (int64_t b = 0; b < bit_tiles; ++b) {
      const float* from = z.data() + b * kTile;
      if (of_images) {
        alignas(64) float tile[kTileSize];
        copy(from, bit_tiles * kTile, kTile, kTile, tile, kTile);
        transpose(tile, tile_of(v, block, b));
      } else {
        copy(from, bit_tiles * kTile, kTile, kTile, tile_of(v, b, block), kTile);
      }
    }
  });
  for_tiles(views, 0, side.tiles * (side.tiles + 1) / 2, depth, [&](int64_t v, int64_t pair) {
    int64_t j = 0, i = pair;
    while (i > j) i -= ++j;
    alignas(64) float c[kTileSize] = {};
    alignas(64) float mirrored[kTileSize];
    subtract_transposed_products(tile_of(v, i, 0), tile_of(v, j, 0), depth, c);
    scale(c, static_cast<float>(-alpha), kTileSize, c);
    write_tile(c, side, i, j, gram + v * side.elements());
    transpose(c, mirrored);
    if (i != j) write_tile(mirrored, side, j, i, gram + v * side.elements());
  });
  return {out, reciprocal};
}

Side side_of(const Tensor& matrices, const char* argument) {
  STD_TORCH_CHECK(matrices.dim() == 3 && matrices.size(1) == matrices.size(2), argument, ": expected square matrices");
  STD_TORCH_CHECK(matrices.scalar_type() == ScalarType::Float, argument, ": expected float32");
  return Side(matrices.size(1));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> coding_rate_factor(Tensor gram_) {
  const Side side = side_of(gram_, "gram");
  const Tensor gram = torch::stable::contiguous(gram_);
  const int64_t matrices = gram.size(0);
  Tensor rate = torch::stable::new_empty(gram, {matrices});
  Tensor factors = torch::stable::new_empty(gram, {matrices, side.size, side.size});
  Tensor smallest = torch::stable::new_empty(gram, {matrices});
  Tensor clamped = torch::stable::new_empty(gram, {matrices}, ScalarType::Int);
  const float* a = static_cast<const float*>(gram.const_data_ptr());
  float* u = static_cast<float*>(factors.mutable_data_ptr());

  std::vector<Pivots> pivots(matrices);
  for_matrices(matrices, side, [&](int64_t first, int64_t last) {
    factor(a + first * side.elements(), side, last - first, u + first * side.elements(), pivots.data() + first);
  });
  for (int64_t v = 0; v < matrices; ++v) {
    static_cast<float*>(rate.mutable_data_ptr())[v] = static_cast<float>(0.5 * pivots[v].log);
    static_cast<float*>(smallest.mutable_data_ptr())[v] = pivots[v].smallest;
    static_cast<int32_t*>(clamped.mutable_data_ptr())[v] = pivots[v].clamped;
  }
  return {rate, factors, smallest, clamped};
}

Tensor coding_rate_inverse(Tensor factors_) {
  const Side side = side_of(factors_, "factor");
  const Tensor factors = torch::stable::contiguous(factors_);
  const int64_t matrices = factors.size(0);
  Tensor inverses = torch::stable::new_empty(factors, {matrices, side.size, side.size});
  const float* u = static_cast<const float*>(factors.const_data_ptr());
  float* m = static_cast<float*>(inverses.mutable_data_ptr());
  for_matrices(matrices, side, [&](int64_t first, int64_t last) {
    invert(u + first * side.elements(), side, last - first, m + first * side.elements());
  });
  return inverses;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bincomm, CPU, m) {
  m.impl("coding_rate_rows", TORCH_BOX(&coding_rate_rows));
  m.impl("coding_rate_gram", TORCH_BOX(&coding_rate_gram));
  m.impl("coding_rate_factor", TORCH_BOX(&coding_rate_factor));
  m.impl("coding_rate_inverse", TORCH_BOX(&coding_rate_inverse));
  m.impl("coding_rate_gradient", TORCH_BOX(&coding_rate_gradient));
}

}  // namespace bincomm
