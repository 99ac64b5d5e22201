// Device code of the coding rate R = 1/2 logdet(I + alpha G) and its gradient. The tests also run this file on a CPU.
//
// The rows of logits a are z = a / |a|. G is z^T z (bits by bits) or z z^T (images by images): both have the same
// determinant, and the inverse of either gives the gradient:
//
//     dR/dz = alpha z (I + alpha z^T z)^-1 = alpha (I + alpha z z^T)^-1 z
//
// All work is done in tiles of 32 x 32. A warp multiplies two of them; `sweep` inverts a matrix of them in shared
// memory, with one block or a cluster of blocks per matrix, and computes its determinant on the way. A matrix that is
// larger than that is swept part by part: `sweep` of a part of its diagonal, `panel`, `update`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "device.cuh"

namespace bincomm {

constexpr int kTile = kWarp;
constexpr int kTileSize = kTile * kTile;
constexpr int kSweepThreads = 512;
constexpr int kProductWarps = 8;
constexpr int kWideWarps = 4;          // of a block that computes 2 x 2 tiles
constexpr int kWide = 2 * kTile;       // their rows and columns
constexpr double kNormEps = 1e-12;  // smallest norm a row is divided by, as in torch.nn.functional.normalize

// ---- Hardware functions, and their replacements on a CPU

#ifdef __CUDACC__

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, float* to) { *to = x; }
__device__ __forceinline__ void narrow(float x, __half* to) { *to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
// 1 / x for 1 <= x < 2^126, to one unit in the last place, without the special cases of a division.
__device__ __forceinline__ float reciprocal_of(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ float largest(float) { return 3.40282347e38f; }
__device__ __forceinline__ float largest(__half) { return 65504.0f; }
__device__ __forceinline__ float largest(__nv_bfloat16) { return 3.38953139e38f; }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

constexpr bool kHasClusters = true;

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same address in the shared memory of another block of the cluster.
__device__ __forceinline__ float* of_block(float* own, unsigned rank) {
  uint64_t remote;
  asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(own), "r"(rank));
  return reinterpret_cast<float*>(remote);
}

#else  // Architectures without clusters launch only sweep<1>, which calls none of these.

constexpr bool kHasClusters = false;

__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_barrier() { __trap(); }
__device__ __forceinline__ float* of_block(float* own, unsigned) { return own; }

#endif
#else

inline float widen(float x) { return x; }
inline void narrow(float x, float* to) { *to = x; }
inline float reciprocal_of(float x) { return std::nextafter(1.0f / x, 2.0f); }  // an error as on a GPU
inline float largest(float) { return 3.40282347e38f; }
constexpr bool kHasClusters = true;
inline unsigned cluster_rank() { return fibers::cluster_rank(); }
inline void cluster_barrier(fibers::Where where = fibers::Where::current()) { fibers::cluster_barrier(where); }
inline float* of_block(float* own, unsigned rank) { return fibers::shared_of(rank) + (own - fibers::shared()); }

#endif

// ---- Tiles

__host__ __device__ constexpr int64_t tiles_of(int64_t side) { return (side + kTile - 1) / kTile; }

// Offset of float4 number `four` of row `row`. The exclusive or spreads the float4 that a quarter of a warp reads at
// once, in rows 4 i + a or neighboring rows, over all banks.
__device__ __forceinline__ int offset_of(int row, int four) {
  return kTile * row + ((four ^ row ^ (row >> 3)) & 7) * 4;
}
__device__ __forceinline__ int element(int row, int column) { return offset_of(row, column >> 2) + (column & 3); }
__device__ __forceinline__ float4& four_of(float* tile, int row, int four) {
  return *reinterpret_cast<float4*>(tile + offset_of(row, four));
}
__device__ __forceinline__ float4 four_of(const float* tile, int row, int four) {
  return *reinterpret_cast<const float4*>(tile + offset_of(row, four));
}

// A thread's lane, the lower three bits of its place in the warp turned: then in a product the threads n and n ^ 1 read
// the same y, n and n ^ 2 the same x. Where that is so, the hardware serves 16 bytes for every thread in two turns rather
// than four. `sweep` has no register left for it.
__device__ constexpr int lane_of(int thread) { return (thread & 24) | (thread << 2 & 4) | (thread >> 1 & 3); }

// A warp's 32 x 32 product: lane l holds rows 4 (l / 4) + a, a < 4, and columns 16 h + 4 (l % 4) + b, h < 2, b < 4.
struct Product {
  float value[4][8] = {};

  // Adds sum over s of X(row, s) Y(column, s). A tile is stored by rows, T[row][s], or transposed, T[s][row].
  template <bool kXByRow, bool kYByRow>
  __device__ __forceinline__ void add(const float* x_tile, const float* y_tile, int lane) {
    const float* const shared = shared_memory();
    const int x_start = start<kXByRow>(static_cast<int>(x_tile - shared), lane >> 2);
    const int y_start = start<kYByRow>(static_cast<int>(y_tile - shared), lane & 3);
#pragma unroll 1
    for (int eight = 0; eight < kTile / 8; ++eight) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[4][4], y[4][4];
        load<kXByRow>(shared, x_start, eight, half, 0, x);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          load<kYByRow>(shared, y_start, eight, half, h, y);
#pragma unroll
          for (int s = 0; s < 4; ++s) {
#pragma unroll
            for (int a = 0; a < 4; ++a) {
#pragma unroll
              for (int b = 0; b < 4; ++b) value[a][4 * h + b] = fmaf(x[a][s], y[b][s], value[a][4 * h + b]);
            }
          }
        }
      }
    }
  }

  // tile <- keep * tile + sign * product; a tile that is not kept is not read.
  template <bool kKeep>
  __device__ __forceinline__ void store(float* tile, float sign, int lane) const {
#pragma unroll
    for (int a = 0; a < 4; ++a) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float4& to = four_of(tile, 4 * (lane >> 2) + a, 4 * h + (lane & 3));
        const float* p = &value[a][4 * h];
        const float4 old = kKeep ? to : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        to = make_float4(fmaf(sign, p[0], old.x), fmaf(sign, p[1], old.y), fmaf(sign, p[2], old.z),
                         fmaf(sign, p[3], old.w));
      }
    }
  }

 private:
  // load() reads rows 4 (group + 4 h) + i, i < 4, at s = 8 eight + 4 half + j, j < 4. `start` is the part of
  // `offset_of` that depends on the lane; the rest, except `eight`, is known when compiled: one exclusive or per load.
  template <bool kByRow>
  __device__ static __forceinline__ int start(int tile, int group) {
    return kByRow ? tile + offset_of(4 * group, 0) : tile + 4 * group;
  }
  template <bool kByRow>
  __device__ static __forceinline__ void load(const float* shared, int start, int eight, int half, int h,
                                              float (&to)[4][4]) {
    const int base = kByRow ? start ^ (8 * eight) : (start + 8 * kTile * eight) ^ (4 * eight);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = kByRow ? (base ^ (4 * (half ^ i ^ (2 * h)))) + kTile * (16 * h + i)
                            : (base ^ (4 * ((4 * half + i) ^ (4 * h)))) + kTile * (4 * half + i);
      const float4 f = *reinterpret_cast<const float4*>(shared + at);
      const float part[4] = {f.x, f.y, f.z, f.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) (kByRow ? to[i][j] : to[j][i]) = part[j];
    }
  }
};

