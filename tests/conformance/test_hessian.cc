// Hessian ops of every backend: the packed triangle, its update, folding, diagonal and gather.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "conformance/backend_test.h"

namespace bitmill::testing {
namespace {

// Element (i, j), j <= i, of a packed lower triangle.
int64_t packed_index(int64_t n, int64_t i, int64_t j) {
  const int64_t edge = hessian_tile(n), width = std::min(edge, n - j / edge * edge);
  return hessian_tile_offset(n, i / edge, j / edge) + i % edge * width + j % edge;
}

// Largest difference between the lower triangle in `packed` and `full` [n, n].
double triangle_difference(const Values& packed, const Values& full, int64_t n) {
  Values a, b;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j)
      a.push_back(packed[packed_index(n, i, j)]), b.push_back(full[i * n + j]);
  return max_difference(a, b);
}

TEST(HessianLayout, TilesLieOneAfterAnother) {
  for (int64_t n : {1, 5, 127, 128, 129, 300, 512, 2047, 2048, 2300}) {
    const int64_t edge = hessian_tile(n);
    int64_t offset = 0;
    for (int64_t row = 0; row * edge < n; ++row)
      for (int64_t col = 0; col <= row; ++col) {
        ASSERT_EQ(hessian_tile_offset(n, row, col), offset) << n << " tile " << row << ", " << col;
        offset += std::min(edge, n - row * edge) * std::min(edge, n - col * edge);
      }
    EXPECT_EQ(hessian_elements(n), offset) << n;
  }
}

class Hessian : public BackendTest {
 protected:
  Tensor zero_hessian(DType type, int64_t n) {
    return backend().upload(Tensor::zeros(type, {hessian_elements(n)}));
  }
  // A packed triangle of distinct, exactly representable values: H[i, j] = i + j / 1024.
  Tensor counted(DType type, int64_t n) {
    Values values(hessian_elements(n), -1.0);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        if (i / hessian_tile(n) >= j / hessian_tile(n)) values[packed_index(n, i, j)] = entry(i, j);
    return up(type, {hessian_elements(n)}, values);
  }
  static double entry(int64_t i, int64_t j) {
    return static_cast<double>(std::max(i, j)) + static_cast<double>(std::min(i, j)) / 1024;
  }
};
BITMILL_EVERY_BACKEND(Hessian);

TEST_P(Hessian, HandChecked) {
  // x = [1 2; 3 4]: x^T x = [10 14; 14 20]; added twice
  Tensor x = up(compute(), {2, 2}, {1, 2, 3, 4}), h = zero_hessian(DType::kF32, 2);
  backend().hessian_update(x, h);
  backend().hessian_update(x, h);
  const Values found = down(std::move(h));
  EXPECT_EQ(found[packed_index(2, 0, 0)], 20);
  EXPECT_EQ(found[packed_index(2, 1, 0)], 28);
  EXPECT_EQ(found[packed_index(2, 1, 1)], 40);
}

TEST_P(Hessian, UpdateMatchesDefinition) {
  for (auto [tokens, n] :
       {std::pair<int64_t, int64_t>{1, 1}, {3, 5}, {33, 17}, {70, 128}, {33, 300}, {700, 131},
        {2047, 130}, {2081, 33}}) {
    const Values x = random(tokens * n, 1);
    Tensor xs = up(compute(), {tokens, n}, x), h = zero_hessian(DType::kF32, n);
    backend().hessian_update(xs, h);
    const double magnitude = max_magnitude(x) * max_magnitude(x);
    EXPECT_LE(triangle_difference(down(std::move(h)), naive_gram(x, tokens, n), n),
              tolerance(tokens, magnitude))
        << tokens << " x " << n;
  }
}

TEST_P(Hessian, DiagonalTilesAreFull) {
  const int64_t n = 200, tokens = 97;
  const Values x = random(tokens * n, 2);
  Tensor xs = up(compute(), {tokens, n}, x), h = zero_hessian(DType::kF32, n);
  backend().hessian_update(xs, h);
  const Values found = down(std::move(h));
  const double slack = tolerance(tokens, max_magnitude(x) * max_magnitude(x));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i / hessian_tile(n) * hessian_tile(n); j <= i; ++j)
      ASSERT_NEAR(found[packed_index(n, i, j)], found[packed_index(n, j, i)], slack)
          << i << ", " << j;
}

