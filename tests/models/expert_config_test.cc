// Families with routed experts: what their config.json describes, and what is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "io/json.h"
#include "models/family.h"

namespace bitmill {
namespace {
using ::testing::HasSubstr;

Json qwen() {
  return {{"architectures", {"Qwen3MoeForCausalLM"}},
          {"model_type", "qwen3_moe"},
          {"vocab_size", 100},
          {"hidden_size", 64},
          {"intermediate_size", 96},
          {"num_hidden_layers", 3},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"head_dim", 32},
          {"num_experts", 6},
          {"num_experts_per_tok", 2},
          {"moe_intermediate_size", 16}};
}

Json deepseek() {
  return {{"architectures", {"DeepseekV3ForCausalLM"}},
          {"model_type", "deepseek_v3"},
          {"vocab_size", 100},
          {"hidden_size", 64},
          {"intermediate_size", 96},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 4},
          {"q_lora_rank", 24},
          {"kv_lora_rank", 20},
          {"qk_nope_head_dim", 16},
          {"qk_rope_head_dim", 8},
          {"v_head_dim", 12},
          {"n_routed_experts", 5},
          {"n_shared_experts", 2},
          {"num_experts_per_tok", 3},
          {"moe_intermediate_size", 16},
          {"first_k_dense_replace", 1}};
}

ModelSpec describe(const Json& config) {
  return find_family(config).describe(config);
}

const LinearSpec& linear(const BlockSpec& block, const std::string& end) {
  for (const LinearSpec& linear : block.linears)
    if (linear.module.ends_with(end)) return linear;
  fail(ExitCode::kInternal, "no linear {}", end);
}

void expect_shape(const BlockSpec& block, const std::string& end, int64_t out, int64_t in) {
  EXPECT_EQ(linear(block, end).out, out) << end;
  EXPECT_EQ(linear(block, end).in, in) << end;
}

std::string refusal(const Json& config) {
  try {
    describe(config);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kInput);
    return error.what();
  }
  return "accepted";
}

// Each linear is in exactly one cut, and reads what the cut says.
void expect_whole(const BlockSpec& block) {
  std::vector<int> seen(block.linears.size(), 0);
  for (const CutSpec& cut : block.cuts)
    for (int index : cut.linears) {
      ++seen.at(static_cast<size_t>(index));
      EXPECT_EQ(block.linears[static_cast<size_t>(index)].in, cut.in) << cut.name;
    }
  EXPECT_THAT(seen, ::testing::Each(1));
}

TEST(Qwen3Moe, ABlockOfExperts) {
  const ModelSpec spec = describe(qwen());
  ASSERT_EQ(spec.blocks.size(), 3u);
  const BlockSpec& block = spec.blocks[1];
  expect_whole(block);
  EXPECT_EQ(block.linears.size(), 4u + 6 * 3);
  EXPECT_EQ(block.cuts.size(), 2u + 6 * 2);
  expect_shape(block, "layers.1.self_attn.k_proj", 64, 64);
  expect_shape(block, "layers.1.mlp.experts.5.up_proj", 16, 64);
  expect_shape(block, "layers.1.mlp.experts.5.down_proj", 64, 16);
  EXPECT_EQ(block.norms.back().name, "model.layers.1.mlp.gate.weight");
  EXPECT_EQ(block.norms.back().shape, (Shape{6, 64}));
  EXPECT_EQ(block.cuts[1].expert, -1);
  EXPECT_EQ(block.cuts[1].token_share, 1);
  EXPECT_EQ(block.cuts.back().expert, 5);
  EXPECT_DOUBLE_EQ(block.cuts.back().token_share, 2.0 / 6);
  EXPECT_TRUE(block.cuts.back().adds_to_hidden);
}

TEST(Qwen3Moe, DenseBlocksAreListedOrBetweenSparseSteps) {
  Json config = qwen();
  config["mlp_only_layers"] = {1};
  EXPECT_EQ(describe(config).blocks[0].linears.size(), 22u);
  EXPECT_EQ(describe(config).blocks[1].linears.size(), 7u);
  config["mlp_only_layers"] = Json::array();
  config["decoder_sparse_step"] = 2;  // blocks 1, 3, ...
  EXPECT_EQ(describe(config).blocks[0].linears.size(), 7u);
  EXPECT_EQ(describe(config).blocks[1].linears.size(), 22u);
  EXPECT_EQ(describe(config).blocks[2].linears.size(), 7u);
}

TEST(DeepseekV3, LatentAttention) {
  const ModelSpec spec = describe(deepseek());
  for (const BlockSpec& block : spec.blocks) {
    expect_whole(block);
    expect_shape(block, "self_attn.q_a_proj", 24, 64);
    expect_shape(block, "self_attn.kv_a_proj_with_mqa", 20 + 8, 64);
    expect_shape(block, "self_attn.q_b_proj", 4 * (16 + 8), 24);
    expect_shape(block, "self_attn.kv_b_proj", 4 * (16 + 12), 20);
    expect_shape(block, "self_attn.o_proj", 64, 4 * 12);
  }
  EXPECT_EQ(spec.head_dim, 24);
  EXPECT_EQ(spec.value_dim, 12);
  EXPECT_EQ(spec.rope.dims, 8);
}

TEST(DeepseekV3, DenseBlocksThenSharedAndRoutedExperts) {
  const ModelSpec spec = describe(deepseek());
  expect_shape(spec.blocks[0], "mlp.gate_proj", 96, 64);
  EXPECT_EQ(spec.blocks[0].linears.size(), 8u);
  EXPECT_EQ(spec.blocks[1].linears.size(), 5u + 3 + 5 * 3);
  expect_shape(spec.blocks[1], "mlp.shared_experts.down_proj", 64, 2 * 16);
  expect_shape(spec.blocks[1], "mlp.experts.4.gate_proj", 16, 64);
  EXPECT_DOUBLE_EQ(spec.blocks[1].cuts.back().token_share, 3.0 / 5);
}

TEST(DeepseekV3, WithoutALatentOfQ) {
  Json config = deepseek();
  config["q_lora_rank"] = nullptr;
  const BlockSpec block = describe(config).blocks[0];
  expect_whole(block);
  expect_shape(block, "self_attn.q_proj", 4 * (16 + 8), 64);
  EXPECT_EQ(block.cuts[0].linears.size(), 2u);
}

TEST(Experts, ContradictionsAreRefused) {
  Json config = qwen();
  config["num_experts_per_tok"] = 7;
  EXPECT_THAT(refusal(config),
              HasSubstr("num_experts_per_tok is 7, expected at most num_experts 6"));
  config = deepseek();
  config["n_routed_experts"] = 600000;
  EXPECT_THAT(refusal(config), HasSubstr("n_routed_experts 600000"));
  config.erase("n_routed_experts");
  EXPECT_THAT(refusal(config), HasSubstr("n_routed_experts"));
  config = qwen();
  config["mlp_only_layers"] = {"first"};
  EXPECT_THAT(refusal(config), HasSubstr("mlp_only_layers"));
}

TEST(Experts, KimiIsDeepseekByArchitecture) {
  Json config = deepseek();
  config["model_type"] = "kimi_k2";
  EXPECT_EQ(find_family(config).name(), "deepseek_v3");
}

TEST(Experts, NoGraph) {
  for (const Json& config : {qwen(), deepseek()}) {
    const ModelFamily& family = find_family(config);
    EXPECT_THROW(family.graph(family.describe(config), 0, TensorView()), Error);
  }
}

}  // namespace
}  // namespace bitmill