// ---- Determinant and inverse
//
// The symmetric sweep operator, block by block. With D the inverse of the block (k, k), and all i, j other than k,
//
//     A_ij <- A_ij - A_ik D A_kj        A_ik <- A_ik D        A_kk <- -D
//
// and after the last k, A holds minus its inverse. The block (k, k) at step k is the Schur complement that a Cholesky
// factorization has there, so the pivots are the same; the work is the same as factor plus inverse, n^3
// multiplications, but each step has all of the matrix to work on, in place, and there are as many steps as blocks.
// With D = W^T W, W the inverse of the Cholesky factor of the block, one rule does all three:
//
//     R_i = A_ik W^T,   R_k = -W^T;   A_ij <- (i, j != k: A_ij) - R_i R_j^T
//
// Only the tiles with i >= j are stored. A panel tile is R_i^T; its rows are indices of the block (k, k).

// Tiles (i, j), i >= j, distributed over kSide x kSide blocks: (i, j) belongs to block (i % kSide, j % kSide).
template <int kSide>
struct Deal {
  int p, q;  // this block

  __device__ explicit Deal(unsigned rank) : p(rank / kSide), q(rank % kSide) {}
  __device__ static unsigned rank_of(int p, int q) { return p * kSide + q; }
  __device__ static int of(int i) { return i % kSide; }
  // Number of this block's tiles in its first `rows` rows, which is the index of the first tile after them.
  __device__ int before(int rows) const { return q <= p ? rows * (rows + 1) / 2 : rows * (rows - 1) / 2; }
  __device__ int count(int tiles) const { return before((tiles - p + kSide - 1) / kSide); }
  __device__ int slot(int i, int j) const { return before(i / kSide) + j / kSide; }
};

// Shared memory of a block of `sweep`, in floats.
template <int kSide>
struct SweepMemory {
  int rows;  // of tiles, at most, in a block

  __host__ __device__ constexpr explicit SweepMemory(int tiles) : rows((tiles + kSide - 1) / kSide) {}
  __host__ __device__ constexpr int panels() const { return rows * (rows + 1) / 2 * kTileSize; }
  // A single block stores R_i in place of A_ik.
  __host__ __device__ constexpr int factors() const { return panels() + (kSide > 1 ? 2 * rows * kTileSize : 0); }
  __host__ __device__ constexpr int line() const { return factors() + 2 * kTileSize; }
  __host__ __device__ constexpr int pivots() const { return line() + 2 * kTile; }
  __host__ __device__ constexpr int size(int tiles) const { return pivots() + tiles * kTile; }
};

// Available to a block: 163 KiB on sm_80, 99 KiB on sm_86, sm_89 and sm_120, 227 KiB on sm_90 and sm_100.
template <int kSide>
constexpr bool fits(int n, int kibibytes) {
  return SweepMemory<kSide>(n / kTile).size(n / kTile) * sizeof(float) <= kibibytes * 1024u;
}
static_assert(fits<1>(256, 163) && fits<1>(192, 99) && fits<2>(256, 99));

