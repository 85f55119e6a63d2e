// The quadratic form e H e^T with a packed Hessian (backend.h), per row or summed over rows.
#pragma once

#include <algorithm>
#include <vector>

#include "backends/backend.h"
#include "backends/cpu/cpu_blas.h"

namespace bitmill {

// Sum over rows of e H e^T = 2 sum_{I > J} e_I H_IJ e_J^T + sum_J e_J H_JJ e_J^T, products in U,
// the sum in double.
template <typename U>
class QuadraticForm {
 public:
  QuadraticForm(int64_t n, TensorView h) : n_(n), tile_(hessian_tile(n)), h_(h) {}

  // sums[r] = e_r H e_r^T, e [rows, n].
  void of(const U* e, int64_t rows, double* sums) const {
    const int64_t tiles = (n_ + tile_ - 1) / tile_;
    std::vector<U> product(static_cast<size_t>(rows * tile_)), block;
    std::fill_n(sums, rows, 0.0);
    for (int64_t j = 0; j < tiles; ++j) {
      const int64_t width = edge(j);
      for (int64_t i = j; i < tiles; ++i) {
        const U* h = tile(i, j, block);
        blas::gemm(false, false, rows, width, edge(i), U(i == j ? 1 : 2), e + i * tile_, n_, h,
                   width, U(i == j ? 0 : 1), product.data(), width);
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < width; ++c) {
          sums[r] += static_cast<double>(product[r * width + c]) *
                     static_cast<double>(e[r * n_ + j * tile_ + c]);
        }
      }
    }
  }

  // out[r] = e_r H e_r^T over columns [first, last) alone, e [rows, last - first]. h has type U.
  void of_rows(const U* e, int64_t rows, int64_t first, int64_t last, double* out) const {
    const int64_t count = last - first;
    std::vector<U> product(static_cast<size_t>(rows * tile_));
    std::fill_n(out, rows, 0.0);
    for (int64_t j = first / tile_; j * tile_ < last; ++j) {
      const int64_t left = std::max(first, j * tile_),
                    width = std::min(last, (j + 1) * tile_) - left;
      for (int64_t i = j; i * tile_ < last; ++i) {
        const int64_t top = std::max(first, i * tile_),
                      height = std::min(last, (i + 1) * tile_) - top;
        const U* h = h_.as<U>() + hessian_tile_offset(n_, i, j) + (top - i * tile_) * edge(j) +
                     left - j * tile_;
        blas::gemm(false, false, rows, width, height, U(i == j ? 1 : 2), e + top - first, count, h,
                   edge(j), U(i == j ? 0 : 1), product.data(), width);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const U *a = product.data() + r * width, *b = e + r * count + left - first;
        for (int64_t c = 0; c < width; ++c)
          out[r] += static_cast<double>(a[c]) * static_cast<double>(b[c]);
      }
    }
  }

 private:
  int64_t edge(int64_t i) const { return std::min(tile_, n_ - i * tile_); }
  // Tile (i, j) of h in U; `block` holds it where h has another type.
  const U* tile(int64_t i, int64_t j, std::vector<U>& block) const {
    const int64_t offset = hessian_tile_offset(n_, i, j);
    if ((h_.dtype == DType::kF64) == (sizeof(U) == 8)) return h_.as<U>() + offset;
    block.resize(static_cast<size_t>(edge(i) * edge(j)));
    for (size_t k = 0; k < block.size(); ++k) block[k] = static_cast<U>(h_.as<float>()[offset + k]);
    return block.data();
  }

  int64_t n_, tile_;
  TensorView h_;
};

}  // namespace bitmill
