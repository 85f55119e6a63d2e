// Grids, rounding, dequantization and the layer error. All weight arithmetic is core/grid.h's.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "backends/cpu/cpu_backend.h"
#include "backends/cpu/dispatch.h"
#include "backends/cpu/quadratic_form.h"

namespace bitmill {
namespace {

constexpr int64_t kRowsPerItem = 16;
constexpr int64_t kErrorRows = 256;

// Calls body(first, last) for ranges of rows; the ranges depend on the row count alone.
template <typename Body>
void over_rows(ThreadPool& pool, int64_t rows, const Body& body) {
  pool.parallel_for((rows + kRowsPerItem - 1) / kRowsPerItem, [&](int64_t item, int) {
    body(item * kRowsPerItem, std::min(rows, (item + 1) * kRowsPerItem));
  });
}

// Grids of the `groups` groups of one row.
template <typename T>
struct FitRow {
  BITMILL_KERNEL void run(const T* w, int64_t cols, int64_t size, int64_t groups,
                          const GridOptions* options, ColumnStats<T> columns, T* spread, T* scales,
                          T* zeros) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * size, count = std::min(size, cols - first);
      ColumnStats<T> stats;
      if (columns.importance != nullptr)
        stats = {columns.importance + first, columns.noise + first};
      const Grid<T> grid = fit_grid(w + first, count, *options, stats, spread);
      scales[g] = grid.scale;
      zeros[g] = grid.zero;
    }
  }
};

template <typename T>
bool fit_grids_of(TensorView weight, const GridOptions& options, int64_t group_size,
                  const ColumnStatsView& columns, TensorView scales, TensorView zeros,
                  ThreadPool& pool) {
  const int64_t cols = weight.cols(), groups = scales.cols();
  const int64_t size = group_size == -1 ? cols : group_size;
  std::atomic<bool> fits{true};
  const bool search = columns.importance.data != nullptr;
  const ColumnStats<T> stats{search ? columns.importance.as<T>() : nullptr,
                             search ? columns.noise.as<T>() : nullptr};
  over_rows(pool, weight.rows(), [&](int64_t first, int64_t last) {
    std::vector<T> spread(search ? static_cast<size_t>(std::min(size, cols)) : 0);
    for (int64_t r = first; r < last; ++r) {
      T* const scale = scales.as<T>() + r * groups;
      dispatch<FitRow<T>>(static_cast<const T*>(weight.as<T>() + r * cols), cols, size, groups,
                          &options, stats, spread.data(), scale, zeros.as<T>() + r * groups);
      for (int64_t g = 0; g < groups; ++g)
        if (!std::isfinite(scale[g])) fits = false;
    }
  });
  return fits;
}

template <typename T>
void round_rows(TensorView weight, TensorView scales, TensorView zeros, const int32_t* group,
                CodeType type, TensorView codes, ThreadPool& pool) {
  const int64_t cols = weight.cols(), groups = scales.cols();
  over_rows(pool, weight.rows(), [&](int64_t first, int64_t last) {
    with_codes<T>(type, [&](const auto& kind) {
      for (int64_t r = first; r < last; ++r) {
        const T* scale = scales.as<T>() + r * groups;
        const T* zero = zeros.as<T>() + r * groups;
        for (int64_t c = 0; c < cols; ++c) {
          const Grid<T> grid{scale[group[c]], zero[group[c]]};
          codes.as<uint8_t>()[r * cols + c] =
              static_cast<uint8_t>(kind.code(weight.as<T>()[r * cols + c], grid));
        }
      }
    });
  });
}

// Reads scale or zero i of any stored type as U.
template <typename U>
U grid_value_at(TensorView scales, int64_t i) {
  switch (scales.dtype) {
    case DType::kU8:
      return U(scales.as<uint8_t>()[i]);
    case DType::kF16:
      return static_cast<U>(to_float(scales.as<Float16>()[i]));
    case DType::kBF16:
      return static_cast<U>(to_float(scales.as<BFloat16>()[i]));
    case DType::kF32:
      return static_cast<U>(scales.as<float>()[i]);
    default:
      BITMILL_CHECK(scales.dtype == DType::kF64);
      return static_cast<U>(scales.as<double>()[i]);
  }
}

void store(float value, float& out) {
  out = value;
}
void store(double value, double& out) {
  out = value;
}
void store(float value, BFloat16& out) {
  out = to_bf16(value);
}

// Arithmetic in U (float; double for F64 output), result in Out.
template <typename U, typename Out>
void dequantize_rows(const QuantizedLinear& linear, Out* out, ThreadPool& pool) {
  const int64_t cols = linear.in(), groups = linear.groups();
  const int32_t* group = linear.g_idx.as<int32_t>();
  over_rows(pool, linear.out(), [&](int64_t first, int64_t last) {
    std::vector<Grid<U>> grids(static_cast<size_t>(groups));
    for (int64_t r = first; r < last; ++r) {
      for (int64_t g = 0; g < groups; ++g) {
        grids[g] = {grid_value_at<U>(linear.scales, r * groups + g),
                    grid_value_at<U>(linear.zeros, r * groups + g)};
      }
      const uint8_t* codes = linear.codes.as<uint8_t>() + r * cols;
      with_codes<U>({linear.bits, linear.kind}, [&](const auto& kind) {
        for (int64_t c = 0; c < cols; ++c)
          store(kind.value(U(codes[c]), grids[group[c]]), out[r * cols + c]);
      });
    }
  });
}

