// Single-threaded BLAS and LAPACK calls by element type, row-major, for the tiles of factor and
// sweep. The library is told to use one thread by CpuBackend's constructor; which of our threads
// calls never changes a result.
#pragma once

#include <cblas.h>

#include <cstdint>

namespace bitmill::blas {

// c[m, n] = alpha * op(a) op(b) + beta * c.
inline void gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, float alpha,
                 const float* a, int64_t lda, const float* b, int64_t ldb, float beta, float* c,
                 int64_t ldc) {
  cblas_sgemm(CblasRowMajor, trans_a ? CblasTrans : CblasNoTrans,
              trans_b ? CblasTrans : CblasNoTrans, static_cast<int>(m), static_cast<int>(n),
              static_cast<int>(k), alpha, a, static_cast<int>(lda), b, static_cast<int>(ldb), beta,
              c, static_cast<int>(ldc));
}
inline void gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, double alpha,
                 const double* a, int64_t lda, const double* b, int64_t ldb, double beta, double* c,
                 int64_t ldc) {
  cblas_dgemm(CblasRowMajor, trans_a ? CblasTrans : CblasNoTrans,
              trans_b ? CblasTrans : CblasNoTrans, static_cast<int>(m), static_cast<int>(n),
              static_cast<int>(k), alpha, a, static_cast<int>(lda), b, static_cast<int>(ldb), beta,
              c, static_cast<int>(ldc));
}

// Lower triangle of c[n, n] -= a a^T with a[n, k].
inline void syrk_lower(int64_t n, int64_t k, const float* a, int64_t lda, float* c, int64_t ldc) {
  cblas_ssyrk(CblasRowMajor, CblasLower, CblasNoTrans, static_cast<int>(n), static_cast<int>(k),
              -1.0F, a, static_cast<int>(lda), 1.0F, c, static_cast<int>(ldc));
}
inline void syrk_lower(int64_t n, int64_t k, const double* a, int64_t lda, double* c, int64_t ldc) {
  cblas_dsyrk(CblasRowMajor, CblasLower, CblasNoTrans, static_cast<int>(n), static_cast<int>(k),
              -1.0, a, static_cast<int>(lda), 1.0, c, static_cast<int>(ldc));
}

// b[m, n] = b L^-T with the lower triangular l[n, n].
inline void solve_right_transposed(int64_t m, int64_t n, const float* l, int64_t ldl, float* b,
                                   int64_t ldb) {
  cblas_strsm(CblasRowMajor, CblasRight, CblasLower, CblasTrans, CblasNonUnit, static_cast<int>(m),
              static_cast<int>(n), 1.0F, l, static_cast<int>(ldl), b, static_cast<int>(ldb));
}
inline void solve_right_transposed(int64_t m, int64_t n, const double* l, int64_t ldl, double* b,
                                   int64_t ldb) {
  cblas_dtrsm(CblasRowMajor, CblasRight, CblasLower, CblasTrans, CblasNonUnit, static_cast<int>(m),
              static_cast<int>(n), 1.0, l, static_cast<int>(ldl), b, static_cast<int>(ldb));
}

// b[m, n] = b L^-1 with the lower triangular l[n, n].
inline void solve_right(int64_t m, int64_t n, const float* l, int64_t ldl, float* b, int64_t ldb) {
  cblas_strsm(CblasRowMajor, CblasRight, CblasLower, CblasNoTrans, CblasNonUnit,
              static_cast<int>(m), static_cast<int>(n), 1.0F, l, static_cast<int>(ldl), b,
              static_cast<int>(ldb));
}
inline void solve_right(int64_t m, int64_t n, const double* l, int64_t ldl, double* b,
                        int64_t ldb) {
  cblas_dtrsm(CblasRowMajor, CblasRight, CblasLower, CblasNoTrans, CblasNonUnit,
              static_cast<int>(m), static_cast<int>(n), 1.0, l, static_cast<int>(ldl), b,
              static_cast<int>(ldb));
}

}  // namespace bitmill::blas