// -W for the inverse W of a tile's Cholesky factor, and its pivots, by one warp: row `lane` of the tile is in
// registers. Gauss-Jordan elimination: at step j, x[c] is the Schur complement for c > j, the inverse for c < j.
__device__ __forceinline__ void factor(const float* tile, float* minus_w, float* line, float* pivots, int lane) {
  float x[kTile];
#pragma unroll
  for (int four = 0; four < kTile / 4; ++four) {
    const float4 f = four_of(tile, lane, four);
    x[4 * four] = f.x, x[4 * four + 1] = f.y, x[4 * four + 2] = f.z, x[4 * four + 3] = f.w;
  }
  float own = 1.0f;
  float diagonal = __shfl_sync(kEveryLane, x[0], 0);
#pragma unroll
  for (int j = 0; j < kTile; ++j) {
    float* shown = line + (j & 1) * kTile;  // two buffers in turn: the next row may be written while this one is read
    if (lane == j) {
#pragma unroll
      for (int c = 0; c < kTile; c += 4) {
        *reinterpret_cast<float4*>(shown + c) = make_float4(x[c], x[c + 1], x[c + 2], x[c + 3]);
      }
    }
    __syncwarp();
    // Each pivot of identity plus positive semi-definite is at least 1: less is rounding. NaN stays NaN.
    const float pivot = diagonal < 1.0f ? 1.0f : diagonal;
    if (lane == j) own = diagonal;
    const float m = lane > j ? x[j] * reciprocal_of(pivot) : 0.0f;
#pragma unroll
    for (int c = 0; c < kTile; c += 4) {
      const float4 f = *reinterpret_cast<const float4*>(shown + c);
      const float v[4] = {f.x, f.y, f.z, f.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (c + i != j) x[c + i] = fmaf(-m, v[i], x[c + i]);
      }
    }
    if (lane > j) x[j] = -m;
    // The next pivot, whose reciprocal then is there before its row.
    if (j + 1 < kTile) diagonal = __shfl_sync(kEveryLane, x[j + 1], j + 1);
  }
  const float scale = 1.0f / sqrtf(own < 1.0f ? 1.0f : own);
#pragma unroll
  for (int c = 0; c < kTile; ++c) x[c] = c < lane ? -scale * x[c] : (c == lane ? -scale : 0.0f);
#pragma unroll
  for (int four = 0; four < kTile / 4; ++four) {
    four_of(minus_w, lane, four) = make_float4(x[4 * four], x[4 * four + 1], x[4 * four + 2], x[4 * four + 3]);
  }
  pivots[lane] = own;
}

// Whole matrices, or a part of the diagonal of larger ones: their rows and columns k to k + n.
struct SweepArguments {
  const float* from;  // (matrices, side, side): alpha G, without the identity, if k = 0; else what `update` left
  float* to;          // of whole matrices (matrices, n, n), (I + alpha G)^-1; of a part (matrices, part, part), W, with
                      // zeros, to the last tile of the n rows
  float* rate;        // (matrices,)
  float* smallest;    // (matrices,): the smallest pivot, before it was clamped to 1
  int* clamped;       // (matrices,): how many were clamped to 1
  int side, part, k, n;
};

