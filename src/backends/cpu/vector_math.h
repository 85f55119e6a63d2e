// Elementwise arithmetic that the compiler vectorises: loads and stores of the float types, exp,
// sums and maxima in fixed lanes. Written without reassociation: a sum has kLanes partial sums,
// folded in one order, so its bits are the same wherever it runs. Users are compiled with
// -fno-trapping-math (the values are the same, only exception flags may differ), without which
// comparisons keep loops scalar. Private to backends/cpu.
#pragma once

#include <immintrin.h>  // F16C: half-precision conversion

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "backends/cpu/dispatch.h"
#include "core/dtype.h"
#include "core/error.h"

namespace bitmill {

constexpr int64_t kLanes = 16;  // two AVX2 registers of fp32

BITMILL_INLINE float load_float(float value) {
  return value;
}
BITMILL_INLINE float load_float(BFloat16 value) {
  return to_float(value);
}
BITMILL_INLINE float load_float(Float16 value) {
  return _cvtsh_ss(value.bits);
}

BITMILL_INLINE void store_float(float value, float& out) {
  out = value;
}
BITMILL_INLINE void store_float(float value, BFloat16& out) {
  out = to_bf16(value);
}

// e^x to 1e-7 relative for |x| <= 80; beyond, x is clamped: e^80 and e^-80 stand for everything
// larger and smaller, which keeps quotients of results out of the denormals (their arithmetic is a
// hundred times slower). NaN gives some finite value. x = n ln 2 + r with |r| <= ln 2 / 2; e^r by a
// polynomial; 2^n is added to the exponent bits. The clamps compare bits as integers (magnitudes
// order like integers), because a compiler splits floating-point clamps into branches.
BITMILL_INLINE float exp_clamped(float x) {
  constexpr int32_t kHighest = std::bit_cast<int32_t>(80.0f);
  constexpr uint32_t kLowest = std::bit_cast<uint32_t>(-80.0f);
  const int32_t below = std::min(std::bit_cast<int32_t>(x), kHighest);
  x = std::bit_cast<float>(std::min(static_cast<uint32_t>(below), kLowest));
  constexpr float kMagic =
      12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const float shifted = x * 1.44269504088896341f + kMagic;
  const float n = shifted - kMagic;
  const float r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;  // (e^r - 1 - r) / r^2, minimax (Cephes expf)
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) +
                              (std::bit_cast<uint32_t>(shifted) << 23));
}

// The same, and NaN stays NaN.
BITMILL_INLINE float fast_exp(float x) {
  const float result = exp_clamped(x);
  return x == x ? result : x;
}

template <typename T>
struct Sum {
  BITMILL_INLINE T operator()(T a, T b) const { return a + b; }
};
struct Larger {
  BITMILL_INLINE float operator()(float a, float b) const { return b > a ? b : a; }
};

// Folds partial results pairwise: lane l with lane l + 8, then 4, 2, 1.
template <typename T, typename Combine>
BITMILL_INLINE T fold_lanes(T* lanes, Combine combine) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] = combine(lanes[l], lanes[l + half]);
  return lanes[0];
}

// sum of x[i]^2 in fp32.
template <typename T>
BITMILL_INLINE float sum_of_squares(const T* x, int64_t n) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) {
      const float value = load_float(x[i + l]);
      lanes[l] += value * value;
    }
  for (int64_t l = 0; i < n; ++i, ++l) lanes[l] += load_float(x[i]) * load_float(x[i]);
  return fold_lanes(lanes, Sum<float>{});
}

// x[i] = e^(scale x[i] - top); returns their sum.
BITMILL_INLINE float exponentials(float* x, int64_t n, float scale, float top) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) {
      const float e = fast_exp(x[i + l] * scale - top);
      x[i + l] = e;
      lanes[l] += e;
    }
  for (int64_t l = 0; i < n; ++i, ++l) lanes[l] += x[i] = fast_exp(x[i] * scale - top);
  return fold_lanes(lanes, Sum<float>{});
}

// Largest of n >= 1 values; NaNs are passed over. Spelled with vector types: compilers leave this
// loop scalar.
BITMILL_INLINE float largest(const float* x, int64_t n) {
  typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
  float lanes[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = -INFINITY;
  Vector top, values;
  __builtin_memcpy(&top, lanes, sizeof top);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    __builtin_memcpy(&values, x + i, sizeof values);
    top = values > top ? values : top;
  }
  __builtin_memcpy(lanes, &top, sizeof top);
  for (int64_t l = 0; i < n; ++i, ++l) lanes[l] = x[i] > lanes[l] ? x[i] : lanes[l];
  return fold_lanes(lanes, Larger{});
}

}  // namespace bitmill
