#include "pipeline/rank_clock.h"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

namespace bitmill {
namespace {

void work_for(double seconds) {
  for (const Stopwatch watch; watch.seconds() < seconds;) {
  }
}

double of(const RankClock& clock, Phase phase) {
  return clock.seconds()[static_cast<size_t>(phase)];
}

TEST(RankClock, InnerTimersTakeTheirTimeFromTheOuter) {
  RankClock clock;
  const Stopwatch watch;
  {
    PhaseTimer solve(clock, Phase::kSolve);
    work_for(0.02);
    {
      PhaseTimer read(clock, Phase::kRead);
      work_for(0.05);
    }
  }
  clock.stop();
  const double solve = of(clock, Phase::kSolve), read = of(clock, Phase::kRead);
  EXPECT_GE(solve, 0.02);
  EXPECT_GE(read, 0.05);
  EXPECT_LE(solve + read, watch.seconds()) << "the 0.05 s of reading count once";
  EXPECT_GE(clock.elapsed(), solve + read);
  EXPECT_LE(clock.elapsed(), watch.seconds() + 0.01);
}

TEST(RankClock, SpansCoverAllTheTime) {
  RankClock clock;
  clock.at_block(4);
  {
    PhaseTimer timer(clock, Phase::kForward);
    work_for(0.01);
  }
  {
    PhaseTimer timer(clock, Phase::kHessian);
    work_for(0.01);
  }
  clock.at_block(5);
  {
    PhaseTimer timer(clock, Phase::kSolve);
    work_for(0.01);
  }
  clock.stop();
  const std::vector<Span> spans = clock.take_spans();
  ASSERT_GE(spans.size(), 2u);
  double end = 0;
  for (const Span& span : spans) {
    EXPECT_EQ(span.start, end);
    end = span.end;
  }
  EXPECT_DOUBLE_EQ(end, clock.elapsed());
  for (const Span& span : spans) {
    if (span.what == Activity::kCapture) {
      EXPECT_EQ(span.block, 4) << "forward and Hessian are one span";
      EXPECT_GE(span.end - span.start, 0.02);
    }
    if (span.what == Activity::kSolve) EXPECT_EQ(span.block, 5);
  }
}

std::string text(const std::vector<Span>& spans) {
  std::string text;
  for (const Span& span : spans)
    text += fmt::format("{} {} {:g}-{:g}; ", activity_name(span.what), span.block, span.start,
                        span.end);
  return text;
}

TEST(SpanRecorder, JoinsEqualNeighboursOfABlock) {
  SpanRecorder recorder(10);
  recorder.add({Activity::kCapture, 0, 0, 1});
  recorder.add({Activity::kCapture, 0, 1, 2});
  recorder.add({Activity::kSolve, 0, 2, 3});
  recorder.add({Activity::kSolve, 1, 3, 4});
  EXPECT_EQ(text(recorder.take()), "capture 0 0-2; solve 0 2-3; solve 1 3-4; ");
}

// 10 s of capture for 3 ms and waiting for 1 ms in turn, then a solve: far more changes than spans.
TEST(SpanRecorder, ShortSpansAreNamedForWhatTookMost) {
  SpanRecorder recorder(8);
  double at = 0;
  for (int i = 0; i < 2500; ++i) {
    recorder.add({Activity::kCapture, 0, at, at + 0.003});
    recorder.add({Activity::kWait, 0, at + 0.003, at + 0.004});
    at += 0.004;
  }
  recorder.add({Activity::kSolve, 0, at, at + 5});
  const std::vector<Span> spans = recorder.take();
  EXPECT_LE(spans.size(), 8u);
  double capture = 0;
  for (const Span& span : spans)
    if (span.what == Activity::kCapture) capture += span.end - span.start;
  EXPECT_GE(capture, 9.5) << text(spans);
  EXPECT_EQ(spans.back().what, Activity::kSolve);
  EXPECT_NEAR(spans.back().start, 10, 0.1);
  EXPECT_NEAR(spans.back().end, 15, 1e-9);
}

// Blocks stay apart however few spans are wanted.
TEST(SpanRecorder, KeepsEveryBlock) {
  SpanRecorder recorder(4);
  for (int b = 0; b < 20; ++b)
    for (int i = 0; i < 10; ++i) {
      const double at = b + i / 10.0;
      recorder.add({i % 2 == 0 ? Activity::kCapture : Activity::kSolve, b, at, at + 0.1});
    }
  const std::vector<Span> spans = recorder.take();
  ASSERT_GE(spans.size(), 20u);
  EXPECT_LE(spans.size(), 40u);
  EXPECT_EQ(spans.front().block, 0);
  EXPECT_EQ(spans.back().block, 19);
}

}  // namespace
}  // namespace bitmill