TEST_P(Hessian, DoublePrecision) {
  const int64_t n = 150, tokens = 60;
  const Values x = random_values(tokens * n, 3);
  Tensor xs = up(DType::kF64, {tokens, n}, x), h = zero_hessian(DType::kF64, n);
  backend().hessian_update(xs, h);
  EXPECT_LE(triangle_difference(down(std::move(h)), naive_gram(x, tokens, n), n), 1e-12);
}

// Whoever looks for NaN and infinities looks at the diagonal only: a square cannot cancel, and
// neither a zero beside it nor the padding of a tile may swallow it.
TEST_P(Hessian, NonFiniteInputsShowOnTheDiagonal) {
  for (const auto& [tokens, n] : {std::pair<int64_t, int64_t>{70, 300}, {1, 129}, {33, 2050}}) {
    Tensor diagonal(DType::kF64, {n});
    for (const double bad : {std::numeric_limits<double>::quiet_NaN(), HUGE_VAL, -HUGE_VAL})
      for (const int64_t token : {int64_t{0}, tokens - 1})
        for (const int64_t column : {int64_t{0}, int64_t{127}, int64_t{128}, n - 1}) {
          Values x(tokens * n, 0.0);
          x[token * n + column] = bad;
          x[token * n + (column + 1) % n] = 0x1p-130;  // subnormal in both compute types
          Tensor h = zero_hessian(DType::kF32, n);
          backend().hessian_update(up(compute(), {tokens, n}, x), h);
          backend().hessian_update(up(compute(), {1, n}, Values(n, 1.0)), h);
          backend().hessian_diagonal(h, n, diagonal);
          for (int64_t c = 0; c < n; ++c)
            ASSERT_EQ(std::isfinite(diagonal.as<double>()[c]), c != column)
                << bad << " at " << token << ", " << column << " seen at " << c;
        }
  }
}

TEST_P(Hessian, NoTokensChangeNothing) {
  Tensor x = backend().allocate(compute(), {0, 40}), h = counted(DType::kF32, 40);
  backend().hessian_update(x, h);
  EXPECT_EQ(down(std::move(h)), down(counted(DType::kF32, 40)));
}

TEST_P(Hessian, AddFoldsLanes) {
  const int64_t n = 150'001;
  for (DType type : {DType::kF32, DType::kF64}) {
    const Values a = rounded(random_values(n, 4), type), b = rounded(random_values(n, 5), type);
    Tensor left = up(type, {n}, a), right = up(type, {n}, b);
    backend().add(left, right);
    Values expected = a;
    for (int64_t i = 0; i < n; ++i) expected[i] += b[i];
    EXPECT_EQ(max_difference(down(std::move(left)), rounded(expected, type)), 0);
  }
}

TEST_P(Hessian, Diagonal) {
  for (DType type : {DType::kF32, DType::kF64})
    for (int64_t n : {1, 128, 301}) {
      Tensor h = counted(type, n), out(DType::kF64, {n});
      backend().hessian_diagonal(h, n, out);
      for (int64_t i = 0; i < n; ++i) ASSERT_EQ(out.as<double>()[i], entry(i, i));
    }
}

TEST_P(Hessian, GatherPermutesAndScales) {
  const int64_t n = 301;
  Values order(n), diagonal(n);
  std::iota(order.begin(), order.end(), 0.0);
  for (int64_t i = n - 1; i > 0; --i) std::swap(order[i], order[i * 7919 % (i + 1)]);
  for (int64_t i = 0; i < n; ++i) diagonal[i] = 1000.0 + static_cast<double>(i);
  for (DType type : {DType::kF32, DType::kF64}) {
    Tensor h = counted(type, n), out = backend().allocate(type, {n, n});
    Tensor order_view = to_tensor(DType::kI32, {n}, order),
           diagonal_view = to_tensor(type, {n}, diagonal);
    backend().hessian_gather(h, order_view, 0.5, diagonal_view, out);
    const Values found = down(std::move(out));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        const auto a = static_cast<int64_t>(order[i]), b = static_cast<int64_t>(order[j]);
        ASSERT_EQ(found[i * n + j], i == j ? diagonal[a] : 0.5 * entry(a, b)) << i << ", " << j;
      }
  }
}

}  // namespace
}  // namespace bitmill::testing
