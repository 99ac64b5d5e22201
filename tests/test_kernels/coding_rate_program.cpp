// The coding rate's kernels on fibers, launched as csrc/coding_rate.cu launches them on a GPU.
//
//     program SIDE OF_IMAGES SEED V n K ALPHA PERMUTED PART WIDE < logits and gradients of the rates, floats > results
//
// SIDE is that of the cluster of blocks of a matrix; PERMUTED has the logits as (n, K, V) in memory; PART is the side of
// the parts that a larger matrix is swept by, a multiple of 64; WIDE has blocks of 2 x 2 tiles. Every array is a heap allocation of its own size, filled with NaN, so that sanitizers see an access beyond its ends, and a result
// that was not written is visible.

#include "fibers.h"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "coding_rate_device.cuh"

using namespace bincomm;

template <class T>
std::vector<T> array(int64_t size) {
  std::vector<T> result(size, std::numeric_limits<T>::has_quiet_NaN ? std::numeric_limits<T>::quiet_NaN() : T(-1));
  result.shrink_to_fit();
  return result;
}

std::vector<float> read(int64_t size) {
  std::vector<float> values = array<float>(size);
  if (std::fread(values.data(), sizeof(float), size, stdin) != static_cast<size_t>(size)) std::abort();
  return values;
}

template <class T>
void write(const std::vector<T>& result) {
  for (const T value : result) {
    const float f = static_cast<float>(value);
    std::fwrite(&f, sizeof f, 1, stdout);
  }
}

constexpr size_t kWideBytes = 8 * kTileSize * sizeof(float);

int wide_of(int side) { return (side + kWide - 1) / kWide; }
int pairs_of(int tiles) { return tiles * (tiles + 1) / 2; }

template <int kSide>
void launch_sweep(const SweepArguments& arguments, int views, unsigned seed) {
  const int tiles = tiles_of(arguments.n);
  const size_t bytes = SweepMemory<kSide>(tiles).size(tiles) * sizeof(float);
  fibers::launch(views * kSide * kSide, kSweepThreads, kSide * kSide, bytes, seed,
                 [&] {
                   if (arguments.n < arguments.side) {
                     coding_rate_sweep_kernel<kSide, true>(arguments);
                   } else {
                     coding_rate_sweep_kernel<kSide, false>(arguments);
                   }
                 });
}

void sweep_parts(SweepArguments sweep, int views, unsigned seed, void (*launch)(const SweepArguments&, int, unsigned)) {
  if (sweep.side <= sweep.part) return launch(sweep, views, seed);
  float* const to = sweep.to;
  const int64_t part = sweep.part;
  for (sweep.k = 0; sweep.k < sweep.side; sweep.k += sweep.part, sweep.from = to) {
    auto factor = array<float>(views * part * part), panels = array<float>(views * part * sweep.side);
    sweep.to = factor.data();
    sweep.n = std::min(sweep.part, sweep.side - sweep.k);
    const int width = tiles_of(sweep.n) * kTile;
    launch(sweep, views, seed);
    const PanelArguments panel{sweep.from, factor.data(), panels.data(), sweep.side, sweep.part, sweep.k, width};
    fibers::launch(views * wide_of(sweep.side) * wide_of(width), kProductThreads<true>, 1, kWideBytes, seed + 1,
                   [&] { coding_rate_panel_kernel(panel); });
    const UpdateArguments update{sweep.from, to, panels.data(), sweep.side, sweep.part, sweep.k, width};
    fibers::launch(views * pairs_of(wide_of(sweep.side)), kProductThreads<true>, 1, kWideBytes, seed + 2,
                   [&] { coding_rate_update_kernel(update); });
  }
}

