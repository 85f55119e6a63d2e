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

#include "core/dtype.h"

namespace bitmill {

// How a group's range becomes a grid. The AWQ kinds are those of llm-awq (Lin et al., arXiv 2306.00978), for comparison
// with it: asymmetric scales are at least 1e-5 / maxq, symmetric ones max|w| / (2^(bits-1) - 1).
enum class GridRange {
  kMirrored,  // contains 0; symmetric ranges are mirrored: what bitmill stores
  kAwqRaw,    // minimum and maximum as they are: a group of one sign loses its values
  kAwqZero,   // the same, extended to 0
};

// The type a format stores scales in; kF64: not rounded (reference checks only).
struct GridOptions {
  int bits = 4;
  bool symmetric = true;
  bool mse = false;                  // search 80 shrunk ranges for the least sum |w - q|^2.4
  DType scale_dtype = DType::kF16;   // kF16, kBF16, kF32, kF64
  GridRange range = GridRange::kMirrored;
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

// Grid of one of the AWQ kinds for weights in [xmin, xmax].
template <typename T>
inline Grid<T> awq_grid_from_range(T xmin, T xmax, const GridOptions& options) {
  const T floor = static_cast<T>(1e-5), half = T(1 << (options.bits - 1)), maxq = 2 * half - 1;
  if (options.symmetric)
    return {stored_scale(std::max(std::max(-xmin, xmax), floor) / (half - 1), options.scale_dtype), half};
  Grid<T> grid;
  grid.scale = stored_scale(std::max(xmax - xmin, floor) / maxq, options.scale_dtype);
  grid.zero = std::min(std::max(-std::rint(xmin / grid.scale), T(0)), maxq);
  return grid;
}

// Grid of `count` weights w[0], w[stride], ...: the range always contains 0; symmetric ranges are mirrored also where a
// group has no negative weight; an all-zero group gets [-1, 1] and the middle zero point 2^(bits-1), whatever rounding
// 1 / scale would give.
template <typename T>
Grid<T> fit_grid(const T* w, int64_t count, int64_t stride, const GridOptions& options) {
  const bool raw = options.range == GridRange::kAwqRaw;
  T xmin = raw ? w[0] : T(0), xmax = xmin;
  for (int64_t i = 0; i < count; ++i) {
    xmin = std::min(xmin, w[i * stride]);
    xmax = std::max(xmax, w[i * stride]);
  }
  if (options.range != GridRange::kMirrored) return awq_grid_from_range(xmin, xmax, options);
  if (options.symmetric) {
    xmax = std::max(-xmin, xmax);
    xmin = -xmax;
  }
  if (xmin == 0 && xmax == 0) {
    Grid<T> empty = grid_from_range(T(-1), T(1), options);
    empty.zero = T(1 << (options.bits - 1));
    return empty;
  }
  Grid<T> best = grid_from_range(xmin, xmax, options);
  if (!options.mse) return best;
  const T maxq = T((1 << options.bits) - 1);
  T best_error = -1;
  for (int step = 0; step < 80; ++step) {  // shrink to 0.2 in steps of 0.01; the first of equals wins
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

}  // namespace bitmill
