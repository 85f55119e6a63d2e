// What each family reads from config.json, and what it refuses.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "models/family.h"
#include "io/json.h"

namespace bitmill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

Json llama() {
  return Json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
    "max_position_embeddings": 128, "rms_norm_eps": 1e-05, "rope_theta": 500000.0
  })");
}

Json of(const char* architecture, const char* model_type) {
  Json config = llama();
  config["architectures"] = {architecture};
  config["model_type"] = model_type;
  return config;
}

ModelSpec describe(const Json& config) {
  return find_family(config).describe(config);
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

std::vector<int64_t> windows(const ModelSpec& spec) {
  std::vector<int64_t> all;
  for (const BlockSpec& block : spec.blocks) all.push_back(block.sliding_window);
  return all;
}

TEST(FindFamily, ByArchitectureOrModelType) {
  EXPECT_EQ(find_family(llama()).name(), "llama");
  EXPECT_EQ(find_family(of("MistralForCausalLM", "mistral")).name(), "mistral");
  EXPECT_EQ(find_family(of("Qwen2ForCausalLM", "qwen2")).name(), "qwen2");
  EXPECT_EQ(find_family(Json{{"model_type", "qwen3"}}).name(), "qwen3");
}

TEST(FindFamily, UnknownListsTheKnown) {
  EXPECT_EQ(refusal(of("FalconForCausalLM", "falcon")),
            "unknown model family: architecture \"FalconForCausalLM\", model_type \"falcon\"; "
            "known families: llama, mistral, qwen2, qwen3, qwen3_moe, deepseek_v3");
  // A sequence classifier has a llama's blocks, but no language model head.
  EXPECT_THAT(refusal(of("LlamaForSequenceClassification", "llama")),
              HasSubstr("unknown model family"));
  EXPECT_EQ(refusal(Json::object()), "config.json has neither architectures nor model_type");
}

TEST(Describe, LlamaSpec) {
  const ModelSpec spec = describe(llama());
  EXPECT_EQ(spec.family, "llama");
  EXPECT_EQ(spec.dtype, DType::kBF16);
  EXPECT_EQ(spec.head_dim, 32);
  EXPECT_EQ(spec.kv_heads, 2);
  EXPECT_FLOAT_EQ(spec.attention_scale, 0.1767767f);
  EXPECT_FLOAT_EQ(spec.norm_eps, 1e-5f);
  EXPECT_EQ(spec.rope.theta, 500000);
  EXPECT_FALSE(spec.tied);
  EXPECT_EQ(spec.head.name, "lm_head.weight");
  EXPECT_EQ(spec.head.shape, (Shape{512, 128}));
  ASSERT_EQ(spec.blocks.size(), 3u);
  const BlockSpec& block = spec.blocks[2];
  EXPECT_EQ(block.index, 2);
  ASSERT_EQ(block.linears.size(), 7u);
  EXPECT_EQ(block.linears[1].weight_name(), "model.layers.2.self_attn.k_proj.weight");
  EXPECT_EQ(block.linears[1].out, 64);
  EXPECT_EQ(block.linears[1].in, 128);
  EXPECT_EQ(block.linears[6].module, "model.layers.2.mlp.down_proj");
  EXPECT_EQ(block.linears[6].in, 256);
  for (const LinearSpec& linear : block.linears) EXPECT_FALSE(linear.bias) << linear.module;
  EXPECT_THAT(windows(spec), ElementsAre(0, 0, 0));
}

TEST(Describe, CutsCoverEveryLinearOnce) {
  const ModelSpec spec = describe(llama());
  const auto& cuts = spec.blocks[0].cuts;
  ASSERT_EQ(cuts.size(), 4u);
  EXPECT_EQ(cuts[0].name, "qkv");
  EXPECT_THAT(cuts[0].linears, ElementsAre(0, 1, 2));
  EXPECT_EQ(cuts[1].name, "o");
  EXPECT_THAT(cuts[1].linears, ElementsAre(3));
  EXPECT_EQ(cuts[2].name, "gate_up");
  EXPECT_THAT(cuts[2].linears, ElementsAre(4, 5));
  EXPECT_EQ(cuts[3].name, "down");
  EXPECT_THAT(cuts[3].linears, ElementsAre(6));
  for (const CutSpec& cut : cuts)
    for (int linear : cut.linears) EXPECT_EQ(spec.blocks[0].linears[linear].in, cut.in);
}

TEST(Describe, DefaultsAndNulls) {
  Json config = llama();
  config.erase("num_key_value_heads");
  config.erase("torch_dtype");
  config.erase("rms_norm_eps");
  config["head_dim"] = nullptr;
  config["dtype"] = "float16";
  const ModelSpec spec = describe(config);
  EXPECT_EQ(spec.kv_heads, 4);
  EXPECT_EQ(spec.head_dim, 32);
  EXPECT_EQ(spec.dtype, DType::kF16);
  EXPECT_FLOAT_EQ(spec.norm_eps, 1e-6f);
}

// The defaults of the families' own configuration classes.
TEST(Describe, HeadsOfKeysAndValues) {
  struct Case {
    const char *architecture, *model_type;
    int64_t absent;
  };
  for (const Case& c : {Case{"LlamaForCausalLM", "llama", 64}, Case{"MistralForCausalLM", "mistral", 8},
                        Case{"Qwen2ForCausalLM", "qwen2", 32}, Case{"Qwen3ForCausalLM", "qwen3", 32}}) {
    Json config = of(c.architecture, c.model_type);
    config["hidden_size"] = 4096;
    config["num_attention_heads"] = 64;
    EXPECT_EQ(describe(config).kv_heads, 2) << c.model_type;
    config["num_key_value_heads"] = nullptr;
    EXPECT_EQ(describe(config).kv_heads, 64) << c.model_type;
    config.erase("num_key_value_heads");
    EXPECT_EQ(describe(config).kv_heads, c.absent) << c.model_type;
  }
  Json small = of("MistralForCausalLM", "mistral");
  small.erase("num_key_value_heads");
  EXPECT_THAT(refusal(small), HasSubstr("num_key_value_heads 8 (the family's default) does not divide "
                                        "num_attention_heads 4"));
}

TEST(Describe, DtypeIsGivenInEitherSpellingOrNotAtAll) {
  Json config = llama();
  EXPECT_TRUE(describe(config).dtype_given);
  config.erase("torch_dtype");
  EXPECT_EQ(describe(config).dtype, DType::kF32);
  EXPECT_FALSE(describe(config).dtype_given);
  config["dtype"] = nullptr;
  EXPECT_FALSE(describe(config).dtype_given);
  config["dtype"] = "float32";
  EXPECT_TRUE(describe(config).dtype_given);
}

TEST(Describe, FamilyDefaultsOfAbsentKeys) {
  struct Case {
    const char *architecture, *model_type;
    int64_t max_positions;
  };
  for (const Case& item : {Case{"LlamaForCausalLM", "llama", 2048},
                           Case{"MistralForCausalLM", "mistral", 131072},
                           Case{"Qwen2ForCausalLM", "qwen2", 32768},
                           Case{"Qwen3ForCausalLM", "qwen3", 32768}}) {
    Json config = of(item.architecture, item.model_type);
    for (const char* key : {"max_position_embeddings", "rms_norm_eps", "rope_theta"})
      config.erase(key);
    const ModelSpec spec = describe(config);
    EXPECT_EQ(spec.max_positions, item.max_positions) << item.model_type;
    EXPECT_EQ(spec.rope.max_positions, item.max_positions) << item.model_type;
    EXPECT_FLOAT_EQ(spec.norm_eps, 1e-6f) << item.model_type;
    EXPECT_EQ(spec.rope.theta, 10000) << item.model_type;
  }
}

TEST(Describe, LlamaBiases) {
  Json config = llama();
  config["attention_bias"] = true;
  for (int i = 0; i < 7; ++i) EXPECT_EQ(describe(config).blocks[0].linears[i].bias, i < 4) << i;
  config["mlp_bias"] = true;
  for (int i = 0; i < 7; ++i) EXPECT_TRUE(describe(config).blocks[0].linears[i].bias) << i;
}

TEST(Describe, TiedHeadIsTheEmbedding) {
  Json config = llama();
  config["tie_word_embeddings"] = true;
  EXPECT_EQ(describe(config).head.name, "model.embed_tokens.weight");
}

TEST(Describe, MistralWindowIsNullableAndHoldsForAllBlocks) {
  Json config = of("MistralForCausalLM", "mistral");
  config["head_dim"] = 64;
  EXPECT_THAT(windows(describe(config)), ElementsAre(4096, 4096, 4096));
  config["sliding_window"] = nullptr;
  EXPECT_THAT(windows(describe(config)), ElementsAre(0, 0, 0));
  config["sliding_window"] = 12;
  EXPECT_THAT(windows(describe(config)), ElementsAre(12, 12, 12));
  config["layer_types"] = {"full_attention", "sliding_attention", "full_attention"};
  EXPECT_THAT(windows(describe(config)), ElementsAre(0, 12, 0));
  EXPECT_EQ(describe(config).blocks[0].linears[3].in, 256);  // heads * head_dim, not hidden
}

TEST(Describe, Qwen2WindowsAndBiases) {
  Json config = of("Qwen2ForCausalLM", "qwen2");
  config["sliding_window"] = 16;
  config["max_window_layers"] = 1;
  EXPECT_THAT(windows(describe(config)), ElementsAre(0, 0, 0));
  config["use_sliding_window"] = true;
  EXPECT_THAT(windows(describe(config)), ElementsAre(0, 16, 16));
  config["max_window_layers"] = 0;
  EXPECT_THAT(windows(describe(config)), ElementsAre(16, 16, 16));
  config["layer_types"] = {"sliding_attention", "full_attention", "full_attention"};
  EXPECT_THAT(windows(describe(config)), ElementsAre(16, 0, 0));
  for (int i = 0; i < 7; ++i) EXPECT_EQ(describe(config).blocks[0].linears[i].bias, i < 3) << i;
}

TEST(Describe, QwenWindowDefaults) {
  for (const Json& base : {of("Qwen2ForCausalLM", "qwen2"), of("Qwen3ForCausalLM", "qwen3")}) {
    Json config = base;
    config["num_hidden_layers"] = 30;
    config["sliding_window"] = 16;
    config["use_sliding_window"] = true;  // max_window_layers absent: 28
    std::vector<int64_t> expected(30, 0);
    expected[28] = expected[29] = 16;
    EXPECT_EQ(windows(describe(config)), expected);
    config.erase("sliding_window");
    expected[28] = expected[29] = 4096;
    EXPECT_EQ(windows(describe(config)), expected);
    config["sliding_window"] = nullptr;
    EXPECT_EQ(windows(describe(config)), std::vector<int64_t>(30, 0));
    config.erase("sliding_window");
    config["use_sliding_window"] = false;
    EXPECT_EQ(windows(describe(config)), std::vector<int64_t>(30, 0));
  }
}

TEST(Describe, Qwen3NormsAndHeadDim) {
  const ModelSpec spec = describe(of("Qwen3ForCausalLM", "qwen3"));
  EXPECT_EQ(spec.head_dim, 128);
  EXPECT_TRUE(spec.qk_norm);
  ASSERT_EQ(spec.blocks[1].norms.size(), 4u);
  EXPECT_EQ(spec.blocks[1].norms[3].name, "model.layers.1.self_attn.k_norm.weight");
  EXPECT_EQ(spec.blocks[1].norms[3].shape, (Shape{128}));
}

TEST(Describe, MissingKeysAreNamed) {
  for (const char* key : {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                          "num_attention_heads"}) {
    Json config = llama();
    config.erase(key);
    EXPECT_EQ(refusal(config), std::string("config.json: the key ") + key + " is missing");
  }
}

TEST(Describe, NonsenseIsRefused) {
  struct Case {
    const char* key;
    Json value;
    const char* message;
  };
  const Case cases[] = {
      {"hidden_size", "128", "hidden_size is \"128\", expected a positive whole number"},
      {"hidden_size", 0, "hidden_size is 0, expected a positive whole number"},
      {"hidden_size", -128, "hidden_size is -128"},
      {"hidden_size", 128.5, "hidden_size is 128.5"},
      {"vocab_size", 18446744073709551615u, "vocab_size is 18446744073709551615"},
      {"num_hidden_layers", 1000000, "num_hidden_layers is 1000000, expected at most 10000"},
      {"num_attention_heads", 6, "num_attention_heads 6 does not divide hidden_size 128"},
      {"num_key_value_heads", 3, "num_key_value_heads 3 does not divide num_attention_heads 4"},
      {"rms_norm_eps", 0, "rms_norm_eps is 0, expected a positive number"},
      {"hidden_act", "mish", "hidden_act is \"mish\"; known: silu"},
      {"hidden_act", 1, "hidden_act is 1, expected a string"},
      {"torch_dtype", "float64", "torch_dtype is \"float64\"; supported: bfloat16"},
      {"tie_word_embeddings", "yes", "tie_word_embeddings is \"yes\", expected true or false"},
      {"attention_bias", 1, "attention_bias is 1, expected true or false"},
      {"head_dim", 33, "rotates 33 dims"},
      {"architectures", "LlamaForCausalLM", "expected a list of strings"},
      {"model_type", 3, "model_type is 3, expected a string"},
  };
  for (const Case& item : cases) {
    Json config = llama();
    config[item.key] = item.value;
    EXPECT_THAT(refusal(config), HasSubstr(item.message));
  }
}

TEST(Describe, LayerTypesAreChecked) {
  Json config = of("MistralForCausalLM", "mistral");
  config["layer_types"] = {"full_attention"};
  EXPECT_THAT(refusal(config),
              HasSubstr("layer_types has 1 entries, expected num_hidden_layers 3"));
  config["layer_types"] = {"full_attention", "full_attention", "sliding_attention"};
  EXPECT_THAT(windows(describe(config)), ElementsAre(0, 0, 4096));
  config["sliding_window"] = nullptr;
  EXPECT_THAT(refusal(config), HasSubstr("but sliding_window is off"));
  config["layer_types"] = {"full_attention", "full_attention", "chunked_attention"};
  EXPECT_THAT(refusal(config), HasSubstr("layer_types holds \"chunked_attention\""));
}

TEST(Describe, RejectsOtherThanObjects) {
  EXPECT_EQ(refusal(Json::array()), "config.json: the whole file is [], expected an object");
}

}  // namespace
}  // namespace bitmill