// One cluster of kSide x kSide blocks per matrix.
template <int kSide, bool kPart>
__device__ __forceinline__ void sweep(const SweepArguments& p) {
  constexpr int kBlocks = kSide * kSide;
  constexpr int kWarps = kSweepThreads / kTile;
  const int thread = threadIdx.x, lane = thread % kTile;
  // The same for all threads of a warp: taken from one, it needs fewer registers, of which a part's sweep has too few;
  // the other is slower by it, as the compiler then orders its loads.
  const int warp = kPart ? __shfl_sync(kEveryLane, thread / kTile, 0) : thread / kTile;
  const Deal<kSide> deal(kSide > 1 ? cluster_rank() : 0);
  const int tiles = (p.n + kTile - 1) / kTile;
  const SweepMemory<kSide> memory(tiles);
  float* const shared = shared_memory();
  float* const row_panel = shared + memory.panels();  // R_i^T for the rows i of this block's tiles,
  float* const column_panel = deal.p == deal.q ? row_panel : row_panel + memory.rows * kTileSize;  // and columns
  float* const line = shared + memory.line();
  float* const pivots = shared + memory.pivots();
  const int side = kPart ? p.side : p.n;
  const int k_start = kPart ? p.k : 0;
  const int64_t start = (static_cast<int64_t>(blockIdx.x / kBlocks) * side + k_start) * side + k_start;

  const auto slot = [&](int i, int j) { return shared + deal.slot(i, j) * kTileSize; };
  const auto minus_w = [&](int k) { return shared + memory.factors() + (k & 1) * kTileSize; };
  const auto panel = [&](float* panels, int i) { return panels + i / kSide * kTileSize; };
  const auto owns = [&](int i, int j) { return deal.p == deal.of(i) && deal.q == deal.of(j); };
  // R_i^T for the row i, or the column i, of a tile of this block, at step k.
  const auto r_of = [&](float* panels, int i, int k) {
    if (i == k) return minus_w(k);
    if (kSide == 1) return i > k ? slot(i, k) : slot(k, i);
    return panel(panels, i);
  };
  const auto update = [&](int i, int j, int k) {
    Product product;
    product.add<false, false>(r_of(row_panel, i, k), r_of(column_panel, j, k), lane);
    __syncwarp();  // one block alone overwrites R_i with A_ik
    if (i == k || j == k) {
      product.store<false>(slot(i, j), -1.0f, lane);
    } else {
      product.store<true>(slot(i, j), -1.0f, lane);
    }
  };
  const auto factor_block = [&](int k) {
    float* const first = kSide > 1 ? of_block(pivots, 0) : pivots;
    factor(slot(k, k), minus_w(k), line, first + k * kTile, lane);
  };
  // Distributes this block's selected tiles over the warps from `first_warp` on.
  const auto for_tiles = [&](int first_warp, const auto& selected, const auto& function) {
    int turn = first_warp;
    for (int i = deal.p; i < tiles; i += kSide) {
      for (int j = deal.q; j <= i; j += kSide) {
        if (!selected(i, j)) continue;
        if (turn == warp) function(i, j);
        turn = turn + 1 < kWarps ? turn + 1 : first_warp;
      }
    }
  };
  const auto all = [](int, int) { return true; };
  // W of all rows is, in the rows of the tile k, -R_j^T where j < k, and W of this tile where j = k.
  // All warps store some rows of each tile.
  const auto store_factor = [&](int k) {
    for (int i = deal.p; i < tiles; i += kSide) {
#pragma unroll 1
      for (int j = deal.q; j <= i; j += kSide) {
        if (i != k && j != k) continue;
        const float* const tile = j == k ? r_of(row_panel, i, k) : r_of(column_panel, j, k);
        const int column = i + j - k;
        const int64_t row = blockIdx.x / kBlocks * p.part + k * kTile;
        float* const to = p.to + row * p.part + column * kTile + lane;
#pragma unroll
        for (int turn = 0; turn < kTile / kWarps; ++turn) {
          const int r = warp + turn * kWarps;
          to[r * p.part] = column <= k ? -tile[element(r, lane)] : 0.0f;
        }
      }
    }
  };

  for_tiles(0, all, [&](int i, int j) {
    float* const tile = slot(i, j);
    const int column = j * kTile + lane;
#pragma unroll 8
    for (int r = 0; r < kTile; ++r) {
      const int row = i * kTile + r;
      const bool inside = row < p.n && column < p.n;
      const float g = inside ? p.from[start + static_cast<int64_t>(row) * side + column] : 0.0f;
      const bool is_stored = kPart && inside && p.k > 0;  // with the identity
      tile[element(r, lane)] = g + (row == column && !is_stored ? 1.0f : 0.0f);
    }
  });
  __syncthreads();
  if (owns(0, 0) && warp == 0) factor_block(0);

  for (int k = 0; k < tiles; ++k) {
    // All blocks have updated their tiles, and the block that owns (k, k) has W.
    if (kSide > 1) {
      cluster_barrier();
    } else {
      __syncthreads();
    }
    const int turn = deal.of(k);
    const bool in_row = deal.p == turn, in_column = deal.q == turn;  // whether this block has tiles (k, j), (i, k)
    if (kSide > 1) {
      if (in_row != in_column) {
        const float* remote = of_block(minus_w(k), deal.rank_of(turn, turn));
        for (int e = 4 * thread; e < kTileSize; e += 4 * kSweepThreads) {
          *reinterpret_cast<float4*>(minus_w(k) + e) = *reinterpret_cast<const float4*>(remote + e);
        }
      }
      __syncthreads();
    }

    // R_i^T = W A_ki.
    for_tiles(
        0, [&](int i, int j) { return (i == k) != (j == k); },
        [&](int i, int j) {
          Product product;
          if (j == k) {
            product.add<true, true>(minus_w(k), slot(i, k), lane);
          } else {
            product.add<true, false>(minus_w(k), slot(k, j), lane);
          }
          __syncwarp();  // one block alone overwrites A_ik with R_i
          product.store<false>(j == k ? r_of(row_panel, i, k) : r_of(column_panel, j, k), -1.0f, lane);
        });
    if (kSide > 1) {
      cluster_barrier();
      // From the block that computed it: R_i with i > k in the row panel of the block of (i, k), with i < k in the
      // column panel of the block of (k, i). No block reads from another one what that one has fetched.
      const auto fetch = [&](float* panels, int of_this) {
        for (int i = of_this; i < tiles; i += kSide) {
          const unsigned maker = i > k ? deal.rank_of(of_this, turn) : deal.rank_of(turn, of_this);
          if (i == k || maker == deal.rank_of(deal.p, deal.q)) continue;
          const bool in_rows = i > k || of_this == turn;
          float* const source = row_panel + (in_rows ? 0 : memory.rows * kTileSize);
          const float* remote = of_block(panel(source, i), maker);
          for (int e = 4 * thread; e < kTileSize; e += 4 * kSweepThreads) {
            *reinterpret_cast<float4*>(panel(panels, i) + e) = *reinterpret_cast<const float4*>(remote + e);
          }
        }
      };
      fetch(row_panel, deal.p);
      if (deal.p != deal.q) fetch(column_panel, deal.q);
    }
    __syncthreads();
    if constexpr (kPart) store_factor(k);

    // The next block to be factored is updated first, so that its factorization runs in parallel with other updates.
    const bool ahead = k + 1 < tiles && owns(k + 1, k + 1);
    if (ahead && warp == 0) {
      update(k + 1, k + 1, k);
      __syncwarp();
      factor_block(k + 1);
    }
    const auto is_next = [&](int i, int j) { return i == k + 1 && j == k + 1; };
    const auto has_k = [&](int i, int j) { return i == k || j == k; };
    const auto step = [&](int i, int j) { update(i, j, k); };
    if (kSide > 1) {
      for_tiles(ahead, [&](int i, int j) { return !is_next(i, j); }, step);
    } else {
      for_tiles(ahead, [&](int i, int j) { return !is_next(i, j) && !has_k(i, j); }, step);
      __syncthreads();  // R_i is no longer needed where A_ik is stored
      for_tiles(0, has_k, step);
    }
  }

  if (kSide > 1) {
    cluster_barrier();  // the pivots are complete, and no block reads another's memory after this
  } else {
    __syncthreads();
  }
  const auto store_inverse = [&](int i, int j) {
    const float* tile = slot(i, j);
#pragma unroll 8
    for (int r = 0; r < kTile; ++r) {
      const int row = i * kTile + r, column = j * kTile + lane;
      if (row < p.n && column < p.n) {
        p.to[start + static_cast<int64_t>(row) * side + column] = -tile[element(r, lane)];
      }
      const int mirrored_row = j * kTile + r, mirrored_column = i * kTile + lane;
      if (i != j && mirrored_row < p.n && mirrored_column < p.n) {
        p.to[start + static_cast<int64_t>(mirrored_row) * side + mirrored_column] = -tile[element(lane, r)];
      }
    }
  };
  if constexpr (!kPart) for_tiles(0, all, store_inverse);
  if (deal.p == 0 && deal.q == 0 && warp == 0) {
    float sum = 0.0f, smallest = INFINITY;
    int clamped = 0;
    for (int i = lane; i < p.n; i += kTile) {
      const float pivot = pivots[i];
      sum += logf(pivot < 1.0f ? 1.0f : pivot);
      clamped += pivot < 1.0f;
      smallest = pivot < smallest || pivot != pivot ? pivot : smallest;  // NaN stays
    }
    for (int step = kTile / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(kEveryLane, sum, step);
      clamped += __shfl_xor_sync(kEveryLane, clamped, step);
      const float other = __shfl_xor_sync(kEveryLane, smallest, step);
      smallest = other < smallest || other != other ? other : smallest;
    }
    if (lane == 0) {
      const int64_t matrix = blockIdx.x / kBlocks;
      if (kPart && p.k > 0) {  // the parts before this one
        sum += 2 * p.rate[matrix];
        clamped += p.clamped[matrix];
        const float before = p.smallest[matrix];
        smallest = before < smallest || before != before ? before : smallest;
      }
      p.rate[matrix] = sum / 2;
      p.smallest[matrix] = smallest;
      p.clamped[matrix] = clamped;
    }
  }
}