template <bool kOfImages>
void run(int side, unsigned seed, int views, int n, int bits, float alpha, bool permuted, int part, bool wide) {
  const int m = kOfImages ? n : bits;
  const int64_t rows = static_cast<int64_t>(views) * n, tiles = tiles_of(m);
  const int64_t bit_tiles = tiles_of(bits), row_tiles = tiles_of(n);
  const std::vector<float> a = read(rows * bits), grad = read(views);
  auto reciprocal = array<float>(rows), out = array<float>(static_cast<int64_t>(views) * m * m);
  auto inverse = array<float>(out.size()), rate = array<float>(views), smallest = array<float>(views);
  auto clamped = array<int>(views);
  auto gradient_of_a = array<float>(rows * bits), radial = array<float>(rows * bit_tiles);
  Logits<float> logits{a.data(), reciprocal.data(), static_cast<int64_t>(n) * bits, bits, 1, n, bits, bits % 4 == 0};
  if (permuted) logits.view_stride = 1, logits.image_stride = static_cast<int64_t>(bits) * views, logits.bit_stride = views, logits.wide = false;

  const auto warps = [](int depth) { return std::min<int>(kProductWarps, tiles_of(depth)); };
  const auto bytes = [](int warps) { return 2 * warps * kTileSize * sizeof(float); };
  const unsigned blocks_of_rows = (rows + kProductWarps - 1) / kProductWarps;
  fibers::launch(blocks_of_rows, kProductWarps * kTile, 1, 0, seed,
                 [&] { coding_rate_reciprocal_norms_kernel(logits, reciprocal.data(), rows); });
  int depth = warps(kOfImages ? bits : n);
  if (wide) {
    fibers::launch(views * pairs_of(wide_of(m)), kProductThreads<true>, 1, kWideBytes, seed + 1,
                   [&] { coding_rate_gram_kernel<float, kOfImages, true>(logits, alpha, out.data()); });
  } else {
    fibers::launch(views * pairs_of(tiles), depth * kTile, 1, bytes(depth), seed + 1,
                   [&] { coding_rate_gram_kernel<float, kOfImages, false>(logits, alpha, out.data()); });
  }
  const SweepArguments arguments{out.data(), inverse.data(), rate.data(), smallest.data(), clamped.data(), m, part, 0, m};
  sweep_parts(arguments, views, seed + 2, side == 1 ? launch_sweep<1> : launch_sweep<2>);
  depth = warps(m);
  if (wide) {
    fibers::launch(views * wide_of(n) * wide_of(bits), kProductThreads<true>, 1, kWideBytes, seed + 3, [&] {
      coding_rate_direction_kernel<float, kOfImages, true>(logits, inverse.data(), gradient_of_a.data(), radial.data());
    });
  } else {
    fibers::launch(views * row_tiles * bit_tiles, depth * kTile, 1, bytes(depth), seed + 3, [&] {
      coding_rate_direction_kernel<float, kOfImages, false>(logits, inverse.data(), gradient_of_a.data(), radial.data());
    });
  }
  // Added to the logits, for one gradient of all rates, the first, twice as large: -0.5 * -4.
  auto sum = array<float>(rows * bits);
  for (int64_t row = 0; row < rows; ++row) {
    for (int bit = 0; bit < bits; ++bit) {
      const int64_t view = row / n, image = row % n;
      sum[row * bits + bit] = a[view * logits.view_stride + image * logits.image_stride + bit * logits.bit_stride];
    }
  }
  const std::vector<float> factor(1, -0.5f);
  fibers::launch(blocks_of_rows, kProductWarps * kTile, 1, 0, seed + 4, [&] {
    coding_rate_gradient_kernel<float, true>(logits, Arriving{grad.data(), 0, factor.data(), -4.0f}, alpha,
                                             gradient_of_a.data(), radial.data(), sum.data(), rows);
  });
  fibers::launch(blocks_of_rows, kProductWarps * kTile, 1, 0, seed + 4, [&] {
    coding_rate_gradient_kernel<float, false>(logits, Arriving{grad.data(), 1, nullptr, 1.0f}, alpha,
                                              gradient_of_a.data(), radial.data(), gradient_of_a.data(), rows);
  });
  for (const auto* result : {&out, &inverse, &rate, &smallest, &gradient_of_a, &sum}) write(*result);
  write(clamped);
}

int main(int, char** arguments) {
  const auto number = [&](int i) { return std::atoi(arguments[i]); };
  const auto function = number(2) ? run<true> : run<false>;
  function(number(1), number(3), number(4), number(5), number(6), std::atof(arguments[7]), number(8),
           number(9), number(10));
}