// w - w_hat (or w, where w_hat is empty) of rows [first, last) in U.
template <typename T, typename U>
std::vector<U> difference(TensorView w, TensorView w_hat, int64_t first, int64_t last) {
  const int64_t n = w.cols();
  std::vector<U> e(static_cast<size_t>((last - first) * n));
  for (size_t k = 0; k < e.size(); ++k) {
    e[k] = static_cast<U>(w.as<T>()[first * n + k]);
    if (w_hat.data) e[k] -= static_cast<U>(w_hat.as<T>()[first * n + k]);
  }
  return e;
}

// out[r] = factor * e_r H e_r^T of rows [first, last), products in U.
template <typename T, typename U>
void quadratic_rows(TensorView w, TensorView w_hat, TensorView h, double factor, int64_t first,
                    int64_t last, double* out) {
  QuadraticForm<U>(w.cols(), h).of(difference<T, U>(w, w_hat, first, last).data(), last - first, out);
  for (int64_t r = 0; r < last - first; ++r) out[r] *= factor;
}

}  // namespace

bool CpuBackend::fit_grids(TensorView weight, const GridOptions& options, int64_t group_size,
                           const ColumnStatsView& columns, TensorView scales, TensorView zeros) {
  BITMILL_CHECK(scales.shape == zeros.shape && scales.dtype == weight.dtype &&
                zeros.dtype == weight.dtype);
  BITMILL_CHECK(scales.rows() == weight.rows() &&
                scales.cols() == group_count(weight.cols(), group_size));
  BITMILL_CHECK(!columns.importance.data ||
                (columns.importance.dtype == weight.dtype &&
                 columns.importance.elements() == weight.cols() &&
                 columns.noise.dtype == weight.dtype && columns.noise.elements() == weight.cols()));
  if (weight.dtype == DType::kF64)
    return fit_grids_of<double>(weight, options, group_size, columns, scales, zeros, pool_);
  BITMILL_CHECK(weight.dtype == DType::kF32);
  return fit_grids_of<float>(weight, options, group_size, columns, scales, zeros, pool_);
}

void CpuBackend::round_to_grid(TensorView weight, TensorView scales, TensorView zeros,
                               TensorView column_group, CodeType type, TensorView codes) {
  BITMILL_CHECK(codes.dtype == DType::kU8 && codes.shape == weight.shape &&
                scales.dtype == weight.dtype);
  BITMILL_CHECK(column_group.dtype == DType::kI32 && column_group.elements() == weight.cols());
  const int32_t* group = column_group.as<int32_t>();
  if (weight.dtype == DType::kF64) {
    round_rows<double>(weight, scales, zeros, group, type, codes, pool_);
  } else {
    BITMILL_CHECK(weight.dtype == DType::kF32);
    round_rows<float>(weight, scales, zeros, group, type, codes, pool_);
  }
}

void CpuBackend::dequantize(const QuantizedLinear& linear, TensorView out) {
  BITMILL_CHECK(out.elements() == linear.codes.elements());
  switch (out.dtype) {
    case DType::kF32:
      return dequantize_rows<float>(linear, out.as<float>(), pool_);
    case DType::kBF16:
      return dequantize_rows<float>(linear, out.as<BFloat16>(), pool_);
    default:
      BITMILL_CHECK(out.dtype == DType::kF64);
      return dequantize_rows<double>(linear, out.as<double>(), pool_);
  }
}

void CpuBackend::layer_errors(TensorView w, TensorView w_hat, TensorView h, double factor,
                              TensorView errors) {
  BITMILL_CHECK(!w_hat.data || (w.dtype == w_hat.dtype && w.shape == w_hat.shape));
  BITMILL_CHECK(h.elements() == hessian_elements(w.cols()) &&
                (h.dtype == DType::kF32 || h.dtype == w.dtype));
  BITMILL_CHECK(errors.dtype == DType::kF64 && errors.elements() == w.rows());
  const int64_t rows = w.rows(), tiles = (rows + kErrorRows - 1) / kErrorRows;
  pool_.parallel_for(tiles, [&](int64_t item, int) {
    const int64_t first = item * kErrorRows, last = std::min(rows, first + kErrorRows);
    double* const out = errors.as<double>() + first;
    if (w.dtype == DType::kF64)
      return quadratic_rows<double, double>(w, w_hat, h, factor, first, last, out);
    // The signal w H w^T cancels nothing, so fp32 products do, unless one is beyond fp32; an error
    // may lie along H's small eigenvalues.
    if (!w_hat.data) {
      quadratic_rows<float, float>(w, w_hat, h, factor, first, last, out);
      if (std::all_of(out, out + (last - first), [](double x) { return std::isfinite(x); })) return;
    }
    quadratic_rows<float, double>(w, w_hat, h, factor, first, last, out);
  });
}

}  // namespace bitmill
