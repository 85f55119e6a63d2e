// The GPTQ config text and its inverse: what loaders find and what bitmill reads back from it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "formats/module_names.h"
#include "formats/quantized_fixture.h"
#include "io/json.h"

namespace bitmill {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::thrown;

constexpr const char* kInner[] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                  "self_attn.o_proj", "mlp.gate_proj",    "mlp.up_proj",
                                  "mlp.down_proj"};

std::vector<ModuleChoice> two_blocks() {
  std::vector<ModuleChoice> modules;
  for (int block = 0; block < 2; ++block)
    for (const char* inner : kInner) {
      ModuleChoice choice;
      choice.module = "model.layers." + std::to_string(block) + "." + inner;
      choice.bits = 4;
      choice.group_size = 128;
      modules.push_back(choice);
    }
  ModuleChoice head;
  head.module = "lm_head";
  head.quantized = false;
  modules.push_back(head);
  return modules;
}

void for_inner(std::vector<ModuleChoice>& modules, const std::string& inner,
               const std::function<void(ModuleChoice&)>& change) {
  for (ModuleChoice& module : modules)
    if (module.module.ends_with(inner)) change(module);
}

Json config_of(const std::string& format, const std::vector<ModuleChoice>& modules,
               const RunOptions::Quantize& settings = {}) {
  return Json::parse(find_format(format).config(settings, modules).quantization_config.dump());
}

TEST(ModuleNames, ParseFindsTheBlock) {
  const ModuleName name = parse_module("model.layers.12.mlp.experts.3.down_proj");
  EXPECT_EQ(name.prefix, "model.layers.");
  EXPECT_EQ(name.block, 12);
  EXPECT_EQ(name.inner, "mlp.experts.3.down_proj");
  EXPECT_EQ(parse_module("lm_head").block, -1);
  EXPECT_EQ(parse_module("model.layers.3").block, -1);
}

TEST(ModuleNames, FusedNames) {
  EXPECT_EQ(fused_name("self_attn.k_proj"), "self_attn.qkv_proj");
  EXPECT_EQ(fused_name("mlp.up_proj"), "mlp.gate_up_proj");
  EXPECT_EQ(fused_name("mlp.down_proj"), "mlp.down_proj");
}

TEST(GptqConfig, HasTheKeysThatLoadersInsistOn) {
  const FormatConfig text = find_format("gptq").config({}, two_blocks());
  const Json config = Json::parse(text.quantization_config.dump());
  EXPECT_EQ(config["quant_method"], "gptq");
  EXPECT_EQ(config["bits"], 4);
  EXPECT_EQ(config["group_size"], 128);
  EXPECT_EQ(config["desc_act"], false);
  EXPECT_EQ(config["sym"], true);
  EXPECT_EQ(config["lm_head"], false);
  EXPECT_EQ(config["checkpoint_format"], "gptq");
  EXPECT_EQ(config["format"], "gptq");
  EXPECT_EQ(config["pack_dtype"], "int32");
  EXPECT_EQ(config["modules_in_block_to_quantize"],
            Json::parse(
                R"([["self_attn.q_proj","self_attn.k_proj","self_attn.v_proj"],["self_attn.o_proj"],
                            ["mlp.gate_proj","mlp.up_proj"],["mlp.down_proj"]])"));
  EXPECT_FALSE(config.contains("dynamic"));
  EXPECT_THAT(config["meta"]["quantizer"][0].get<std::string>(), HasSubstr("bitmill:"));
  ASSERT_EQ(text.files.size(), 1u);
  EXPECT_EQ(text.files[0].first, "quantize_config.json");
  EXPECT_EQ(Json::parse(text.files[0].second), config);
  EXPECT_THAT(find_format("gptq").config_violations(config, two_blocks()), IsEmpty());
}

TEST(GptqConfig, DampOutsideZeroToOneIsNotOffered) {
  RunOptions::Quantize settings;
  settings.damp = 0;  // loaders refuse a config that says so
  EXPECT_FALSE(config_of("gptq", two_blocks(), settings).contains("damp_percent"));
}

