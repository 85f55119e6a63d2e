#include "core/page_heap.h"

#include <gtest/gtest.h>

#include <cstring>

namespace bitmill {
namespace {

constexpr int64_t kMiB = 1 << 20;

TEST(PageHeap, CutsAndJoinsFreeRanges) {
  PageHeap heap;
  auto* whole = static_cast<char*>(heap.allocate(8 * kMiB));
  heap.release(whole, 8 * kMiB);
  EXPECT_EQ(heap.free_bytes(), 8 * kMiB);
  auto* first = static_cast<char*>(heap.allocate(3 * kMiB));
  auto* second = static_cast<char*>(heap.allocate(5 * kMiB));
  EXPECT_EQ(first, whole);
  EXPECT_EQ(second, whole + 3 * kMiB);
  EXPECT_EQ(heap.free_bytes(), 0);
  heap.release(first, 3 * kMiB);
  heap.release(second, 5 * kMiB);
  EXPECT_EQ(heap.allocate(8 * kMiB), whole) << "the two ranges are one again";
  heap.release(whole, 8 * kMiB);
}

TEST(PageHeap, TakesTheSmallestRangeThatFits) {
  PageHeap heap;
  char* blocks[5];
  const int64_t sizes[5] = {4 * kMiB, kMiB, 2 * kMiB, kMiB, 3 * kMiB};
  for (int i = 0; i < 5; ++i) blocks[i] = static_cast<char*>(heap.allocate(sizes[i]));
  for (int i : {0, 2, 4}) heap.release(blocks[i], sizes[i]);
  EXPECT_EQ(heap.allocate(2 * kMiB - 100), blocks[2]) << "requests count in whole pages";
  EXPECT_EQ(heap.allocate(3 * kMiB), blocks[4]);
  EXPECT_EQ(heap.allocate(3 * kMiB), blocks[0]);
  for (int i : {0, 4}) heap.release(blocks[i], 3 * kMiB);
  heap.release(blocks[1], kMiB), heap.release(blocks[2], 2 * kMiB - 100),
      heap.release(blocks[3], kMiB);
}

// Forty blocks with gaps between them: none of the free ranges serves the larger requests that
// follow, and still the heap holds no more than the peak in use, a sixteenth of it or 16 MiB.
TEST(PageHeap, ReturnsRangesBeforeItOutgrowsThePeak) {
  PageHeap heap;
  char* small[40];
  for (char*& block : small) block = static_cast<char*>(heap.allocate(4 * kMiB));
  for (int i = 0; i < 40; i += 2) heap.release(small[i], 4 * kMiB);
  EXPECT_EQ(heap.free_bytes(), 80 * kMiB) << "within the peak everything is kept";
  char* large[10];
  int64_t used = 80 * kMiB;
  for (char*& block : large) {
    block = static_cast<char*>(heap.allocate(8 * kMiB));
    std::memset(block, 1, 8 * kMiB);  // pages that are there
    used += 8 * kMiB;
    EXPECT_LE(used + heap.free_bytes(), (160 + 16) * kMiB);
  }
  for (char* block : large) heap.release(block, 8 * kMiB);
  for (int i = 1; i < 40; i += 2) heap.release(small[i], 4 * kMiB);
  heap.trim();
  EXPECT_EQ(heap.free_bytes(), 0);
}

TEST(PageHeap, SaysWhenTheKernelHasNone) {
  PageHeap heap;
  EXPECT_EQ(heap.allocate(int64_t{1} << 55), nullptr);
  EXPECT_EQ(heap.free_bytes(), 0);
}

}  // namespace
}  // namespace bitmill
