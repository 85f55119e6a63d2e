#include "pipeline/partition.h"

#include <gtest/gtest.h>

#include <functional>
#include <numeric>
#include <random>

namespace bitmill {
namespace {

double largest(const std::vector<double>& costs, const std::vector<BlockRange>& ranges) {
  double worst = 0;
  for (const BlockRange& r : ranges)
    worst = std::max(worst, std::accumulate(costs.begin() + r.first, costs.begin() + r.end, 0.0));
  return worst;
}

// Least possible largest sum, by trying every cut.
double best_possible(const std::vector<double>& costs, int stages) {
  const std::function<double(size_t, int)> search = [&](size_t from, int left) -> double {
    if (left == 1) return std::accumulate(costs.begin() + static_cast<int64_t>(from), costs.end(), 0.0);
    double best = 1e300, sum = 0;
    for (size_t end = from + 1; end + static_cast<size_t>(left) - 1 <= costs.size(); ++end) {
      sum += costs[end - 1];
      best = std::min(best, std::max(sum, search(end, left - 1)));
    }
    return best;
  };
  return search(0, stages);
}

TEST(Partition, TheExampleOfTheHeader) {
  const auto ranges = partition_blocks({1, 1, 1, 1, 4}, 2, 0, 0);
  ASSERT_EQ(ranges.size(), 2u);
  EXPECT_EQ(ranges[0].first, 0);
  EXPECT_EQ(ranges[0].end, 4);
  EXPECT_EQ(ranges[1].end, 5);
}

TEST(Partition, CoversEveryBlockAndIsOptimal) {
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    std::vector<double> costs(1 + random() % 9);
    for (double& cost : costs) cost = 1 + random() % 20;
    const int stages = 1 + static_cast<int>(random() % costs.size());
    const auto ranges = partition_blocks(costs, stages, 0, 0);
    ASSERT_EQ(ranges.size(), static_cast<size_t>(stages));
    int64_t next = 0;
    for (const BlockRange& range : ranges) {
      EXPECT_EQ(range.first, next);
      EXPECT_GT(range.count(), 0);
      next = range.end;
    }
    EXPECT_EQ(next, static_cast<int64_t>(costs.size()));
    EXPECT_EQ(largest(costs, ranges), best_possible(costs, stages));
  }
}

TEST(Partition, MoreRanksThanBlocksLeavesTheRestIdle) {
  EXPECT_EQ(partition_blocks({1, 1, 1}, 5, 0, 0).size(), 3u);
}

TEST(Partition, EmbeddingAndHeadWeighOnTheEnds) {
  const auto ranges = partition_blocks({1, 1, 1, 1}, 2, 0, 2);
  EXPECT_EQ(ranges[0].count(), 3);
  EXPECT_EQ(ranges[1].count(), 1);
}

TEST(Partition, AThousandRanksAreArithmetic) {
  EXPECT_EQ(partition_blocks(std::vector<double>(126, 1.0), 1024, 0, 0).size(), 126u);
}

}  // namespace
}  // namespace bitmill