TEST(GptqConfig, DynamicOrderIsDescAct) {
  std::vector<ModuleChoice> modules = two_blocks();
  modules[3].act_order = ActOrder::kDynamic;
  EXPECT_EQ(config_of("gptq", modules)["desc_act"], true);
}

TEST(GptqConfig, FloatLinearsAreSkippedInBothSpellingsAndUnlisted) {
  std::vector<ModuleChoice> modules = two_blocks();
  for (const char* inner : {"q_proj", "k_proj", "v_proj", "down_proj"})
    for_inner(modules, inner, [](ModuleChoice& m) { m.quantized = false; });
  const OutputFormat& format = find_format("gptq_v2");
  EXPECT_NO_THROW(format.check_model(modules));
  const Json config = config_of("gptq_v2", modules);
  EXPECT_TRUE(config["dynamic"].contains(R"(-:^model\.layers\.\d+\.self_attn\.q_proj$)"));
  EXPECT_TRUE(config["dynamic"].contains(R"(-:^model\.layers\.\d+\.self_attn\.qkv_proj$)"));
  EXPECT_TRUE(config["dynamic"].contains(R"(-:^model\.layers\.\d+\.mlp\.down_proj$)"));
  EXPECT_EQ(config["modules_in_block_to_quantize"],
            Json::parse(R"([["self_attn.o_proj"],["mlp.gate_proj","mlp.up_proj"]])"));
  EXPECT_FALSE(format.configured(config, "model.layers.1.mlp.down_proj").quantized);
  EXPECT_TRUE(format.configured(config, "model.layers.1.mlp.up_proj").quantized);
  EXPECT_THAT(format.config_violations(config, modules), IsEmpty());
}

TEST(GptqConfig, OwnBitsBecomeOverrides) {
  std::vector<ModuleChoice> modules = two_blocks();
  for_inner(modules, "0.mlp.down_proj", [](ModuleChoice& m) { m.bits = 8, m.group_size = 32; });
  const OutputFormat& format = find_format("gptq");
  EXPECT_NO_THROW(format.check_model(modules));
  const Json config = config_of("gptq", modules);
  EXPECT_EQ(config["dynamic"],
            Json::parse(
                R"({"+:^model\\.layers\\.0\\.mlp\\.down_proj$": {"bits": 8, "group_size": 32}})"));
  EXPECT_EQ(format.configured(config, "model.layers.0.mlp.down_proj").bits, 8);
  EXPECT_EQ(format.configured(config, "model.layers.0.mlp.down_proj").group_size, 32);
  EXPECT_EQ(format.configured(config, "model.layers.1.mlp.down_proj").bits, 4);
  EXPECT_THAT(format.config_violations(config, modules), IsEmpty());
}

TEST(GptqConfig, BaseIsWhatMostModulesHave) {
  std::vector<ModuleChoice> modules = two_blocks();
  for (ModuleChoice& module : modules) module.bits = 3;
  for_inner(modules, "o_proj", [](ModuleChoice& m) { m.bits = 4; });
  const Json config = config_of("gptq", modules);
  EXPECT_EQ(config["bits"], 3);
  EXPECT_EQ(config["dynamic"].size(), 1u);
}

TEST(GptqCheckModel, RefusesWhatEnginesCannotLoad) {
  std::vector<ModuleChoice> modules = two_blocks();
  for_inner(modules, "1.mlp.down_proj", [](ModuleChoice& m) { m.quantized = false; });
  auto [code, text] = thrown([&] { find_format("gptq").check_model(modules); });
  EXPECT_EQ(code, ExitCode::kUsage);
  EXPECT_THAT(text, HasSubstr("mlp.down_proj must be float in every block or in none"));

  modules = two_blocks();
  for_inner(modules, "0.self_attn.k_proj", [](ModuleChoice& m) { m.bits = 8; });
  for (const char* format : {"gptq", "compressed-tensors"}) {
    std::tie(code, text) = thrown([&] { find_format(format).check_model(modules); });
    EXPECT_EQ(code, ExitCode::kUsage);
    EXPECT_THAT(text,
                HasSubstr("0.self_attn.q_proj and model.layers.0.self_attn.k_proj as one matrix"));
  }

  modules = two_blocks();
  for_inner(modules, "o_proj", [](ModuleChoice& m) { m.symmetric = false; });
  std::tie(code, text) = thrown([&] { find_format("gptq_v2").check_model(modules); });
  EXPECT_EQ(code, ExitCode::kUsage);
  EXPECT_THAT(text, HasSubstr("one quantize.symmetric"));
}

