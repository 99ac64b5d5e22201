// CUDA device code on the CPU, for tests: every thread of a block, or of a cluster of blocks, is a fiber.
//
//     fibers::launch(blocks, threads, blocks_per_cluster, shared_bytes, seed, [&] { kernel(arguments); });
//
// A kernel's own source compiles as C++20 after this header, so that sanitizers see its memory accesses. One
// fiber runs at a time, and alone until it comes to a switch point: a barrier, a shuffle or its end. There
// the scheduler draws who continues.
//
// A missing barrier shows when the threads it should keep apart run in the wrong order: a reader before the
// writer, or the next writer before a slow reader. What a thread does between two switch points happens at
// once, so if the thread is drawn uniformly at every switch, either order is as likely as the other, but only
// where both have about as many switch points before them: a warp in a long chain of shuffles would always
// come last, and the blocks of a cluster would advance in step. Therefore the scheduler stays with a block
// and, within it, with a warp for 2^s switches on average, where s is drawn anew at each barrier: now all
// threads mix, now a warp comes to the next barrier of its block before another has begun, or a block to the
// next barrier of its cluster. Lanes of a warp are drawn uniformly. With one seed an error can stay hidden:
// use several. Never seen are lost updates (two threads that add to one element take turns here), what
// depends on the memory model, and what clusters do to one another: they run one after the other.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline uint3 threadIdx, blockIdx;  // of the fiber that runs: set at each switch
inline dim3 blockDim, gridDim;

namespace fibers {

using Where = std::source_location;
constexpr unsigned kFull = 0xffffffff;
constexpr size_t kStack = 128 << 10;

struct Block;
struct Warp;

struct Fiber {
  std::unique_ptr<char[]> stack;  // kept for the next launch; none for the program's own thread
  const void* bottom = nullptr;   // of the stack, as AddressSanitizer knows it
  size_t size = 0;
  void* fake_stack = nullptr;
  void* registers[5];  // where it continues, for __builtin_longjmp
  bool entered = false;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned thread = 0, lane = 0, mask = 0, turn = 0;
  const char* state = nullptr;  // why it cannot run; null: it can
  Where where;                  // the last barrier or shuffle
};

struct Warp {
  unsigned runnable = 0, arrived = 0;  // a bit for each lane
  Fiber* lanes[32];
  uint64_t values[2][32];  // two, as a lane may come to the next shuffle before another has read this one's
};

struct Barrier {
  unsigned arrived = 0;
  Where where;
};

struct Block {
  unsigned index = 0, rank = 0, runnable = 0, ended = 0, scale = 0;
  std::vector<Warp> warps;
  Warp* current = nullptr;  // the scheduler stays with it for 2^scale switches
  Barrier barrier;
  float* shared = nullptr;
};

inline std::mt19937 generator;
inline std::function<void()> body;
inline std::vector<Fiber> pool;
inline Fiber program, *running = &program, *left = nullptr;
inline size_t bytes = 0;           // of a block's shared memory
inline std::vector<Block> blocks;  // of the cluster that runs; what follows is for it as for a block
inline Block* current = nullptr;
inline unsigned ended = 0, scale = 0;
inline Barrier barrier;

// Reports an error of the device code, and where the threads are: neighbors at the same position share a line.
[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "fibers: %s\n", what);
  const char* last = nullptr;
  for (size_t i = 0; i < blocks.size() * blockDim.x; ++i) {
    const Fiber& fiber = pool[i];
    const char* state = &fiber == running && !fiber.state ? "runs" : fiber.state;
    if (state && (state != last || fiber.where.line() != pool[i - 1].where.line())) {
      std::fprintf(stderr, "  block %u, from thread %u: %s; last barrier or shuffle: %s:%u\n",
                   fiber.block->index, fiber.thread, state, fiber.where.file_name(), fiber.where.line());
    }
    last = state;
  }
  std::abort();
}

// The switch. Unlike swapcontext, __builtin_setjmp and __builtin_longjmp make no system call; they must be in
// two functions, and none that changes the stack may be instrumented.
#define FIBERS_SWITCH [[gnu::noinline, gnu::no_sanitize("address", "undefined")]] inline
void begin_thread();
void end_thread();

FIBERS_SWITCH void arrive_on_stack() {
  if (running != &program) threadIdx.x = running->thread, blockIdx.x = running->block->index;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(running->fake_stack, &left->bottom, &left->size);
#endif
}

