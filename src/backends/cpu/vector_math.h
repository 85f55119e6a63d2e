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

#include "core/dtype.h"
#include "core/error.h"

namespace bitmill {

constexpr int64_t kLanes = 16;  // two AVX2 registers of fp32

inline float load_float(float value) {
  return value;
}
inline float load_float(BFloat16 value) {
  return to_float(value);
}
inline float load_float(Float16 value) {
  return _cvtsh_ss(value.bits);
}

inline void store_float(float value, float& out) {
  out = value;
}
inline void store_float(float value, BFloat16& out) {
  out = to_bf16(value);
}

// e^x to 1e-7 relative for |x| <= 80; beyond, x is clamped: e^80 and e^-80 stand for everything
// larger and smaller, which keeps quotients of results out of the denormals (their arithmetic is a
// hundred times slower). NaN gives some finite value. x = n ln 2 + r with |r| <= ln 2 / 2; e^r by a
// polynomial; 2^n is added to the exponent bits. The clamps compare bits as integers (magnitudes
// order like integers), because a compiler splits floating-point clamps into branches.
inline float exp_clamped(float x) {
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
inline float fast_exp(float x) {
  const float result = exp_clamped(x);
  return x == x ? result : x;
}

// Folds partial results pairwise: lane l with lane l + 8, then 4, 2, 1.
template <typename T, typename Combine>
inline T fold_lanes(T* lanes, Combine combine) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] = combine(lanes[l], lanes[l + half]);
  return lanes[0];
}

// sum of x[i]^2 in fp32.
template <typename T>
inline float sum_of_squares(const T* x, int64_t n) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) {
      const float value = load_float(x[i + l]);
      lanes[l] += value * value;
    }
  for (int64_t l = 0; i < n; ++i, ++l) lanes[l] += load_float(x[i]) * load_float(x[i]);
  return fold_lanes(lanes, [](float a, float b) { return a + b; });
}

// sum of x[i] in fp32.
inline float sum_of(const float* x, int64_t n) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += x[i + l];
  for (int64_t l = 0; i < n; ++i, ++l) lanes[l] += x[i];
  return fold_lanes(lanes, [](float a, float b) { return a + b; });
}

// Largest of n >= 1 values; NaNs are passed over.
inline float largest(const float* x, int64_t n) {
  float lanes[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = -INFINITY;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
  for (int64_t l = 0; i < n; ++i, ++l) lanes[l] = x[i] > lanes[l] ? x[i] : lanes[l];
  return fold_lanes(lanes, [](float a, float b) { return b > a ? b : a; });
}

}  // namespace bitmill
