// Reading ahead changes no byte and no error: every test compares with what a plain read gives.
#include "io/read_ahead.h"

#include <random>
#include <thread>

#include "io/expect_error.h"
#include "support/checkpoint_maker.h"
#include "support/paths.h"

namespace bitmill {
namespace {

constexpr int64_t kFileBytes = 1 << 20;

class ReadAheadTest : public ::testing::Test {
 protected:
  static std::string content() {
    std::string bytes(kFileBytes, '\0');
    std::mt19937_64 generator(3);
    for (char& byte : bytes) byte = static_cast<char>(generator());
    return bytes;
  }
  // What `ahead` reads, compared with the file's content.
  void expect_same(int64_t offset, int64_t bytes) {
    std::string got(static_cast<size_t>(bytes), '\0');
    ahead_.read(file_, offset, bytes, got.data());
    EXPECT_EQ(got, bytes_.substr(static_cast<size_t>(offset), static_cast<size_t>(bytes)))
        << offset << " + " << bytes;
  }
  std::string write_file() {
    testing::write_bytes(dir_.file("a"), bytes_);
    return dir_.file("a");
  }

  testing::TemporaryDirectory dir_;
  const std::string bytes_ = content();
  const RangeReader file_{write_file()};
  ReadAhead ahead_;
};

TEST_F(ReadAheadTest, WhatWasRequestedComesFromBuffersOnce) {
  ahead_.request({{&file_, 1000, 300'000}, {&file_, 500'000, 1}}, kFileBytes);
  ahead_.wait_idle();
  EXPECT_EQ(ahead_.peak_bytes(), 300'001);
  expect_same(0, 2000);  // begins before what was requested
  EXPECT_EQ(ahead_.taken_bytes(), 1000);
  expect_same(2000, 299'500);  // ends behind it
  EXPECT_EQ(ahead_.taken_bytes(), 300'000);
  expect_same(499'999, 3);
  EXPECT_EQ(ahead_.taken_bytes(), 300'001);
  expect_same(0, kFileBytes);
  EXPECT_EQ(ahead_.taken_bytes(), 300'001) << "buffers that were taken are gone";
}

TEST_F(ReadAheadTest, BuffersStayBelowTheBound) {
  constexpr int64_t kLimit = 64 << 10;
  ahead_.request({{&file_, 0, kFileBytes}}, kLimit);
  ahead_.wait_idle();
  EXPECT_EQ(ahead_.peak_bytes(), kLimit) << "as much as fits, without a reader";
  for (int64_t at = 0; at < kFileBytes; at += 50'000)
    expect_same(at, std::min<int64_t>(50'000, kFileBytes - at));
  EXPECT_LE(ahead_.peak_bytes(), kLimit);
  EXPECT_GE(ahead_.taken_bytes(), kLimit);
}

TEST_F(ReadAheadTest, AReaderThatIsFasterReadsItself) {
  // No space for a piece until the first is taken, so the others are still queued.
  ahead_.request({{&file_, 0, 4096}, {&file_, 8192, 4096}}, 4096);
  ahead_.wait_idle();
  expect_same(8000, 5000);
  expect_same(0, 4096);
}

TEST_F(ReadAheadTest, ForgetDropsAllBuffers) {
  ahead_.request({{&file_, 0, 10'000}}, kFileBytes);
  ahead_.wait_idle();
  ahead_.forget();
  expect_same(0, 10'000);
  EXPECT_EQ(ahead_.taken_bytes(), 0);
  ahead_.request({{&file_, 0, 10'000}}, kFileBytes);  // and works again
  ahead_.wait_idle();
  expect_same(0, 10'000);
  EXPECT_EQ(ahead_.taken_bytes(), 10'000);
}

// Room for one request. The second waits for the first, which is still wanted; the third makes the
// first a leftover.
TEST_F(ReadAheadTest, LeftoversGoWhenSpaceIsNeeded) {
  constexpr int64_t kBytes = 10'000;
  ahead_.request({{&file_, 0, kBytes}}, kBytes);
  ahead_.wait_idle();
  ahead_.request({{&file_, 100'000, kBytes}}, kBytes);
  ahead_.wait_idle();
  expect_same(0, kBytes / 2);  // half of it: one of its two pieces
  EXPECT_EQ(ahead_.taken_bytes(), kBytes / 2);
  ahead_.request({{&file_, 200'000, kBytes}}, kBytes);
  ahead_.wait_idle();
  expect_same(100'000, kBytes);
  ahead_.wait_idle();
  expect_same(0, kBytes);
  EXPECT_EQ(ahead_.taken_bytes(), kBytes / 2 + kBytes)
      << "the rest of the first request was dropped";
  expect_same(200'000, kBytes);
  EXPECT_LE(ahead_.peak_bytes(), kBytes);
}

TEST_F(ReadAheadTest, ARepeatedRequestIsReadOnce) {
  for (int i = 0; i < 3; ++i) ahead_.request({{&file_, 0, 10'000}}, kFileBytes);
  ahead_.wait_idle();
  EXPECT_EQ(ahead_.peak_bytes(), 10'000);
  expect_same(0, 10'000);
}

TEST_F(ReadAheadTest, ErrorsComeFromTheReadThatMeetsThem) {
  const RangeReader short_file(dir_.file("a"));
  testing::write_bytes(dir_.file("a"), bytes_.substr(0, 1000));  // truncated while it is open
  const auto message = [&](const std::function<void(void*)>& read) {
    std::string out(2000, '\0');
    return testing::error_of([&] { read(out.data()); }, ExitCode::kInput);
  };
  ahead_.request({{&short_file, 500, 2000}}, kFileBytes);
  ahead_.wait_idle();
  EXPECT_EQ(message([&](void* out) { ahead_.read(short_file, 500, 2000, out); }),
            message([&](void* out) { short_file.read(500, 2000, out); }));
}

TEST_F(ReadAheadTest, ManyReadersAndRequestsAtOnce) {
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 3; ++seed)
    threads.emplace_back([&, seed] {
      std::mt19937 generator(seed);
      for (int i = 0; i < 200; ++i) {
        const auto begin = static_cast<int64_t>(generator() % kFileBytes);
        const auto bytes = static_cast<int64_t>(generator() % 20'000 + 1);
        if (i % 4 == 0)
          ahead_.request({{&file_, begin, std::min(100'000L, kFileBytes - begin)}}, 60'000);
        if (i % 31 == 30) ahead_.forget();
        expect_same(begin, std::min(bytes, kFileBytes - begin));
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(ahead_.peak_bytes(), 60'000);
}

TEST_F(ReadAheadTest, EndsWithMuchLeftToRead) {
  for (int i = 0; i < 20; ++i) {
    ReadAhead ahead;
    ahead.request({{&file_, 0, kFileBytes}}, kFileBytes);
  }
}

}  // namespace
}  // namespace bitmill