FIBERS_SWITCH void enter() {
  for (arrive_on_stack();; end_thread()) begin_thread(), body();
}

[[noreturn]] FIBERS_SWITCH void jump(Fiber& fiber) {
  if (fiber.entered) __builtin_longjmp(fiber.registers, 1);
  fiber.entered = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack - fiber.lane * 128;  // equal offsets would share few cache lines
  makecontext(&context, enter, 0);
  setcontext(&context);
  std::abort();
}

FIBERS_SWITCH void switch_to(Fiber& fiber) {
  left = running;
  running = &fiber;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&left->fake_stack, fiber.bottom, fiber.size);
#endif
  if (!__builtin_setjmp(left->registers)) jump(fiber);
  arrive_on_stack();
}

inline unsigned draw(unsigned n) { return generator() % n; }
inline unsigned draw_scale() { return draw(24); }

template <class T>
void choose(T*& current, std::vector<T>& from, unsigned scale) {
  if (current && current->runnable && draw(1u << scale)) return;
  current = nullptr;
  unsigned candidates = 0;
  for (T& candidate : from) {
    if (candidate.runnable && !draw(++candidates)) current = &candidate;
  }
}

// Continues with a fiber that can run, or with launch() when all have ended.
inline void schedule() {
  choose(current, blocks, scale);
  if (!current) {
    if (ended < blocks.size() * blockDim.x) fail("deadlock: no thread can continue");
    return switch_to(program);
  }
  choose(current->current, current->warps, current->scale);
  unsigned lanes = current->current->runnable;
  for (unsigned skip = draw(std::popcount(lanes)); skip; --skip) lanes &= lanes - 1;
  Fiber& next = *current->current->lanes[std::countr_zero(lanes)];
  if (&next != running) switch_to(next);
}

inline void stop(const char* state, Where where) {
  running->state = state;
  running->where = where;
  running->warp->runnable &= ~(1u << running->lane);
  --running->block->runnable;
}

inline void wake(Block& block, Warp& warp, unsigned mask) {
  warp.runnable |= mask;
  block.runnable += std::popcount(mask);
  for (; mask; mask &= mask - 1) warp.lanes[std::countr_zero(mask)]->state = nullptr;
}

inline void wake(Block& block) {
  for (Warp& warp : block.warps) wake(block, warp, kFull);
  block.scale = draw_scale();
}

// A block's shared memory lives from the start of its first thread to the end of its last one.
inline void begin_thread() {
  float*& shared = running->block->shared;
  if (!shared) shared = static_cast<float*>(std::memset(std::malloc(bytes), 0xff, bytes));  // NaN
}

inline void end_thread() {
  Block& block = *running->block;
  stop("has ended", running->where);
  ++ended;
  if (++block.ended == blockDim.x) {
    std::free(block.shared);
    block.shared = nullptr;
  }
  if (block.barrier.arrived || barrier.arrived) fail("a thread ended while others wait for it at a barrier");
  schedule();
}

// True for the last of the threads.
inline bool arrive(Barrier& barrier, unsigned threads, unsigned ended, const char* state, Where where) {
  stop(state, where);
  if (ended) fail("a thread waits at a barrier for threads that have ended");
  if (!barrier.arrived) barrier.where = where;
  if (where.line() != barrier.where.line() || where.column() != barrier.where.column()) {
    fail("threads wait for each other at different positions of the source");
  }
  barrier.arrived = (barrier.arrived + 1) % threads;
  return !barrier.arrived;
}

inline void wait_for_lanes(unsigned mask, const char* state, Where where) {
  Warp& warp = *running->warp;
  stop(state, where);
  running->mask = mask;
  if (!(mask >> running->lane & 1)) fail("a lane is missing from its own mask");
  warp.arrived |= 1u << running->lane;
  if ((warp.arrived & mask) == mask) {
    for (unsigned rest = warp.arrived; rest; rest &= rest - 1) {
      const Fiber& lane = *warp.lanes[std::countr_zero(rest)];
      if ((lane.mask & mask) && (lane.mask != mask || std::strcmp(lane.state, state))) {
        fail("lanes of a warp wait for each other at different operations or with different masks");
      }
    }
    warp.arrived &= ~mask;
    wake(*running->block, warp, mask);
  }
  schedule();
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, const char* state, Where where) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8);
  if (mask != kFull) fail("a shuffle among a part of the warp is not supported");
  uint64_t* values = running->warp->values[running->turn ^= 1];
  std::memcpy(&values[running->lane], &value, sizeof(T));
  wait_for_lanes(mask, state, where);
  if (source < 32) std::memcpy(&value, &values[source], sizeof(T));  // from beyond the warp: its own value
  return value;
}

