// What gptaq needs besides the Hessian: cross products of activations, and the corrected weight.
#include <algorithm>
#include <vector>

#include "backends/cpu/amx.h"
#include "backends/cpu/cpu_backend.h"
#include "backends/cpu/cpu_blas.h"
#include "backends/cpu/kernels.h"

namespace bitmill {
namespace {

constexpr int64_t kEdge = 256;  // of a tile of the cross product, and rows of a weight tile

int64_t tiles_of(int64_t n) {
  return (n + kEdge - 1) / kEdge;
}

// Calls body(row, col, rows, cols) for all tiles of a [rows, cols] matrix.
template <typename Body>
void over_tiles(ThreadPool& pool, int64_t rows, int64_t cols, const Body& body) {
  const int64_t across = tiles_of(cols);
  pool.parallel_for(tiles_of(rows) * across, [&](int64_t item, int) {
    const int64_t row = item / across * kEdge, col = item % across * kEdge;
    body(row, col, std::min(kEdge, rows - row), std::min(kEdge, cols - col));
  });
}

template <typename T>
void cross_tiles(TensorView a, TensorView b, TensorView m, ThreadPool& pool) {
  over_tiles(pool, m.rows(), m.cols(), [&](int64_t row, int64_t col, int64_t rows, int64_t cols) {
    blas::gemm(true, false, rows, cols, a.rows(), T(1), a.as<T>() + row, a.cols(), b.as<T>() + col,
               b.cols(), T(1), m.as<T>() + row * m.cols() + col, m.cols());
  });
}

// x in A or B tiles; the other pointer is null.
void pack(TensorView x, BFloat16* a, BFloat16* b, ThreadPool& pool) {
  constexpr int64_t kSteps = 4;  // 128 tokens per packing item
  const int64_t steps = (x.rows() + 31) / 32;
  pool.parallel_for((steps + kSteps - 1) / kSteps, [&](int64_t item, int) {
    amx::pack_gram(x.as<BFloat16>(), x.rows(), x.cols(), item * kSteps,
                   std::min(steps, (item + 1) * kSteps), a, b);
  });
}

void cross_amx(TensorView a, TensorView b, TensorView m, ThreadPool& pool) {
  const int64_t tokens = a.rows();
  Tensor packed_a(DType::kBF16, {amx::packed_elements(a.cols(), tokens)});
  Tensor packed_b(DType::kBF16, {amx::packed_elements(b.cols(), tokens)});
  pack(a, packed_a.as<BFloat16>(), nullptr, pool);
  pack(b, nullptr, packed_b.as<BFloat16>(), pool);
  over_tiles(pool, m.rows(), m.cols(), [&](int64_t row, int64_t col, int64_t rows, int64_t cols) {
    amx::multiply_packed(packed_a.as<BFloat16>() + amx::packed_elements(row, tokens),
                         packed_b.as<BFloat16>() + amx::packed_elements(col, tokens), rows, cols,
                         tokens, m.as<float>() + row * m.cols() + col, m.cols());
  });
}

Tensor widened(TensorView x) {
  Tensor out(DType::kF32, x.shape);
  convert(x, out);
  return out;
}

// Calls body with a typed pointer of a compute type.
template <typename Body>
void with_compute_type(TensorView x, const Body& body) {
  if (x.dtype == DType::kBF16) return body(x.as<BFloat16>());
  BITMILL_CHECK(x.dtype == DType::kF32);
  body(x.as<float>());
}

// One tile of rows of `correct_weight`.
template <typename T>
struct Correction {
  TensorView w, c, r;
  T c_factor, r_factor;
  const T* l;
  const int32_t* order;
  TensorView out;

