// AWQ's pass over a float block: the block computes the same afterwards, rules leave folds out, and
// the whole beats plain rounding where channels are loud.
#include "pipeline/awq_pass.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "pipeline/forward.h"
#include "pipeline/one_rank.h"
#include "pipeline/stage.h"
#include "support/naive.h"
#include "support/outlier_model.h"
#include "support/paths.h"

namespace bitmill {
namespace {

constexpr int64_t kSamples = 12, kLength = 16;

// A model with activations of random tokens.
class Model {
 public:
  Model(const std::string& directory, int threads = 2)
      : source(ModelSource::open(directory)),
        backend(make_backend({"cpu", DType::kF32, threads})),
        rope(rope_table(source.spec().rope, kLength)) {
    options.quantize.algorithm = "awq";
    options.quantize.group_size = 32;
    options.run.microbatch_tokens = 64;
    options.run.reduction_lanes = 4;
    std::mt19937 random(3);
    ids = Tensor(DType::kI32, {kSamples, kLength});
    for (int64_t i = 0; i < ids.elements(); ++i)
      ids.as<int32_t>()[i] =
          static_cast<int32_t>(random() % static_cast<uint32_t>(source.spec().vocab));
  }

  Activations embedded() {
    Activations activations = make_activations(
        plan_batches(kSamples, kLength, options.run.reduction_lanes, options.run.microbatch_tokens),
        kLength);
    embed_tokens(source, ids, activations, *backend);
    return activations;
  }
  const BlockSpec& block() const { return source.spec().blocks[0]; }
  std::unique_ptr<BlockGraph> graph(int64_t index = 0) const {
    return source.family().graph(source.spec(), index, rope);
  }
  BlockChange change() {
    testing::OneRank rank(options, source, find_format("gptq_v2"), *backend);
    Activations activations = embedded();
    return find_block_change(rank.context, block(), *graph(), activations);
  }
  // Outputs of block 0 with the change's floats and weights.
  testing::Values outputs(const BlockChange& change) {
    BlockWeights weights = source.read_block(block(), *backend);
    for (const auto& [name, value] : change.floats()) weights.set_float(name, value, *backend);
    for (int linear = 0; linear < static_cast<int>(block().linears.size()); ++linear) {
      const Tensor weight = source.read_weight(block().linears[linear], DType::kF32, *backend);
      change.apply(linear, weight, 0, false, *backend);
      weights.set_linear(linear, weight, *backend);
    }
    return forward(weights);
  }
  testing::Values forward(const BlockWeights& weights) {
    testing::Values all;
    Tensor scratch;
    for (MicroBatch& batch : embedded().batches) {
      for (int cut = 0; cut < static_cast<int>(block().cuts.size()); ++cut) {
        const TensorView x = graph()->input(cut, weights, batch, *backend, scratch);
        graph()->advance(cut, weights, x, batch, *backend);
      }
      const testing::Values values = testing::to_values(batch.hidden);
      all.insert(all.end(), values.begin(), values.end());
    }
    return all;
  }
  // Every block through the stage; the last block's output.
  testing::Values quantized(std::vector<QuantizeRecord>* records = nullptr) {
    Activations activations = embedded();
    testing::OneRank rank(options, source, find_format("gptq_v2"), *backend);
    Stage stage(rank.context);
    for (size_t i = 0; i < source.spec().blocks.size(); ++i)
      stage.run(static_cast<int64_t>(i), graph(static_cast<int64_t>(i)).get(), activations);
    if (records != nullptr) *records = rank.records;
    testing::Values all;
    for (const MicroBatch& batch : activations.batches) {
      const testing::Values values = testing::to_values(batch.hidden);
      all.insert(all.end(), values.begin(), values.end());
    }
    return all;
  }

