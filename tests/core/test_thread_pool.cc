// Every item runs exactly once, whatever the number of threads, and errors come back to the caller.
#include "core/thread_pool.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <set>
#include <stdexcept>
#include <string>

namespace bitmill {
namespace {

class ThreadPoolTest : public ::testing::TestWithParam<int> {};

TEST_P(ThreadPoolTest, EveryItemOnceAndThreadsInRange) {
  ThreadPool pool(GetParam());
  EXPECT_EQ(pool.size(), GetParam());
  for (int64_t count : {0, 1, 2, 7, 1000}) {
    std::vector<std::atomic<int>> runs(count);
    std::atomic<bool> in_range{true};
    pool.parallel_for(count, [&](int64_t item, int thread) {
      ++runs[item];
      if (thread < 0 || thread >= pool.size()) in_range = false;
    });
    for (int64_t i = 0; i < count; ++i) ASSERT_EQ(runs[i], 1) << i;
    EXPECT_TRUE(in_range);
  }
}

TEST_P(ThreadPoolTest, ManyShortRoundsDoNotLoseItems) {
  ThreadPool pool(GetParam());
  std::atomic<int64_t> sum{0};
  for (int round = 0; round < 2000; ++round)
    pool.parallel_for(3, [&](int64_t item, int) { sum += item + 1; });
  EXPECT_EQ(sum, 2000 * 6);
}

TEST_P(ThreadPoolTest, ExceptionStopsAndComesBack) {
  ThreadPool pool(GetParam());
  std::atomic<int> runs{0};
  const auto body = [&](int64_t item, int) {
    ++runs;
    if (item == 5) throw std::runtime_error("item 5");
  };
  try {
    pool.parallel_for(1'000'000, body);
    FAIL() << "nothing was thrown";
  } catch (const std::runtime_error& error) {
    EXPECT_EQ(std::string(error.what()), "item 5");
  }
  EXPECT_LT(runs, 1'000'000) << "no further items are handed out";
  std::atomic<int> after{0};
  pool.parallel_for(10, [&](int64_t, int) { ++after; });
  EXPECT_EQ(after, 10) << "the pool is usable after an exception";
}

TEST_P(ThreadPoolTest, LibrariesRunWithOneThread) {
  ThreadPool pool(GetParam());
  std::atomic<int> most{0};
  pool.parallel_for(64, [&](int64_t, int) { most = std::max(most.load(), omp_get_max_threads()); });
  EXPECT_EQ(most, 1);
}

INSTANTIATE_TEST_SUITE_P(Threads, ThreadPoolTest, ::testing::Values(1, 2, 3));

TEST(ThreadPoolOrder, OneThreadRunsItemsInOrder) {
  ThreadPool pool(1);
  std::vector<int64_t> order;
  pool.parallel_for(5, [&](int64_t item, int) { order.push_back(item); });
  EXPECT_EQ(order, (std::vector<int64_t>{0, 1, 2, 3, 4}));
}

TEST(AvailableCpus, AtLeastOne) {
  EXPECT_GE(available_cpus(), 1);
}

}  // namespace
}  // namespace bitmill
