// Hessian accumulation: hand values, and the fixed tree over lanes.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <limits>

#include "algorithms/problem_data.h"

namespace bitmill {
namespace {

using testing::bytes_of;
using testing::random_inputs;

class HessianTest : public ::testing::Test {
 protected:
  std::unique_ptr<Backend> backend_ = make_backend({"cpu", DType::kF32, 1});

  Tensor lane_sum(TensorView x, int64_t columns) {
    Tensor sum = Tensor::zeros(DType::kF32, {hessian_elements(columns)});
    backend_->hessian_update(x, sum);
    return sum;
  }
};

TEST_F(HessianTest, TwoByTwoByHand) {
  Tensor x(DType::kF64, {3, 2});
  const double values[] = {1, 2, 3, 4, -1, 0};
  std::copy(values, values + 6, x.as<double>());
  HessianAccumulator accumulator(2, DType::kF64, *backend_);
  accumulator.add(x.view().slice(0, 1), 1, 0);
  accumulator.add(x.view().slice(1, 3), 3, 4);
  const Hessian hessian = accumulator.finish();
  EXPECT_EQ(hessian.samples, 4);
  EXPECT_EQ(hessian.tokens, 3);
  EXPECT_EQ(hessian.factor(), 0.5);
  Tensor diagonal(DType::kF64, {2});
  backend_->hessian_diagonal(hessian.sum, 2, diagonal);
  EXPECT_EQ(diagonal.as<double>()[0], 11);
  EXPECT_EQ(diagonal.as<double>()[1], 20);
  EXPECT_EQ(hessian.sum.as<double>()[2], 14);  // row 1, column 0 of the only tile
}

TEST_F(HessianTest, NoTokensIsALegalState) {
  HessianAccumulator accumulator(16, DType::kF32, *backend_);
  const Hessian hessian = accumulator.finish();
  EXPECT_EQ(hessian.tokens, 0);
  EXPECT_TRUE(hessian.sum.empty());
  EXPECT_EQ(hessian.factor(), 0);
}

// Lanes 0, 1, 2, 3, 6 of 8: ((0+1) + (2+3)) + 6, whatever is missing beside 6.
TEST_F(HessianTest, LanesFoldAsAFixedTree) {
  const int64_t n = 40, tokens = 7;
  const Tensor x = testing::to_type(random_inputs(5 * tokens, n, 1), DType::kF32);
  const int lanes[] = {0, 1, 2, 3, 6};
  HessianAccumulator accumulator(n, DType::kF32, *backend_);
  std::vector<Tensor> sums;
  for (int i = 0; i < 5; ++i) {
    const TensorView part = x.view().slice(i * tokens, (i + 1) * tokens);
    accumulator.add(part, 1, lanes[i]);
    sums.push_back(lane_sum(part, n));
  }
  backend_->add(sums[0], sums[1]);
  backend_->add(sums[2], sums[3]);
  backend_->add(sums[0], sums[2]);
  backend_->add(sums[0], sums[4]);
  EXPECT_EQ(bytes_of(accumulator.finish().sum), bytes_of(sums[0]));
}

// Lanes 1, 2, 3: 1 meets the others at the top, so 2 + 3 come first.
TEST_F(HessianTest, MissingLaneDoesNotChangeItsNeighboursPairs) {
  const int64_t n = 24, tokens = 5;
  const Tensor x = testing::to_type(random_inputs(3 * tokens, n, 2), DType::kF32);
  HessianAccumulator accumulator(n, DType::kF32, *backend_);
  std::vector<Tensor> sums;
  for (int i = 0; i < 3; ++i) {
    const TensorView part = x.view().slice(i * tokens, (i + 1) * tokens);
    accumulator.add(part, 1, i + 1);
    sums.push_back(lane_sum(part, n));
  }
  backend_->add(sums[1], sums[2]);
  backend_->add(sums[0], sums[1]);
  EXPECT_EQ(bytes_of(accumulator.finish().sum), bytes_of(sums[0]));
}

TEST_F(HessianTest, LivePartialSumsStayLogarithmic) {
  const int64_t n = 256, bytes = hessian_elements(n) * 4;
  const Tensor x = testing::to_type(random_inputs(2, n, 3), DType::kF32);
  const int64_t before = HostAllocator::instance().current_bytes();
  HessianAccumulator accumulator(n, DType::kF32, *backend_);
  for (int lane = 0; lane < 64; ++lane) {
    accumulator.add(x, 1, lane);
    EXPECT_LE(HostAllocator::instance().current_bytes() - before, 7 * bytes) << "lane " << lane;
  }
}

// Whoever holds which lanes, and whichever lanes have samples: the sum has the same bits.
TEST_F(HessianTest, HoldersOfLaneRangesFoldToTheSameBits) {
  std::mt19937_64 random(11);
  for (int round = 0; round < 300; ++round) {
    const int lanes = 1 + static_cast<int>(random() % 40),
              holders = 1 + static_cast<int>(random() % 6);
    LaneSum alone({1}, DType::kF32, *backend_);
    std::vector<LanePart> parts;
    size_t most = 0;
    for (int holder = 0; holder < holders; ++holder) {
      const LaneRange range{holder * lanes / holders, (holder + 1) * lanes / holders};
      LaneSum mine({1}, DType::kF32, *backend_, range);
      for (int lane = range.first; lane < range.end; ++lane) {
        if (random() % 3 == 0) continue;
        const float value = std::ldexp(1.0f + static_cast<float>(random() % 1000) / 1000,
                                       static_cast<int>(random() % 30));
        alone.open(lane).as<float>()[0] += value;
        mine.open(lane).as<float>()[0] += value;
      }
      std::vector<LanePart> taken = mine.take_parts();
      most = std::max(most, taken.size());
      for (LanePart& part : taken) parts.push_back(std::move(part));
    }
    EXPECT_LE(most, 12u);  // two subtrees per level at most, not one per lane
    const Tensor whole = alone.finish(), folded = fold_parts(std::move(parts), *backend_);
    ASSERT_EQ(whole.empty(), folded.empty());
    if (!whole.empty()) {
      ASSERT_EQ(whole.as<float>()[0], folded.as<float>()[0]) << "round " << round;
    }
  }
}

TEST_F(HessianTest, SaysWhenTheNewestLaneIsNotFinite) {
  const int64_t n = 200;
  Tensor x = testing::to_type(random_inputs(3, n, 4), DType::kF32);
  HessianAccumulator accumulator(n, DType::kF32, *backend_);
  EXPECT_TRUE(accumulator.finite()) << "nothing was added";
  accumulator.add(x, 1, 0);
  EXPECT_TRUE(accumulator.finite());
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    HessianAccumulator other(n, DType::kF32, *backend_);
    other.add(x, 1, 0);
    x.as<float>()[2 * n + 150] = bad;
    other.add(x, 1, 1);
    EXPECT_FALSE(other.finite()) << bad;
    x.as<float>()[2 * n + 150] = 0;
    other.add(x, 1, 2);
    EXPECT_TRUE(other.finite()) << "another lane";
  }
}

}  // namespace
}  // namespace bitmill
