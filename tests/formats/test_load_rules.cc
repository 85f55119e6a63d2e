// Tensor-parallel load rules, on shapes where the arithmetic can be followed by hand.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "formats/format.h"

namespace bitmill {
namespace {

using ::testing::HasSubstr;

ModelSpec model(int64_t hidden, int64_t intermediate, int64_t kv_heads, int64_t head_dim) {
  ModelSpec spec;
  spec.kv_heads = kv_heads;
  spec.head_dim = head_dim;
  BlockSpec block;
  const int64_t kv = kv_heads * head_dim;
  block.linears = {{"model.layers.0.self_attn.q_proj", hidden, hidden, false},
                   {"model.layers.0.self_attn.k_proj", kv, hidden, false},
                   {"model.layers.0.self_attn.v_proj", kv, hidden, false},
                   {"model.layers.0.self_attn.o_proj", hidden, hidden, false},
                   {"model.layers.0.mlp.gate_proj", intermediate, hidden, false},
                   {"model.layers.0.mlp.up_proj", intermediate, hidden, false},
                   {"model.layers.0.mlp.down_proj", hidden, intermediate, false}};
  spec.blocks = {block};
  return spec;
}

std::vector<LoadWarning> check(const ModelSpec& spec, const std::string& format, int bits,
                               int64_t group_size, bool symmetric = true) {
  std::vector<ModuleChoice> modules;
  for (const LinearSpec& linear : spec.blocks[0].linears) {
    ModuleChoice choice;
    choice.module = linear.module;
    choice.bits = bits;
    choice.group_size = group_size;
    choice.symmetric = symmetric;
    modules.push_back(choice);
  }
  return check_load(spec, find_format(format), modules);
}

std::string text_of(const std::vector<LoadWarning>& warnings, int parallel) {
  std::string text;
  for (const LoadWarning& w : warnings)
    if (w.tensor_parallel == parallel) text += w.module + ": " + w.reason + "\n";
  return text;
}

TEST(LoadRules, ALargeModelLoadsEverywhere) {
  for (const char* format : {"gptq", "compressed-tensors", "awq"})
    EXPECT_TRUE(check(model(8192, 28672, 8, 128), format, 4, 128).empty());
}

TEST(LoadRules, AGroupMustNotStraddleTheSplit) {
  // Llama-7B: 11008 / 8 = 1376 = 10.75 groups of 128, also no multiple of 128; 11008 / 4 = 2752
  // = 21.5 groups.
  const auto warnings = check(model(4096, 11008, 32, 128), "gptq", 4, 128);
  EXPECT_EQ(text_of(warnings, 1), "");
  EXPECT_EQ(text_of(warnings, 2), "");
  EXPECT_THAT(text_of(warnings, 4),
              HasSubstr("down_proj: a group of 128 columns straddles the split: 2752 columns"));
  EXPECT_THAT(text_of(warnings, 8), HasSubstr("1376 columns per rank"));
  EXPECT_EQ(text_of(check(model(4096, 11008, 32, 128), "gptq", 4, -1), 8).find("straddles"),
            std::string::npos);
}

TEST(LoadRules, OneWarningPerSplitAndReason) {
  int straddling = 0;
  for (const LoadWarning& w : check(model(256, 512, 2, 64), "gptq", 4, 128))
    if (w.tensor_parallel == 8 && w.reason.find("straddles") != std::string::npos) ++straddling;
  EXPECT_EQ(straddling, 1);
}

TEST(LoadRules, KeysAndValuesAreReplicatedBeyondTheirHeads) {
  // One kv head of 128: k_proj keeps 128 rows at any split, so only other rules may speak.
  EXPECT_TRUE(check(model(8192, 28672, 1, 128), "gptq", 4, 128).empty());
}

TEST(LoadRules, SchemesThatAnEngineHasNoKernelFor) {
  const ModelSpec spec = model(8192, 28672, 8, 128);
  EXPECT_THAT(text_of(check(spec, "gptq", 3, 128), 1),
              HasSubstr("vLLM reads gptq only with 4 or 8 bits"));
  EXPECT_THAT(text_of(check(spec, "gptq_v2", 4, 128, false), 1), HasSubstr("symmetric=true"));
  EXPECT_EQ(text_of(check(spec, "compressed-tensors", 4, 128, false), 1), "");
  EXPECT_EQ(text_of(check(spec, "awq", 4, 128, false), 1), "");
  EXPECT_THAT(text_of(check(spec, "compressed-tensors", 2, 128, false), 1),
              HasSubstr("4 or 8 bits"));
  EXPECT_THAT(text_of(check(spec, "gptq", 4, 256), 1), HasSubstr("group_size=256"));
}

TEST(LoadRules, ScatteredGroups) {
  const ModelSpec spec = model(8192, 28672, 8, 128);
  ModuleChoice choice;
  choice.module = spec.blocks[0].linears[0].module;
  choice.bits = 4;
  choice.group_size = 128;
  choice.act_order = ActOrder::kDynamic;
  EXPECT_THAT(text_of(check_load(spec, find_format("gptq"), {choice}), 1),
              HasSubstr("vLLM refuses desc_act=true with groups"));
  choice.group_size = -1;  // one group per row: nothing is scattered
  EXPECT_EQ(text_of(check_load(spec, find_format("gptq"), {choice}), 1), "");
}

TEST(LoadRules, DimensionsThatDoNotDivide) {
  EXPECT_THAT(text_of(check(model(8192, 28672 + 64 * 3, 8, 128), "gptq", 4, 64), 8),
              HasSubstr("gate_proj: 3608 output rows per rank are no multiple of 64"));
  EXPECT_THAT(text_of(check(model(8196, 28672, 8, 128), "gptq", 4, -1), 8),
              HasSubstr("do not divide by 8"));
}

TEST(LoadRules, AQuantizedHeadIsNamed) {
  ModelSpec spec = model(4096, 12288, 8, 128);
  spec.vocab = 32000;
  spec.hidden = 4096;
  const std::vector<ModuleChoice> modules = {{"lm_head", true, 4, 128, true}};
  for (const char* format : {"gptq", "compressed-tensors"}) {
    const auto warnings = check_load(spec, find_format(format), modules);
    EXPECT_THAT(text_of(warnings, 1), HasSubstr("lm_head: "));
    // 32000 / 8 = 4000 rows: no multiple of 64.
    EXPECT_THAT(text_of(warnings, 8), HasSubstr("lm_head: 4000 output rows"));
  }
  EXPECT_TRUE(check_load(spec, find_format("gptq"), {{"lm_head", false, 0, 0, true}}).empty());
}

}  // namespace
}  // namespace bitmill
