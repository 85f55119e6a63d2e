// One block, segment by segment, against the plain order of things: forward, Hessian, quantize.
#include "pipeline/stage.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <random>

#include "pipeline/forward.h"
#include "pipeline/one_rank.h"
#include "support/paths.h"
#include "io/json.h"

namespace bitmill {
namespace {

class StageTest : public ::testing::Test {
 protected:
  StageTest() : source_(ModelSource::open(testing::source_path("tests/data/tiny-llama"))) {
    options_.quantize.group_size = 32;
    options_.run.microbatch_tokens = 64;
    options_.run.reduction_lanes = 4;
    std::mt19937 random(3);
    ids_ = Tensor(DType::kI32, {12, 16});
    for (int64_t i = 0; i < ids_.elements(); ++i) ids_.as<int32_t>()[i] = static_cast<int32_t>(random() % 512);
  }

  Activations embedded(Backend& backend) {
    Activations activations = make_activations(
        plan_batches(12, 16, options_.run.reduction_lanes, options_.run.microbatch_tokens), 16);
    embed_tokens(source_, ids_, activations, backend);
    return activations;
  }

  PackedBlock run(Backend& backend, Activations& activations) {
    const Tensor rope = rope_table(source_.spec().rope, 16);
    const auto graph = source_.family().graph(source_.spec(), 0, rope);
    testing::OneRank rank(options_, source_, find_format("gptq"), backend);
    return Stage(rank.context).run(0, graph.get(), activations);
  }

  static std::vector<char> bytes(const PackedBlock& block) {
    std::vector<char> all;
    for (const NamedTensor& t : block.tensors)
      all.insert(all.end(), static_cast<char*>(t.data.data()), static_cast<char*>(t.data.data()) + t.data.bytes());
    return all;
  }