  void rows(int64_t first, int64_t count) const {
    const int64_t n = w.cols(), elements = count * n;
    std::vector<T> lost(static_cast<size_t>(elements)), solved(lost.size());
    if (r.data != nullptr) {
      for (int64_t i = 0; i < elements; ++i) lost[i] = r_factor * r.as<T>()[first * n + i];
    }
    blas::gemm(false, false, count, n, n, c_factor, w.as<T>() + first * n, n, c.as<T>(), n,
               T(r.data != nullptr ? 1 : 0), lost.data(), n);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t p = 0; p < n; ++p) solved[i * n + p] = lost[i * n + order[p]];
    blas::solve_right_transposed(count, n, l, n, solved.data(), n);
    blas::solve_right(count, n, l, n, solved.data(), n);
    for (int64_t i = 0; i < count; ++i) {
      const T* weight = w.as<T>() + (first + i) * n;
      T* to = out.as<T>() + (first + i) * n;
      for (int64_t p = 0; p < n; ++p) to[order[p]] = weight[order[p]] + solved[i * n + p];
    }
  }
};

template <typename T>
void correct(const Correction<T>& correction, ThreadPool& pool) {
  const int64_t rows = correction.w.rows();
  pool.parallel_for(tiles_of(rows), [&](int64_t item, int) {
    correction.rows(item * kEdge, std::min(kEdge, rows - item * kEdge));
  });
}

}  // namespace

void CpuBackend::cross_update(TensorView a, TensorView b, TensorView m) {
  BITMILL_CHECK(a.dtype == b.dtype && a.rows() == b.rows());
  BITMILL_CHECK(m.rows() == a.cols() && m.cols() == b.cols());
  BITMILL_CHECK(m.dtype == (a.dtype == DType::kF64 ? DType::kF64 : DType::kF32));
  if (a.rows() == 0) return;
  if (a.dtype == DType::kF64) return cross_tiles<double>(a, b, m, pool_);
  if (a.dtype == DType::kF32) return cross_tiles<float>(a, b, m, pool_);
  if (amx_) return cross_amx(a, b, m, pool_);
  cross_tiles<float>(widened(a), widened(b), m, pool_);
}

void CpuBackend::difference(TensorView a, TensorView b, TensorView out) {
  BITMILL_CHECK(a.shape == b.shape && a.shape == out.shape);
  constexpr int64_t kChunk = 1 << 16;
  const int64_t n = a.elements();
  const auto over_chunks = [&](const auto& subtract) {
    pool_.parallel_for((n + kChunk - 1) / kChunk, [&](int64_t item, int) {
      const int64_t first = item * kChunk;
      subtract(first, std::min(kChunk, n - first));
    });
  };
  if (out.dtype == DType::kF64) {
    BITMILL_CHECK(a.dtype == DType::kF64 && b.dtype == DType::kF64);
    const double *x = a.as<double>(), *y = b.as<double>();
    return over_chunks([&, to = out.as<double>()](int64_t first, int64_t count) {
      for (int64_t i = first; i < first + count; ++i) to[i] = x[i] - y[i];
    });
  }
  with_compute_type(a, [&](const auto* x) {
    with_compute_type(b, [&](const auto* y) {
      with_compute_type(out, [&](auto* to) {
        over_chunks([&](int64_t first, int64_t count) {
          dispatch<Subtract<std::decay_t<decltype(*x)>, std::decay_t<decltype(*y)>,
                            std::decay_t<decltype(*to)>>>(x + first, y + first, to + first, count);
        });
      });
    });
  });
}

void CpuBackend::correct_weight(TensorView w, TensorView c, double c_factor, TensorView r,
                                double r_factor, TensorView l, TensorView order, TensorView out) {
  const int64_t n = w.cols();
  BITMILL_CHECK(c.rows() == n && c.cols() == n && l.rows() == n && l.cols() == n);
  BITMILL_CHECK(c.dtype == w.dtype && l.dtype == w.dtype && out.dtype == w.dtype);
  BITMILL_CHECK(out.shape == w.shape && out.data != w.data && order.elements() == n);
  BITMILL_CHECK(r.data == nullptr || (r.shape == w.shape && r.dtype == w.dtype));
  const int32_t* columns = order.as<int32_t>();
  if (w.dtype == DType::kF64)
    return correct<double>({w, c, r, c_factor, r_factor, l.as<double>(), columns, out}, pool_);
  BITMILL_CHECK(w.dtype == DType::kF32);
  correct<float>({w, c, r, static_cast<float>(c_factor), static_cast<float>(r_factor),
                  l.as<float>(), columns, out},
                 pool_);
}

}  // namespace bitmill
