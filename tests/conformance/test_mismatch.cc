// Cross products of activations, their differences and the corrected weight, against plain loops.
#include <cmath>

#include "conformance/backend_test.h"

namespace bitmill::testing {
namespace {

class Mismatch : public BackendTest {
 protected:
  Values look(const Tensor& tensor) { return down(clone(tensor)); }
  static Tensor ints(int32_t a, int32_t b) {
    Tensor out(DType::kI32, {2});
    out.as<int32_t>()[0] = a;
    out.as<int32_t>()[1] = b;
    return out;
  }
};
BITMILL_EVERY_BACKEND(Mismatch);

TEST_P(Mismatch, CrossUpdateByHand) {
  // a = [1 2; 3 4], b = [5; 6]: a^T b = [23; 34]; added twice
  Tensor a = up(compute(), {2, 2}, {1, 2, 3, 4}), b = up(compute(), {2, 1}, {5, 6});
  Tensor m = up(DType::kF32, {2, 1}, {0, 0});
  backend().cross_update(a, b, m);
  backend().cross_update(a, b, m);
  EXPECT_EQ(look(m), (Values{46, 68}));
}

// Small integers: every partial sum is exact, so every order of summation gives the same.
TEST_P(Mismatch, CrossUpdateOfAnyShape) {
  for (const auto& [tokens, rows, cols] :
       {std::array<int64_t, 3>{1, 1, 1}, {33, 17, 300}, {64, 270, 16}, {100, 257, 259}}) {
    Values a(tokens * rows), b(tokens * cols), expected(rows * cols, 0.0);
    for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<double>(i * 7 % 13) - 6;
    for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<double>(i * 5 % 11) - 5;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j)
          expected[i * cols + j] += a[t * rows + i] * b[t * cols + j];
    for (DType type : {compute(), DType::kF64}) {
      Tensor m = up(type == DType::kF64 ? DType::kF64 : DType::kF32, {rows, cols},
                    Values(rows * cols, 0.0));
      backend().cross_update(up(type, {tokens, rows}, a), up(type, {tokens, cols}, b), m);
      EXPECT_EQ(look(m), expected) << rows << " x " << cols << " " << dtype_name(type);
    }
  }
}

TEST_P(Mismatch, DifferenceRoundsOnce) {
  Tensor a = up(DType::kF32, {1, 3}, {1.00390625, -2, 5}), b = up(DType::kF32, {1, 3}, {0, 1, 5});
  Tensor exact = up(DType::kF32, {1, 3}, {0, 0, 0}), rounded = up(DType::kBF16, {1, 3}, {0, 0, 0});
  backend().difference(a, b, exact);
  backend().difference(a, b, rounded);
  EXPECT_EQ(look(exact), (Values{1.00390625, -3, 0}));
  EXPECT_EQ(look(rounded), (Values{1, -3, 0})) << "a tie in bf16 goes to even";
  backend().difference(up(DType::kBF16, {1, 2}, {3, 1}), up(DType::kF32, {1, 2}, {1, 0.5}),
                       exact.view().reshaped({3}).slice(0, 2).reshaped({1, 2}));
  EXPECT_EQ(look(exact)[0], 2);
  EXPECT_EQ(look(exact)[1], 0.5);
}

// H = [4 2; 2 10] with factor L = [2 0; 1 3]. w C + R = [8 14]; times H^-1 = [10 -2; -2 4] / 36 is
// [52 40] / 36, times the factor 9: [13 10].
TEST_P(Mismatch, CorrectWeightByHand) {
  for (DType type : {DType::kF32, DType::kF64}) {
    Tensor w = up(type, {1, 2}, {1, 2}), c = up(type, {2, 2}, {1, 2, 3, 5}),
           r = up(type, {1, 2}, {1, 2});
    Tensor l = up(type, {2, 2}, {2, 0, 1, 3}), out = up(type, {1, 2}, {0, 0});
    Tensor order = ints(0, 1);
    backend().correct_weight(w, c, 9, r, 9, l, order, out);
    EXPECT_NEAR(look(out)[0], 14, 1e-5);
    EXPECT_NEAR(look(out)[1], 12, 1e-5);
    // Without a residual: w C = [7 12], [7 12] H^-1 = [46 34] / 36.
    backend().correct_weight(w, c, 36, TensorView(), 0, l, order, out);
    EXPECT_NEAR(look(out)[0], 47, 2e-5);
    EXPECT_NEAR(look(out)[1], 36, 2e-5);
    // R alone, at half weight: [0.5 1] H^-1 = [3 3] / 36.
    backend().correct_weight(w, c, 0, r, 0.5, l, order, out);
    EXPECT_NEAR(look(out)[0], 1 + 3 / 36.0, 1e-6);
    EXPECT_NEAR(look(out)[1], 2 + 3 / 36.0, 1e-6);
    // The same Hessian with its columns exchanged: H[order, order] = [10 2; 2 4].
    const double root = std::sqrt(10.0);
    Tensor swapped = up(type, {2, 2}, {root, 0, 2 / root, std::sqrt(3.6)});
    backend().correct_weight(w, c, 9, r, 9, swapped, ints(1, 0), out);
    EXPECT_NEAR(look(out)[0], 14, 1e-4);
    EXPECT_NEAR(look(out)[1], 12, 1e-4);
  }
}

}  // namespace
}  // namespace bitmill::testing