  ModelSource source;
  std::unique_ptr<Backend> backend;
  Tensor rope, ids;
  RunOptions options;
};

std::string tiny(const std::string& name) {
  return testing::source_path("tests/data/" + name);
}

auto ends_with(std::string end) {
  return [end = std::move(end)](const std::string& module) { return module.ends_with(end); };
}

class AwqFamilies : public ::testing::TestWithParam<const char*> {};

// Biases and as many v heads as o has (tiny-llama-bias), grouped heads (tiny-llama), norms on q and
// k (tiny-qwen3).
TEST_P(AwqFamilies, ScalingKeepsTheFloatFunction) {
  Model model(tiny(GetParam()));
  const testing::Values before = model.outputs(BlockChange());
  const BlockChange change = model.change();
  QuantizeRecord record;
  change.describe(0, record);
  EXPECT_GT(record.awq_ratio, 0) << "nothing was scaled, so nothing is tested";
  EXPECT_TRUE(change.floats().contains(model.block().norms[0].name));
  EXPECT_LT(testing::max_difference(before, model.outputs(change)),
            2e-5 * testing::max_magnitude(before));
}
INSTANTIATE_TEST_SUITE_P(Tiny, AwqFamilies,
                         ::testing::Values("tiny-llama-bias", "tiny-llama", "tiny-qwen2",
                                           "tiny-qwen3", "tiny-mistral"));

TEST(AwqPass, FoldsVIntoOOnlyWhereShapesAllow) {
  Model equal(tiny("tiny-llama-bias")), grouped(tiny("tiny-llama"));
  QuantizeRecord of_equal, of_grouped;
  equal.change().describe(3, of_equal);
  grouped.change().describe(3, of_grouped);
  EXPECT_GE(of_equal.awq_ratio, 0);
  EXPECT_EQ(of_equal.note, "");
  EXPECT_EQ(of_grouped.awq_ratio, -1);
  EXPECT_EQ(of_grouped.note, "") << "that is how the model is, no fallback";
  EXPECT_TRUE(equal.change().floats().contains("model.layers.0.self_attn.v_proj.bias"));
}

TEST(AwqPass, AFloatConsumerLeavesTheFoldOut) {
  Model model(tiny("tiny-llama"));
  model.options.quantize.rules.push_back({"", ends_with("v_proj"), {{"skip", "true"}}});
  const BlockChange change = model.change();
  EXPECT_FALSE(change.floats().contains("model.layers.0.input_layernorm.weight"));
  EXPECT_TRUE(change.floats().contains("model.layers.0.post_attention_layernorm.weight"));
  EXPECT_FALSE(change.changes(2));
  QuantizeRecord record;
  change.describe(0, record);
  EXPECT_EQ(record.note, "not scaled: model.layers.0.self_attn.v_proj is not quantized with awq");
}

TEST(AwqPass, OnlyVAndTheMlpAreClipped) {
  Model model(tiny("tiny-llama"));
  const BlockChange change = model.change();
  for (int linear = 0; linear < 7; ++linear) {
    const LinearSpec& spec = model.block().linears[linear];
    const Tensor scaled = model.source.read_weight(spec, DType::kF32, *model.backend),
                 clipped = clone(scaled);
    change.apply(linear, scaled, 0, false, *model.backend);
    change.apply(linear, clipped, 0, true, *model.backend);
    const bool differs =
        testing::max_difference(testing::to_values(scaled), testing::to_values(clipped)) > 0;
    EXPECT_EQ(differs, linear > 1) << spec.module;
  }
}

TEST(AwqPass, FoldedTensorsAreNamed) {
  Model model(tiny("tiny-llama-bias"));
  const std::vector<std::string> names = folded_tensors(model.options, model.source.spec());
  const auto named = [&](const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  EXPECT_TRUE(named("model.layers.1.input_layernorm.weight"));
  EXPECT_TRUE(named("model.layers.1.mlp.up_proj.bias"));
  EXPECT_TRUE(named("model.layers.0.mlp.down_proj.weight"));
  EXPECT_FALSE(named("model.layers.0.mlp.down_proj.bias"));
  EXPECT_FALSE(named("model.norm.weight"));
  const BlockChange change = model.change();
  for (const auto& [name, value] : change.floats()) EXPECT_TRUE(named(name)) << name;
  model.options.quantize.algorithm = "gptq";
  EXPECT_TRUE(folded_tensors(model.options, model.source.spec()).empty());
}

TEST(AwqPass, LooksAtNoMoreSamplesThanItsTokensNeed) {
  Model model(tiny("tiny-llama"));
  model.options.awq.tokens = 1000;
  EXPECT_EQ(samples_needed(model.options, model.source.spec(), 128, 512), 2);
  EXPECT_EQ(samples_needed(model.options, model.source.spec(), 1, 512), 1);
  model.options.quantize.algorithm = "awq+gptq";
  EXPECT_EQ(samples_needed(model.options, model.source.spec(), 128, 512), 128);
  model.options.quantize.algorithm = "rtn";
  EXPECT_EQ(samples_needed(model.options, model.source.spec(), 128, 512), 0);
}

TEST(AwqPass, ThreadsDoNotChangeABit) {
  testing::Values first;
  for (int threads : {1, 2, 3}) {
    Model model(tiny("tiny-llama-bias"), threads);
    model.options.quantize.algorithm = "awq+gptq";
    const testing::Values now = model.quantized();
    if (first.empty()) first = now;
    EXPECT_EQ(now, first) << threads << " threads";
  }
}

// With one float forward of the whole block, the Hessians must be those of the scaled inputs.
TEST(AwqPass, WholeBlockCaptureSeesTheScaledBlock) {
  Model model(tiny("tiny-llama-bias"));
  model.options.quantize.algorithm = "awq+gptq";
  std::vector<QuantizeRecord> sequential, whole;
  model.quantized(&sequential);
  model.options.quantize.true_sequential = false;
  model.quantized(&whole);
  for (size_t i = 0; i < 7; ++i) {
    EXPECT_EQ(whole[i].method, "awq+gptq");
    EXPECT_NEAR(whole[i].relative_error / sequential[i].relative_error, 1, 0.3) << whole[i].module;
  }
}

double distance(const testing::Values& a, const testing::Values& b) {
  double sum = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]), norm += b[i] * b[i];
  return std::sqrt(sum / norm);
}

// The demo with every 37th channel of its norms 32 times louder computes the same; plain rounding
// loses the small columns.
TEST(AwqPass, LoudChannelsAreProtected) {
  testing::TemporaryDirectory directory;
  testing::write_outlier_model(testing::source_path("configs/demo/model"), directory.file("loud"),
                               37, 32);
  Model model(directory.file("loud"));
  model.options.quantize.group_size = 128;
  model.options.quantize.symmetric = false;
  model.options.quantize.rules.push_back(
      {"", [](const std::string&) { return true; }, {{"skip", "true"}}});
  const testing::Values plain = model.quantized();
  model.options.quantize.rules.clear();
  std::map<std::string, double> error;
  for (const char* algorithm : {"rtn", "awq", "gptq", "awq+gptq"}) {
    model.options.quantize.algorithm = algorithm;
    error[algorithm] = distance(model.quantized(), plain);
    RecordProperty(algorithm, std::to_string(error[algorithm]));
  }
  EXPECT_LT(error["awq"], 0.6 * error["rtn"]);
  EXPECT_LT(error["awq+gptq"], error["gptq"] * 1.02);
}

}  // namespace
}  // namespace bitmill
