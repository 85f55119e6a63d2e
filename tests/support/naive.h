// The definition of the backend's numeric operations: plain loops in double precision over
// row-major vectors, nothing fast, nothing shared with src/. Conformance tests compare every
// backend with these.
#pragma once

#include <cstdint>
#include <vector>

#include "core/tensor.h"

namespace bitmill::testing {

using Values = std::vector<double>;

// ---- moving numbers between vectors and tensors

// Normally distributed values with a seed, the same on every machine.
Values random_values(int64_t count, uint64_t seed, double scale = 1.0);
// A host tensor of a float type (rounded to it) or of kI32, kU8 (exact integers).
Tensor to_tensor(DType dtype, Shape shape, const Values& values);
// Elements of a host tensor, exactly.
Values to_values(TensorView view);
// `values` as they read after a stay in `dtype` (kBF16, kF16, kF32: rounded; kF64: as they are).
Values rounded(const Values& values, DType dtype);
// Largest |a - b| (infinity when one is NaN and the other is not, or sizes differ).
double max_difference(const Values& a, const Values& b);
// Largest |value|.
double max_magnitude(const Values& values);

// ---- forward

// c [m, n] = a [m, k] * b [n, k]^T: a linear layer's product.
Values naive_matmul_bt(const Values& a, const Values& b, int64_t m, int64_t n, int64_t k);
// x [tokens, n] / sqrt(mean(x^2) + eps) * weight [n]
Values naive_rms_norm(const Values& x, const Values& weight, double eps, int64_t tokens, int64_t n);
// Rotation of dims (j, j + pairs) of each head by the angle of its position; table [length, 2 *
// pairs]: cos, then sin.
Values naive_rope(const Values& x, const Values& table, int64_t tokens, int64_t heads,
                  int64_t head_dim, int64_t length, int64_t pairs);

struct NaiveAttention {
  int64_t sequences, length, heads, kv_heads, head_dim;
  double scale;
  int64_t window;  // 0: none
};
// Causal softmax(scale q k^T) v; q [tokens, heads * head_dim], k and v [tokens, kv_heads *
// head_dim].
Values naive_attention(const Values& q, const Values& k, const Values& v,
                       const NaiveAttention& shape);

double naive_silu(double x);
double naive_gelu_tanh(double x);
double naive_relu(double x);

// logsumexp(logits[t]) - logits[t, target]; 0 where target is -1.
Values naive_token_nll(const Values& logits, const std::vector<int>& targets, int64_t vocab);

// ---- Hessian and factor

// x [tokens, n] -> x^T x [n, n], in full.
Values naive_gram(const Values& x, int64_t tokens, int64_t n);
// Lower Cholesky factor of a symmetric positive definite a [n, n]; the upper triangle is zero.
// Empty when a pivot is not positive.
Values naive_cholesky(const Values& a, int64_t n);

}  // namespace bitmill::testing
