// Grid arithmetic: the only place that rounds weights. Scalar, header-only, for float and double, so that every backend's
// kernels and the reference tests run this very code. Compile users with -ffp-contract=off.
//
// A grid is (scale, zero, maxq): code = clamp(rint(w / scale) + zero, 0, maxq), value = scale * (code - zero).
// IEEE division (never a reciprocal), round half to even, scale = (xmax - xmin) / maxq; the scale takes its stored type
// before zero point and codes are computed. Source: Frantar et al., arXiv 2210.17323, and docs/algorithms.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "core/dtype.h"

namespace bitmill {

// The type a format stores scales in; kF64: not rounded (reference checks only).
struct GridOptions {
  int bits = 4;
  bool symmetric = true;
  bool mse = false;                  // search 80 shrunk ranges for the least sum |w - q|^2.4; before any other search
  DType scale_dtype = DType::kF16;   // kF16, kBF16, kF32, kF64
};

template <typename T>
struct Grid {
  T scale;
  T zero;
};

// Scale as stored. fp16/bf16 underflow to 0 becomes the smallest normal 2^-14 (bf16: 2^-126); overflow gives infinity,
// which fit_grids reports.
template <typename T>
inline T stored_scale(T scale, DType dtype) {
  switch (dtype) {
    case DType::kF16: {
      const float half = to_float(to_f16(scale));
      return half == 0 ? T(0x1p-14) : T(half);
    }
    case DType::kBF16: {
      const float b = to_float(to_bf16(static_cast<float>(scale)));
      return b == 0 ? T(0x1p-126) : T(b);
    }
    case DType::kF32: {
      const float f = static_cast<float>(scale);
      return f == 0 ? T(0x1p-126) : T(f);
    }
    default: return scale;
  }
}

// Grid of the range [xmin, xmax] (which contains 0 and is not empty).
template <typename T>
inline Grid<T> grid_from_range(T xmin, T xmax, const GridOptions& options) {
  const T maxq = T((1 << options.bits) - 1);
  Grid<T> grid;
  grid.scale = stored_scale((xmax - xmin) / maxq, options.scale_dtype);
  grid.zero = options.symmetric ? T(1 << (options.bits - 1))
                                : std::min(std::max(std::rint(-xmin / grid.scale), T(0)), maxq);
  return grid;
}

// Code of one weight.
template <typename T>
inline T to_code(T w, Grid<T> grid, T maxq) {
  return std::min(std::max(std::rint(w / grid.scale) + grid.zero, T(0)), maxq);
}

// Value of a code.
template <typename T>
inline T from_code(T code, Grid<T> grid) {
  return grid.scale * (code - grid.zero);
}

// Smallest range that holds 0 and the `count` values w[0], w[stride], ...; mirrored where `symmetric`, also for a group
// without a negative weight.
template <typename T>
std::pair<T, T> value_range(const T* w, int64_t count, int64_t stride, bool symmetric) {
  T xmin = 0, xmax = 0;
  for (int64_t i = 0; i < count; ++i) {
    xmin = std::min(xmin, w[i * stride]);
    xmax = std::max(xmax, w[i * stride]);
  }
  if (symmetric) {
    xmax = std::max(-xmin, xmax);
    xmin = -xmax;
  }
  return {xmin, xmax};
}

// Grid of an all-zero group: range [-1, 1] and the middle zero point 2^(bits-1), whatever rounding 1 / scale would give.
template <typename T>
Grid<T> empty_group_grid(const GridOptions& options) {
  Grid<T> grid = grid_from_range(T(-1), T(1), options);
  grid.zero = T(1 << (options.bits - 1));
  return grid;
}

// The first of 80 shrunk ranges (p = 1, 0.99, .. 0.21) with the least sum of |value - w|^2.4.
template <typename T>
Grid<T> search_mse(const T* w, int64_t count, int64_t stride, T xmin, T xmax, const GridOptions& options) {
  const T maxq = T((1 << options.bits) - 1);
  Grid<T> best{};
  T best_error = -1;
  for (int step = 0; step < 80; ++step) {
    const T p = static_cast<T>(1 - step / 100.0);  // rounded once, also for float
    const Grid<T> grid = grid_from_range(p * xmin, p * xmax, options);
    T error = 0;
    for (int64_t i = 0; i < count; ++i) {
      const T value = w[i * stride];
      error += std::pow(std::abs(from_code(to_code(value, grid, maxq), grid) - value), T(2.4));
    }
    if (best_error < 0 || error < best_error) {
      best_error = error;
      best = grid;
    }
  }
  return best;
}

// Expected error of a grid: sum_i importance_i E[(value(x) - x)^2], where x = w_i + scale_noise * noise_i * g with a standard
// normal g, by the three-point Gauss-Hermite rule (nodes 0 and +-sqrt(3), exact up to the fifth power). `spread` is
// sqrt(3) * noise in the unit of the weights. Sixteen partial sums, whatever the machine's vectors.
template <typename T>
T expected_error(const T* w, const T* importance, const T* spread, int64_t count, Grid<T> grid, T maxq) {
  constexpr int64_t kLanes = 16;
  T sums[kLanes] = {};
  const auto error = [&](T x) {
    const T d = from_code(to_code(x, grid, maxq), grid) - x;
    return d * d;
  };
  const auto term = [&](int64_t i) {
    const T outer = error(w[i] - spread[i]) + error(w[i] + spread[i]);
    return importance[i] * (T(4) * error(w[i]) + outer);  // six times the rule
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += term(i + lane);
  for (; i < count; ++i) sums[i % kLanes] += term(i);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
}

// What the solver knows about the columns of a group, for the range search of fit_grid; docs/algorithms.md derives both.
template <typename T>
struct ColumnStats {
  const T* importance = nullptr;  // weight of each column's squared error; null: no search
  const T* noise = nullptr;       // standard deviation of what error feedback will add, in steps of the full range's grid
};

// The first of 30 shrunk ranges (p = 1, 0.98, .. 0.42) with the least expected error of the `count` weights w. `spread` is
// scratch of `count` elements.
template <typename T>
Grid<T> search_expected(const T* w, int64_t count, T xmin, T xmax, const GridOptions& options, ColumnStats<T> columns,
                        T* spread) {
  const T maxq = T((1 << options.bits) - 1);
  Grid<T> best = grid_from_range(xmin, xmax, options);
  const T step_size = best.scale * T(1.7320508075688772);
  for (int64_t i = 0; i < count; ++i) spread[i] = columns.noise[i] * step_size;
  T best_error = expected_error(w, columns.importance, spread, count, best, maxq);
  for (int step = 1; step < 30; ++step) {
    const T p = static_cast<T>(1 - step / 50.0);
    const Grid<T> grid = grid_from_range(p * xmin, p * xmax, options);
    const T error = expected_error(w, columns.importance, spread, count, grid, maxq);
    if (error < best_error) {
      best_error = error;
      best = grid;
    }
  }
  return best;
}

// Grid of `count` consecutive weights that the search of `columns` may shrink; options.mse comes first.
template <typename T>
Grid<T> fit_grid(const T* w, int64_t count, const GridOptions& options, ColumnStats<T> columns, T* spread) {
  const auto [xmin, xmax] = value_range(w, count, 1, options.symmetric);
  if (xmin == 0 && xmax == 0) return empty_group_grid<T>(options);
  if (options.mse) return search_mse(w, count, 1, xmin, xmax, options);
  if (columns.importance == nullptr) return grid_from_range(xmin, xmax, options);
  return search_expected(w, count, xmin, xmax, options, columns, spread);
}

// Grid of `count` weights w[0], w[stride], ...: of their range (value_range), or, with options.mse, of a shrunk one.
template <typename T>
Grid<T> fit_grid(const T* w, int64_t count, int64_t stride, const GridOptions& options) {
  const auto [xmin, xmax] = value_range(w, count, stride, options.symmetric);
  if (xmin == 0 && xmax == 0) return empty_group_grid<T>(options);
  if (options.mse) return search_mse(w, count, stride, xmin, xmax, options);
  return grid_from_range(xmin, xmax, options);
}

}  // namespace bitmill
