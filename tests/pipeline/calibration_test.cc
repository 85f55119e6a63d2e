#include "pipeline/calibration.h"

#include <gtest/gtest.h>

#include <array>

namespace bitmill {
namespace {

TEST(PlanBatches, TheExampleOfTheHeader) {
  const auto batches = plan_batches(10, 512, 4, 1024);
  const std::vector<std::array<int64_t, 3>> want{{0, 0, 2}, {1, 2, 2}, {1, 4, 1}, {2, 5, 2}, {3, 7, 2}, {3, 9, 1}};
  ASSERT_EQ(batches.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_EQ(batches[i].lane, want[i][0]);
    EXPECT_EQ(batches[i].first_sample, want[i][1]);
    EXPECT_EQ(batches[i].samples, want[i][2]);
  }
}

TEST(PlanBatches, EverySampleOnceAndNoBatchCrossesALane) {
  for (int64_t samples : {0, 1, 7, 31, 32, 33, 128, 500})
    for (int lanes : {1, 3, 32})
      for (int64_t tokens : {1, 512, 2048, 100000}) {
        int64_t next = 0;
        for (const BatchRange& batch : plan_batches(samples, 512, lanes, tokens)) {
          EXPECT_EQ(batch.first_sample, next);
          EXPECT_GT(batch.samples, 0);
          EXPECT_LE(batch.samples, std::max<int64_t>(1, tokens / 512));
          EXPECT_GE(batch.first_sample, batch.lane * samples / lanes);
          EXPECT_LE(batch.first_sample + batch.samples, (batch.lane + 1) * samples / lanes);
          next += batch.samples;
        }
        EXPECT_EQ(next, samples);
        EXPECT_EQ(count_batches(samples, 512, lanes, tokens),
                  static_cast<int64_t>(plan_batches(samples, 512, lanes, tokens).size()));
      }
}

TEST(PlanBatches, ASampleLongerThanTheLimitIsABatchOfItsOwn) {
  const auto batches = plan_batches(3, 4096, 1, 2048);
  ASSERT_EQ(batches.size(), 3u);
  EXPECT_EQ(batches[0].samples, 1);
}

// 10^12 samples of one token in 32 lanes of 31,250,000,000, 2048 to a batch: 15,258,790 (rounded up) per lane.
TEST(CountBatches, TakesAsLongForAnyNumberOfSamples) {
  EXPECT_EQ(count_batches(1'000'000'000'000, 1, 32, 2048), 32 * 15'258'790);
}

}  // namespace
}  // namespace bitmill
