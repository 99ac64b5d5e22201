"""fibers.h itself: correct device code gives its result for every seed, and errors are caught."""

import subprocess

import pytest
from on_fibers import NEEDS_COMPILER, build

pytestmark = [NEEDS_COMPILER, pytest.mark.kernels, pytest.mark.slow]

PROGRAM = r"""
#include <map>
#include <string>
#include "fibers.h"

constexpr unsigned kAll = 0xffffffff;
bool wrong;
void expect(bool right) { wrong |= !right; }

// The sum of 0 .. blockDim.x - 1 by halves; with barrier = false, the one barrier in the loop is missing.
__device__ __forceinline__ float block_sum(float* __restrict__ s, bool barrier) {
  s[threadIdx.x] = threadIdx.x;
  for (unsigned half = blockDim.x / 2; half; half /= 2) {
    if (barrier) __syncthreads();
    if (threadIdx.x < half) s[threadIdx.x] += s[threadIdx.x + half];
  }
  __syncthreads();
  return s[0];
}

__global__ void __launch_bounds__(256) reduction(bool barrier) {
  expect(block_sum(fibers::shared(), barrier) == blockDim.x * (blockDim.x - 1) / 2);
}

void rotation(bool barrier) {
  float* s = fibers::shared();
  const unsigned next = (threadIdx.x + 1) % blockDim.x;
  s[threadIdx.x] = threadIdx.x;
  for (unsigned step = 1; step < 4; ++step) {
    __syncthreads();
    const float value = s[next];
    if (barrier) __syncthreads();
    s[threadIdx.x] = value;
    expect(value == (threadIdx.x + step) % blockDim.x);
  }
}

// The first warp overwrites what the others read, but only after many shuffles.
void late_writer(bool barrier) {
  float* s = fibers::shared();
  if (threadIdx.x == 0) s[0] = 1;
  __syncthreads();
  if (threadIdx.x >= 32) expect(s[0] == 1);
  if (barrier) __syncthreads();
  if (threadIdx.x < 32) {
    float value = 0;
    for (int i = 0; i < 300; ++i) value += __shfl_xor_sync(kAll, 1.0f, 1);
    if (threadIdx.x == 0) s[0] = value;
  }
}

void lanes(bool barrier) {
  float* s = fibers::shared() + threadIdx.x / 32 * 32;
  const unsigned lane = threadIdx.x % 32, other = lane < 8 ? 7 - lane : 39 - lane;
  s[lane] = lane;
  if (barrier) __syncwarp(lane < 8 ? 0xff : ~0xff);
  expect(s[other] == other);
}

template <class T>
void shuffles_of() {
  const unsigned lane = threadIdx.x % 32, first = threadIdx.x - lane;
  for (unsigned i = 0; i < 32; ++i) expect(__shfl_sync(kAll, T(threadIdx.x), i) == T(first + i));
  T sum = threadIdx.x;
  for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(kAll, sum, bits);
  expect(sum == T(32 * first + 496));
  expect(__shfl_down_sync(kAll, T(lane), 3) == T(lane < 29 ? lane + 3 : lane));
}

void shuffles() {
  shuffles_of<float>();
  shuffles_of<double>();
  shuffles_of<int>();
  shuffles_of<unsigned>();
}

void cluster(bool barrier) {
  float* s = fibers::shared();
  const unsigned rank = fibers::cluster_rank();
  fibers::cluster_barrier();  // all blocks have started
  s[threadIdx.x] = blockIdx.x;
  for (int i = 0; i < 5; ++i) __syncthreads();  // which do not hold back the other blocks
  if (barrier) fibers::cluster_barrier();
  for (unsigned other = 0; other < 4; ++other) {
    expect(fibers::shared_of(other)[threadIdx.x] == blockIdx.x - rank + other);
  }
  fibers::cluster_barrier();  // no block has ended
}

void indices() {
  static std::map<std::pair<unsigned, unsigned>, int> visits;
  __syncthreads();
  ++visits[{blockIdx.x, threadIdx.x}];
  expect(gridDim.x == 8 && blockDim.x == 256 && blockIdx.x % 4 == fibers::cluster_rank());
  fibers::cluster_barrier();
  expect(visits[{blockIdx.x, threadIdx.x}] == 1);
  fibers::cluster_barrier();
  visits.erase({blockIdx.x, threadIdx.x});
}

void uninitialized() {
  for (size_t i = 0; i < fibers::shared_bytes() / 4; ++i) expect(std::isnan(fibers::shared()[i]));
  __syncthreads();
  fibers::shared()[threadIdx.x] = 0;  // gone when the next block starts
}

void arithmetic() {
  const float4 v = make_float4(1, 4, 0.25f, 3);
  expect(rsqrtf(v.y) == 0.5f && __frcp_rn(v.z) == 4 && __fmaf_rn(v.y, v.z, v.w) == 4 && __ldg(&v.w) == 3);
}

void outside() {
  if (threadIdx.x == 0) fibers::shared()[fibers::shared_bytes() / 4] = 0;
}

void misaligned() {
  __syncthreads();
  reinterpret_cast<float4*>(fibers::shared() + 1)->x = 0;
}

void local() {
  float values[4] = {};
  float* volatile end = values + 4;
  __syncthreads();
  if (threadIdx.x == 77) *end = 0;
}

void ended_block() {
  fibers::cluster_barrier();
  const float* other = fibers::shared_of((fibers::cluster_rank() + 1) % 4);
  fibers::cluster_barrier();
  for (int i = 0; i < 1000; ++i) __syncthreads(), expect(other[0] != 0);
}

void not_started_block() { fibers::shared_of((fibers::cluster_rank() + 1) % 4); }

void divergent_end() {
  if (threadIdx.x < 64) __syncthreads();
}

void divergent_positions() {
  if (threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void divergent_operations() {
  if (threadIdx.x % 32 < 16) {
    __shfl_sync(kAll, 1, 0);
  } else {
    __syncwarp();
  }
}

void divergent_masks() { __syncwarp(threadIdx.x % 32 < 16 ? 0xffff : kAll); }

void deadlock() {
  if (threadIdx.x % 32 == 7) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

void half_a_cluster() {
  if (fibers::cluster_rank() % 2) fibers::cluster_barrier();
}

int main(int, char** argv) {
  std::map<std::string, std::function<void()>> cases;
#define CASE(name) cases[#name] = name
#define PAIR(name) cases[#name] = [] { name(true); }, cases[#name " without a barrier"] = [] { name(false); }
  PAIR(reduction), PAIR(rotation), PAIR(late_writer), PAIR(lanes), PAIR(cluster);
  CASE(shuffles), CASE(indices), CASE(uninitialized), CASE(arithmetic), CASE(outside), CASE(misaligned);
  CASE(local), CASE(ended_block), CASE(not_started_block), CASE(divergent_end), CASE(divergent_positions);
  CASE(divergent_operations), CASE(divergent_masks), CASE(deadlock), CASE(half_a_cluster);
  int count = 0;
  for (int seed = 0; seed < std::atoi(argv[2]); ++seed) {
    wrong = false;
    fibers::launch(8, 256, 4, 256 * sizeof(float), seed, cases.at(argv[1]));
    count += wrong;
  }
  std::printf("%d", count);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(PROGRAM, tmp_path_factory.mktemp("fibers"))


def run(program, case, seeds=1):
    return subprocess.run([program, case, str(seeds)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "case",
    [
        "reduction",
        "rotation",
        "late_writer",
        "lanes",
        "shuffles",
        "cluster",
        "indices",
        "uninitialized",
        "arithmetic",
    ],
)
def test_correct_code_is_right_for_every_seed(program, case):
    process = run(program, case, seeds=20)
    assert (process.stdout, process.stderr, process.returncode) == ("0", "", 0)


# The orders are random: how many of 20 seeds must show the error says how easy it is to hide.
@pytest.mark.parametrize(
    ("case", "least"),
    [("reduction", 20), ("rotation", 20), ("lanes", 20), ("late_writer", 18), ("cluster", 16)],
)
def test_a_missing_barrier_gives_wrong_values(program, case, least):
    process = run(program, f"{case} without a barrier", seeds=20)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) >= least


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("outside", "heap-buffer-overflow"),
        ("local", "stack-buffer-overflow"),
        ("misaligned", "misaligned address"),
        ("ended_block", "heap-use-after-free"),
        ("not_started_block", "fibers: shared memory of a block that has not started"),
        ("divergent_end", "fibers: a thread"),
        ("divergent_positions", "fibers: threads wait for each other at different positions"),
        ("divergent_operations", "fibers: lanes of a warp wait for each other at different operations"),
        ("divergent_masks", "fibers: "),
        ("deadlock", "fibers: deadlock"),
        ("half_a_cluster", "fibers: a thread"),
    ],
)
def test_errors_end_the_program(program, case, message):
    process = run(program, case)
    assert process.returncode != 0
    assert message in process.stderr