TEST(GptqConfigured, ReadsForeignFiles) {
  const OutputFormat& format = find_format("gptq");
  const auto at = [&](const char* text) {
    return format.configured(Json::parse(text), "model.layers.0.mlp.up_proj");
  };
  EXPECT_TRUE(at(R"({"bits": 4, "group_size": -1})").symmetric);
  EXPECT_EQ(at(R"({"bits": 4, "group_size": 64, "dynamic": {".*up_proj": {"bits": 8}}})").bits, 8);
  EXPECT_FALSE(
      at(R"({"bits": 4, "group_size": 64, "modules_in_block_to_quantize": ["mlp.down_proj"]})")
          .quantized);
  EXPECT_EQ(thrown([&] { at(R"({"group_size": 64})"); }).first, ExitCode::kInput);
  EXPECT_EQ(thrown([&] { at(R"({"bits": 5, "group_size": 64})"); }).first, ExitCode::kInput);
  EXPECT_EQ(thrown([&] { at(R"({"bits": 4, "group_size": 0})"); }).first, ExitCode::kInput);
  EXPECT_EQ(thrown([&] { at(R"({"bits": 4, "group_size": 64, "dynamic": {"-:(": {}}})"); }).first,
            ExitCode::kInput);
}

TEST(GptqConfigViolations, EachBrokenKeyIsNamed) {
  const OutputFormat& format = find_format("gptq");
  const Json good = config_of("gptq", two_blocks());
  const auto broken = [&](const char* key, const Json& value) {
    Json config = good;
    if (value.is_null())
      config.erase(key);
    else
      config[key] = value;
    const auto found = format.config_violations(config, two_blocks());
    return found.empty() ? std::string() : found.front();
  };
  EXPECT_THAT(broken("sym", nullptr), HasSubstr("sym"));
  EXPECT_THAT(broken("desc_act", 0), HasSubstr("desc_act"));
  EXPECT_THAT(broken("checkpoint_format", "gptq_v2"), HasSubstr("checkpoint_format"));
  EXPECT_THAT(broken("bits", 8), HasSubstr("4 bits"));
  EXPECT_THAT(broken("is_marlin_format", true), HasSubstr("is_marlin_format"));
  EXPECT_THAT(broken("dynamic", Json{{"-:.*down_proj", Json::object()}}), HasSubstr("float"));
}

TEST(GptqConfig, QuantizedHead) {
  std::vector<ModuleChoice> modules = two_blocks();
  ModuleChoice& head = modules.back();
  head.quantized = true;
  head.bits = 4;
  head.group_size = 128;
  for (int bits : {4, 8}) {
    head.bits = bits;
    const Json config = config_of("gptq", modules);
    EXPECT_EQ(config["lm_head"], true);
    EXPECT_EQ(config["modules_in_block_to_quantize"].dump().find("lm_head"), std::string::npos);
    EXPECT_EQ(config.contains("dynamic"), bits == 8)
        << "only a head with another scheme needs a rule";
    const ModuleChoice says = find_format("gptq").configured(config, "lm_head");
    EXPECT_TRUE(says.quantized);
    EXPECT_EQ(says.bits, bits);
    EXPECT_TRUE(find_format("gptq").config_violations(config, modules).empty());
  }
}

}  // namespace
}  // namespace bitmill
