// Grids small enough to check by hand. Every expected number below is worked out in its comment.
#include "core/grid.h"

#include <gtest/gtest.h>

#include <limits>
#include <vector>

namespace bitmill {
namespace {

template <typename T>
class GridTest : public ::testing::Test {};
using Reals = ::testing::Types<float, double>;
TYPED_TEST_SUITE(GridTest, Reals);

template <typename T>
Grid<T> fit(const std::vector<T>& w, GridOptions options) {
  return fit_grid(w.data(), static_cast<int64_t>(w.size()), 1, options);
}

template <typename T>
std::vector<T> codes(const std::vector<T>& w, Grid<T> grid, int bits) {
  std::vector<T> out;
  for (T value : w) out.push_back(to_code(value, grid, T((1 << bits) - 1)));
  return out;
}

GridOptions exact(int bits, bool symmetric) {
  return {.bits = bits, .symmetric = symmetric, .mse = false, .scale_dtype = DType::kF64};
}

// Range [-3, 3], 4 steps of... maxq = 3: scale 6/3 = 2, zero 2. -3/2 = -1.5 -> -2 (even) -> 0; 1/2
// -> 0 (even) -> 2; 3/2 -> 2 -> clamped 3.
TYPED_TEST(GridTest, SymmetricTwoBits) {
  using T = TypeParam;
  const std::vector<T> w{-3, 0, 1, 3};
  const Grid<T> grid = fit(w, exact(2, true));
  EXPECT_EQ(grid.scale, T(2));
  EXPECT_EQ(grid.zero, T(2));
  EXPECT_EQ(codes(w, grid, 2), (std::vector<T>{0, 2, 2, 3}));
  EXPECT_EQ(from_code(T(0), grid), T(-4));
  EXPECT_EQ(from_code(T(3), grid), T(2));
}

// Range [-1, 2]: scale 3/3 = 1, zero 1.
TYPED_TEST(GridTest, AsymmetricTwoBits) {
  using T = TypeParam;
  const std::vector<T> w{-1, T(0.5), T(1.5), 2, T(0.25)};
  const Grid<T> grid = fit(w, exact(2, false));
  EXPECT_EQ(grid.scale, T(1));
  EXPECT_EQ(grid.zero, T(1));
  EXPECT_EQ(codes(w, grid, 2), (std::vector<T>{0, 1, 3, 3, 1}));
}

// A group of one sign: the asymmetric range still starts at 0, the symmetric one is mirrored.
TYPED_TEST(GridTest, OneSign) {
  using T = TypeParam;
  const std::vector<T> positive{3, 6}, negative{-3, -6};
  EXPECT_EQ(fit(positive, exact(2, false)).scale, T(2));
  EXPECT_EQ(fit(positive, exact(2, false)).zero, T(0));
  EXPECT_EQ(fit(negative, exact(2, false)).zero, T(3));
  EXPECT_EQ(fit(positive, exact(2, true)).scale, T(4));
  EXPECT_EQ(fit(negative, exact(2, true)).scale, T(4));
}

// An all-zero group: range [-1, 1], scale 2/maxq in the stored type, the middle zero point, value
// exactly 0.
TYPED_TEST(GridTest, AllZeroGroupHasTheMiddleZeroPoint) {
  using T = TypeParam;
  const std::vector<T> w(8, T(0));
  for (int bits = 2; bits <= 8; ++bits)
    for (bool symmetric : {true, false})
      for (bool mse : {true, false})
        for (DType stored : {DType::kF16, DType::kBF16, DType::kF32, DType::kF64}) {
          const GridOptions options{bits, symmetric, mse, stored};
          const Grid<T> grid = fit(w, options);
          ASSERT_EQ(grid.zero, T(1 << (bits - 1)))
              << bits << symmetric << mse << dtype_name(stored);
          ASSERT_EQ(grid.scale, stored_scale(T(2) / T((1 << bits) - 1), stored));
          ASSERT_EQ(from_code(to_code(T(0), grid, T((1 << bits) - 1)), grid), T(0));
        }
}

TYPED_TEST(GridTest, StrideSkipsOtherColumns) {
  using T = TypeParam;
  const std::vector<T> w{-1, 100, 2, -100, T(0.5), 7};
  const Grid<T> grid = fit_grid(w.data(), 3, 2, exact(2, false));
  EXPECT_EQ(grid.scale, T(1));
  EXPECT_EQ(grid.zero, T(1));
}

// The scale is stored first, the zero point follows from what is stored: 2^-20 is not a multiple of
// anything special, so use a range whose scale underflows half: 3 * 2^-26 / 3 = 2^-26 -> 0 ->
// 2^-14, hence zero = rint(2^-26 / 2^-14) = 0.
TYPED_TEST(GridTest, UnderflowingScaleBecomesTheSmallestNormal) {
  using T = TypeParam;
  const std::vector<T> w{T(-0x1p-26), T(0x1p-25)};
  const Grid<T> grid =
      fit(w, {.bits = 2, .symmetric = false, .mse = false, .scale_dtype = DType::kF16});
  EXPECT_EQ(grid.scale, T(0x1p-14));
  EXPECT_EQ(grid.zero, T(0));
  EXPECT_EQ(stored_scale(T(0), DType::kBF16), T(0x1p-126));
  EXPECT_EQ(stored_scale(T(1e6), DType::kF16), std::numeric_limits<T>::infinity());
  EXPECT_EQ(stored_scale(T(1.00390625), DType::kBF16), T(1)) << "a tie in bf16";
  EXPECT_EQ(stored_scale(T(0.5), DType::kF64), T(0.5));
}

// Symmetric, one bit pattern worth checking: 2 bits, w = {-1, 1, 1, 1}, values -2s, -s, 0, s.
// Unshrunk s = 2/3 gives -1 -> -1.5 -> -2 -> -4/3 and 1 -> 1.5 -> 2, clamped to 1 -> 2/3, each off
// by 1/3. No p below 1 lowers the error, as 1 stays clamped to p * 2/3; so candidate 0 wins.
TYPED_TEST(GridTest, MseKeepsTheFullRangeWhereShrinkingHurts) {
  using T = TypeParam;
  const std::vector<T> w{-1, 1, 1, 1};
  GridOptions options = exact(2, true);
  options.mse = true;
  EXPECT_EQ(fit(w, options).scale, fit(w, exact(2, true)).scale);
}

// Asymmetric 2 bits: 200 weights at 0.5 and one at 3. The full range has scale 1, where 0.5 rounds
// to 0 and costs 200 * 0.5^2.4 = 37.9. At p = 0.5 the scale is 0.5, 0.5 is exact, and 3 is clamped
// to 1.5: 1.5^2.4 = 2.65. A further shrink moves 0.5 and 3 both the wrong way, a smaller one leaves
// 200 * (0.5 - p)^2.4 > 0 and gains at most 1.5^2.4 - (3 - 3p)^2.4: at p = 0.51 that is 200 *
// 0.01^2.4 = 0.0032 against 2.65 - 2.52 = 0.13, so a larger p wins. Near the minimum 200 * (p -
// 0.5)^2.4 + (3 - 3p)^2.4 over p = 0.50 .. 0.60: 2.646, 2.523, 2.416, 2.326, 2.256, 2.209,
// 2.192, 2.210, 2.268: p = 0.56.
TYPED_TEST(GridTest, MseTradesTheOutlierForTheRest) {
  using T = TypeParam;
  std::vector<T> w(200, T(0.5));
  w.push_back(3);
  GridOptions options = exact(2, false);
  options.mse = true;
  EXPECT_NEAR(fit(w, options).scale, 0.56, 1e-6);
  EXPECT_EQ(fit(w, options).zero, T(0));
}

// All candidates that code exactly are equal; the first of equals is the unshrunk one.
TYPED_TEST(GridTest, MseTakesTheFirstOfEquals) {
  using T = TypeParam;
  const std::vector<T> w{0, 3};  // scale 1: exact
  GridOptions options = exact(2, false);
  options.mse = true;
  EXPECT_EQ(fit(w, options).scale, T(1));
}

// 200 weights at 0.5 and one at 3, 2 bits asymmetric, so that a range shrunk by p has scale p.
template <typename T>
struct Outlier {
  std::vector<T> w = std::vector<T>(201, T(0.5)), importance = std::vector<T>(201, T(1)),
                 noise = std::vector<T>(201, T(0)), spread = std::vector<T>(201);
  Outlier() { w.back() = 3; }
  T scale(const GridOptions& options = exact(2, false)) {
    return fit_grid(w.data(), 201, options, {importance.data(), noise.data()}, spread.data()).scale;
  }
};

// 0.5 is a value of the grid at p = 0.5 alone (0.25 is not tried).
TYPED_TEST(GridTest, RangeSearchForgetsAColumnWithoutImportance) {
  Outlier<TypeParam> group;
  group.importance.back() = 0;
  EXPECT_NEAR(group.scale(), 0.5, 1e-6);
  group.importance.back() = 1e6;
  EXPECT_EQ(group.scale(), TypeParam(1));
}

// With errors weighted alike: 200 (p - 0.5)^2 + (3 - 3p)^2 is least at p = 0.5 + 4.5 / 209 = 0.5215;
// p = 0.52 is the nearest candidate.
TYPED_TEST(GridTest, RangeSearchWeighsSquaredErrors) {
  EXPECT_NEAR(Outlier<TypeParam>().scale(), 0.52, 1e-6);
}

// Values that feedback will spread over many steps need the whole range.
TYPED_TEST(GridTest, RangeSearchLeavesRoomForNoise) {
  Outlier<TypeParam> group;
  group.importance.back() = 0;
  group.noise.assign(201, TypeParam(4));
  EXPECT_EQ(group.scale(), TypeParam(1));
}

TYPED_TEST(GridTest, MseGoesBeforeTheRangeSearch) {
  Outlier<TypeParam> group;
  GridOptions options = exact(2, false);
  options.mse = true;
  EXPECT_NEAR(group.scale(options), 0.56, 1e-6);
}

// The rule is exact for a grid so fine that the error is the same everywhere, and its partial sums
// take every count.
TYPED_TEST(GridTest, ExpectedErrorAddsUp) {
  using T = TypeParam;
  const Grid<T> grid{T(1), T(0)};
  for (int64_t count : {1, 15, 16, 17, 40}) {
    const std::vector<T> w(count, T(1.25)), importance(count, T(2)), spread(count, T(1));
    // x = 1.25, 0.25, 2.25: each a quarter away; six times the rule.
    EXPECT_EQ(expected_error(w.data(), importance.data(), spread.data(), count, grid, T(3)),
              T(6 * 2 * count) / 16);
  }
}

// Sums only grow: a look after 64 columns may end the sum, above the limit and never below it.
TYPED_TEST(GridTest, ExpectedErrorMayStopAboveItsLimit) {
  using T = TypeParam;
  const Grid<T> grid{T(1), T(0)};
  const std::vector<T> w(200, T(1.25)), importance(200, T(2)), spread(200, T(1));
  const auto error = [&](T limit) {
    return expected_error(w.data(), importance.data(), spread.data(), 200, grid, T(3), limit);
  };
  EXPECT_EQ(error(T(150)), T(150)) << "not above the limit: whole";
  EXPECT_EQ(error(T(149)), T(150)) << "192 columns make 144: whole";
  EXPECT_EQ(error(T(47)), T(48)) << "64 columns";
  EXPECT_EQ(error(T(48)), T(96)) << "128 columns";
}

// Ternary: the values are the range's ends and 0, borders lie half way. Range [-2, 3]: below -1 is
// -2, above 1.5 is 3; a weight on a border is 0.
TYPED_TEST(GridTest, Ternary) {
  using T = TypeParam;
  GridOptions options = exact(2, false);
  options.kind = GridKind::kTernary;
  const std::vector<T> w{-2, T(-1.5), -1, 0, T(1.5), T(1.75), 3};
  const Grid<T> grid = fit(w, options);
  EXPECT_EQ(grid.scale, T(3));
  EXPECT_EQ(grid.zero, T(-2));
  std::vector<T> seen, values;
  with_codes<T>(options.codes(), [&](const auto& kind) {
    for (T value : w) seen.push_back(kind.code(value, grid));
    for (T code : {T(0), T(1), T(2)}) values.push_back(kind.value(code, grid));
  });
  EXPECT_EQ(seen, (std::vector<T>{0, 0, 1, 1, 1, 2, 2}));
  EXPECT_EQ(values, (std::vector<T>{-2, 0, 3}));
}

// Symmetric: [-3, 3]; without a negative weight [0, 2], where no weight is below 0 / 2; nothing but
// zeros: [-1, 1].
TYPED_TEST(GridTest, TernarySymmetricRanges) {
  using T = TypeParam;
  GridOptions options = exact(2, true);
  options.kind = GridKind::kTernary;
  EXPECT_EQ(fit(std::vector<T>{-1, 3}, options).zero, T(-3));
  EXPECT_EQ(fit(std::vector<T>{1, 2}, options).zero, T(-2));
  options.range = GridRange::kUnmirrored;
  EXPECT_EQ(fit(std::vector<T>{1, 2}, options).zero, T(0));
  EXPECT_EQ(fit(std::vector<T>{0, 0}, options).scale, T(1));
  EXPECT_EQ(fit(std::vector<T>{0, 0}, options).zero, T(-1));
}

// Without the mirror a range of one sign keeps half the scale, 6 / 3 = 2, around the same middle 2:
// 6 / 2 + 2 is clipped to 3, whose value is 2.
TYPED_TEST(GridTest, UnmirroredRangeClips) {
  using T = TypeParam;
  GridOptions options = exact(2, true);
  options.range = GridRange::kUnmirrored;
  const std::vector<T> w{3, 6};
  const Grid<T> grid = fit(w, options);
  EXPECT_EQ(grid.scale, T(2));
  EXPECT_EQ(grid.zero, T(2));
  EXPECT_EQ(from_code(codes(w, grid, 2)[1], grid), T(2));
  EXPECT_EQ(fit(std::vector<T>{-3, 6}, options).scale, T(4));
}

}  // namespace
}  // namespace bitmill
