// Whole forwards of small checkpoints against values computed outside in fp32 from the same bf16
// weights.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "io/tokens.h"
#include "support/model_runner.h"
#include "support/paths.h"
#include "io/json.h"

namespace bitmill {
namespace {

using testing::ModelRunner;
using testing::source_path;

std::unique_ptr<Backend> cpu(DType compute) {
  BackendOptions options;
  options.kind = "cpu";
  options.compute = compute;
  return make_backend(options);
}

// expected.safetensors holds only what its name says; it has no index beside it.
class Expected {
 public:
  explicit Expected(const std::string& directory)
      : reader_(directory + "/expected.safetensors"),
        json_(read_json(directory + "/expected.json")) {
    for (TensorEntry& entry : read_safetensors_header(directory + "/expected.safetensors"))
      entries_.emplace(entry.name, entry);
  }
  Tensor read(const std::string& name) const {
    const TensorEntry& entry = entries_.at(name);
    Tensor out(entry.dtype, entry.shape);
    reader_.read(entry.offset, entry.bytes, out.data());
    return out;
  }
  double tolerance(const std::string& key) const { return json_["suggested_tolerance"][key]; }
  const Json& json() const { return json_; }

 private:
  RangeReader reader_;
  Json json_;
  std::map<std::string, TensorEntry> entries_;
};

double max_difference(TensorView a, TensorView b) {
  BITMILL_CHECK(a.dtype == DType::kF32 && b.dtype == DType::kF32);
  BITMILL_CHECK(a.elements() <= b.elements());  // `b` may hold more sequences
  double largest = 0;
  for (int64_t i = 0; i < a.elements(); ++i) {
    const double difference = std::abs(double{a.as<float>()[i]} - b.as<float>()[i]);
    if (!(difference <= largest)) largest = difference;  // a NaN stays
  }
  return largest;
}

double rms_difference(TensorView a, TensorView b) {
  double sum = 0;
  for (int64_t i = 0; i < a.elements(); ++i)
    sum += std::pow(double{a.as<float>()[i]} - b.as<float>()[i], 2);
  return std::sqrt(sum / static_cast<double>(a.elements()));
}

class TinyModel : public ::testing::TestWithParam<const char*> {
 protected:
  std::string directory() const { return source_path(std::string("tests/data/") + GetParam()); }
};

TEST_P(TinyModel, Fp32LogitsAndHiddenStates) {
  const auto backend = cpu(DType::kF32);
  ModelRunner model(directory(), *backend);
  const Expected expected(directory());
  const std::vector<Tensor> states = model.hidden_states(expected.read("input_ids"));
  ASSERT_EQ(states.size(), model.spec().blocks.size() + 1);
  EXPECT_EQ(max_difference(expected.read("hidden.embed"), states[0]), 0);
  for (size_t block = 0; block + 1 < states.size(); ++block)
    EXPECT_LE(max_difference(expected.read(fmt::format("hidden.{}", block)), states[block + 1]),
              expected.tolerance("hidden_atol"))
        << "block " << block;
  EXPECT_LE(max_difference(expected.read("logits"), model.logits(states.back())),
            expected.tolerance("logits_atol"));
}

TEST_P(TinyModel, CutInputsAreTheLinearsInputs) {
  const auto backend = cpu(DType::kF32);
  ModelRunner model(directory(), *backend);
  const Expected expected(directory());
  const double rtol = expected.tolerance("hessian_diag_rtol");
  int compared = 0;
  model.hidden_states(expected.read("input_ids"), [&](int64_t block, const CutSpec& cut,
                                                      TensorView x) {
    ASSERT_EQ(x.cols(), cut.in);
    std::vector<double> sums(cut.in, 0.0);
    for (int64_t t = 0; t < x.rows(); ++t)
      for (int64_t i = 0; i < cut.in; ++i) sums[i] += std::pow(x.as<float>()[t * cut.in + i], 2.0);
    for (int linear : cut.linears) {
      const std::string module = model.spec().blocks[block].linears[linear].module;
      const Tensor diagonal = expected.read("hessian_diag." + module);
      for (int64_t i = 0; i < cut.in; ++i)
        ASSERT_NEAR(sums[i], diagonal.as<double>()[i], rtol * diagonal.as<double>()[i]) << module;
      ++compared;
    }
  });
  EXPECT_EQ(compared, 7 * static_cast<int>(model.spec().blocks.size()));
}

// The documented error of a bf16 run is a maximum over logits; the same with some slack bounds
// ours.
TEST_P(TinyModel, Bf16StaysNearFp32) {
  const auto backend = cpu(DType::kBF16);
  ModelRunner model(directory(), *backend);
  const Expected expected(directory());
  const std::vector<Tensor> states = model.hidden_states(expected.read("input_ids"));
  const Tensor logits = model.logits(states.back());
  const double documented = expected.json()["accuracy"]["logits_max_abs_bf16_vs_fp32"];
  const Tensor reference = expected.read("logits");
  EXPECT_LE(max_difference(reference, logits), 2 * documented);
  const double rms = rms_difference(reference, logits);
  EXPECT_LE(rms, documented / 3);
  EXPECT_GT(rms, documented / 1000) << "bf16 rounds nothing";
}

// Micro-batches of one sequence give what one of two gives: nothing crosses sequences.
TEST_P(TinyModel, SequencesAreIndependent) {
  const auto backend = cpu(DType::kF32);
  ModelRunner model(directory(), *backend);
  const Expected expected(directory());
  const Tensor ids = expected.read("input_ids");
  const std::vector<Tensor> both = model.hidden_states(ids);
  for (int64_t sequence = 0; sequence < ids.rows(); ++sequence) {
    const std::vector<Tensor> alone = model.hidden_states(ids.view().slice(sequence, sequence + 1));
    const TensorView part =
        both.back().view().slice(sequence * ids.cols(), (sequence + 1) * ids.cols());
    EXPECT_LE(max_difference(alone.back(), part), expected.tolerance("hidden_atol"));
  }
}

INSTANTIATE_TEST_SUITE_P(Fixtures, TinyModel,
                         ::testing::Values("tiny-llama", "tiny-llama-bias", "tiny-mistral",
                                           "tiny-qwen2", "tiny-qwen3"),
                         [](const auto& instance) {
                           std::string name = instance.param;
                           for (char& c : name)
                             if (c == '-') c = '_';
                           return name;
                         });

// The trained models give logits for the first positions of two evaluation windows.
void check_trained(const std::string& model_directory, const std::string& tokens_path) {
  const auto backend = cpu(DType::kF32);
  ModelRunner model(model_directory, *backend);
  const Expected expected(model_directory);
  const Tensor reference = expected.read("logits");
  const int64_t windows = reference.shape()[0], positions = reference.shape()[1];
  const Tensor ids = read_token_file(tokens_path, windows, positions, model.spec().vocab, "tokens");
  const std::vector<Tensor> states = model.hidden_states(ids);
  EXPECT_LE(max_difference(reference, model.logits(states.back())), 2e-4);
}

TEST(TrainedModel, DemoLogits) {
  check_trained(source_path("configs/demo/model"),
                source_path("configs/demo/eval-demo.safetensors"));
}

TEST(TrainedModel, BaseLogits) {
  const std::string model = testing::fixture_path("models/base");
  const std::string tokens = testing::fixture_path("data/eval-base.safetensors");
  if (model.empty() || tokens.empty()) GTEST_SKIP() << "the base model fixture is not there";
  check_trained(model, tokens);
}

// The graph frees the carry after it is consumed and leaves the hidden state in the compute type.
TEST(Segments, MemoryAndTypesAlongABlock) {
  const auto backend = cpu(DType::kBF16);
  ModelRunner model(source_path("tests/data/tiny-qwen3"), *backend);
  const ModelSpec& spec = model.spec();
  const Tensor rope = backend->upload(rope_table(spec.rope, 4));
  const auto graph = find_family({{"model_type", "qwen3"}}).graph(spec, 0, rope);
  MicroBatch batch;
  batch.sequences = 1;
  batch.length = 4;
  batch.hidden = backend->allocate(DType::kBF16, {4, spec.hidden});
  const Tensor ids = Tensor::zeros(DType::kI32, {4});
  const Tensor table = Tensor::zeros(DType::kBF16, {1, spec.hidden});
  for (int64_t i = 0; i < spec.hidden; ++i) table.as<BFloat16>()[i] = to_bf16(0.25f);
  backend->embed(ids, table, batch.hidden);
  Tensor scratch;
  struct Step {
    DType hidden;
    bool carry;
  };
  const Step after[] = {
      {DType::kBF16, true}, {DType::kF32, false}, {DType::kF32, true}, {DType::kBF16, false}};
  for (int cut = 0; cut < 4; ++cut) {
    const TensorView input = graph->input(cut, model.block(0), batch, *backend, scratch);
    EXPECT_EQ(input.dtype, DType::kBF16);
    EXPECT_EQ(input.data == batch.carry.data(), cut % 2 == 1);
    graph->advance(cut, model.block(0), input, batch, *backend);
    EXPECT_EQ(batch.hidden.dtype(), after[cut].hidden) << cut;
    EXPECT_EQ(!batch.carry.empty(), after[cut].carry) << cut;
  }
}

}  // namespace
}  // namespace bitmill
