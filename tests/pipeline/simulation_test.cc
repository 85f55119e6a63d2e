// Simulated runs of the pipeline's own code, up to 64 ranks, against the plan's estimate. Each
// prints its line of the table in docs/scaling.md (tests/bench/simulation.py).
#include "pipeline/simulation.h"

#include <gtest/gtest.h>

#include <cmath>

namespace bitmill {
namespace {
using testing::SimulatedResult;
using testing::SimulatedRun;
using testing::Simulation;

constexpr int kBlocks = 16;
// Seconds of the last cut's part of a block's forward pass, 4 s in all. FLOPs per token: q, k, v, o
// 2 * 4 * 128^2, gate, up, down 2 * 3 * 128 * 512, attention over 8 tokens 8 * 2 * 128.
constexpr double kDown = 4.0 * 2 * 128 * 512 / (2 * 4 * 128 * 128 + 2 * 3 * 128 * 512 + 8 * 256);

constexpr std::pair<int, int> kLayouts[] = {{1, 1}, {2, 1}, {8, 1}, {1, 8}, {4, 2}, {8, 8}};

const Simulation& model() {
  static const Simulation simulation(kBlocks);
  return simulation;
}

void print(const std::string& links, const SimulatedRun& shape, const SimulatedResult& result) {
  // No minus before a zero.
  const double percent = std::round(1000 * result.difference()) / 10 + 0.0;
  fmt::print("| {} | {}{} | {} x {} | {} | {:.1f} s | {:.1f} s | {:+.1f}% | {:.2f} |\n", links,
             shape.mode, shape.true_sequential ? "" : ", true_sequential=false", shape.stages,
             shape.width, result.batches, result.estimated_seconds, result.simulated_seconds,
             percent, result.busy);
}

SimulatedResult run(const std::string& links, const SimulatedRun& shape) {
  const SimulatedResult result = model().run(shape);
  EXPECT_EQ(result.linears, 7 * kBlocks);
  EXPECT_EQ(result.blocks, kBlocks);
  print(links, shape, result);
  return result;
}

class Mode : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Simulation, Mode, ::testing::Values("quantized", "full"));

TEST_P(Mode, TakesWhatThePlanSays) {
  for (const auto& [stages, width] : kLayouts) {
    const SimulatedResult result = run("free", {stages, width, GetParam()});
    EXPECT_NEAR(result.difference(), 0, 0.05) << stages << " x " << width;
  }
}

// All micro-batches take 7 s to the next stage, half of what a stage of 2 blocks captures in
// mode full; then 28 s, twice that: the links are then what all wait for.
TEST_P(Mode, SlowLinksBetweenStages) {
  for (const double seconds : {7.0, 28.0}) {
    SimulatedRun shape{8, 1, GetParam()};
    shape.link_bytes_per_second = 128 * 8 * 128 * 2 / seconds;
    const SimulatedResult result = run(fmt::format("{:g} s a boundary", seconds), shape);
    EXPECT_NEAR(result.difference(), 0, 0.05) << seconds;
  }
}

// Little memory: several waves a stage, which hold up the stage behind.
TEST(Simulation, Waves) {
  SimulatedRun shape{2, 1, "full"};
  shape.memory_per_rank = 20'000'000;
  const SimulatedResult result = run("free, waves", shape);
  EXPECT_GT(result.waves, 1);
  EXPECT_NEAR(result.difference(), 0, 0.05);
}

// A float forward without its last cut (nobody needs its output), all Hessians, the solve, a
// quantized forward: N (4 - down + 3 + 2 + 4), less the last block's last cut. Of the latter only
// the last cut's micro-batches can leave one by one.
TEST(Simulation, WholeBlocksByHand) {
  SimulatedRun shape{1, 1, "quantized", false};
  const double alone = kBlocks * (4 - kDown + 3 + 2 + 4) - kDown;
  EXPECT_NEAR(run("free", shape).simulated_seconds, alone, 1e-3 * alone);
  shape.stages = 8;
  EXPECT_NEAR(run("free", shape).simulated_seconds, alone - 7 * (1 - 1 / 128.0) * kDown,
              1e-3 * alone);
}

// What the members of a stage send on one block, at 1 MB/s. Sums: triangles of 128 x 128, three of
// them, and 10 tiles of 128 x 128, 4 bytes each; every rank sends 7/8 of its own and 7/8 of the
// folded ones. Results: a row is n codes and 27 bytes of grid and sums, and who has rows sends them
// to 7 others. q, k, v and o are 128 rows on one rank, gate and up 256 on each of two, down 128: at
// least 128 of q, k or v, and 256 of gate or up, at most all of them one after the other.
TEST(Simulation, ExchangeByHand) {
  SimulatedRun shape{1, 8};
  const double free = run("free", shape).simulated_seconds;
  shape.link_bytes_per_second = 1e6;
  const double slow = run("1 MB/s", shape).simulated_seconds;
  const double sums = 2 * 7 / 8.0 * 4 * (3 + 10) * 128 * 128;
  const double least = 7 * (2 * 128 * 155 + 256 * 155 + 128 * 539);
  const double most = 7 * (4 * 128 * 155 + 2 * 256 * 155 + 128 * 539);
  EXPECT_GT((slow - free) / kBlocks, 0.99 * (sums + least) / 1e6);
  EXPECT_LT((slow - free) / kBlocks, 1.01 * (sums + most) / 1e6);
}

// Linears of four row tiles on four ranks. The error records of a cut's linears are made one linear
// after the other, so that most ranks wait: the estimate has them all at once.
TEST(Simulation, ErrorRecordsComeLinearByLinear) {
  const Simulation wide(4, 1024, 1024);
  for (const char* mode : {"quantized", "full"}) {
    SimulatedRun shape{1, 4, mode};
    shape.samples = 32;
    const SimulatedResult result = wide.run(shape);
    print("free, wide", shape, result);
    EXPECT_GT(result.difference(), -0.05);
    EXPECT_LT(result.difference(), 0.1);
  }
}

TEST(Simulation, TimeDoesNotDependOnThreads) {
  SimulatedRun shape{4, 2, "quantized"};
  shape.link_bytes_per_second = 1e6;
  shape.latency = 1e-3;
  const double seconds = model().run(shape).simulated_seconds;
  EXPECT_EQ(model().run(shape).simulated_seconds, seconds);
}

}  // namespace
}  // namespace bitmill
