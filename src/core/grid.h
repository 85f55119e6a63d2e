// Grid arithmetic: the only place that rounds weights. Scalar, header-only, for float and double,
// so that every backend's kernels and the reference tests run this very code. Compile users with
// -ffp-contract=off.
//
// A grid is two numbers per row and group, and a kind that says what codes mean on it. A kind is
// one value of GridKind, one struct with `code` and `value` below, one case of with_codes and, if
// its range is fitted in another way, of fit_grid. Loops over weights are written once, inside
// with_codes: the kind is chosen per call, never per weight.
//
// Uniform, (scale, zero): code = clamp(rint(w / scale) + zero, 0, maxq), value = scale * (code -
// zero). IEEE division (never a reciprocal), round half to even, scale = (xmax - xmin) / maxq; the
// scale takes its stored type before zero point and codes are computed. Source: Frantar et al.,
// arXiv 2210.17323, and docs/algorithms.md.
//
// Ternary, (largest, smallest) weight: the values are smallest, 0 and largest.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "core/dtype.h"

namespace bitmill {

enum class GridKind : uint8_t {
  kUniform,
  kTernary,  // reference checks only: no output format stores it
};

// What codes mean; a plain number of bits is a uniform grid.
struct CodeType {
  CodeType(int code_bits, GridKind code_kind = GridKind::kUniform)  // NOLINT: implicit on purpose
      : bits(code_bits), kind(code_kind) {}
  int bits;  // uniform: codes are 0..2^bits-1
  GridKind kind;
};

// How a group's range becomes a grid. Only kMirrored is stored by bitmill; the others are for
// comparison with the programs that have them.
enum class GridRange : uint8_t {
  kMirrored,    // contains 0; symmetric ranges are mirrored
  kUnmirrored,  // a symmetric range of one sign stays [0, xmax] around a zero point in its middle, as
                // the original GPTQ program has it, which clips the upper half
  kAwqRaw,      // llm-awq (Lin et al., arXiv 2306.00978): minimum and maximum as they are, so that a
                // group of one sign loses its values; asymmetric scales are at least 1e-5 / maxq,
                // symmetric ones max|w| / (2^(bits-1) - 1)
  kAwqZero,     // the same, extended to 0
};

// The type a format stores scales in; kF64: not rounded (reference checks only).
struct GridOptions {
  int bits = 4;
  bool symmetric = true;
  bool mse = false;  // search 80 shrunk ranges for the least sum |w - q|^2.4; before any other search
  DType scale_dtype = DType::kF16;  // kF16, kBF16, kF32, kF64
  GridKind kind = GridKind::kUniform;
  GridRange range = GridRange::kMirrored;

  bool awq() const { return range == GridRange::kAwqRaw || range == GridRange::kAwqZero; }

