// exp, log1p and sums of squares that compilers turn into vector code, and choice of the instruction set at run time.
//
// exp and log1p are written without branches and without tables, so that a plain loop over an array vectorizes at
// whatever width the target has. tests/test_ops/test_sign_bce.py compares them with fp64 over the full range of
// arguments.
#pragma once

#include <bit>
#include <cstdint>

// One function body, compiled for AVX-512, AVX2 and the baseline; the loader chooses by CPUID when the library is opened.
// The helpers below must be inlined into those clones, or they would be compiled for the baseline alone.
#if defined(__x86_64__) && defined(__gnu_linux__) && (defined(__GNUC__) || __clang_major__ >= 17)
#define BINCOMM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define BINCOMM_CLONES
#endif
#define BINCOMM_INLINE inline __attribute__((always_inline))

namespace bincomm {

// e^-x for x >= 0; 0 above 87.7 (where e^-x leaves the normal numbers); NaN stays NaN.
BINCOMM_INLINE float exp_of_minus(float x) {
  const float highest = 88.0f;  // n = -127 from here on, whose power of two below is 0
  const float y = highest < x ? highest : x;  // one min instruction, which returns x where x is NaN
  // -x / ln 2 = n + f. Adding 1.5 * 2^23 + 127 rounds to n, and leaves n + 127 in the low bits of the sum.
  const float shifted = 12583039.0f - y * 1.44269504f;
  const float n = shifted - 12583039.0f;
  const float f = (-(y * 1.44269504f) - n) - y * 1.92596299e-8f;  // what 1 / ln 2 has beyond fp32
  // 2^f on [-1/2, 1/2] by the polynomial of least relative error, 2e-9.
  float p = 1.5345812e-4f;
  p = p * f + 1.3399931219e-3f;
  p = p * f + 9.6184889571e-3f;
  p = p * f + 5.5503287770e-2f;
  p = p * f + 2.4022646891e-1f;
  p = p * f + 6.9314720574e-1f;
  p = p * f + 1.0f;
  return p * std::bit_cast<float>(std::bit_cast<int32_t>(shifted) << 23);
}

// log(1 + x) for x >= 0 up to 2^100; NaN stays NaN, relative accuracy is kept for tiny x.
BINCOMM_INLINE float log1p_nonnegative(float x) {
  const float u = 1.0f + x;
  // u = 2^k * m with m in [sqrt(1/2), sqrt(2)): shift the mantissa's cut before reading the exponent.
  const int32_t bits = std::bit_cast<int32_t>(u) - 0x3f3504f3;
  const int32_t k = bits >> 23;
  const float scale = std::bit_cast<float>((127 - k) << 23);
  // The rounding lost in 1 + x, brought to m's scale; it is nearly the full value when x is tiny. The sum has two
  // branches in exact arithmetic, x - (u - 1) and 1 - (u - x), by which of 1 and x is the larger.
  const float lost = x > 1.0f ? 1.0f - (u - x) : x - (u - 1.0f);
  const float f = (u * scale - 1.0f) + lost * scale;
  // log(1 + f) = f - f^2 / 2 + f^3 P(f) (Cephes logf).
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float kf = static_cast<float>(k);
  const float square = f * f;
  float tail = f * square * p;
  tail += kf * -2.12194440e-4f;
  tail -= 0.5f * square;
  return (f + tail) + kf * 0.693359375f;
}

// Sum of squares, in double: the square of no finite float overflows or vanishes there.
BINCOMM_INLINE double sum_of_squares(const float* x, int64_t count) {
  constexpr int kLanes = 32;
  double lanes[kLanes] = {};
  const int64_t full = count / kLanes * kLanes;
  for (int64_t first = 0; first < full; first += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const double a = x[first + j];
      lanes[j] += a * a;
    }
  }
  for (int64_t j = full; j < count; ++j) lanes[j - full] += static_cast<double>(x[j]) * x[j];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

// The storage types as fp32 and back, rounding to nearest even.
struct Float {
  using stored = float;
  static BINCOMM_INLINE float load(stored s) { return s; }
  static BINCOMM_INLINE stored store(float f) { return f; }
};

struct BFloat16 {
  using stored = uint16_t;
  static BINCOMM_INLINE float load(stored s) { return std::bit_cast<float>(static_cast<uint32_t>(s) << 16); }
  static BINCOMM_INLINE stored store(float f) {
    const uint32_t u = std::bit_cast<uint32_t>(f);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return static_cast<stored>(f != f ? 0x7fc0 : rounded);
  }
};

// IEEE half in integer arithmetic: slower than F16C, but it vectorizes on every target.
struct Half {
  using stored = uint16_t;
  static BINCOMM_INLINE float load(stored s) {
    const uint32_t sign = static_cast<uint32_t>(s & 0x8000) << 16;
    const uint32_t rest = static_cast<uint32_t>(s & 0x7fff) << 13;
    // Multiplying by 2^112 moves the exponent's bias from 15 to 127 and normalizes subnormals on the way.
    const float scaled = std::bit_cast<float>(rest) * 0x1p112f;
    const uint32_t special = rest | 0x7f800000;  // inf and NaN keep the largest exponent
    const uint32_t magnitude = rest >= 0x0f800000 ? special : std::bit_cast<uint32_t>(scaled);
    return std::bit_cast<float>(sign | magnitude);
  }
  static BINCOMM_INLINE stored store(float f) {
    const uint32_t u = std::bit_cast<uint32_t>(f);
    const uint32_t sign = (u >> 16) & 0x8000;
    const uint32_t a = u & 0x7fffffff;
    const uint32_t normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
    // Below 2^-14 the halves are multiples of 2^-24: adding 1/2 makes the FPU round to just that.
    const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(a) + 0.5f) - 0x3f000000;
    uint32_t h = a < 0x38800000 ? subnormal : normal;
    h = a >= 0x477ff000 ? 0x7c00 : h;  // 65520 and above round to infinity
    h = a > 0x7f800000 ? 0x7e00 : h;
    return static_cast<stored>(sign | h);
  }
};

}  // namespace bincomm
