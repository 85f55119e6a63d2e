// AWQ's two searches: rounding errors of scaled weights, and clipping limits. All weight arithmetic
// is core/grid.h's.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "backends/cpu/cpu_backend.h"
#include "backends/cpu/quadratic_form.h"

namespace bitmill {
namespace {

constexpr int64_t kErrorRows = 256;
constexpr int64_t kClipRows = 32;
constexpr int kClipSteps = 10;          // candidates
constexpr double kClipStep = 1.0 / 20;  // shrinks per candidate

// e = w - value(code(w * s)) / s of one row; false when a scale is beyond its stored type.
template <typename T>
bool row_error(const T* w, const T* s, int64_t cols, const GridOptions& options, int64_t group_size,
               T* scaled, T* e) {
  const T maxq = T((1 << options.bits) - 1);
  for (int64_t c = 0; c < cols; ++c) scaled[c] = w[c] * s[c];
  for (int64_t first = 0; first < cols; first += group_size) {
    const int64_t last = std::min(cols, first + group_size);
    const Grid<T> grid = fit_grid(scaled + first, last - first, 1, options);
    if (!std::isfinite(grid.scale)) return false;
    for (int64_t c = first; c < last; ++c)
      e[c] = w[c] - from_code(to_code(scaled[c], grid, maxq), grid) / s[c];
  }
  return true;
}

template <typename T>
void errors_of(TensorView weight, const GridOptions& options, int64_t group_size, TensorView scales,
               TensorView h, TensorView errors, ThreadPool& pool) {
  const int64_t rows = weight.rows(), n = weight.cols(), candidates = scales.rows();
  const int64_t tiles = (rows + kErrorRows - 1) / kErrorRows;
  std::vector<T> s(static_cast<size_t>(scales.elements()));
  for (size_t i = 0; i < s.size(); ++i) s[i] = static_cast<T>(scales.as<double>()[i]);
  std::vector<double> sums(static_cast<size_t>(candidates * tiles));
  const QuadraticForm<T> form(n, h);
  pool.parallel_for(candidates * tiles, [&](int64_t item, int) {
    const int64_t candidate = item / tiles, first = item % tiles * kErrorRows,
                  count = std::min(kErrorRows, rows - first);
    std::vector<T> e(static_cast<size_t>(count * n)), scaled(static_cast<size_t>(n));
    bool fits = true;
    for (int64_t r = 0; r < count && fits; ++r)
      fits = row_error(weight.as<T>() + (first + r) * n, s.data() + candidate * n, n, options,
                       group_size, scaled.data(), e.data() + r * n);
    sums[item] = std::numeric_limits<double>::quiet_NaN();
    if (!fits) return;
    std::vector<double> of_rows(static_cast<size_t>(count));
    form.of(e.data(), count, of_rows.data());
    sums[item] = std::accumulate(of_rows.begin(), of_rows.end(), 0.0);
  });
  for (int64_t k = 0; k < candidates; ++k)
    errors.as<double>()[k] =
        std::accumulate(sums.begin() + k * tiles, sums.begin() + (k + 1) * tiles, 0.0);
}

// Rounding errors of the group w clamped to [-limit, limit].
template <typename T>
void clipped_error(const T* w, int64_t count, T limit, const GridOptions& options, T* clamped,
                   T* e) {
  const T maxq = T((1 << options.bits) - 1);
  for (int64_t c = 0; c < count; ++c) clamped[c] = std::min(std::max(w[c], -limit), limit);
  const Grid<T> grid = fit_grid(clamped, count, 1, options);
  for (int64_t c = 0; c < count; ++c)
    e[c] = from_code(to_code(clamped[c], grid, maxq), grid) - w[c];
}

// Limits of rows [first, first + rows) in one group of columns [begin, end).
template <typename T>
class GroupClip {
 public:
  GroupClip(TensorView weight, const GridOptions& options, TensorView h)
      : weight_(weight), options_(options), form_(weight.cols(), h) {}