// ---- Products of more than a tile

// Rows of a matrix in memory; zero beyond its ends.
struct Rows {
  const float* data;
  int stride, rows, columns;

  __device__ __forceinline__ void fill(float* tile, int row, int column, int lane) const {
    const float* const from = data + static_cast<int64_t>(row) * stride + column;
    // Then rows are aligned, as all that is filled from here begins at a multiple of four: load 16 bytes at once.
    if (stride % 4 == 0 && row + kTile <= rows && column + kTile <= columns) {
      const float* four = from + static_cast<int64_t>(lane / 8) * stride + 4 * (lane % 8);
#pragma unroll
      for (int r = lane / 8; r < kTile; r += 4, four += 4 * static_cast<int64_t>(stride)) {
        four_of(tile, r, lane % 8) = *reinterpret_cast<const float4*>(four);
      }
      return;
    }
    const int inside = column + lane < columns ? rows - row : 0;
#pragma unroll 8
    for (int r = 0; r < kTile; ++r) {
      tile[element(r, lane)] = r < inside ? from[static_cast<int64_t>(r) * stride + lane] : 0.0f;
    }
  }
};

// A block's 2 x 2 tiles of a product: a warp fills one of the four tiles that a step multiplies. `x` and `y` fill a
// tile, of the first or the second rows or columns, at `s`; if they are the `same` matrix, x alone. Returns the place in
// shared memory of the warp's own tile (warp / 2, warp % 2), which no other warp reads.
template <bool kXByRow, bool kYByRow, typename FillX, typename FillY>
__device__ __forceinline__ float* wide_product(int from, int to, bool same, const FillX& x, const FillY& y, int lane) {
  const int warp = threadIdx.x / kTile;
  float* tiles = shared_memory();  // two sets in turn: one may be filled while another warp still reads the other
  float* others = tiles + 4 * kTileSize;
  Product product;
  for (int s = from; s < to; s += kTile) {
    if (warp < 2) {
      x(tiles + warp * kTileSize, warp, s);
    } else if (!same) {
      y(tiles + warp * kTileSize, warp - 2, s);
    }
    __syncthreads();  // all four are filled
    product.add<kXByRow, kYByRow>(tiles + warp / 2 * kTileSize, tiles + (warp % 2 + (same ? 0 : 2)) * kTileSize, lane);
    float* const read = tiles;
    tiles = others, others = read;
  }
  float* const own = tiles + warp * kTileSize;
  product.store<false>(own, 1.0f, lane);
  __syncwarp();
  return own;
}

// ---- A matrix that is swept part by part
//
// With W of a part k of the diagonal, from `sweep`, the rule is that of the tiles. All elements are stored, not only
// those below the diagonal.

struct PanelArguments {
  const float* from;    // (matrices, side, side): alpha G if k = 0; else what `update` left
  const float* factor;  // (matrices, part, part): W
  float* panels;        // (matrices, side, part): R
  int side, part, k;
  int width;  // of the part, in whole tiles
};

// R_i = A_ik W^T, and R_k = -W^T.
__device__ __forceinline__ void panel(const PanelArguments& p) {
  const int warp = threadIdx.x / kTile, lane = lane_of(threadIdx.x);
  const int down = (p.side + kWide - 1) / kWide, across = (p.width + kWide - 1) / kWide;
  const int64_t matrix = blockIdx.x / (down * across);
  const int row = blockIdx.x / across % down * kWide, column = blockIdx.x % across * kWide;
  const int own_row = row + warp / 2 * kTile, own_column = column + warp % 2 * kTile;
  const Rows w{p.factor + matrix * p.part * p.part, p.part, p.width, p.width};
  const bool in_part = row >= p.k && row < p.k + p.width;
  const float* tile;
  if (in_part) {
    float* const transposed = shared_memory() + warp * kTileSize;
    w.fill(transposed, own_column, own_row - p.k, lane);
    __syncwarp();
    tile = transposed;
  } else {
    const Rows a{p.from + matrix * p.side * p.side + p.k, p.side, p.side, p.side - p.k};
    tile = wide_product<true, true>(
        0, p.width < column + kWide ? p.width : column + kWide, false,  // W's other elements are zero
        [&](float* to, int part, int s) { a.fill(to, row + part * kTile, s, lane); },
        [&](float* to, int part, int s) { w.fill(to, column + part * kTile, s, lane); }, lane);
  }
  if (own_column >= p.width) return;
  float* const to = p.panels + (matrix * p.side + own_row) * p.part + own_column + lane;
#pragma unroll 4
  for (int r = 0; r < kTile; ++r) {
    if (own_row + r < p.side) {
      to[static_cast<int64_t>(r) * p.part] = in_part ? -tile[element(lane, r)] : tile[element(r, lane)];
    }
  }
}