// What CUDA has in cooperative groups: the rank of the running block in its cluster, ...
inline unsigned cluster_rank() { return running->block->rank; }

// ... a barrier of all threads of the cluster, ...
inline void cluster_barrier(Where where = Where::current()) {
  if (arrive(barrier, blocks.size() * blockDim.x, ended, "waits at cluster_barrier", where)) {
    for (Block& block : blocks) wake(block);
    scale = draw_scale();
  }
  schedule();
}

// ... and the dynamic shared memory of one of its blocks; then that of the running block, and its size.
inline float* shared_of(unsigned rank) {
  if (rank >= blocks.size()) fail("no block of the cluster has this rank");
  if (!blocks[rank].shared) fail("shared memory of a block that has not started or has ended");
  return blocks[rank].shared;
}
inline float* shared() { return shared_of(cluster_rank()); }
inline size_t shared_bytes() { return bytes; }

// Runs body() once for each thread of each block (one-dimensional, a multiple of 32 threads), cluster after
// cluster in random order; the blocks of a cluster live at the same time. Errors go to stderr and abort.
inline void launch(unsigned grid, unsigned threads, unsigned blocks_per_cluster, size_t shared_bytes,
                   unsigned seed, std::function<void()> run) {
  const unsigned size = blocks_per_cluster;
  if (!threads || threads % 32 || !size || grid % size) fail("no launch has this shape");
  generator.seed(seed);
  body = std::move(run);
  bytes = shared_bytes;
  blockDim = {threads};
  gridDim = {grid};
  program.entered = true;
  while (pool.size() < size * threads) {
    Fiber& fiber = pool.emplace_back();
    fiber.stack = std::make_unique_for_overwrite<char[]>(kStack);
    fiber.bottom = fiber.stack.get();
    fiber.size = kStack;
  }
  std::vector<unsigned> order(grid / size);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), generator);
  for (unsigned cluster : order) {
    blocks.assign(size, {});
    current = nullptr;
    ended = 0;
    scale = draw_scale();
    for (Block& block : blocks) {
      block.rank = &block - blocks.data();
      block.index = cluster * size + block.rank;
      block.warps.resize(threads / 32);
      for (unsigned thread = 0; thread < threads; ++thread) {
        Warp& warp = block.warps[thread / 32];
        Fiber& fiber = *(warp.lanes[thread % 32] = &pool[block.rank * threads + thread]);
        fiber.block = &block;
        fiber.warp = &warp;
        fiber.thread = thread;
        fiber.lane = thread % 32;
        fiber.where = {};
      }
      wake(block);
    }
    schedule();
  }
}

}  // namespace fibers

// As in CUDA, but the threads of a block must all come to the same __syncthreads of the source, and a shuffle
// is among all lanes of a warp.
#define FIBERS_WHERE fibers::Where where = fibers::Where::current()

inline void __syncthreads(FIBERS_WHERE) {
  fibers::Block& block = *fibers::running->block;
  if (arrive(block.barrier, blockDim.x, block.ended, "waits at __syncthreads", where)) wake(block);
  fibers::schedule();
}

inline void __syncwarp(unsigned mask = fibers::kFull, FIBERS_WHERE) {
  fibers::wait_for_lanes(mask, "waits at __syncwarp", where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, FIBERS_WHERE) {
  return fibers::shuffle(mask, value, lane & 31, "waits at __shfl_sync", where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, FIBERS_WHERE) {
  return fibers::shuffle(mask, value, fibers::running->lane ^ bits, "waits at __shfl_xor_sync", where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, FIBERS_WHERE) {
  return fibers::shuffle(mask, value, fibers::running->lane + lanes, "waits at __shfl_down_sync", where);
}

template <class T>
T __ldg(const T* address) { return *address; }
inline float rsqrtf(float x) noexcept { return 1.0f / std::sqrt(x); }  // noexcept as in new C libraries
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