  void run(int64_t first, int64_t rows, int64_t begin, int64_t end, double* limits,
           int64_t stride) const {
    const int64_t n = weight_.cols(), count = end - begin;
    std::vector<T> e(static_cast<size_t>(rows * kClipSteps * count)),
        clamped(static_cast<size_t>(count));
    std::vector<double> errors(static_cast<size_t>(rows * kClipSteps));
    for (int64_t r = 0; r < rows; ++r) {
      const T* w = weight_.as<T>() + (first + r) * n + begin;
      for (int step = 0; step < kClipSteps; ++step)
        clipped_error(w, count, limit(w, count, step), options_, clamped.data(),
                      e.data() + (r * kClipSteps + step) * count);
    }
    form_.of_rows(e.data(), rows * kClipSteps, begin, end, errors.data());
    for (int64_t r = 0; r < rows; ++r) {
      const double* of_row = errors.data() + r * kClipSteps;
      const int64_t best = std::min_element(of_row, of_row + kClipSteps) - of_row;
      const T* w = weight_.as<T>() + (first + r) * n + begin;
      limits[r * stride] =
          limit(w, count, std::isfinite(of_row[best]) ? static_cast<int>(best) : 0);
    }
  }

 private:
  static T limit(const T* w, int64_t count, int step) {
    T top = 0;
    for (int64_t c = 0; c < count; ++c) top = std::max(top, std::abs(w[c]));
    return top * static_cast<T>(1 - step * kClipStep);
  }

  TensorView weight_;
  GridOptions options_;
  QuadraticForm<T> form_;
};

template <typename T>
void limits_of(TensorView weight, const GridOptions& options, int64_t group_size, TensorView h,
               TensorView limits, ThreadPool& pool) {
  const int64_t rows = weight.rows(), n = weight.cols(), groups = limits.cols();
  const GroupClip<T> clip(weight, options, h);
  const int64_t tiles = (rows + kClipRows - 1) / kClipRows;
  pool.parallel_for(groups * tiles, [&](int64_t item, int) {
    const int64_t group = item / tiles, first = item % tiles * kClipRows;
    const int64_t begin = group * group_size;
    clip.run(first, std::min(kClipRows, rows - first), begin, std::min(n, begin + group_size),
             limits.as<double>() + first * groups + group, groups);
  });
}

}  // namespace

void CpuBackend::scaling_errors(TensorView weight, const GridOptions& options, int64_t group_size,
                                TensorView scales, TensorView h, TensorView errors) {
  const int64_t n = weight.cols(), size = group_size == -1 ? n : group_size;
  BITMILL_CHECK(h.dtype == weight.dtype && h.elements() == hessian_elements(n));
  BITMILL_CHECK(scales.dtype == DType::kF64 && scales.cols() == n &&
                errors.elements() == scales.rows());
  if (weight.dtype == DType::kF64)
    return errors_of<double>(weight, options, size, scales, h, errors, pool_);
  BITMILL_CHECK(weight.dtype == DType::kF32);
  errors_of<float>(weight, options, size, scales, h, errors, pool_);
}

void CpuBackend::clip_limits(TensorView weight, const GridOptions& options, int64_t group_size,
                             TensorView h, TensorView limits) {
  const int64_t n = weight.cols(), size = group_size == -1 ? n : group_size;
  BITMILL_CHECK(h.dtype == weight.dtype && h.elements() == hessian_elements(n));
  BITMILL_CHECK(limits.dtype == DType::kF64 && limits.rows() == weight.rows() &&
                limits.cols() == group_count(n, group_size));
  if (weight.dtype == DType::kF64)
    return limits_of<double>(weight, options, size, h, limits, pool_);
  BITMILL_CHECK(weight.dtype == DType::kF32);
  limits_of<float>(weight, options, size, h, limits, pool_);
}

}  // namespace bitmill