struct UpdateArguments {
  const float* from;    // (matrices, side, side): alpha G if k = 0; else what `update` left
  float* to;            // (matrices, side, side): may be `from`
  const float* panels;  // (matrices, side, part): R
  int side, part, k, width;
};

// A_ij <- (i, j not in the part: A_ij) - R_i R_j^T; after the last part the negative of that, the inverse.
__device__ __forceinline__ void update(const UpdateArguments& p) {
  const int warp = threadIdx.x / kTile, lane = lane_of(threadIdx.x);
  const int down = (p.side + kWide - 1) / kWide, pairs = down * (down + 1) / 2;
  const int64_t matrix = blockIdx.x / pairs;
  int i = 0, j = blockIdx.x % pairs;
  while (j > i) j -= ++i;
  const int row = i * kWide, column = j * kWide;
  const bool row_in_part = row >= p.k && row < p.k + p.width;
  const bool column_in_part = column >= p.k && column < p.k + p.width;
  // R_k is zero where W is, before the diagonal.
  const int first = row_in_part ? row - p.k : (column_in_part ? column - p.k : 0);
  const Rows r_of_all{p.panels + matrix * p.side * p.part, p.part, p.side, p.width};
  float* const tile = wide_product<true, true>(
      first, p.width, i == j, [&](float* to, int part, int s) { r_of_all.fill(to, row + part * kTile, s, lane); },
      [&](float* to, int part, int s) { r_of_all.fill(to, column + part * kTile, s, lane); }, lane);
  const int own_row = row + warp / 2 * kTile, own_column = column + warp % 2 * kTile;
  const int64_t start = matrix * p.side * p.side;
  const bool keep = !row_in_part && !column_in_part;
  const float sign = p.k + p.part < p.side ? 1.0f : -1.0f;
#pragma unroll 8
  for (int r = 0; r < kTile; ++r) {
    const int64_t at = start + static_cast<int64_t>(own_row + r) * p.side + own_column + lane;
    if (own_row + r >= p.side || own_column + lane >= p.side) continue;
    const float identity = p.k == 0 && own_row + r == own_column + lane ? 1.0f : 0.0f;
    const float value = sign * ((keep ? p.from[at] + identity : 0.0f) - tile[element(r, lane)]);
    p.to[at] = value;
    tile[element(r, lane)] = value;
  }
  if (i == j) return;
  __syncwarp();
#pragma unroll 8
  for (int r = 0; r < kTile; ++r) {
    if (own_column + r < p.side && own_row + lane < p.side) {
      p.to[start + static_cast<int64_t>(own_column + r) * p.side + own_row + lane] = tile[element(lane, r)];
    }
  }
}

// ---- Logits

// Logits of any strides with the reciprocals of their rows' norms.
template <typename T>
struct Logits {
  const T* a;
  const float* reciprocal;  // (views, n)
  int64_t view_stride, image_stride, bit_stride;
  int n, bits;
  bool wide;  // whether 16 bytes can be loaded at once: bits are neighbors in memory, and rows aligned

  __device__ __forceinline__ float raw(int64_t view, int image, int bit) const {
    return widen(a[view * view_stride + image * image_stride + bit * bit_stride]);
  }
  __device__ __forceinline__ float z(int64_t view, int image, int bit) const {
    return raw(view, image, bit) * reciprocal[view * n + image];
  }
  // 32 images by 32 bits, zero beyond the ends.
  __device__ __forceinline__ void fill(float* tile, int64_t view, int image, int bit, int lane) const {
    const T* const from = a + view * view_stride + image * image_stride + bit * bit_stride;
    const float* const scale = reciprocal + view * n + image;
    const int images = n - image;
    if (wide && bit + kTile <= bits && images >= kTile) {
      constexpr int kWidth = 16 / sizeof(T), kLanes = kTile / kWidth;  // of a load, and that share a row
      const int part = lane % kLanes;
      const T* row = from + lane / kLanes * image_stride + part * kWidth;
      constexpr int kAtOnce = sizeof(T);  // loads in flight: a load of 16-bit logits needs twice the registers
#pragma unroll kAtOnce
      for (int r = lane / kLanes; r < kTile; r += kTile / kLanes, row += kTile / kLanes * image_stride) {
        const float4 loaded = *reinterpret_cast<const float4*>(row);
        const float z = scale[r];
        T values[kWidth];
        std::memcpy(values, &loaded, sizeof values);
#pragma unroll
        for (int w = 0; w < kWidth; w += 4) {
          four_of(tile, r, (part * kWidth + w) / 4) =
              make_float4(widen(values[w]) * z, widen(values[w + 1]) * z, widen(values[w + 2]) * z,
                          widen(values[w + 3]) * z);
        }
      }
      return;
    }
    const int inside = bit + lane < bits ? images : 0;
#pragma unroll 8
    for (int r = 0; r < kTile; ++r) {
      tile[element(r, lane)] = r < inside ? widen(from[r * image_stride + lane * bit_stride]) * scale[r] : 0.0f;
    }
  }
};

// 1 / |a|, one row per warp. In double precision no square of a float overflows or vanishes.
template <typename T>
__device__ __forceinline__ void reciprocal_norms(const Logits<T>& logits, float* reciprocal, int64_t rows) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kTile;
  const int lane = threadIdx.x % kTile;
  if (row >= rows) return;
  double sum = 0.0;
  for (int bit = lane; bit < logits.bits; bit += kTile) {
    const double a = logits.raw(row / logits.n, static_cast<int>(row % logits.n), bit);
    sum += a * a;
  }
  const double norm = sqrt(sum_of_lanes(sum));
  if (lane == 0) reciprocal[row] = static_cast<float>(1.0 / (norm < kNormEps ? kNormEps : norm));
}