  RunOptions options_;
  ModelSource source_;
  Tensor ids_;
};

TEST_F(StageTest, EveryLinearIsRecordedOnceWithAllTokens) {
  const auto backend = make_backend({"cpu", DType::kF32, 2});
  Activations activations = embedded(*backend);
  const PackedBlock block = run(*backend, activations);
  ASSERT_EQ(block.records.size(), 7u);
  for (const QuantizeRecord& record : block.records) {
    EXPECT_EQ(record.method, "gptq") << record.module;
    EXPECT_EQ(record.tokens, 12 * 16) << record.module;
    EXPECT_EQ(record.samples, 12) << record.module;
    EXPECT_GT(record.relative_error, 0) << record.module;
    EXPECT_LT(record.relative_error, 0.1) << record.module;
  }
  EXPECT_FALSE(block.failed);
}

// Groups follow the order of solving: g_idx is a permutation of full groups, one per input for the linears that share it.
TEST_F(StageTest, DynamicOrderScattersGroupsAlikeOverACut) {
  options_.quantize.act_order = ActOrder::kDynamic;
  const auto backend = make_backend({"cpu", DType::kF32, 1});
  Activations activations = embedded(*backend);
  const PackedBlock block = run(*backend, activations);
  std::map<std::string, std::vector<int32_t>> groups;
  for (const NamedTensor& t : block.tensors)
    if (t.name.ends_with(".g_idx"))
      groups[t.name.substr(t.name.find("layers.0.") + 9)] = {t.data.as<int32_t>(), t.data.as<int32_t>() + t.data.elements()};
  ASSERT_EQ(groups.size(), 7u);
  EXPECT_EQ(groups["self_attn.q_proj.g_idx"], groups["self_attn.k_proj.g_idx"]);
  EXPECT_EQ(groups["mlp.gate_proj.g_idx"], groups["mlp.up_proj.g_idx"]);
  EXPECT_NE(groups["self_attn.q_proj.g_idx"], groups["mlp.up_proj.g_idx"]);
  for (auto& [name, group] : groups) {
    EXPECT_FALSE(std::is_sorted(group.begin(), group.end())) << name;
    std::sort(group.begin(), group.end());
    for (size_t i = 0; i < group.size(); ++i) EXPECT_EQ(group[i], static_cast<int32_t>(i) / 32) << name;
  }
}

// The block's output is what a reader of the packed tensors computes: propagation uses the dequantized weights.
TEST_F(StageTest, OutputIsThatOfTheQuantizedBlock) {
  const auto backend = make_backend({"cpu", DType::kF32, 1});
  Activations activations = embedded(*backend), plain = embedded(*backend);
  const Tensor rope = rope_table(source_.spec().rope, 16);
  const auto graph = source_.family().graph(source_.spec(), 0, rope);
  const BlockSpec& spec = source_.spec().blocks[0];
  const PackedBlock block = run(*backend, activations);

  testing::TemporaryDirectory directory;
  std::vector<NamedView> views;
  for (const NamedTensor& tensor : block.tensors) views.push_back({tensor.name, tensor.data});
  write_safetensors(directory.file("model.safetensors"), views);
  const Checkpoint written = Checkpoint::open(directory.path());
  const OutputFormat& format = find_format("gptq");
  std::vector<ModuleChoice> modules;
  for (const BlockSpec& b : source_.spec().blocks)
    for (const LinearSpec& linear : b.linears) modules.push_back({linear.module, true, 4, 32, true});
  const Json config = Json::parse(format.config(options_.quantize, modules).quantization_config.dump());
  BlockWeights weights = source_.read_block_floats(spec, *backend);
  for (size_t i = 0; i < spec.linears.size(); ++i) {
    Tensor dense(DType::kF32, {spec.linears[i].out, spec.linears[i].in});
    backend->dequantize(format.unpack(written, spec.linears[i], config), dense);
    weights.set_linear(static_cast<int>(i), dense, *backend);
  }
  Tensor scratch;
  for (size_t i = 0; i < plain.batches.size(); ++i) {
    for (int cut = 0; cut < 4; ++cut) {
      const TensorView x = graph->input(cut, weights, plain.batches[i], *backend, scratch);
      graph->advance(cut, weights, x, plain.batches[i], *backend);
    }
    ASSERT_EQ(std::memcmp(plain.batches[i].hidden.data(), activations.batches[i].hidden.data(),
                          static_cast<size_t>(plain.batches[i].hidden.bytes())), 0);
  }
}

TEST_F(StageTest, ThreadsDoNotChangeABit) {
  for (DType compute : {DType::kF32, DType::kBF16}) {
    std::vector<char> first;
    for (int threads : {1, 2, 3}) {
      const auto backend = make_backend({"cpu", compute, threads});
      Activations activations = embedded(*backend);
      const std::vector<char> now = bytes(run(*backend, activations));
      if (first.empty()) first = now;
      EXPECT_EQ(now, first) << threads << " threads";
    }
  }
}

// With one float forward of the whole block the first cut sees the same inputs, the later ones do not.
TEST_F(StageTest, TrueSequentialChangesOnlyLaterCuts) {
  const auto backend = make_backend({"cpu", DType::kF32, 1});
  Activations a = embedded(*backend), b = embedded(*backend);
  const PackedBlock sequential = run(*backend, a);
  options_.quantize.true_sequential = false;
  const PackedBlock whole = run(*backend, b);
  ASSERT_EQ(sequential.records.size(), whole.records.size());
  for (size_t i = 0; i < whole.records.size(); ++i) {
    const bool first_cut = i < 3;  // q, k, v
    EXPECT_EQ(sequential.records[i].error == whole.records[i].error, first_cut) << whole.records[i].module;
  }
}

auto ends_with(std::string end) {
  return [end = std::move(end)](const std::string& module) { return module.ends_with(end); };
}

TEST_F(StageTest, RulesSkipAndOverride) {
  options_.quantize.rules.push_back({"", ends_with("v_proj"), {{"skip", "true"}}});
  options_.quantize.rules.push_back({"", ends_with("down_proj"), {{"algorithm", "rtn"}, {"bits", "8"}}});
  const auto backend = make_backend({"cpu", DType::kF32, 1});
  Activations activations = embedded(*backend);
  const PackedBlock block = run(*backend, activations);
  EXPECT_EQ(block.records.size(), 6u);
  bool float_v = false;
  for (const NamedTensor& tensor : block.tensors) float_v |= tensor.name == "model.layers.0.self_attn.v_proj.weight";
  EXPECT_TRUE(float_v);
  for (const QuantizeRecord& record : block.records)
    if (record.module.ends_with("down_proj")) {
      EXPECT_EQ(record.method, "rtn");
      EXPECT_EQ(record.bits, 8);
    }
}

TEST_F(StageTest, RoundToNearestNeedsNoActivations) {
  options_.quantize.algorithm = "rtn";
  EXPECT_FALSE(needs_calibration(options_, source_.spec()));
  const auto backend = make_backend({"cpu", DType::kF32, 1});
  Activations none;
  testing::OneRank rank(options_, source_, find_format("gptq"), *backend);
  EXPECT_EQ(Stage(rank.context).run(1, nullptr, none).records.size(), 7u);
}

// The head is one more linear behind the last block: all tokens, its Hessian from the final norm.
TEST_F(StageTest, HeadIsQuantizedFromTheFinalNormsOutput) {
  options_.quantize.lm_head = true;
  for (bool sequential : {true, false}) {
    options_.quantize.true_sequential = sequential;
    const auto backend = make_backend({"cpu", DType::kF32, 2});
    Activations activations = embedded(*backend);
    testing::OneRank rank(options_, source_, find_format("gptq"), *backend);
    const PackedBlock head = Stage(rank.context).run_head(activations);
    ASSERT_EQ(head.records.size(), 1u);
    EXPECT_EQ(head.records[0].module, "lm_head");
    EXPECT_EQ(head.records[0].method, "gptq");
    EXPECT_EQ(head.records[0].tokens, 12 * 16);
    EXPECT_EQ(head.records[0].out, 512);
    for (const NamedTensor& tensor : head.tensors)
      EXPECT_TRUE(tensor.name.starts_with("lm_head.")) << tensor.name;
    // tr(W H W^T) of the record is that of the normed hidden states.
    Tensor norm(DType::kF32, {128}), normed(DType::kF32, {192, 128});
    convert(source_.read_float("model.norm.weight", *backend), norm);
    int64_t row = 0;
    for (const MicroBatch& batch : activations.batches) {
      backend->rms_norm(batch.hidden, norm, source_.spec().norm_eps,
                        normed.view().slice(row, row + batch.tokens()));
      row += batch.tokens();
    }
    Tensor h = Tensor::zeros(DType::kF32, {hessian_elements(128)});
    backend->hessian_update(normed, h);
    const Tensor weight = source_.read_weight(source_.spec().head_linear(), DType::kF32, *backend);
    Tensor rows(DType::kF64, {weight.rows()});
    backend->layer_errors(weight, TensorView(), h, 2.0 / 12, rows);
    const double signal = std::accumulate(rows.as<double>(), rows.as<double>() + weight.rows(), 0.0);
    EXPECT_NEAR(head.records[0].error / head.records[0].relative_error / signal, 1, 1e-5);
  }
}

std::string refusal(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kInput);
    return error.what();
  }
  return "accepted";
}

// NaN and infinity in the calibration activations name the first module that sees them, and the
// sample.
TEST_F(StageTest, NonFiniteActivationsNameModuleAndSample) {
  for (bool sequential : {true, false}) {
    options_.quantize.true_sequential = sequential;
    for (const char* algorithm :
         {"gptq", "rtn"}) {  // rtn needs no Hessian, but the activations still go on
      options_.quantize.algorithm = algorithm;
      const auto backend = make_backend({"cpu", DType::kF32, 1});
      Activations activations = embedded(*backend);
      ASSERT_GE(activations.batches.size(), 3u);
      const BatchRange range = activations.ranges[2];
      ASSERT_GE(range.samples, 2);
      // Token 5 of the batch's second sample.
      activations.batches[2].hidden.as<float>()[(16 + 5) * 128 + 3] =
          std::numeric_limits<float>::quiet_NaN();
      const std::string text = refusal([&] { run(*backend, activations); });
      EXPECT_NE(
          text.find(fmt::format(
              "model.layers.0.self_attn.q_proj: its input is not finite in calibration sample {} "
              "(token 5,",
              range.first_sample + 1)),
          std::string::npos)
          << text;
    }
  }
}

}  // namespace
}  // namespace bitmill
