// The plan is arithmetic: its numbers are checked by hand for tests/data/tiny-llama (2 blocks, hidden 128, intermediate 256,
// 4 heads of 32, 2 kv heads, vocabulary 512, untied, bf16).
#include "pipeline/plan.h"

#include <algorithm>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "io/checkpoint.h"
#include "support/paths.h"
#include "io/json.h"

namespace bitmill {
namespace {
using ::testing::HasSubstr;

class PlanTest : public ::testing::Test {
 protected:
  PlanTest() {
    const Json config = read_model_config(testing::source_path("tests/data/tiny-llama"));
    spec_ = find_family(config).describe(config);
    job_.samples = 4;
    job_.length = 32;
    machine_.memory_name = "host memory";
    options_.run.stage_width = "1";
  }
  Plan plan(int ranks) {
    machine_.ranks = machine_.ranks_per_node = ranks;
    return make_plan(options_, spec_, find_format(options_.output.format), machine_, job_,
                     [](const std::string&) { return DType::kBF16; });
  }
  RunOptions options_;
  ModelSpec spec_;
  PlanMachine machine_;
  PlanJob job_;
};

int64_t part(const Plan& plan, MemoryKind kind) { return plan.ranks[0].peak[static_cast<size_t>(kind)]; }

// One block, 4 bits, group 128: linears with 128 columns store 64 bytes of codes, half a byte of zeros and 2 bytes of scale
// per output row, plus 512 bytes of g_idx: 66.5 * (128+64+64+128+256+256) + 6 * 512 = 62656. down_proj [128, 256]:
// 16384 + 128 + 512 + 1024 = 18048. Norms: 2 * 128 * 2 = 512. Together 81216.
constexpr int64_t kBlockBytes = 62656 + 18048 + 512;
constexpr int64_t kEmbeddingBytes = 512 * 128 * 2;

TEST_F(PlanTest, BytesByHand) {
  const Plan p = plan(1);
  EXPECT_EQ(p.output_bytes, 2 * kBlockBytes + 2 * kEmbeddingBytes + 256);
  EXPECT_EQ(p.quantized_weights, 2 * (896 * 128 + 128 * 256));
  EXPECT_DOUBLE_EQ(p.bits_per_weight, 8.0 * 2 * (62656 + 18048) / (2.0 * (896 * 128 + 128 * 256)));
  // Source: 2 bytes for every weight and norm.
  EXPECT_EQ(p.source_bytes, 2 * (2 * (896 * 128 + 128 * 256) + 4 * 128 + 128 + 2 * 512 * 128));
  EXPECT_TRUE(p.joined);
  EXPECT_EQ(p.files, std::vector<std::string>{"model.safetensors"});
}

TEST_F(PlanTest, ShardsDependOnTheModelAloneNotOnRanks) {
  options_.output.shard_size = 100000;
  const Plan one = plan(1), two = plan(2);
  ASSERT_EQ(one.shards.size(), 5u);  // embedding, two blocks, norm, head
  EXPECT_EQ(one.files.front(), "model-00001-of-00005.safetensors");
  ASSERT_EQ(two.shards.size(), one.shards.size());
  for (size_t i = 0; i < one.shards.size(); ++i) {
    EXPECT_EQ(one.shards[i].key, two.shards[i].key);
    EXPECT_EQ(one.shards[i].tensor_bytes, two.shards[i].tensor_bytes);
  }
  EXPECT_EQ(two.shards[1].rank, 0);
  EXPECT_EQ(two.shards[2].rank, 1);
}

TEST_F(PlanTest, ABlockAboveShardSizeIsCutInKeyOrder) {
  options_.output.shard_size = 50000;
  const Plan p = plan(1);
  EXPECT_EQ(p.shards[0].key, "embedding");
  EXPECT_EQ(p.shards[1].key, "block-00000.part-1");
  EXPECT_EQ(p.shards[2].key, "block-00000.part-2");
  EXPECT_LE(p.shards[1].tensor_bytes, 50000);
  EXPECT_LT(p.shards[1].tensors.back().name, p.shards[2].tensors.front().name);
}

TEST_F(PlanTest, MoreRanksThanBlocksAreNamedIdle) {
  const Plan p = plan(5);
  EXPECT_EQ(p.active_ranks(), 2);
  ASSERT_EQ(p.notes.size(), 1u);
  EXPECT_THAT(p.notes[0], HasSubstr("3 of 5 ranks stay idle (ranks 2-4)"));
  EXPECT_THAT(plan_text(p, spec_), HasSubstr("idle"));
}

TEST_F(PlanTest, AMillionRanksAreAFewLines) {
  const Plan p = plan(1'000'000);
  const std::string text = plan_text(p, spec_);
  EXPECT_LT(std::count(text.begin(), text.end(), '\n'), 40);
  EXPECT_THAT(text, HasSubstr("  ... 999996 more like this\n"));  // 2 work; of the idle the first and the last are shown
  EXPECT_THAT(text, HasSubstr("\n  999999 "));
  EXPECT_EQ(plan_json(p).at("ranks").size(), 2u);
  EXPECT_EQ(plan_json(p).at("idle_ranks"), 999'998);
}

// Ranks in the middle of a deep model own as many blocks each and need the same memory.
TEST_F(PlanTest, EqualRanksAndFilesAreElidedInTheMiddle) {
  for (int64_t b = 2; b < 40; ++b) spec_.blocks.push_back(spec_.blocks[1]);
  options_.output.shard_size = 100000;
  const std::string text = plan_text(plan(40), spec_);
  EXPECT_THAT(text, HasSubstr("  ... 36 more like this\n"));  // ranks 1 to 38: the first and last differ
  EXPECT_THAT(text, HasSubstr("model-00002-of-00043.safetensors"));
  EXPECT_THAT(text, ::testing::Not(HasSubstr("model-00003-of-00043.safetensors")));
  EXPECT_THAT(text, HasSubstr("model-00041-of-00043.safetensors"));
}

TEST_F(PlanTest, HugeSampleCountsArePlannedAtOnce) {
  job_.samples = 1'000'000'000;
  job_.length = 1000;
  EXPECT_EQ(plan(1).micro_batches, 32 * (31'250'000 / 2));  // 32 lanes, two samples of 1000 tokens to a batch
}

TEST_F(PlanTest, RefusesWhatDoesNotFitAndSaysWhatHelps) {
  machine_.memory_per_rank = 100000;
  try {
    plan(1);
    FAIL() << "fits into 100 kB?";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kDoesNotFit);
    EXPECT_THAT(error.what(), HasSubstr("rank 0 needs"));
    EXPECT_THAT(error.what(), HasSubstr("host memory"));
  }
}

// 1000 samples of 32 tokens and a limit of 25 MB on one rank: activations need up to 32.8 MB.
TEST_F(PlanTest, WhatARefusalNamesReallyFits) {
  job_.samples = 1000;
  machine_.memory_per_rank = 25'000'000;
  std::string said;
  try {
    plan(1);
    FAIL() << "fits into 25 MB?";
  } catch (const Error& error) {
    said = error.what();
  }
  EXPECT_THAT(said, HasSubstr("activations"));
  const auto number = [&](const std::string& before) {
    const size_t at = said.find(before);
    EXPECT_NE(at, std::string::npos) << before << " in " << said;
    return at == std::string::npos ? 1 : std::stoi(said.substr(at + before.size()));
  };
  job_.samples = number("calibration.samples=");
  EXPECT_LT(job_.samples, 1000);
  EXPECT_NO_THROW(plan(1));
  job_.samples = 1000;
  EXPECT_THAT(said, HasSubstr("2 ranks with run.stage_width=2"));
  options_.run.stage_width = "2";
  EXPECT_NO_THROW(plan(2));
}

// With two ranks half of the activations each: what was refused at width 1 names width 2.
TEST_F(PlanTest, ARefusalNamesTheWidthsThatFit) {
  job_.samples = 1000;
  machine_.memory_per_rank = 25'000'000;
  try {
    plan(2);
    FAIL() << "fits into 25 MB?";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("run.stage_width=2"));
  }
  options_.run.stage_width = "2";
  EXPECT_NO_THROW(plan(2));
  options_.run.stage_width = "auto";
  EXPECT_EQ(plan(2).width, 2);
}

// Of a GPU's rank, packed tensors and copies lie in host memory: the embedding is larger than a block.
TEST_F(PlanTest, WithADeviceTheHostIsCountedApart) {
  const int64_t packed = part(plan(1), MemoryKind::kPacked);
  EXPECT_GT(packed, 0);
  EXPECT_EQ(total(plan(1).ranks[0].host_peak), 0);
  const int64_t everything = total(plan(1).ranks[0].peak);
  machine_.device = true;
  EXPECT_EQ(total(plan(1).ranks[0].peak), everything - packed);
  EXPECT_EQ(total(plan(1).ranks[0].host_peak), kEmbeddingBytes);
}

TEST_F(PlanTest, AwqInFullModeTakesOneBlockPerWave) {
  options_.propagation.mode = "full";
  EXPECT_EQ(plan(1).ranks[0].waves.size(), 1u);
  options_.quantize.algorithm = "awq+gptq";
  const Plan p = plan(1);
  ASSERT_EQ(p.ranks[0].waves.size(), 2u);
  EXPECT_EQ(p.ranks[0].waves[1].first, 1);
  EXPECT_EQ(p.ranks[0].waves[1].end, 2);
}

// Members of a stage have the same blocks and half of the activations each.
TEST_F(PlanTest, WidthSplitsSamplesNotBlocks) {
  job_.samples = 1000;
  options_.run.stage_width = "2";
  const Plan p = plan(4);
  EXPECT_EQ(p.stages, 2);
  EXPECT_EQ(p.ranks[1].stage, 0);
  EXPECT_EQ(p.ranks[2].stage, 1);
  EXPECT_EQ(p.ranks[0].blocks.end, p.ranks[1].blocks.end);
  const int64_t tokens = 500 * 32;
  EXPECT_EQ(part(p, MemoryKind::kActivations), tokens * (128 * 4 + 256 * 2));
  EXPECT_EQ(plan_json(p).at("width"), 2);
}

TEST_F(PlanTest, ActivationsAreCountedByHand) {
  job_.samples = 1000;  // large enough that activations decide
  const Plan p = plan(1);
  // Worst: after gate_up ran, the F32 residual stream and the bf16 carry of 256 channels live together.
  const int64_t tokens = 1000 * 32;
  EXPECT_EQ(p.ranks[0].peak[static_cast<size_t>(MemoryKind::kActivations)], tokens * (128 * 4 + 256 * 2));
}

// One forward of the whole block with all Hessians open. 4 samples lie in lanes 7, 15, 23 and 31, so a micro-batch is one
// sample of 32 tokens.
TEST_F(PlanTest, CollectingAWholeBlockByHand) {
  options_.quantize.true_sequential = false;
  const Plan p = plan(1);
  EXPECT_EQ(p.ranks[0].peak_at, "block 0, collect");
  EXPECT_EQ(part(p, MemoryKind::kWeights), 2 * (896 * 128 + 128 * 256));  // all linears in bf16
  // qkv, o and gate_up have one tile of 128 x 128, down the three of a lower triangle; at lane 31 three sums exist: the
  // subtree of lanes 7 and 15, lane 23, and lane 31.
  EXPECT_EQ(part(p, MemoryKind::kHessians), 3 * 4 * (3 + 3) * 128 * 128);
  EXPECT_EQ(part(p, MemoryKind::kActivations), 128 * 128 * 2);
  // Before down: the normed stream and the packed inputs of x x^T, twice 256 channels in bf16; and the copy of the batch,
  // the F32 residual and the bf16 carry of 256 channels.
  EXPECT_EQ(part(p, MemoryKind::kScratch), 32 * ((128 + 2 * 256) * 2 + 128 * 4 + 256 * 2));
  EXPECT_EQ(part(p, MemoryKind::kFactor), 0);
}

// Many tokens: activations outweigh the sums. While down is solved its Hessian is the last one left.
TEST_F(PlanTest, HessiansOfAWholeBlockStayUntilTheyAreSolved) {
  options_.quantize.true_sequential = false;
  job_.samples = 1000;
  const Plan p = plan(1);
  EXPECT_EQ(p.ranks[0].peak_at, "block 0, solve down");
  EXPECT_EQ(part(p, MemoryKind::kHessians), 4 * 3 * 128 * 128);
  // F32 and codes of [128, 256], a scale and a zero point in F32 for each of 2 groups a row.
  EXPECT_EQ(part(p, MemoryKind::kWeights), 128 * 256 * (4 + 1) + 128 * 2 * 8);
  // The factor; and the one tile of 128 rows: weights and codes of 256 columns, sums of a block, two groups' grids.
  const int64_t tile = 128 * (256 * 5 + 128 * 4 + 2 * 8);
  EXPECT_EQ(part(p, MemoryKind::kFactor), 256 * 256 * 4 + tile);
}

// Each thread sweeps a tile of its own, as long as there are tiles: a head of 512 rows has two.
TEST_F(PlanTest, ThreadsSweepTilesOfTheirOwn) {
  options_.quantize.lm_head = true;
  spec_.vocab = 65536;
  spec_.embedding.shape = spec_.head.shape = {65536, 128};
  const int64_t tile = 256 * (128 * 5 + 128 * 4 + 8);
  for (const int threads : {1, 2, 16}) {
    machine_.threads = threads;
    EXPECT_EQ(part(plan(1), MemoryKind::kFactor), 128 * 128 * 4 + threads * tile);
  }
}

// In full mode one rank's micro-batches leave it while the number of its sums grows: of 25 samples in each of 32
// lanes 425 are left at lane 15, where five sums exist; at lane 31 there are six.
TEST_F(PlanTest, MicroBatchesLeaveWhileSumsGrow) {
  options_.propagation.mode = "full";
  job_.samples = 800;
  job_.length = 8;
  const Plan p = plan(1);
  EXPECT_EQ(p.ranks[0].peak_at, "blocks 0-1, collect");
  EXPECT_EQ(part(p, MemoryKind::kHessians), 2 * 5 * 4 * (3 + 3) * 128 * 128);
  EXPECT_EQ(part(p, MemoryKind::kActivations), 425 * 8 * 128 * 2);
}

// Only the samples of the first awq.tokens tokens are looked at, and rank 1 has none of them.
TEST_F(PlanTest, OneMemberSearchesForScales) {
  options_.quantize.algorithm = "awq+gptq";
  options_.run.stage_width = "2";
  job_.samples = 1024;
  options_.awq.tokens = 512 * 32;
  const Plan p = plan(2);
  EXPECT_EQ(p.ranks[0].peak_at, "block 0, scale down");
  EXPECT_EQ(p.ranks[1].peak_at, "block 0, run gate_up");
}

// What is only copied passes through in pieces of 16 MiB and a queue of 64 MiB.
TEST_F(PlanTest, CopiesNeedNoMoreThanTheQueue) {
  constexpr int64_t kMost = 80 << 20;
  job_.other = {{"b", DType::kF32, {1000, 1000}}, {"a", DType::kF32, {500, 1000}}, {"c", DType::kBF16, {1000, 1000}}};
  EXPECT_EQ(plan(1).ranks[0].peak_at, "other tensors");
  EXPECT_EQ(part(plan(1), MemoryKind::kEmbedding), 8'000'000);
  const Plan two = plan(2);  // the last rank copies them
  EXPECT_NE(two.ranks[0].peak_at, "other tensors");
  EXPECT_EQ(two.ranks[1].peak_at, "other tensors");
  job_.other[0].shape = {100'000, 10'000};
  EXPECT_EQ(part(plan(1), MemoryKind::kEmbedding), kMost);
  job_.other.clear();
  spec_.embedding.shape = {1'000'000, 128};
  EXPECT_EQ(plan(1).ranks[0].peak_at, "embedding");
  EXPECT_EQ(part(plan(1), MemoryKind::kEmbedding), kMost);
}

TEST_F(PlanTest, AnUntiedHeadIsCopiedByTheLastRank) {
  spec_.head.shape = {512 * 100, 128};
  const Plan p = plan(2);
  EXPECT_EQ(p.ranks[1].peak_at, "head");
  EXPECT_EQ(p.ranks[1].peak[static_cast<size_t>(MemoryKind::kEmbedding)], 512 * 100 * 128 * 2);
}

// Plain rounding takes a linear in pieces of rows: of one with 2^32 weights codes and grids are whole, and what is packed
// of them, half a byte of codes a weight and 2.5 bytes a group. The F32 weight, 16 GiB, never is.
TEST_F(PlanTest, RoundingNeedsNoWholeWeight) {
  options_.quantize.algorithm = "rtn";
  job_.calibrated = false;
  for (BlockSpec& block : spec_.blocks) block.linears.back().out = 1 << 24;  // down [2^24, 256]
  const int64_t weights = int64_t{256} << 24, groups = int64_t{2} << 24;
  const Plan p = plan(1);
  EXPECT_EQ(p.ranks[0].peak_at, "block 0, solve down");
  EXPECT_EQ(part(p, MemoryKind::kWeights), weights + groups * 8);
  EXPECT_EQ(part(p, MemoryKind::kPacked), 62656 + weights / 2 + groups * 5 / 2 + 256 * 4);
}

TEST_F(PlanTest, SettingsThatCannotBeStoredAreRefused) {
  options_.quantize.bits = 5;
  EXPECT_THROW(plan(1), Error);
  options_.quantize.bits = 4;
  options_.quantize.group_size = 48;
  EXPECT_THROW(plan(1), Error);
}

// Only groups that are solved in the order of columns can scatter: that is what reaches the file.
TEST_F(PlanTest, DynamicOrderIsDynamicOnDiskOnlyWithGroupsAndASolver) {
  options_.quantize.act_order = ActOrder::kDynamic;
  const auto order = [&] { return choose_modules(options_, spec_, find_format("gptq")).front().act_order; };
  EXPECT_EQ(order(), ActOrder::kDynamic);
  options_.quantize.group_size = -1;
  EXPECT_EQ(order(), ActOrder::kStatic);
  EXPECT_NO_THROW(choose_modules(options_, spec_, find_format("compressed-tensors")));
  options_.quantize.group_size = 128;
  EXPECT_THROW(choose_modules(options_, spec_, find_format("compressed-tensors")), Error);
  options_.quantize.algorithm = "rtn";
  EXPECT_EQ(order(), ActOrder::kStatic);
}

TEST_F(PlanTest, EnginesAreNamedThatRefuseScatteredGroups) {
  options_.quantize.act_order = ActOrder::kDynamic;
  EXPECT_THAT(plan_text(plan(1), spec_), HasSubstr("desc_act=true"));
}

TEST_F(PlanTest, SkippingEveryModuleIsRefused) {
  options_.quantize.rules.push_back({".* skip=true", [](const std::string&) { return true; }, {{"skip", "true"}}});
  EXPECT_THROW(plan(1), Error);
}

TEST_F(PlanTest, TextAndJsonHoldTheNumbers) {
  const Plan p = plan(2);
  EXPECT_EQ(plan_json(p).at("output_bytes"), p.output_bytes);
  EXPECT_EQ(plan_json(p).at("ranks").size(), 2u);
  EXPECT_EQ(plan_json(p).at("start_bytes"), 35'000'000);
  EXPECT_THAT(plan_text(p, spec_), HasSubstr("each rank takes about 35.0 MB of host memory for itself"));
  EXPECT_THAT(plan_text(p, spec_), HasSubstr("model.safetensors"));
}

// The head [512, 128] packs like a linear: 66.5 * 512 + 512 bytes of g_idx instead of 2 * 512 *
// 128.
constexpr int64_t kHeadBytes = 34048 + 512;

TEST_F(PlanTest, QuantizedHeadByHand) {
  const Plan plain = plan(2);
  options_.quantize.lm_head = true;
  options_.output.shard_size = 100000;
  const Plan p = plan(2);
  EXPECT_EQ(p.output_bytes, plain.output_bytes - kEmbeddingBytes + kHeadBytes);
  EXPECT_EQ(p.source_bytes, plain.source_bytes);
  EXPECT_EQ(p.quantized_weights, plain.quantized_weights + 512 * 128);
  ASSERT_EQ(p.shards.back().key, "head");
  EXPECT_EQ(p.shards.back().rank, 1);
  EXPECT_EQ(p.shards.back().tensor_bytes, kHeadBytes);
  EXPECT_EQ(p.shards.back().tensors.front().name, "lm_head.g_idx");
  EXPECT_GT(p.ranks[1].cost, plain.ranks[1].cost);
}

TEST_F(PlanTest, AWideHeadDecidesTheMemoryOfTheLastRank) {
  options_.quantize.lm_head = true;
  spec_.vocab = 65536;
  spec_.embedding.shape = spec_.head.shape = {65536, 128};
  const Plan p = plan(2);
  EXPECT_EQ(p.ranks[1].peak_at, "head, solve head");
  // F32 and codes of the weight, and a scale and a zero point of each row. Nothing runs it.
  EXPECT_EQ(p.ranks[1].peak[static_cast<size_t>(MemoryKind::kWeights)], 65536 * (128 * (4 + 1) + 8));
  EXPECT_NE(p.ranks[0].peak_at, "head, solve head");
}

std::string refusal(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
    return error.what();
  }
  return "accepted";
}