// A block's sum over the warps of their products: afterwards warp 0's first tile holds it.
__device__ __forceinline__ void sum_of_warps(const Product& product, float* shared, int warps, int warp, int lane) {
  __syncwarp();  // the other lanes no longer need this tile
  product.store<false>(shared + 2 * warp * kTileSize, 1.0f, lane);
  __syncthreads();
  for (int e = warp * kTile + lane; e < kTileSize; e += warps * kTile) {
    float sum = shared[e];
    for (int w = 1; w < warps; ++w) sum += shared[2 * w * kTileSize + e];
    shared[e] = sum;
  }
  __syncthreads();
}

// A tile (i, j) of alpha G from shared memory, and its transpose if that is `mirrored`: every `step`th row.
__device__ __forceinline__ void store_gram(const float* tile, float alpha, float* to, int side, int i, int j,
                                           bool mirrored, int first, int step, int lane) {
  for (int r = first; r < kTile; r += step) {
    const int row = i * kTile + r, column = j * kTile + lane;
    if (row < side && column < side) to[static_cast<int64_t>(row) * side + column] = alpha * tile[element(r, lane)];
    const int mirrored_row = j * kTile + r, mirrored_column = i * kTile + lane;
    if (mirrored && mirrored_row < side && mirrored_column < side) {
      to[static_cast<int64_t>(mirrored_row) * side + mirrored_column] = alpha * tile[element(lane, r)];
    }
  }
}

// alpha z^T z, or alpha z z^T `of_images`, of one view: a block computes a tile (i, j), i >= j, its warps a part of the
// terms each, or, if there are enough blocks, 2 x 2 tiles; and the transpose.
template <typename T, bool kOfImages, bool kWideBlocks>
__device__ __forceinline__ void gram(const Logits<T>& logits, float alpha, float* out) {
  const int warps = blockDim.x / kTile, warp = threadIdx.x / kTile, lane = lane_of(threadIdx.x);
  const int side = kOfImages ? logits.n : logits.bits, depth = kOfImages ? logits.bits : logits.n;
  constexpr int kAlong = kWideBlocks ? 2 : 1;
  const int tiles = (tiles_of(side) + kAlong - 1) / kAlong, pairs = tiles * (tiles + 1) / 2;
  const int64_t view = blockIdx.x / pairs;
  int i = 0, j = blockIdx.x % pairs;
  while (j > i) j -= ++i;
  float* const to = out + view * side * side;
  const auto fill = [&](float* tile, int index, int s) {
    if (kOfImages) {
      logits.fill(tile, view, index * kTile, s, lane);
    } else {
      logits.fill(tile, view, s, index * kTile, lane);
    }
  };
  if constexpr (kWideBlocks) {
    const float* const tile = wide_product<kOfImages, kOfImages>(
        0, depth, i == j, [&](float* x, int part, int s) { fill(x, 2 * i + part, s); },
        [&](float* y, int part, int s) { fill(y, 2 * j + part, s); }, lane);
    store_gram(tile, alpha, to, side, 2 * i + warp / 2, 2 * j + warp % 2, i != j, 0, 1, lane);
  } else {
    float* const shared = shared_memory();
    float* const x = shared + 2 * warp * kTileSize;
    float* const y = i == j ? x : x + kTileSize;
    Product product;
    for (int s = warp * kTile; s < depth; s += warps * kTile) {
      __syncwarp();
      fill(x, i, s);
      if (i != j) fill(y, j, s);
      __syncwarp();
      product.add<kOfImages, kOfImages>(x, y, lane);
    }
    sum_of_warps(product, shared, warps, warp, lane);
    store_gram(shared, alpha, to, side, i, j, i != j, warp, warps, lane);
  }
}

// A tile of g from shared memory, and its share of each row's g.z: every `step`th row.
template <typename T>
__device__ __forceinline__ void store_direction(const float* tile, const Logits<T>& logits, float* g, float* radial,
                                                int64_t view, int image, int column, int first, int step, int lane) {
  const int tiles = tiles_of(logits.bits), bit = column * kTile + lane;
  if (column >= tiles) return;
  for (int r = first; r < kTile && image + r < logits.n; r += step) {
    float part = 0.0f;
    if (bit < logits.bits) {
      const float value = tile[element(r, lane)];
      g[(view * logits.n + image + r) * logits.bits + bit] = value;
      part = value * logits.z(view, image + r, bit);
    }
    part = sum_of_lanes(part);
    if (lane == 0) radial[(view * logits.n + image + r) * tiles + column] = part;
  }
}

