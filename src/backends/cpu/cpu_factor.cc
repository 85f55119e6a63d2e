// Tiled lower Cholesky, right-looking: per tile column k one factorization of the diagonal tile,
// one triangular solve per tile below it, one update per remaining tile. Each tile operation is one
// single-threaded library call, so the result depends on n alone. The first update item also
// factorizes the next diagonal tile, which hides that serial step.
#include <lapacke.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "backends/cpu/cpu_backend.h"
#include "backends/cpu/cpu_blas.h"

namespace bitmill {
namespace {

constexpr int64_t kTile = 256;

// A row-major lower triangle is a column-major upper one, which LAPACK takes without a copy: A^T =
// U^T U, U = L^T.
int potrf(float* a, int64_t n, int64_t lda) {
  return LAPACKE_spotrf_work(LAPACK_COL_MAJOR, 'U', static_cast<int>(n), a, static_cast<int>(lda));
}
int potrf(double* a, int64_t n, int64_t lda) {
  return LAPACKE_dpotrf_work(LAPACK_COL_MAJOR, 'U', static_cast<int>(n), a, static_cast<int>(lda));
}

template <typename T>
class TiledCholesky {
 public:
  TiledCholesky(T* a, int64_t n, ThreadPool& pool)
      : a_(a), n_(n), tiles_((n + kTile - 1) / kTile), pool_(pool) {
    state_.smallest_pivot = std::numeric_limits<double>::infinity();
  }

  FactorState run() {
    factor_diagonal(0);
    for (int64_t k = 0; k + 1 < tiles_ && state_.failed_pivot < 0; ++k) {
      const int64_t below = tiles_ - k - 1;
      pool_.parallel_for(below, [&](int64_t item, int) { solve(k + 1 + item, k); });
      pool_.parallel_for(below * (below + 1) / 2, [&](int64_t item, int) { update_item(k, item); });
    }
    state_.ok = state_.failed_pivot < 0;
    return state_;
  }

 private:
  T* at(int64_t i, int64_t j) { return a_ + i * kTile * n_ + j * kTile; }
  int64_t edge(int64_t i) const { return std::min(kTile, n_ - i * kTile); }

  void factor_diagonal(int64_t k) {
    const int64_t size = edge(k);
    const int info = potrf(at(k, k), size, n_);
    // The library may pass NaN and infinity through: every pivot is looked at.
    for (int64_t i = 0; i < size; ++i) {
      const double pivot = static_cast<double>(at(k, k)[i * n_ + i]);
      if (info == i + 1 || !(pivot > 0) || !std::isfinite(pivot)) {
        state_.failed_pivot = k * kTile + i;
        return;
      }
      state_.smallest_pivot = std::min(state_.smallest_pivot, pivot * pivot);
    }
  }

  void solve(int64_t i, int64_t k) {
    blas::solve_right_transposed(edge(i), kTile, at(k, k), n_, at(i, k), n_);
  }

  // Items count the remaining lower tiles row by row: 0 -> (k+1, k+1), 1 -> (k+2, k+1), 2 -> (k+2,
  // k+2), ...
  void update_item(int64_t k, int64_t item) {
    int64_t row = static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(item) + 1) - 1) / 2);
    while ((row + 1) * (row + 2) / 2 <= item) ++row;
    while (row * (row + 1) / 2 > item) --row;
    const int64_t i = k + 1 + row, j = k + 1 + item - row * (row + 1) / 2;
    if (i == j) {
      blas::syrk_lower(edge(i), kTile, at(i, k), n_, at(i, i), n_);
    } else {
      blas::gemm(false, true, edge(i), edge(j), kTile, T(-1), at(i, k), n_, at(j, k), n_, T(1),
                 at(i, j), n_);
    }
    if (item == 0) factor_diagonal(k + 1);
  }

  T* a_;
  int64_t n_, tiles_;
  ThreadPool& pool_;
  FactorState state_;
};

// Rademacher sign of probe `row` at position k: bit of a mixed counter (the finalizer of
// SplitMix64, Steele et al. 2014), the same everywhere.
bool negative_sign(uint64_t row, uint64_t k) {
  uint64_t x = (row << 40) + k + 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return (x >> 63) != 0;
}

// Sums over `rows` probes r of (r - y)^2 per position, y = r diag(L) L^-1, into sums[n].
template <typename T>
void probe_feedback(const T* factor, int64_t n, int64_t first_row, int64_t rows, double* sums) {
  std::vector<T> y(static_cast<size_t>(rows * n));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < n; ++k) {
      const T pivot = factor[k * n + k];
      y[r * n + k] = negative_sign(first_row + r, k) ? -pivot : pivot;
    }
  }
  blas::solve_right(rows, n, factor, n, y.data(), n);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < n; ++k) {
      const T sign = negative_sign(first_row + r, k) ? T(-1) : T(1);
      const double d = static_cast<double>(sign - y[r * n + k]);
      sums[k] += d * d;
    }
  }
}

template <typename T>
void estimate_feedback(const T* factor, int64_t n, T* variance, ThreadPool& pool) {
  constexpr int64_t kProbes = 256, kRows = 32, kItems = kProbes / kRows;
  std::vector<std::vector<double>> sums(kItems, std::vector<double>(static_cast<size_t>(n)));
  pool.parallel_for(kItems, [&](int64_t item, int) {
    probe_feedback(factor, n, item * kRows, kRows, sums[item].data());
  });
  for (int64_t k = 0; k < n; ++k) {
    double sum = 0;
    for (const std::vector<double>& part : sums) sum += part[k];
    variance[k] = static_cast<T>(sum / kProbes);
  }
}

}  // namespace

void CpuBackend::feedback_variance(TensorView factor, TensorView variance) {
  const int64_t n = factor.rows();
  BITMILL_CHECK(factor.cols() == n && variance.elements() == n && variance.dtype == factor.dtype);
  if (factor.dtype == DType::kF64)
    return estimate_feedback(factor.as<double>(), n, variance.as<double>(), pool_);
  BITMILL_CHECK(factor.dtype == DType::kF32);
  estimate_feedback(factor.as<float>(), n, variance.as<float>(), pool_);
}

FactorState CpuBackend::factorize(TensorView a) {
  BITMILL_CHECK(a.shape.rank() == 2 && a.rows() == a.cols() && a.rows() > 0);
  if (a.dtype == DType::kF64) return TiledCholesky<double>(a.as<double>(), a.rows(), pool_).run();
  BITMILL_CHECK(a.dtype == DType::kF32);
  return TiledCholesky<float>(a.as<float>(), a.rows(), pool_).run();
}

}  // namespace bitmill
