// Words, names, refusals and config text of AWQ gemm.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "formats/quantized_fixture.h"
#include "io/json.h"

namespace bitmill {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::random_quantized;
using testing::tensor_named;
using testing::thrown;
using testing::word;

const OutputFormat& format() {
  return find_format("awq");
}

std::vector<NamedTensor> pack(const QuantizedLinear& q, TensorView bias = {}) {
  return format().pack({"m", q.out(), q.in(), bias.data != nullptr}, q, bias);
}

// Output rows 0..7 in the order 0 2 4 6 1 3 5 7 from the lowest nibble: 0x75316420.
TEST(Awq, WordsOfTheFormatPage) {
  QuantizedLinear q = random_quantized(16, 32, {.group_size = 16, .symmetric = false});
  for (int64_t o = 0; o < 16; ++o)
    for (int64_t i = 0; i < 32; ++i)
      q.codes.as<uint8_t>()[o * 32 + i] = static_cast<uint8_t>(o % 8);
  q.codes.as<uint8_t>()[9 * 32 + 3] = 15;  // row 9, column 3: word row 3, word 1, nibble 4
  for (int64_t o = 0; o < 16; ++o) {
    q.zeros.as<uint8_t>()[o * 2] = static_cast<uint8_t>(o % 8);
    q.zeros.as<uint8_t>()[o * 2 + 1] = 0;  // a zero point of 0 is as good as any other
  }
  const auto tensors = pack(q);
  const Tensor& qweight = tensor_named(tensors, "m.qweight");
  EXPECT_EQ(qweight.shape(), Shape({32, 2}));
  EXPECT_EQ(word(qweight, 0), 0x75316420u);
  EXPECT_EQ(word(qweight, 3 * 2), 0x75316420u);
  EXPECT_EQ(word(qweight, 3 * 2 + 1), 0x753F6420u);
  const Tensor& qzeros = tensor_named(tensors, "m.qzeros");
  EXPECT_EQ(qzeros.shape(), Shape({2, 2}));
  EXPECT_EQ(word(qzeros, 0), 0x75316420u);
  EXPECT_EQ(word(qzeros, 2), 0u);
  EXPECT_EQ(tensors.size(), 3u);  // no g_idx, no bias
}

TEST(Awq, SymmetricZeroPointsAreStoredAsEight) {
  const auto tensors = pack(random_quantized(8, 64, {}));
  const Tensor& qzeros = tensor_named(tensors, "m.qzeros");
  for (int64_t i = 0; i < qzeros.elements(); ++i) EXPECT_EQ(word(qzeros, i), 0x88888888u);
}

TEST(Awq, ScalesAreF16ByGroup) {
  Tensor bias = Tensor::zeros(DType::kBF16, {8});
  const QuantizedLinear q = random_quantized(8, 64, {});
  const auto tensors = pack(q, bias);
  const Tensor& scales = tensor_named(tensors, "m.scales");
  EXPECT_EQ(scales.shape(), Shape({2, 8}));
  EXPECT_EQ(scales.dtype(), DType::kF16);
  EXPECT_EQ(scales.as<uint16_t>()[8 + 3], q.scales.as<uint16_t>()[3 * 2 + 1]);
  EXPECT_EQ(tensor_named(tensors, "m.bias").dtype(), DType::kF16);
}

TEST(Awq, PackGivesWhatPackedSpecsPromise) {
  Tensor bias = Tensor::zeros(DType::kBF16, {24});
  for (int64_t group_size : {int64_t{-1}, int64_t{32}}) {
    QuantizeSettings settings;
    settings.group_size = group_size;
    const auto tensors = pack(random_quantized(24, 96, {.group_size = group_size}), bias);
    const auto specs = format().packed_specs({"m", 24, 96, true}, settings, DType::kBF16);
    ASSERT_EQ(specs.size(), tensors.size());
    for (const PackedSpec& spec : specs) {
      EXPECT_EQ(tensor_named(tensors, spec.name).dtype(), spec.dtype) << spec.name;
      EXPECT_EQ(tensor_named(tensors, spec.name).shape(), spec.shape) << spec.name;
    }
  }
}

std::pair<ExitCode, std::string> checked(int64_t out, int64_t in,
                                         const std::function<void(QuantizeSettings&)>& change) {
  QuantizeSettings settings;
  change(settings);
  return thrown([&] { format().check({"model.layers.0.m", out, in, false}, settings); });
}

TEST(Awq, RefusesWhatItCannotHold) {
  for (int bits : {2, 3, 8}) {
    const auto [code, text] = checked(128, 128, [&](auto& s) { s.bits = bits; });
    EXPECT_EQ(code, ExitCode::kUsage);
    EXPECT_THAT(text, HasSubstr("stores 4 bits"));
    EXPECT_THAT(text, HasSubstr("output.format=gptq"));
  }
  const auto narrow = checked(20, 128, [](auto&) {});
  EXPECT_EQ(narrow.first, ExitCode::kUsage);
  EXPECT_THAT(narrow.second, HasSubstr("model.layers.0.m has 20"));
  const auto ragged = checked(128, 96, [](auto&) {});
  EXPECT_EQ(ragged.first, ExitCode::kUsage);
  EXPECT_THAT(ragged.second, HasSubstr("quantize.group_size=128 does not divide the 96"));
  const auto scattered = checked(128, 128, [](auto& s) { s.act_order = ActOrder::kDynamic; });
  EXPECT_EQ(scattered.first, ExitCode::kUsage);
  EXPECT_THAT(scattered.second, HasSubstr("gptq or gptq_v2"));
  // One group per row has nothing to scatter; a skipped module may be anything.
  EXPECT_EQ(checked(128, 96,
                    [](auto& s) {
                      s.group_size = -1;
                      s.act_order = ActOrder::kDynamic;
                    })
                .first,
            ExitCode::kDone);
  EXPECT_EQ(checked(21, 96, [](auto& s) { s.skip = true; }).first, ExitCode::kDone);
  for (int64_t vocabulary : {128, 127}) {  // the reason is the head, whatever else does not fit
    const auto head = thrown([&] { format().check({"lm_head", vocabulary, 96, false}, {}); });
    EXPECT_EQ(head.first, ExitCode::kUsage);
    EXPECT_THAT(head.second, HasSubstr("keep lm_head in float"));
    EXPECT_THAT(head.second, HasSubstr("output.format=gptq, gptq_v2 or compressed-tensors"));
  }

  QuantizedLinear swapped = random_quantized(8, 64, {});
  std::swap(swapped.g_idx.as<int32_t>()[0], swapped.g_idx.as<int32_t>()[63]);
  EXPECT_EQ(thrown([&] { pack(swapped); }).first, ExitCode::kUsage);
}

std::vector<ModuleChoice> modules_of(bool symmetric) {
  std::vector<ModuleChoice> modules;
  for (const char* inner : {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                            "self_attn.o_proj", "mlp.down_proj"})
    for (int block : {1, 11}) {
      ModuleChoice choice;
      choice.module = "model.layers." + std::to_string(block) + "." + inner;
      choice.bits = 4;
      choice.group_size = 128;
      choice.symmetric = symmetric;
      modules.push_back(choice);
    }
  return modules;
}

Json config_of(const std::vector<ModuleChoice>& modules) {
  return Json::parse(format().config({}, modules).quantization_config.dump());
}

TEST(AwqConfig, HasTheKeysThatLoadersInsistOn) {
  for (bool symmetric : {true, false}) {
    const Json config = config_of(modules_of(symmetric));
    EXPECT_EQ(config["quant_method"], "awq");
    EXPECT_EQ(config["version"], "gemm");
    EXPECT_EQ(config["bits"], 4);
    EXPECT_EQ(config["group_size"], 128);
    EXPECT_EQ(config["zero_point"], true);
    EXPECT_TRUE(config["modules_to_not_convert"].is_null());
    EXPECT_FALSE(config.contains("dynamic"));
    EXPECT_TRUE(format().matches(config));
    EXPECT_FALSE(find_format("gptq").matches(config));
    EXPECT_EQ(format().configured(config, "model.layers.1.mlp.down_proj").symmetric, symmetric);
    EXPECT_FALSE(format().configured(config, "lm_head").quantized);
    EXPECT_THAT(format().config_violations(config, modules_of(symmetric)), IsEmpty());
  }
}

TEST(AwqConfig, FloatLinearsAreNamedForEveryLoader) {
  std::vector<ModuleChoice> modules = modules_of(true);
  for (ModuleChoice& module : modules)
    module.quantized =
        !module.module.starts_with("model.layers.1.") ||
        (!module.module.ends_with("down_proj") && !module.module.ends_with("k_proj"));
  const Json config = config_of(modules);
  EXPECT_EQ(config["modules_to_not_convert"],
            Json::parse(R"(["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.qkv_proj",
                            "model.layers.1.mlp.down_proj"])"));
  EXPECT_TRUE(config["dynamic"].contains(R"(-:^model\.layers\.1\.mlp\.down_proj$)"));
  EXPECT_FALSE(format().configured(config, "model.layers.1.mlp.down_proj").quantized);
  EXPECT_TRUE(format().configured(config, "model.layers.11.mlp.down_proj").quantized);
  EXPECT_THAT(format().config_violations(config, modules), IsEmpty());
  Json silent = config;
  silent["modules_to_not_convert"] = nullptr;
  EXPECT_THAT(format().config_violations(silent, modules).front(),
              HasSubstr("modules_to_not_convert"));
}

TEST(AwqConfig, OneSchemePerModel) {
  std::vector<ModuleChoice> modules = modules_of(true);
  EXPECT_EQ(thrown([&] { format().check_model(modules); }).first, ExitCode::kDone);
  modules.back().group_size = 64;
  const auto [code, text] = thrown([&] { format().check_model(modules); });
  EXPECT_EQ(code, ExitCode::kUsage);
  EXPECT_THAT(text, HasSubstr("group_size=64"));
}

TEST(AwqConfig, ReadsOlderSpellings) {
  const Json older = Json::parse(R"({"quant_method": "awq", "w_bit": 4, "q_group_size": 64,
      "zero_point": false, "version": "GEMM", "modules_to_not_convert": ["mlp.gate"]})");
  ASSERT_TRUE(format().matches(older));
  const ModuleChoice choice = format().configured(older, "model.layers.0.mlp.gate_proj");
  EXPECT_TRUE(choice.quantized);  // "mlp.gate" is another module
  EXPECT_EQ(choice.group_size, 64);
  EXPECT_TRUE(choice.symmetric);
  EXPECT_FALSE(format().configured(older, "model.layers.0.mlp.gate").quantized);
  EXPECT_FALSE(format().matches(Json{{"quant_method", "awq"}, {"version", "gemv"}}));
}

TEST(AwqConfig, ViolationsNameTheKey) {
  const Json good = config_of(modules_of(true));
  for (const char* key : {"quant_method", "version", "bits", "group_size", "zero_point"}) {
    Json config = good;
    config.erase(key);
    const auto found = format().config_violations(config, modules_of(true));
    ASSERT_FALSE(found.empty()) << key;
    EXPECT_THAT(found.front(), HasSubstr(key));
  }
  Json other = good;
  other["group_size"] = 64;
  EXPECT_THAT(format().config_violations(other, modules_of(true)).front(),
              HasSubstr("group_size=64"));
  other["bits"] = 8;
  EXPECT_EQ(thrown([&] { format().configured(other, "model.layers.1.mlp.down_proj"); }).first,
            ExitCode::kInput);
}

}  // namespace
}  // namespace bitmill
