// Words, names, refusals and config text of compressed-tensors pack-quantized.
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
  return find_format("compressed-tensors");
}

std::vector<NamedTensor> pack(const QuantizedLinear& q, TensorView bias = {}) {
  return format().pack({"m", q.out(), q.in(), bias.data != nullptr}, q, bias);
}

TEST(CompressedTensors, WordsOfTheFormatPage) {
  QuantizedLinear q = random_quantized(2, 16, {.group_size = 8});
  for (int64_t i = 0; i < 16; ++i) {
    q.codes.as<uint8_t>()[i] = static_cast<uint8_t>(i % 8);           // signed -8..-1
    q.codes.as<uint8_t>()[16 + i] = static_cast<uint8_t>(8 + i % 8);  // signed 0..7
  }
  const auto tensors = pack(q);
  const Tensor& packed = tensor_named(tensors, "m.weight_packed");
  EXPECT_EQ(packed.shape(), Shape({2, 2}));
  EXPECT_EQ(word(packed, 0), 0x76543210u);
  EXPECT_EQ(word(packed, 2), 0xFEDCBA98u);

  QuantizedLinear eight = random_quantized(1, 4, {.bits = 8, .group_size = -1});
  const uint8_t codes[] = {0, 127, 128, 255};  // signed -128, -1, 0, 127
  std::copy_n(codes, 4, eight.codes.as<uint8_t>());
  EXPECT_EQ(word(tensor_named(pack(eight), "m.weight_packed"), 0), 0xFF807F00u);
}

TEST(CompressedTensors, ScalesAndBiasKeepTheirType) {
  Tensor bias = Tensor::zeros(DType::kBF16, {8});
  const QuantizedLinear q = random_quantized(8, 64, {.scale_dtype = DType::kBF16});
  const auto tensors = pack(q, bias);
  EXPECT_TRUE(testing::same_bytes(tensor_named(tensors, "m.weight_scale"), q.scales));
  EXPECT_EQ(tensor_named(tensors, "m.bias").dtype(), DType::kBF16);
  EXPECT_EQ(tensor_named(tensors, "m.weight_shape").as<int64_t>()[0], 8);
  EXPECT_EQ(tensor_named(tensors, "m.weight_shape").as<int64_t>()[1], 64);
  EXPECT_EQ(tensors.size(), 4u);  // no zero points when symmetric
}

// config.json may say another type than the file has: the output is the model's type throughout, as
// packed_specs says.
TEST(CompressedTensors, BiasOfAnotherTypeIsRoundedToTheModels) {
  Tensor bias = Tensor::zeros(DType::kF32, {8});
  bias.as<float>()[1] = 1.00390625f;  // 1 + 2^-8: half way in BF16, exact in F16
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    const auto tensors = pack(random_quantized(8, 64, {.scale_dtype = dtype}), bias);
    const Tensor& stored = tensor_named(tensors, "m.bias");
    ASSERT_EQ(stored.dtype(), dtype);
    Tensor wide(DType::kF32, {8});
    convert(stored, wide);
    EXPECT_EQ(wide.as<float>()[0], 0.0f);
    EXPECT_EQ(wide.as<float>()[1], dtype == DType::kBF16 ? 1.0f : 1.00390625f);
    for (const PackedSpec& spec : format().packed_specs({"m", 8, 64, true}, {}, dtype))
      if (spec.name == "m.bias") EXPECT_EQ(spec.dtype, dtype);
  }
  bias.as<float>()[3] = 1e6f;
  const auto [code, text] =
      thrown([&] { pack(random_quantized(8, 64, {.scale_dtype = DType::kF16}), bias); });
  EXPECT_EQ(code, ExitCode::kInput);
  EXPECT_THAT(text, ::testing::HasSubstr("m.bias: element 3"));
}

TEST(CompressedTensors, AsymmetricZeroPointsRunDownTheColumns) {
  QuantizedLinear q = random_quantized(8, 64, {.symmetric = false});
  for (int64_t o = 0; o < 8; ++o) {
    q.zeros.as<uint8_t>()[o * 2] = static_cast<uint8_t>(o);
    q.zeros.as<uint8_t>()[o * 2 + 1] = static_cast<uint8_t>(15 - o);
  }
  const auto tensors = pack(q);
  const Tensor& zeros = tensor_named(tensors, "m.weight_zero_point");
  EXPECT_EQ(zeros.shape(), Shape({1, 2}));
  EXPECT_EQ(word(zeros, 0), 0x76543210u);
  EXPECT_EQ(word(zeros, 1), 0x89ABCDEFu);
}