  CodeType codes() const { return {bits, kind}; }
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
                                : std::min(std::max(T(0), std::rint(-xmin / grid.scale)), maxq);
  return grid;
}

// Code of one weight, always in 0..maxq: std::max gives its first argument for a NaN, which overflow
// can make.
template <typename T>
inline T to_code(T w, Grid<T> grid, T maxq) {
  return std::min(std::max(T(0), std::rint(w / grid.scale) + grid.zero), maxq);
}

// Value of a code.
template <typename T>
inline T from_code(T code, Grid<T> grid) {
  return grid.scale * (code - grid.zero);
}

// The kinds. Each has code(weight, grid) and value(code, grid), codes as T.
template <typename T>
struct UniformCodes {
  T maxq;
  T code(T w, Grid<T> grid) const { return to_code(w, grid, maxq); }
  T value(T code, Grid<T> grid) const { return from_code(code, grid); }
};

// Codes 0, 1, 2 are grid.zero (the smallest weight), 0 and grid.scale (the largest); borders lie
// half way.
template <typename T>
struct TernaryCodes {
  T code(T w, Grid<T> grid) const {
    return T(1) + T(w > grid.scale / 2 ? 1 : 0) - T(w < grid.zero / 2 ? 1 : 0);
  }
  T value(T code, Grid<T> grid) const {
    return code == T(2) ? grid.scale : code == T(0) ? grid.zero : T(0);
  }
};

// Calls body(codes) with the struct of the type's kind.
template <typename T, typename Body>
decltype(auto) with_codes(CodeType type, const Body& body) {
  if (type.kind == GridKind::kTernary) return body(TernaryCodes<T>{});
  return body(UniformCodes<T>{T((1 << type.bits) - 1)});
}

// Grid of one of the AWQ kinds for weights in [xmin, xmax].
template <typename T>
inline Grid<T> awq_grid_from_range(T xmin, T xmax, const GridOptions& options) {
  const T floor = static_cast<T>(1e-5), half = T(1 << (options.bits - 1)), maxq = 2 * half - 1;
  if (options.symmetric) {
    const T largest = std::max(std::max(-xmin, xmax), floor);
    return {stored_scale(largest / (half - 1), options.scale_dtype), half};
  }
  Grid<T> grid;
  grid.scale = stored_scale(std::max(xmax - xmin, floor) / maxq, options.scale_dtype);
  grid.zero = std::min(std::max(T(0), -std::rint(xmin / grid.scale)), maxq);
  return grid;
}

// Range of the `count` values w[0], w[stride], ..., as options.range says.
template <typename T>
std::pair<T, T> value_range(const T* w, int64_t count, int64_t stride, const GridOptions& options) {
  T xmin = options.range == GridRange::kAwqRaw ? w[0] : T(0), xmax = xmin;
  for (int64_t i = 0; i < count; ++i) {
    xmin = std::min(xmin, w[i * stride]);
    xmax = std::max(xmax, w[i * stride]);
  }
  if (options.symmetric && !options.awq()) {
    xmax = std::max(-xmin, xmax);
    if (options.range == GridRange::kMirrored || xmin < 0) xmin = -xmax;
  }
  return {xmin, xmax};
}

// Grid of a range without any search. An all-zero group gets [-1, 1] and the middle zero point
// 2^(bits-1), whatever rounding 1 / scale would give. A ternary grid is the range itself, in T: mse
// and scale_dtype have no say in it.
template <typename T>
Grid<T> plain_grid(T xmin, T xmax, const GridOptions& options) {
  if (options.awq()) return awq_grid_from_range(xmin, xmax, options);
  const bool empty = xmin == 0 && xmax == 0;
  if (options.kind == GridKind::kTernary) return empty ? Grid<T>{T(1), T(-1)} : Grid<T>{xmax, xmin};
  if (!empty) return grid_from_range(xmin, xmax, options);
  Grid<T> grid = grid_from_range(T(-1), T(1), options);
  grid.zero = T(1 << (options.bits - 1));
  return grid;
}

// Do the weights of a range leave a search something to find?
template <typename T>
bool searchable(T xmin, T xmax, const GridOptions& options) {
  return options.kind == GridKind::kUniform && !options.awq() && (xmin != 0 || xmax != 0);
}

// The first of 80 shrunk ranges (p = 1, 0.99, .. 0.21) with the least sum of |value - w|^2.4.
template <typename T>
Grid<T> search_mse(const T* w, int64_t count, int64_t stride, T xmin, T xmax,
                   const GridOptions& options) {
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

// Six times the expected error of a grid: sum_i importance_i E[(value(x) - x)^2], x normal around
// w_i, by the three-point Gauss-Hermite rule (nodes 0 and +-sqrt(3) deviations, exact up to the
// fifth power). `spread` is sqrt(3) times the deviation, importance >= 0. Sixteen partial sums,
// whatever the machine's vectors. A result above `limit` may be a part of the error: sums only grow.
template <typename T>
T expected_error(const T* w, const T* importance, const T* spread, int64_t count, Grid<T> grid,
                 T maxq, T limit = std::numeric_limits<T>::infinity()) {
  constexpr int64_t kLanes = 16;
  T sums[kLanes] = {};
  // Next to a tie the reciprocal may take the other neighbour, which is as far away.
  const T inverse = T(1) / grid.scale;
  const auto error = [&](T x) {
    const T code = std::min(std::max(std::rint(x * inverse) + grid.zero, T(0)), maxq);
    const T d = from_code(code, grid) - x;
    return d * d;
  };
  const auto term = [&](int64_t i) {
    const T outer = error(w[i] - spread[i]) + error(w[i] + spread[i]);
    return importance[i] * (T(4) * error(w[i]) + outer);
  };
  const auto folded = [&] {
    T parts[kLanes];
    std::copy_n(sums, kLanes, parts);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
      for (int64_t lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
    return parts[0];
  };
  constexpr int64_t kLook = 4 * kLanes;  // columns between two looks at the limit
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    if (i > 0 && i % kLook == 0)
      if (const T part = folded(); part > limit) return part;
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += term(i + lane);
  }
  for (; i < count; ++i) sums[i % kLanes] += term(i);
  return folded();
}

// What the solver knows about the columns of a group, for the range search of fit_grid;
// docs/algorithms.md derives both.
template <typename T>
struct ColumnStats {
  const T* importance = nullptr;  // weight of each column's squared error; null: no search
  // Standard deviation of what error feedback will add, in steps of the full range's grid.
  const T* noise = nullptr;
};

// The first of 30 shrunk ranges (p = 1, 0.98, .. 0.42) with the least expected error of the `count`
// weights w. `spread` is scratch of `count` elements.
template <typename T>
Grid<T> search_expected(const T* w, int64_t count, T xmin, T xmax, const GridOptions& options,
                        ColumnStats<T> columns, T* spread) {
  const T maxq = T((1 << options.bits) - 1);
  Grid<T> best = grid_from_range(xmin, xmax, options);
  const T step_size = best.scale * T(1.7320508075688772);
  for (int64_t i = 0; i < count; ++i) spread[i] = columns.noise[i] * step_size;
  T best_error = expected_error(w, columns.importance, spread, count, best, maxq);
  for (int step = 1; step < 30; ++step) {
    const T p = static_cast<T>(1 - step / 50.0);
    const Grid<T> grid = grid_from_range(p * xmin, p * xmax, options);
    const T error =
        expected_error(w, columns.importance, spread, count, grid, maxq, best_error);
    if (error < best_error) {
      best_error = error;
      best = grid;
    }
  }
  return best;
}

// Grid of `count` consecutive weights that the search of `columns` may shrink; options.mse comes
// first. `spread`: scratch of `count` elements where there is such a search.
template <typename T>
Grid<T> fit_grid(const T* w, int64_t count, const GridOptions& options, ColumnStats<T> columns,
                 T* spread) {
  const auto [xmin, xmax] = value_range(w, count, 1, options);
  if (!searchable(xmin, xmax, options)) return plain_grid(xmin, xmax, options);
  if (options.mse) return search_mse(w, count, 1, xmin, xmax, options);
  if (columns.importance == nullptr) return plain_grid(xmin, xmax, options);
  return search_expected(w, count, xmin, xmax, options, columns, spread);
}

// Grid of `count` weights w[0], w[stride], ...: of their range, or, with options.mse, of a shrunk
// one.
template <typename T>
Grid<T> fit_grid(const T* w, int64_t count, int64_t stride, const GridOptions& options) {
  const auto [xmin, xmax] = value_range(w, count, stride, options);
  if (!options.mse || !searchable(xmin, xmax, options)) return plain_grid(xmin, xmax, options);
  return search_mse(w, count, stride, xmin, xmax, options);
}

}  // namespace bitmill
