// The tiled Cholesky factorization: products, pivots, and the same bits for any number of threads.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "algorithms/problem_data.h"

namespace bitmill {
namespace {

using testing::bytes_of;
using testing::random_inputs;

// X^T X + I of random inputs, both triangles.
Tensor positive_matrix(int64_t n, uint64_t seed) {
  const Tensor x = random_inputs(n / 2 + 3, n, seed);
  Tensor a(DType::kF64, {n, n});
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = i == j ? 1 : 0;
      for (int64_t t = 0; t < x.rows(); ++t)
        sum += x.as<double>()[t * n + i] * x.as<double>()[t * n + j];
      a.as<double>()[i * n + j] = sum;
    }
  }
  return a;
}

class FactorTest : public ::testing::TestWithParam<int64_t> {};

TEST_P(FactorTest, ProductGivesTheMatrixBack) {
  const int64_t n = GetParam();
  const std::unique_ptr<Backend> backend = make_backend({"cpu", DType::kF32, 2});
  const Tensor a = positive_matrix(n, 5);
  Tensor l = clone(a);
  const FactorState state = backend->factorize(l);
  ASSERT_TRUE(state.ok);
  EXPECT_EQ(state.failed_pivot, -1);
  double smallest = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < n; ++i) {
    smallest = std::min(smallest, std::pow(l.as<double>()[i * n + i], 2));
    for (int64_t j = 0; j <= i; j += 7) {
      double sum = 0;
      for (int64_t k = 0; k <= j; ++k) sum += l.as<double>()[i * n + k] * l.as<double>()[j * n + k];
      const double size = std::sqrt(a.as<double>()[i * n + i] * a.as<double>()[j * n + j]);
      ASSERT_NEAR(sum, a.as<double>()[i * n + j], 1e-12 * size) << i << ", " << j;
    }
  }
  EXPECT_EQ(state.smallest_pivot, smallest);
}

INSTANTIATE_TEST_SUITE_P(Sizes, FactorTest, ::testing::Values(1, 2, 255, 256, 257, 600));

TEST(Factor, FailedPivotIsItsColumn) {
  const std::unique_ptr<Backend> backend = make_backend({"cpu", DType::kF32, 2});
  for (int64_t column : {0, 3, 256, 299}) {
    for (double pivot : {0.0, -1.0, std::numeric_limits<double>::quiet_NaN(),
                         std::numeric_limits<double>::infinity()}) {
      Tensor a = Tensor::zeros(DType::kF64, {300, 300});
      for (int64_t i = 0; i < 300; ++i) a.as<double>()[i * 301] = i == column ? pivot : 2;
      const FactorState state = backend->factorize(a);
      EXPECT_FALSE(state.ok);
      EXPECT_EQ(state.failed_pivot, column) << "pivot " << pivot;
    }
  }
}

TEST(Factor, ThreadsDoNotChangeABit) {
  const Tensor a = testing::to_type(positive_matrix(700, 6), DType::kF32);
  std::vector<uint8_t> wanted;
  for (int threads : {1, 2, 3}) {
    Tensor l = clone(a);
    ASSERT_TRUE(make_backend({"cpu", DType::kF32, threads})->factorize(l).ok);
    if (threads == 1) wanted = bytes_of(l);
    EXPECT_EQ(bytes_of(l), wanted);
  }
}

// sum_{j > k} (L_jj (L^-1)_jk)^2 by an explicit inverse.
std::vector<double> exact_variance(const Tensor& factor) {
  const int64_t n = factor.rows();
  const double* l = factor.as<double>();
  std::vector<double> variance(static_cast<size_t>(n));
  for (int64_t k = 0; k < n; ++k) {
    std::vector<double> inverse(static_cast<size_t>(n));  // column k of L^-1
    for (int64_t j = k; j < n; ++j) {
      double sum = j == k ? 1 : 0;
      for (int64_t i = k; i < j; ++i) sum -= l[j * n + i] * inverse[i];
      inverse[j] = sum / l[j * n + j];
      if (j > k) variance[k] += std::pow(l[j * n + j] * inverse[j], 2);
    }
  }
  return variance;
}

// A single estimate has a relative standard deviation of 9%, the mean of 300 far less.
TEST(Feedback, VarianceIsThatOfTheInverse) {
  const int64_t n = 300;
  const std::unique_ptr<Backend> backend = make_backend({"cpu", DType::kF32, 2});
  Tensor factor = positive_matrix(n, 9);
  ASSERT_TRUE(backend->factorize(factor).ok);
  Tensor variance(DType::kF64, {n});
  backend->feedback_variance(factor, variance);
  const std::vector<double> exact = exact_variance(factor);
  double ratio = 0;
  for (int64_t k = 0; k + 1 < n; ++k) {
    EXPECT_NEAR(variance.as<double>()[k], exact[k], 0.4 * exact[k]) << k;
    ratio += variance.as<double>()[k] / exact[k] / static_cast<double>(n - 1);
  }
  EXPECT_NEAR(ratio, 1, 0.03);
  EXPECT_EQ(variance.as<double>()[n - 1], 0) << "nothing is solved before the last position";
}

TEST(Feedback, SameBitsForAnyThreads) {
  const std::unique_ptr<Backend> one = make_backend({"cpu", DType::kF32, 1});
  const std::unique_ptr<Backend> three = make_backend({"cpu", DType::kF32, 3});
  Tensor factor = testing::to_type(positive_matrix(500, 4), DType::kF32);
  ASSERT_TRUE(one->factorize(factor).ok);
  Tensor a(DType::kF32, {500}), b(DType::kF32, {500});
  one->feedback_variance(factor, a);
  three->feedback_variance(factor, b);
  EXPECT_EQ(bytes_of(a), bytes_of(b));
}

}  // namespace
}  // namespace bitmill