// g = z M, or M z `of_images`, M the inverse, of one view: a block computes 32 images by 32 bits, its warps a part of
// the terms each, or, if there are enough blocks, 64 by 64; and each tile's share of each row's g.z, which will be
// subtracted: (views, n, tiles of bits).
template <typename T, bool kOfImages, bool kWideBlocks>
__device__ __forceinline__ void direction(const Logits<T>& logits, const float* inverse, float* g, float* radial) {
  const int warps = blockDim.x / kTile, warp = threadIdx.x / kTile, lane = lane_of(threadIdx.x);
  const int side = kOfImages ? logits.n : logits.bits;
  constexpr int kAlong = kWideBlocks ? 2 : 1;
  const int across = (tiles_of(logits.bits) + kAlong - 1) / kAlong, down = (tiles_of(logits.n) + kAlong - 1) / kAlong;
  const int64_t view = blockIdx.x / (down * across);
  const int image = blockIdx.x / across % down * kAlong * kTile, column = blockIdx.x % across * kAlong;
  const Rows m{inverse + view * side * side, side, side, side};
  const auto fill_x = [&](float* x, int part, int s) {
    if (kOfImages) {
      m.fill(x, image + part * kTile, s, lane);
    } else {
      logits.fill(x, view, image + part * kTile, s, lane);
    }
  };
  const auto fill_y = [&](float* y, int part, int s) {
    if (kOfImages) {
      logits.fill(y, view, s, (column + part) * kTile, lane);
    } else {
      m.fill(y, s, (column + part) * kTile, lane);
    }
  };
  if constexpr (kWideBlocks) {
    const float* const tile = wide_product<true, false>(0, side, false, fill_x, fill_y, lane);
    store_direction(tile, logits, g, radial, view, image + warp / 2 * kTile, column + warp % 2, 0, 1, lane);
  } else {
    float* const shared = shared_memory();
    float* const x = shared + 2 * warp * kTileSize;
    float* const y = x + kTileSize;
    Product product;
    for (int s = warp * kTile; s < side; s += warps * kTile) {
      __syncwarp();
      fill_x(x, 0, s);
      fill_y(y, 0, s);
      __syncwarp();
      product.add<true, false>(x, y, lane);
    }
    sum_of_warps(product, shared, warps, warp, lane);
    store_direction(shared, logits, g, radial, view, image, column, warp, warps, lane);
  }
}

// The gradients of the rates that arrive: a number for each view, or one for all, times a scalar if there is one.
struct Arriving {
  const float* grad;
  int64_t stride;
  const float* factor;  // or null
  float weight;

  __device__ __forceinline__ float of(int64_t view) const {
    return grad[view * stride] * (factor != nullptr ? *factor * weight : weight);
  }
};

// dR/da = alpha (g - (g.z) z) / |a|, times the incoming gradient, one row per warp, or its sum with what is there. A
// norm that was clamped to its minimum is a constant, and nothing is subtracted.
template <typename T, bool kAdd>
__device__ __forceinline__ void gradient(const Logits<T>& logits, const Arriving& arriving, float alpha, const float* g,
                                         const float* radial, T* out, int64_t rows) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kTile;
  const int lane = threadIdx.x % kTile;
  if (row >= rows) return;
  const int64_t view = row / logits.n;
  const int image = static_cast<int>(row % logits.n), tiles = tiles_of(logits.bits);
  float along = 0.0f;
  for (int t = lane; t < tiles; t += kTile) along += radial[row * tiles + t];
  along = sum_of_lanes(along);
  const float reciprocal = logits.reciprocal[row];
  if (reciprocal >= static_cast<float>(1.0 / kNormEps)) along = 0.0f;
  const float grad = arriving.of(view), scale = grad * alpha * reciprocal;
  // Numbers beyond the type's range become its largest number. But if the incoming gradient is large, as that of a
  // scaled loss, they become infinite, which shows that the scale is too large.
  const float limit = fabsf(grad) <= 1.0f ? largest(T{}) : INFINITY;
  constexpr int kAtOnce = 8;  // loads in flight: `out` may be `g`, so that none passes a store by itself
  for (int first = lane; first < logits.bits; first += kAtOnce * kTile) {
    float x[kAtOnce], z[kAtOnce], old[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int next = first + i * kTile, bit = next < logits.bits ? next : first;  // beyond the end it is not used
      x[i] = g[row * logits.bits + bit];
      z[i] = logits.raw(view, image, bit);
      old[i] = kAdd ? widen(out[row * logits.bits + bit]) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int bit = first + i * kTile;
      if (bit >= logits.bits) break;
      x[i] = (x[i] - along * (z[i] * reciprocal)) * scale;
      const float part = x[i] < -limit ? -limit : (x[i] > limit ? limit : x[i]);
      narrow(kAdd ? old[i] + part : part, out + row * logits.bits + bit);
    }
  }
}

// ---- The kernels

template <int kSide, bool kPart>
__global__ void __launch_bounds__(kSweepThreads) coding_rate_sweep_kernel(SweepArguments p) {
  if constexpr (kSide == 1 || kHasClusters) sweep<kSide, kPart>(p);
}

template <typename T>
__global__ void coding_rate_reciprocal_norms_kernel(Logits<T> logits, float* reciprocal, int64_t rows) {
  reciprocal_norms(logits, reciprocal, rows);
}

template <bool kWideBlocks>
constexpr int kProductThreads = (kWideBlocks ? kWideWarps : kProductWarps) * kTile;

template <typename T, bool kOfImages, bool kWideBlocks>
__global__ void __launch_bounds__(kProductThreads<kWideBlocks>, kWideBlocks ? 4 : 2)
    coding_rate_gram_kernel(Logits<T> logits, float alpha, float* out) {
  gram<T, kOfImages, kWideBlocks>(logits, alpha, out);
}

__global__ void __launch_bounds__(kProductThreads<true>, 3) coding_rate_panel_kernel(PanelArguments p) {
  panel(p);
}

__global__ void __launch_bounds__(kProductThreads<true>, 4) coding_rate_update_kernel(UpdateArguments p) {
  update(p);
}

template <typename T, bool kOfImages, bool kWideBlocks>
__global__ void __launch_bounds__(kProductThreads<kWideBlocks>, kWideBlocks ? 4 : 2)
    coding_rate_direction_kernel(Logits<T> logits, const float* inverse, float* g, float* radial) {
  direction<T, kOfImages, kWideBlocks>(logits, inverse, g, radial);
}

template <typename T, bool kAdd>
__global__ void coding_rate_gradient_kernel(Logits<T> logits, Arriving arriving, float alpha, const float* g,
                                            const float* radial, T* out, int64_t rows) {
  gradient<T, kAdd>(logits, arriving, alpha, g, radial, out, rows);
}

}  // namespace bincomm