TEST_F(PlanTest, TiedHeadNeedsUntie) {
  spec_.tied = true;
  spec_.head = spec_.embedding;
  EXPECT_EQ(plan(1).shards.back().key, "norm");
  options_.quantize.lm_head = true;
  EXPECT_THAT(refusal([&] { plan(1); }), HasSubstr("quantize.untie=true"));
  options_.quantize.untie = true;
  const Plan p = plan(1);
  EXPECT_EQ(p.shards.back().tensor_bytes, kHeadBytes);
  EXPECT_EQ(p.shards.front().tensor_bytes, kEmbeddingBytes);  // the float embedding stays
  options_.quantize.lm_head = false;
  EXPECT_THAT(refusal([&] { plan(1); }), HasSubstr("quantize.lm_head=true"));
}

TEST_F(PlanTest, RulesSpeakOfTheHead) {
  options_.quantize.lm_head = true;
  const auto head = [](const std::string& module) { return module == "lm_head"; };
  options_.quantize.rules.push_back({"lm_head bits=8", head, {{"bits", "8"}}});
  EXPECT_EQ(plan(1).shards.back().tensor_bytes, kHeadBytes + 512 * 128 / 2 + 512 / 2);
  options_.quantize.rules = {{"lm_head skip=true", head, {{"skip", "true"}}}};
  EXPECT_EQ(plan(1).output_bytes, 2 * kBlockBytes + 2 * kEmbeddingBytes + 256);
  options_.quantize.rules = {{"lm_head group_size=48", head, {{"group_size", "48"}}}};
  EXPECT_THAT(refusal([&] { plan(1); }), HasSubstr("lm_head"));
}

}  // namespace
}  // namespace bitmill
