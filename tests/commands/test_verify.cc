// bitmill verify finds what is wrong with an output, one broken thing at a time.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "commands/quantized_model.h"
#include "io/json.h"

namespace bitmill {
namespace {

using testing::Draft;
using ::testing::HasSubstr;
using testing::QuantizedModel;
using testing::run_alone;
using testing::source_path;

const std::string kUp = "model.layers.1.mlp.up_proj";

std::string source() {
  return source_path("tests/data/tiny-llama");
}

std::pair<int, Json> verify(const std::string& directory, bool against = true,
                            bool strict = false) {
  return run_alone(run_verify, directory, [&](RunOptions::Extra& extra) {
    if (against) extra.against = source();
    extra.strict = strict;
  });
}

TEST(Verify, GoodOutputsOfEveryFormatPass) {
  for (const OutputFormat* format : output_formats())
    for (bool symmetric : {true, false}) {
      if (!symmetric && format->name() == "gptq") continue;
      SCOPED_TRACE(format->name() + (symmetric ? " symmetric" : " asymmetric"));
      const QuantizedModel model(source(), format->name(), symmetric);
      const auto [code, json] = verify(model.path());
      EXPECT_EQ(code, 0) << json["violations"].dump(1);
      EXPECT_EQ(json["ok"], true);
      EXPECT_EQ(json["linears"], 14);
      EXPECT_EQ(json["compared"], 14);
      EXPECT_LT(json["error_over_nearest_max"].get<double>(),
                1.2);  // rounding itself, with a rounded scale
      EXPECT_EQ(verify(model.path(), false).first, 0);
    }
}

TEST(Verify, BiasesMayBeRoundedToHalf) {
  const std::string biased = source_path("tests/data/tiny-qwen2");
  for (const char* format : {"gptq", "compressed-tensors"}) {
    const QuantizedModel model(biased, format);
    const auto [code, json] = run_alone(run_verify, model.path(),
                                        [&](RunOptions::Extra& extra) { extra.against = biased; });
    EXPECT_EQ(code, 0) << json["violations"].dump(1);
  }
}

TEST(Verify, AFloatCheckpointPassesAgainstItself) {
  EXPECT_EQ(verify(source()).first, 0);
}

TEST(Verify, LoadRulesWarnAndFailOnlyWhenStrict) {
  const QuantizedModel model(source(), "gptq");  // far too small for 8 ranks
  const auto [code, json] = verify(model.path());
  EXPECT_EQ(code, 0);
  EXPECT_FALSE(json["warnings"].empty());
  EXPECT_EQ(verify(model.path(), true, true).first, 3);
}

// What verify says about a model with one thing changed; fails unless the exit code is 3.
std::string broken(const std::string& format, const std::function<void(Draft&)>& change,
                   bool against = true) {
  const QuantizedModel model(source(), format, true, change);
  const auto [code, json] = verify(model.path(), against);
  EXPECT_EQ(code, 3);
  return json["violations"].dump();
}

// With desc_act groups may be scattered, and each still holds its 32 columns.
TEST(Verify, ScatteredGroupsAreWholeGroups) {
  const auto scattered = [](Draft& d) {
    d.config["quantization_config"]["desc_act"] = true;
    (*d.repeated)["desc_act"] = true;
  };
  EXPECT_EQ(verify(QuantizedModel(source(), "gptq", true, scattered).path()).first, 0);
  EXPECT_THAT(broken(
                  "gptq",
                  [&](Draft& d) {
                    scattered(d);
                    d.tensors.at(kUp + ".g_idx").as<int32_t>()[0] = 1;
                  },
                  false),
              HasSubstr("group 0 of g_idx holds 31 columns, expected 32"));
}

TEST(Verify, NamesBrokenTensors) {
  EXPECT_THAT(broken(
                  "gptq", [](Draft& d) { d.tensors.erase(kUp + ".g_idx"); }, false),
              HasSubstr(kUp + ".g_idx is missing"));
  EXPECT_THAT(
      broken(
          "gptq", [](Draft& d) { d.tensors.at(kUp + ".scales").as<uint16_t>()[0] = 0x7E00; },
          false),
      HasSubstr(kUp + ": 1 of 1024 scales"));
  EXPECT_THAT(
      broken(
          "gptq", [](Draft& d) { d.tensors.at(kUp + ".scales").as<uint16_t>()[0] = 0; }, false),
      HasSubstr("scales"));
  EXPECT_THAT(
      broken(
          "gptq", [](Draft& d) { d.tensors.at(kUp + ".qzeros").as<int32_t>()[0] = 0x77777776; },
          false),
      HasSubstr("1 of 1024 zero points are not 8"));
  EXPECT_THAT(
      broken(
          "gptq", [](Draft& d) { d.tensors.at(kUp + ".g_idx").as<int32_t>()[0] = 1; }, false),
      HasSubstr("g_idx differs"));
  EXPECT_THAT(
      broken(
          "gptq", [](Draft& d) { d.tensors.at(kUp + ".g_idx").as<int32_t>()[0] = 4; }, false),
      HasSubstr("expected 0..3"));
  EXPECT_THAT(
      broken(
          "compressed-tensors", [](Draft& d) { d.tensors.erase(kUp + ".weight_scale"); }, false),
      HasSubstr("weight_scale"));
  EXPECT_THAT(broken(
                  "gptq", [](Draft& d) { d.tensors.erase("model.norm.weight"); }, false),
              HasSubstr("model.norm.weight"));
}

TEST(Verify, ComparesWithTheSource) {
  // Two words of one column exchanged: every code is legal, the weights are not those of the
  // source.
  EXPECT_THAT(broken("gptq",
                     [](Draft& d) {
                       Tensor& words = d.tensors.at(kUp + ".qweight");
                       std::swap_ranges(words.as<int32_t>(), words.as<int32_t>() + words.cols(),
                                        words.as<int32_t>() + words.cols());
                     }),
              HasSubstr(kUp + ": relative weight error"));
  EXPECT_THAT(
      broken("gptq", [](Draft& d) { d.tensors.at("model.norm.weight").as<uint16_t>()[3] ^= 1; }),
      HasSubstr("tensor model.norm.weight differs from the source"));
  EXPECT_THAT(broken("gptq",
                     [](Draft& d) {
                       d.tensors[kUp + ".weight"] = Tensor::zeros(DType::kBF16, {256, 128});
                     }),
              HasSubstr("is still there beside the packed one"));
  EXPECT_THAT(
      broken("gptq", [](Draft& d) { d.tensors["stray"] = Tensor::zeros(DType::kBF16, {4}); }),
      HasSubstr("tensor stray is in neither the source nor the format"));
}

TEST(Verify, NamesBrokenConfig) {
  EXPECT_THAT(broken(
                  "gptq", [](Draft& d) { d.repeated.reset(); }, false),
              HasSubstr("quantize_config.json is missing"));
  EXPECT_THAT(broken(
                  "gptq", [](Draft& d) { (*d.repeated)["bits"] = 8; }, false),
              HasSubstr("quantize_config.json differs"));
  EXPECT_THAT(broken(
                  "gptq", [](Draft& d) { d.config["quantization_config"].erase("sym"); }, false),
              HasSubstr("sym"));
  EXPECT_THAT(
      broken(
          "gptq", [](Draft& d) { d.config["quantization_config"]["group_size"] = 64; }, false),
      HasSubstr("qzeros"));
  EXPECT_THAT(
      broken(
          "compressed-tensors",
          [](Draft& d) { d.config["quantization_config"]["ignore"] = Json::array(); }, false),
      HasSubstr("lm_head"));
}

TEST(Verify, NamesStrayAndTruncatedFiles) {
  const QuantizedModel model(source(), "gptq");
  write_safetensors(model.path() + "/model-00001-of-00002.safetensors", {});
  EXPECT_THAT(verify(model.path()).second["violations"].dump(),
              HasSubstr("model-00001-of-00002.safetensors lies in"));
  std::filesystem::resize_file(model.path() + "/model.safetensors", 1000);
  const auto [code, json] = verify(model.path());
  EXPECT_EQ(code, 3);
  EXPECT_THAT(json["violations"].dump(), HasSubstr("model.safetensors"));
}

TEST(Verify, AnIndexMustAddUp) {
  const QuantizedModel model(source(), "gptq");
  Json map;
  const Checkpoint checkpoint = Checkpoint::open(model.path());
  for (const auto& [name, entry] : checkpoint.tensors())
    map[name] = "model-00001-of-00001.safetensors";
  std::filesystem::rename(model.path() + "/model.safetensors",
                          model.path() + "/model-00001-of-00001.safetensors");
  write_file_durably(model.path() + "/model.safetensors.index.json",
                     Json{{"metadata", {{"total_size", 17}}}, {"weight_map", map}}.dump());
  const auto [code, json] = verify(model.path());
  EXPECT_EQ(code, 3);
  EXPECT_THAT(json["violations"].dump(), HasSubstr("total_size is 17"));
}

TEST(Verify, CopiedFilesAreEqual) {
  const std::string demo = source_path("configs/demo/model");
  const QuantizedModel model(demo, "gptq");
  const auto against = [&](RunOptions::Extra& extra) { extra.against = demo; };
  EXPECT_THAT(run_alone(run_verify, model.path(), against).second["violations"].dump(),
              HasSubstr("tokenizer.json"));
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                           "generation_config.json"})
    std::filesystem::copy_file(demo + "/" + name, model.path() + "/" + name);
  const auto [code, json] = run_alone(run_verify, model.path(), against);
  EXPECT_EQ(code, 0) << json["violations"].dump(1);
}

}  // namespace
}  // namespace bitmill
