// bitmill inspect: numbers that can be counted by hand on the small models.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "commands/quantized_model.h"
#include "io/json.h"

namespace bitmill {
namespace {

using testing::QuantizedModel;
using testing::run_alone;
using testing::source_path;

// tiny-llama: 2 blocks of q, o [128, 128], k, v [64, 128], gate, up [256, 128], down [128, 256].
constexpr int64_t kLinearWeights = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128);

TEST(Inspect, FloatModel) {
  const auto [code, json] = run_alone(run_inspect, source_path("tests/data/tiny-llama"));
  EXPECT_EQ(code, 0);
  EXPECT_EQ(json["family"], "llama");
  EXPECT_EQ(json["format"], "float");
  EXPECT_EQ(json["blocks"], 2);
  EXPECT_EQ(json["sizes"]["bytes"]["float_linears"], kLinearWeights * 2);
  EXPECT_EQ(json["sizes"]["bytes"]["other"], 0);
  EXPECT_EQ(json["sizes"]["bits_per_weight"], 16.0);
  EXPECT_EQ(json["block_0"].size(), 7u);
}

TEST(Inspect, QuantizedModel) {
  const QuantizedModel model(source_path("tests/data/tiny-llama"), "compressed-tensors");
  const auto [code, json] = run_alone(run_inspect, model.path());
  EXPECT_EQ(code, 0);
  EXPECT_EQ(json["format"], "compressed-tensors");
  EXPECT_EQ(json["sizes"]["quantized_linears"], 14);
  // 4 bits, a 16-bit scale per 32 weights, and 16 bytes of weight_shape per linear.
  EXPECT_DOUBLE_EQ(json["sizes"]["bits_per_weight"].get<double>(),
                   4.5 + 8.0 * 14 * 16 / kLinearWeights);
  EXPECT_EQ(json["block_0"][0]["bits"], 4);
  EXPECT_EQ(json["block_0"][0]["group_size"], 32);
}

TEST(Inspect, ATensorsFirstCodes) {
  const std::string source = source_path("tests/data/tiny-llama"),
                    module = "model.layers.0.mlp.down_proj";
  const QuantizedModel model(source, "gptq");
  const auto [code, json] = run_alone(run_inspect, model.path(),
                                      [&](RunOptions::Extra& extra) { extra.tensor = module; });
  EXPECT_EQ(code, 0);
  const Json& tensor = json["tensor"];
  ASSERT_EQ(tensor["codes"].size(), 4u);
  ASSERT_EQ(tensor["codes"][0].size(), 16u);
  EXPECT_EQ(tensor["zeros"][0][0], 8);
  // scale * (code - 8) is within half a step of the source weight.
  const Tensor weight = Checkpoint::open(source).read(module + ".weight");
  const float scale = tensor["scales"][2][0];
  const float value = scale * (tensor["codes"][2][5].get<float>() - 8);
  EXPECT_NEAR(value, to_float(weight.as<BFloat16>()[2 * 256 + 5]), 0.51f * scale);
}

TEST(Inspect, UnknownModuleIsNamed) {
  EXPECT_THROW(run_alone(run_inspect, source_path("tests/data/tiny-llama"),
                         [](RunOptions::Extra& extra) { extra.tensor = "model.layers.9.x"; }),
               Error);
}

}  // namespace
}  // namespace bitmill
