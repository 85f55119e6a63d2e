// The estimate's formulas against a discrete-event simulation of the same pipeline and against
// shapes small enough to work out by hand.
#include "pipeline/cost.h"

#include <gtest/gtest.h>

namespace bitmill {
namespace {

// A model of 64 equal blocks: forward 4 s, Hessian 3 s, solve work that splits 1.6 s and that does
// not 0.4 s on one device. P stages of D ranks, M micro-batches.
struct Pipeline {
  int stages, width, batches;
};
constexpr int kBlocks = 64;

double quantized_seconds(Pipeline p) {
  std::vector<BlockSeconds> blocks(kBlocks);
  for (BlockSeconds& block : blocks) {
    block.capture = (4.0 + 3.0) / p.width;
    block.solve = 1.6 / p.width + 0.4;
    block.propagate = 4.0 / p.width;
  }
  blocks.back().propagate = 0;  // nothing follows
  Stream stream;
  double done = 0;
  for (int stage = 0; stage < p.stages; ++stage) {
    const int each = kBlocks / p.stages;
    const std::vector<BlockSeconds> mine(blocks.begin() + stage * each,
                                         blocks.begin() + (stage + 1) * each);
    const StageEnd end = run_quantized_stage(stream, 0, mine, p.batches);
    stream = end.out;
    done = end.done;
  }
  return done;
}

double full_seconds(Pipeline p, int waves) {
  BlockSeconds block;
  block.capture = (4.0 + 3.0) / p.width;
  block.solve = 1.6 / p.width + 0.4;
  const size_t each = static_cast<size_t>(kBlocks / p.stages / waves);
  const std::vector<std::vector<BlockSeconds>> stage(static_cast<size_t>(waves),
                                                     std::vector<BlockSeconds>(each, block));
  Stream stream;
  double done = 0;
  for (int s = 0; s < p.stages; ++s) {
    const StageEnd end = run_full_stage(stream, 0, stage, p.batches);
    stream = end.out;
    done = std::max(done, end.done);
  }
  return done;
}

// Makespans of an event simulation with list scheduling over serial stages, seconds to one decimal.
TEST(Pipeline, QuantizedAgreesWithTheSimulation) {
  EXPECT_NEAR(quantized_seconds({1, 8, 16}), 125.9, 0.05);
  EXPECT_NEAR(quantized_seconds({1, 64, 16}), 38.1, 0.05);
  EXPECT_NEAR(quantized_seconds({8, 1, 16}), 801.8, 0.06);
  EXPECT_NEAR(quantized_seconds({8, 8, 16}), 122.6, 0.05);
}

TEST(Pipeline, FullAgreesWithTheSimulation) {
  EXPECT_NEAR(full_seconds({1, 64, 16}, 1), 34.2, 0.05);
  EXPECT_NEAR(full_seconds({8, 1, 4}, 1), 170.0, 0.05);
  EXPECT_NEAR(full_seconds({8, 1, 16}, 1), 96.5, 0.05);
  EXPECT_NEAR(full_seconds({8, 1, 64}, 1), 78.1, 0.05);
  EXPECT_NEAR(full_seconds({8, 8, 64}, 1), 12.6, 0.05);
}

// N (k + S + g) - g - (P-1) (1 - 1/M) min(g, k) = 64 * 13 - 4 - 7 * 15/16 * 4
TEST(Pipeline, QuantizedIsTheClosedForm) {
  EXPECT_NEAR(quantized_seconds({8, 1, 16}), 64 * 13 - 4 - 7 * 15.0 / 16 * 4, 1e-9);
}

// N/P (k (M + P - 1) / M + S) = 64/8 (7 * 23/16 + 2)
TEST(Pipeline, FullIsTheClosedForm) {
  EXPECT_NEAR(full_seconds({8, 1, 16}, 1), 8 * (7 * 23.0 / 16 + 2), 1e-9);
}

// Two waves on one stage take no longer than one; on several stages the next stage waits for the
// last wave: stage s can begin its first wave when the last wave of the stage before streams.
TEST(Pipeline, WavesHoldUpTheStagesBehind) {
  EXPECT_NEAR(full_seconds({1, 1, 16}, 2), full_seconds({1, 1, 16}, 1), 1e-9);
  // Two stages of 32 blocks, two waves of 16: a wave captures 112 s and solves 32 s. Stage 1 gets
  // its first micro-batch at 144 + 7, its first wave's last at 144 + 112 + 7 and is done 32 + 144
  // later.
  EXPECT_NEAR(full_seconds({2, 1, 16}, 2), 144 + 112 + 7 + 32 + 144, 1e-9);
}

TEST(Pipeline, AStepPassesMicroBatchesOn) {
  const Stream out = pass({10, 20}, 8, 4);  // 2 s each; the step waits for the last one
  EXPECT_DOUBLE_EQ(out.first, 12);
  EXPECT_DOUBLE_EQ(out.last, 22);
  EXPECT_DOUBLE_EQ(pass({10, 11}, 8, 4).last, 18);  // or the last one for the step
}

// 32 lanes on 3 ranks: lanes 0-9, 10-20, 21-31. Complete subtrees: 0-7 8-9 | 10-11 12-15 16-19 20 |
// 21 22-23 24-31. Most sums alive: at lane 7: 0-3 4-5 6 and lane 7 itself; at lane 19: 10-11 12-15
// 16-17 18 and 19; at lane 31: 21 22-23 24-27 28-29 30 and 31.
TEST(LaneShare, ThreeRanksByHand) {
  const int partials[] = {2, 4, 3}, live[] = {4, 5, 6}, samples[] = {40, 44, 44};
  for (int member = 0; member < 3; ++member) {
    const LaneShare share = lane_share(128, 2048, 32, 2048, 3, member);
    EXPECT_EQ(share.partials, partials[member]);
    EXPECT_EQ(share.live, live[member]);
    EXPECT_EQ(share.samples, samples[member]);
    EXPECT_EQ(share.batches, samples[member]);  // of one sample each
  }
}

TEST(LaneShare, MoreRanksThanLanesLeaveSomeWithoutSamples) {
  int64_t samples = 0;
  for (int member = 0; member < 48; ++member)
    samples += lane_share(128, 512, 32, 2048, 48, member).samples;
  EXPECT_EQ(samples, 128);
  EXPECT_EQ(lane_share(128, 512, 32, 2048, 48, 0).samples, 0);
}

// One cut of 512 x 1024 on 4096 tokens of 256.
class OneCut : public ::testing::Test {
 protected:
  OneCut() {
    CutWork cut;
    cut.in = 1024;
    cut.rows = 512;
    cut.tiles = 2;
    cut.hessian = true;
    cut.grid_weights = 31.0 * 512 * 1024;
    cut.source_bytes = 512 * 1024 * 2;
    cut.packed_bytes = 512 * 1024 / 2;
    work_.cuts = {cut};
    shape_.tokens = 4096;
    shape_.length = 256;
    rates_.forward_flops = rates_.hessian_flops = rates_.factor_flops = rates_.sweep_flops = 1e9;
    rates_.grid_elements = 1e6;
    rates_.read_bandwidth = rates_.write_bandwidth = rates_.link_bandwidth = 1e6;
    rates_.storage_bandwidth = 1e9;
  }
  double seconds(CostPhase phase) const {
    return block_seconds(work_, shape_, rates_).phases[static_cast<size_t>(phase)];
  }
  BlockWork work_;
  CostShape shape_;
  Rates rates_;
};

TEST_F(OneCut, PhasesByHand) {
  EXPECT_NEAR(seconds(CostPhase::kForward), 2.0 * 512 * 1024 * 4096 / 1e9, 1e-9);
  // Tiles of 128: 8 rows of tiles, 36 tiles.
  EXPECT_NEAR(seconds(CostPhase::kHessian), 2.0 * 36 * 128 * 128 * 4096 / 1e9, 1e-9);
  EXPECT_NEAR(seconds(CostPhase::kFactor), (1024.0 * 1024 * 1024 / 3 + 512.0 * 1024 * 1024) / 1e9,
              1e-9);
  EXPECT_NEAR(seconds(CostPhase::kSweep), 512.0 * 1024 * (2 * 1024 + 128) / 1e9, 1e-9);
  EXPECT_NEAR(seconds(CostPhase::kGrid), 31.0 * 512 * 1024 / 1e6, 1e-9);
  EXPECT_EQ(seconds(CostPhase::kExchange), 0);
  EXPECT_EQ(seconds(CostPhase::kRead), 0);  // a second, beside over 20 of arithmetic
}

TEST_F(OneCut, TwoRanksShareAllButTheFactorization) {
  const double forward = seconds(CostPhase::kForward), factor = seconds(CostPhase::kFactor);
  const double sweep = seconds(CostPhase::kSweep);
  shape_.width = 2;
  shape_.share = 0.5;
  EXPECT_NEAR(seconds(CostPhase::kForward), forward / 2, 1e-9);
  EXPECT_NEAR(seconds(CostPhase::kFactor), factor, 1e-9);
  EXPECT_NEAR(seconds(CostPhase::kSweep), sweep / 2, 1e-9);
  // Half of one partial triangle goes out and half of the folded one; so do half of the codes.
  EXPECT_NEAR(seconds(CostPhase::kExchange), (4.0 * 36 * 128 * 128 + 512 * 1024 / 2.0) / 1e6, 1e-9);
  shape_.width = 3;  // two tiles on three ranks: one has none, the others as on two
  EXPECT_NEAR(seconds(CostPhase::kSweep), sweep / 2, 1e-9);
}

TEST_F(OneCut, FilesCountWhereTheyAreSlowerThanTheArithmetic) {
  rates_.read_bandwidth = 10'000;  // 104.9 s
  const BlockSeconds block = block_seconds(work_, shape_, rates_);
  const double read = block.phases[static_cast<size_t>(CostPhase::kRead)];
  EXPECT_NEAR(total(block.phases), 512 * 1024 * 2 / 1e4, 1e-9);
  EXPECT_GT(read, 70);
}

// 8 experts of that shape, each seeing a quarter of the tokens: 2 ranks own 4 each.
TEST_F(OneCut, ExpertsAreSplitWithTheirFactorizations) {
  const double factor = seconds(CostPhase::kFactor), forward = seconds(CostPhase::kForward);
  CutWork& cut = work_.cuts.front();
  cut.expert = true;
  cut.count = 8;
  cut.token_share = 0.25;
  EXPECT_NEAR(seconds(CostPhase::kForward), 2 * forward, 1e-9);
  EXPECT_NEAR(seconds(CostPhase::kFactor), 8 * factor, 1e-9);
  shape_.width = 2;
  shape_.share = 0.5;
  EXPECT_NEAR(seconds(CostPhase::kForward), forward, 1e-9);
  EXPECT_NEAR(seconds(CostPhase::kFactor), 4 * factor, 1e-9);
  shape_.width = 3;  // 3, 3 and 2
  EXPECT_NEAR(seconds(CostPhase::kFactor), 3 * factor, 1e-9);
}

TEST(Rates, GivenOnesReplaceAssumptions) {
  RunOptions::Machine machine;
  machine.sweep_flops = 5;
  const Rates rates = rates_of(machine, false, DType::kF32);
  EXPECT_EQ(rates.sweep_flops, 5);
  EXPECT_EQ(rates.factor_flops, assumed_rates(false, DType::kF32).factor_flops);
  EXPECT_TRUE(rates.assumed);
  EXPECT_NEAR(factor_rate(rates, 550), rates.factor_flops / 2, 1);
  EXPECT_NEAR(large_factor_rate(factor_rate(rates, 2048), 2048, rates), rates.factor_flops, 1);
}

}  // namespace
}  // namespace bitmill
