// Plans of large models at 8, 64 and 1,024 ranks. The numbers are worked out from the published
// shapes in the comments, for 128 x 2048 = 262,144 tokens, 4 bits in groups of 128, GPUs of 80 GB.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "io/checkpoint.h"
#include "io/json.h"
#include "pipeline/plan.h"
#include "support/paths.h"

namespace bitmill {
namespace {
using ::testing::HasSubstr;

constexpr double kTokens = 262144;

class Model {
 public:
  explicit Model(const std::string& name) {
    const Json config = read_model_config(testing::source_path("configs/models/" + name));
    spec = find_family(config).describe(config);
    machine.device = true;
    machine.memory_name = "device memory";
    machine.memory_per_rank = 80'000'000'000;
  }
  Plan plan(int ranks, const std::string& mode) {
    machine.ranks = ranks;
    machine.ranks_per_node = 8;
    options.propagation.mode = mode;
    return make_plan(options, spec, find_format("gptq"), machine, PlanJob(),
                     [](const std::string&) { return DType::kBF16; });
  }
  RunOptions options;
  ModelSpec spec;
  PlanMachine machine;
};

double seconds(const Plan& plan, CostPhase phase) {
  return plan.phases[static_cast<size_t>(phase)];
}
int64_t bytes(const RankPlan& rank, MemoryKind kind) {
  return rank.peak[static_cast<size_t>(kind)];
}
int64_t weights(const ModelSpec& spec) {
  int64_t sum = 0;
  for (const BlockSpec& block : spec.blocks)
    for (const LinearSpec& linear : block.linears) sum += linear.out * linear.in;
  return sum;
}
int64_t linears(const ModelSpec& spec) {
  int64_t sum = 0;
  for (const BlockSpec& block : spec.blocks) sum += static_cast<int64_t>(block.linears.size());
  return sum;
}

// What holds for every plan: phases add up, all blocks are owned once, ranks fit.
void check_whole(const Plan& plan, const ModelSpec& spec) {
  EXPECT_NEAR(total(plan.phases), plan.seconds, 1e-6 * plan.seconds);
  int64_t next = 0;
  for (const RankPlan& rank : plan.ranks) {
    EXPECT_LE(total(rank.peak), 80'000'000'000);
    if (rank.rank >= plan.active_ranks()) continue;
    EXPECT_NEAR(total(rank.seconds), plan.seconds, 1e-6 * plan.seconds);
    if (rank.member > 0) continue;
    EXPECT_EQ(rank.blocks.first, next);
    next = rank.blocks.end;
    int64_t in_wave = rank.blocks.first;
    for (const BlockRange& wave : rank.waves) {
      EXPECT_EQ(wave.first, in_wave);
      in_wave = wave.end;
    }
    EXPECT_EQ(in_wave, plan.full ? rank.blocks.end : rank.blocks.first);
  }
  EXPECT_EQ(next, static_cast<int64_t>(spec.blocks.size()));
}

// Per block q and o 8192^2, k and v 1024 x 8192, gate, up and down 28672 x 8192:
// 2 * 67,108,864 + 2 * 8,388,608 + 3 * 234,881,024 = 855,638,016; 80 blocks 68,451,041,280.
TEST(Llama3_70B, Shapes) {
  Model model("Llama-3-70B");
  EXPECT_EQ(weights(model.spec), 68'451'041'280);
  // With norms 80 * 2 * 8192 + 8192 and twice 128,256 * 8192: 70,553,706,496 parameters of 2 bytes.
  EXPECT_EQ(model.plan(8, "quantized").source_bytes, 141'107'412'992);
}

TEST(Llama3_70B, EightRanksShareOneStage) {
  Model model("Llama-3-70B");
  const Plan plan = model.plan(8, "quantized");
  check_whole(plan, model.spec);
  EXPECT_EQ(plan.width, 8);
  EXPECT_EQ(plan.stages, 1);
  // 2 FLOP per weight and token, 3.5888e16; attention over half of 2048 keys on average, 64 heads
  // of 128 + 128 columns: 2 * 1024 * 16384 per token and block, 7.037e14. On 8 ranks of 790
  // TFLOP/s.
  EXPECT_NEAR(seconds(plan, CostPhase::kForward), (3.5888e16 + 7.037e14) / 8 / 790e12, 0.001);
  // Packed triangles in tiles of 256: 8192 columns 32 * 33 / 2 = 528 tiles (qkv, o, gate_up), 28672
  // columns 112 * 113 / 2 = 6328 (down); 7912 tiles of 65,536 = 518,520,832 elements.
  EXPECT_NEAR(seconds(plan, CostPhase::kHessian), 2 * kTokens * 518'520'832 * 80 / 8 / 700e12,
              1e-4);
  // n^3/3 + 512 n^2 at 30e12 n/(n + 8192): 8192 columns 14.5 ms, 28672 columns 355.8 ms.
  const double small = (8192.0 * 8192 * 8192 / 3 + 512.0 * 8192 * 8192) / 15e12;
  const double large = (28672.0 * 28672 * 28672 / 3 + 512.0 * 28672 * 28672) / (30e12 * 7 / 9);
  EXPECT_NEAR(small, 0.01450, 1e-4);
  EXPECT_NEAR(large, 0.3547, 2e-3);
  EXPECT_NEAR(seconds(plan, CostPhase::kFactor), 80 * (3 * small + large), 1e-6);
}

// A Hessian per cut lives at most three times on a rank of 4 lanes (lanes 0-1, lane 2, lane 3
// open): a block needs 3 * 4 * 518,520,832 = 6.22 GB of sums and 1.71 GB of weights. Nine
// blocks, 71.4 GB, fit, ten do not: 80 blocks are nine waves.
TEST(Llama3_70B, FullModeOnEightRanksWorksInWaves) {
  Model model("Llama-3-70B");
  model.options.run.stage_width = "8";
  const Plan plan = model.plan(8, "full");
  check_whole(plan, model.spec);
  ASSERT_EQ(plan.ranks[0].waves.size(), 9u);
  EXPECT_EQ(plan.ranks[0].waves[0].count(), 9);
  EXPECT_EQ(bytes(plan.ranks[0], MemoryKind::kHessians), int64_t{9} * 3 * 4 * 518'520'832);
  EXPECT_EQ(bytes(plan.ranks[0], MemoryKind::kWeights), int64_t{9} * 855'638'016 * 2);
}

// 80 blocks are at most 80 stages; all 32 lanes on one rank: six sums of a triangle at most.
TEST(Llama3_70B, FullModeOn1024RanksIsAStagePerBlock) {
  Model model("Llama-3-70B");
  model.options.run.stage_width = "1";
  const Plan plan = model.plan(1024, "full");
  check_whole(plan, model.spec);
  EXPECT_EQ(plan.active_ranks(), 80);
  EXPECT_EQ(bytes(plan.ranks[40], MemoryKind::kHessians), int64_t{6} * 4 * 518'520'832);
  EXPECT_NEAR(seconds(plan, CostPhase::kForward), (3.5888e16 + 7.037e14) / 80 / 790e12, 0.001);
}

// 32 ranks have one lane each. The triangle of 28672 columns, 4 * 414,711,808 = 1,658,847,232 bytes,
// lies there once, as the result of the exchange; the factor, 4 * 28672^2 = 3,288,334,336 bytes, is
// whole on every rank, and so is the one tile of 256 rows that it sweeps: 5 bytes a weight, 512 a
// row of sums, 8 a group.
TEST(Llama3_70B, TheFactorDecidesTheMemoryOfAWideStage) {
  Model model("Llama-3-70B");
  model.options.run.stage_width = "32";
  const Plan plan = model.plan(64, "quantized");
  EXPECT_EQ(plan.ranks[0].peak_at, "block 0, solve down");
  EXPECT_EQ(bytes(plan.ranks[0], MemoryKind::kHessians), 1'658'847'232);
  EXPECT_EQ(bytes(plan.ranks[0], MemoryKind::kFactor),
            int64_t{3'288'334'336} + 256 * (28672 * 5 + 512 + 224 * 8));
}

// The mode's point: ranks in stages add nothing to quantized propagation, and divide full.
TEST(Llama3_70B, FullModeIsFasterOn64Ranks) {
  Model model("Llama-3-70B");
  const Plan quantized = model.plan(64, "quantized"), full = model.plan(64, "full");
  check_whole(quantized, model.spec);
  check_whole(full, model.spec);
  EXPECT_LT(full.seconds, quantized.seconds / 3);
  EXPECT_THAT(quantized.hints.front(), HasSubstr("propagation.mode=full"));
}

// q, o 16384^2, k, v 1024 x 16384, three of 53248 x 16384: 3,187,671,040 per block, 126 blocks.
// Triangles: 16384 columns 64 * 65 / 2 = 2080 tiles, three times; 53248 columns 208 * 209 / 2 =
// 21,736: 27,976 tiles of 65,536 = 1,833,435,136 elements.
TEST(Llama31_405B, ByHand) {
  Model model("Llama-3.1-405B");
  EXPECT_EQ(weights(model.spec), 401'646'551'040);
  for (const int ranks : {8, 64, 1024}) {
    const Plan plan = model.plan(ranks, "quantized");
    check_whole(plan, model.spec);
    EXPECT_EQ(plan.source_bytes,
              2 * 405'853'388'800);  // norms 4,145,152, embedding and head 4,202,692,608
  }
  const Plan full = model.plan(1024, "full");
  check_whole(full, model.spec);
  // One block per stage of 8 ranks with 4 lanes each: the open lane and a subtree of 2 and of 1.
  EXPECT_EQ(full.width, 8);
  EXPECT_EQ(full.active_ranks(), 126 * 8);
  EXPECT_EQ(bytes(full.ranks[60], MemoryKind::kHessians), int64_t{3} * 4 * 1'833'435'136);
}

// q, o 8192 x 4096, k, v 512 x 4096: 71,303,168; 128 experts of 3 * 1536 * 4096 = 18,874,368.
TEST(Qwen3_235B, ByHand) {
  Model model("Qwen3-235B-A22B");
  EXPECT_EQ(weights(model.spec), 94 * (71'303'168 + int64_t{128} * 18'874'368));
  EXPECT_EQ(linears(model.spec), 94 * (4 + 128 * 3));
  for (const int ranks : {8, 64, 1024}) check_whole(model.plan(ranks, "quantized"), model.spec);
  model.options.run.stage_width = "8";
  const Plan plan = model.plan(8, "quantized");
  // A token passes 8 experts: 71,303,168 + 8 * 18,874,368 = 222,298,112 weights a block; attention
  // over 64 heads of 128 + 128.
  const double flop = 94 * kTokens * (2.0 * 222'298'112 + 2048.0 * 64 * 256);
  EXPECT_NEAR(seconds(plan, CostPhase::kForward), flop / 8 / 790e12, 1e-3);
}

// Attention per block: q_a 1536 x 7168, kv_a 576 x 7168, q_b 24576 x 1536, kv_b 32768 x 512, o 7168
// x 16384: 187,105,280. Three dense MLPs of 3 * 18432 * 7168 = 396,361,728; in the other 58 blocks
// 257 experts, one shared, of 3 * 2048 * 7168 = 44,040,192.
TEST(DeepSeekV3, ByHand) {
  Model model("DeepSeek-V3");
  EXPECT_EQ(weights(model.spec),
            int64_t{61} * 187'105'280 + 3 * 396'361'728 + int64_t{58} * 257 * 44'040'192);
  EXPECT_EQ(linears(model.spec), 45'032);
  for (const int ranks : {64, 1024}) check_whole(model.plan(ranks, "quantized"), model.spec);
  model.options.run.stage_width = "8";
  const Plan plan = model.plan(8, "quantized");
  check_whole(plan, model.spec);
  // A token passes 9 experts: 61 * 187,105,280 + 3 * 396,361,728 + 58 * 9 * 44,040,192 =
  // 35,591,487,488 weights; attention over 128 heads of 192 + 128 columns.
  const double flop = kTokens * (2.0 * 35'591'487'488 + 61.0 * 2048 * 128 * 320);
  EXPECT_NEAR(seconds(plan, CostPhase::kForward), flop / 8 / 790e12, 1e-3);
}

TEST(KimiK2, ByHand) {
  Model model("Kimi-K2");
  // 64 heads: q_b 12288 x 1536, kv_b 16384 x 512, o 7168 x 8192, with q_a and kv_a 101,122,048. One
  // dense block; 60 with 385 experts.
  EXPECT_EQ(weights(model.spec),
            int64_t{61} * 101'122'048 + 396'361'728 + int64_t{60} * 385 * 44'040'192);
  EXPECT_EQ(linears(model.spec), 69'608);
  for (const int ranks : {8, 64, 1024}) check_whole(model.plan(ranks, "quantized"), model.spec);
}

TEST(Experts, TheirForwardIsRefused) {
  for (const char* name : {"Qwen3-235B-A22B", "DeepSeek-V3"}) {
    const Json config =
        read_model_config(testing::source_path("configs/models/" + std::string(name)));
    const ModelFamily& family = find_family(config);
    try {
      family.graph(family.describe(config), 0, TensorView());
      FAIL() << name;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput);
      EXPECT_THAT(error.what(), HasSubstr("can be planned"));
    }
  }
}

}  // namespace
}  // namespace bitmill