TEST(CompressedTensors, RefusesWhatItCannotHold) {
  QuantizedLinear q = random_quantized(8, 64, {});
  q.zeros.as<uint8_t>()[3] = 7;
  EXPECT_EQ(thrown([&] { pack(q); }).first, ExitCode::kInput);
  QuantizedLinear scattered = random_quantized(8, 64, {});
  std::swap(scattered.g_idx.as<int32_t>()[0], scattered.g_idx.as<int32_t>()[63]);
  EXPECT_EQ(thrown([&] { pack(scattered); }).first, ExitCode::kUsage);

  QuantizeSettings settings;
  settings.bits = 3;
  auto [code, text] = thrown([&] { format().check({"m", 128, 128, false}, settings); });
  EXPECT_EQ(code, ExitCode::kUsage);
  EXPECT_THAT(text, HasSubstr("differs between versions"));
  settings.bits = 4;
  settings.act_order = ActOrder::kDynamic;
  EXPECT_EQ(thrown([&] {
              format().check({"m", 128, 128, false}, settings);
            }).first,
            ExitCode::kUsage);
  settings.act_order = ActOrder::kStatic;
  EXPECT_EQ(thrown([&] {
              format().check({"m", 128, 96, false}, settings);
            }).first,
            ExitCode::kUsage);
  EXPECT_EQ(thrown([&] {
              format().check({"m", 21, 128, false}, settings);
            }).first,
            ExitCode::kDone);
}

std::vector<ModuleChoice> modules_of(int64_t group_size) {
  std::vector<ModuleChoice> modules;
  for (const char* inner : {"self_attn.o_proj", "mlp.down_proj"}) {
    ModuleChoice choice;
    choice.module = std::string("model.layers.0.") + inner;
    choice.bits = 4;
    choice.group_size = group_size;
    modules.push_back(choice);
  }
  return modules;
}

Json config_of(const std::vector<ModuleChoice>& modules) {
  return Json::parse(format().config({}, modules).quantization_config.dump());
}

TEST(CompressedTensorsConfig, IsTheDocumentedObject) {
  EXPECT_EQ(config_of(modules_of(128)), Json::parse(R"({
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": null, "output_activations": null,
      "weights": {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128,
        "block_structure": null, "dynamic": false, "actorder": null, "observer": "minmax", "observer_kwargs": {}}}},
    "ignore": ["lm_head"], "kv_cache_scheme": null, "global_compression_ratio": null})"));
  const Json weights = config_of(modules_of(-1))["config_groups"]["group_0"]["weights"];
  EXPECT_EQ(weights["strategy"], "channel");
  EXPECT_TRUE(weights["group_size"].is_null());
}

TEST(CompressedTensorsConfig, FloatLinearsAreIgnoredByName) {
  std::vector<ModuleChoice> modules = modules_of(128);
  modules[1].quantized = false;
  const Json config = config_of(modules);
  EXPECT_EQ(config["ignore"], Json::parse(R"(["lm_head", "model.layers.0.mlp.down_proj"])"));
  EXPECT_FALSE(format().configured(config, "model.layers.0.mlp.down_proj").quantized);
  EXPECT_FALSE(format().configured(config, "lm_head").quantized);
  EXPECT_TRUE(format().configured(config, "model.layers.0.self_attn.o_proj").quantized);
  EXPECT_THAT(format().config_violations(config, modules), IsEmpty());
}

TEST(CompressedTensorsConfig, OneSchemePerModel) {
  std::vector<ModuleChoice> modules = modules_of(128);
  modules[1].bits = 8;
  const auto [code, text] = thrown([&] { format().check_model(modules); });
  EXPECT_EQ(code, ExitCode::kUsage);
  EXPECT_THAT(text, HasSubstr("model.layers.0.self_attn.o_proj has 4 bits"));
  EXPECT_THAT(text, HasSubstr("model.layers.0.mlp.down_proj has 8 bits"));
}

TEST(CompressedTensorsConfig, ViolationsNameTheKey) {
  const Json good = config_of(modules_of(128));
  EXPECT_THAT(format().config_violations(good, modules_of(128)), IsEmpty());
  const auto broken = [&](const char* pointer, const Json& value) {
    Json config = good;
    config[Json::json_pointer(pointer)] = value;
    const auto found = format().config_violations(config, modules_of(128));
    return found.empty() ? std::string() : found.front();
  };
  EXPECT_THAT(broken("/quantization_status", "frozen"), HasSubstr("quantization_status"));
  EXPECT_THAT(broken("/config_groups/group_0/weights/surprise", 1), HasSubstr("surprise"));
  EXPECT_THAT(broken("/config_groups/group_0/weights/actorder", "group"), HasSubstr("actorder"));
  EXPECT_THAT(broken("/config_groups/group_0/weights/num_bits", 8), HasSubstr("8 bits"));
  EXPECT_THAT(broken("/ignore", Json::array()), HasSubstr("lm_head"));
  EXPECT_THAT(broken("/config_groups/group_0", 3), HasSubstr("config_groups"));
}

TEST(CompressedTensors, AQuantizedHeadLeavesTheIgnoreList) {
  std::vector<ModuleChoice> modules = {{"model.layers.0.mlp.down_proj", true, 4, 32, true},
                                       {"lm_head", true, 4, 32, true}};
  const OutputFormat& ct = find_format("compressed-tensors");
  const Json config = Json::parse(ct.config({}, modules).quantization_config.dump());
  EXPECT_EQ(config["ignore"], Json::array());
  EXPECT_TRUE(ct.configured(config, "lm_head").quantized);
  EXPECT_TRUE(ct.config_violations(config, modules).empty());
  modules[1].bits = 8;
  const auto [code, text] = thrown([&] { ct.check_model(modules); });
  EXPECT_EQ(code, ExitCode::kUsage);
  EXPECT_NE(text.find("lm_head"), std::string::npos);
}

}  // namespace
}  // namespace bitmill
