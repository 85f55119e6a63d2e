// What reaches stderr, and how lines and the progress bar share a terminal.
#include "core/log.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <string>

namespace bitmill {
namespace {

class LogTest : public ::testing::Test {
 protected:
  void TearDown() override { set_log_rank(0, 1); }
};

template <typename Action>
std::string stderr_of(Action action) {
  ::testing::internal::CaptureStderr();
  action();
  return ::testing::internal::GetCapturedStderr();
}

TEST_F(LogTest, RankZeroTalksEveryRankWarns) {
  const auto talk = [] {
    info("block {} of {}", 1, 3);
    warn("{} is odd", "x");
  };
  EXPECT_EQ(stderr_of(talk), "block 1 of 3\nbitmill: warning: x is odd\n");
  set_log_rank(0, 2);
  EXPECT_EQ(stderr_of(talk), "block 1 of 3\n[rank 0] bitmill: warning: x is odd\n");
  set_log_rank(1, 2);
  EXPECT_EQ(log_rank(), 1);
  EXPECT_EQ(stderr_of(talk), "[rank 1] bitmill: warning: x is odd\n");
}

TEST_F(LogTest, NoBarInAFile) {
  EXPECT_EQ(stderr_of([] {
              ProgressBar bar(4, "linears");
              bar.advance(4, "done");
            }),
            "");
}

// stderr is a pseudo terminal for the life of this object.
class Terminal {
 public:
  Terminal() : master_(posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK)) {
    if (master_ < 0 || grantpt(master_) != 0 || unlockpt(master_) != 0) return;
    const int slave = open(ptsname(master_), O_RDWR | O_NOCTTY);
    if (slave < 0) return;
    saved_ = dup(STDERR_FILENO);
    dup2(slave, STDERR_FILENO);
    close(slave);
  }
  ~Terminal() {
    restore();
    if (master_ >= 0) close(master_);
  }
  bool ready() const { return saved_ >= 0; }
  void restore() {
    if (saved_ < 0) return;
    dup2(saved_, STDERR_FILENO);
    close(saved_);
    saved_ = -1;
  }
  std::string text() const {
    std::string all;
    char buffer[4096];
    for (ssize_t count; (count = read(master_, buffer, sizeof buffer)) > 0;)
      all.append(buffer, count);
    return all;
  }

 private:
  int master_, saved_ = -1;
};

TEST_F(LogTest, LinesLiftTheBarAndPutItBack) {
  Terminal terminal;
  if (!terminal.ready()) GTEST_SKIP() << "no pseudo terminal here";
  {
    ProgressBar bar(2, "linears");
    terminal.text();
    bar.advance(2, "q_proj");
    const std::string drawn = terminal.text();
    EXPECT_NE(drawn.find("2/2 linears"), std::string::npos) << drawn;
    EXPECT_NE(drawn.find("q_proj"), std::string::npos);
    info("a line");
    const std::string after = terminal.text();
    EXPECT_EQ(after.find("\r\x1b[Ka line\r\n[####"), 0u) << after;
  }
  EXPECT_EQ(terminal.text(), "\r\x1b[K") << "the bar leaves nothing behind";
  info("plain");
  EXPECT_EQ(terminal.text(), "plain\r\n");
}

TEST_F(LogTest, OtherRanksDrawNoBar) {
  Terminal terminal;
  if (!terminal.ready()) GTEST_SKIP() << "no pseudo terminal here";
  set_log_rank(1, 2);
  ProgressBar bar(2, "linears");
  bar.advance(1, "");
  EXPECT_EQ(terminal.text(), "");
}

TEST(Human, Bytes) {
  EXPECT_EQ(human_bytes(0), "0 B");
  EXPECT_EQ(human_bytes(999), "999 B");
  EXPECT_EQ(human_bytes(1'000), "1.00 KB");
  EXPECT_EQ(human_bytes(1'500'000'000), "1.50 GB");
  EXPECT_EQ(human_bytes(37'240'000), "37.2 MB");
  EXPECT_EQ(human_bytes(9'996'000), "10.0 MB");
  EXPECT_EQ(human_bytes(512'000'000), "512 MB");
  EXPECT_EQ(human_bytes(999'900'000), "1.00 GB");
  EXPECT_EQ(human_bytes(-2'000), "-2.00 KB");
}

TEST(Human, Seconds) {
  EXPECT_EQ(human_seconds(0.4), "0.40 s");
  EXPECT_EQ(human_seconds(12.34), "12.3 s");
  EXPECT_EQ(human_seconds(59.96), "1:00");
  EXPECT_EQ(human_seconds(245), "4:05");
  EXPECT_EQ(human_seconds(3599.7), "1:00:00");
  EXPECT_EQ(human_seconds(7807), "2:10:07");
}

}  // namespace
}  // namespace bitmill
