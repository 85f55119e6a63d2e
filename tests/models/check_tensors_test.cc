// What a checkpoint whose tensors do not fit its config.json is told.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "io/safetensors.h"
#include "models/family.h"
#include "support/paths.h"
#include "io/json.h"

namespace bitmill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

ModelSpec small_spec(bool tied = false) {
  const Json config = Json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "vocab_size": 8, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 16
  })");
  Json copy = config;
  copy["tie_word_embeddings"] = tied;
  return find_family(copy).describe(copy);
}

// A checkpoint that fits a spec, tensor by tensor changeable before it is written.
class SmallCheckpoint {
 public:
  explicit SmallCheckpoint(const ModelSpec& spec) {
    add(spec.embedding.name, spec.embedding.shape);
    add(spec.final_norm.name, spec.final_norm.shape);
    if (!spec.tied) add(spec.head.name, spec.head.shape);
    for (const BlockSpec& block : spec.blocks) {
      for (const LinearSpec& linear : block.linears)
        add(linear.weight_name(), {linear.out, linear.in});
      for (const TensorSpec& norm : block.norms) add(norm.name, norm.shape);
    }
  }
  void add(const std::string& name, Shape shape, DType dtype = DType::kBF16) {
    remove(name);
    tensors_.emplace_back(name, Tensor::zeros(dtype, shape));
  }
  void remove(const std::string& name) {
    std::erase_if(tensors_, [&](const auto& entry) { return entry.first == name; });
  }
  Checkpoint open() {
    std::vector<NamedView> views;
    for (const auto& [name, tensor] : tensors_) views.push_back({name, tensor.view()});
    write_safetensors(directory_.file("model.safetensors"), views);
    return Checkpoint::open(directory_.path());
  }

 private:
  testing::TemporaryDirectory directory_;
  std::vector<std::pair<std::string, Tensor>> tensors_;
};

std::string refusal(const ModelSpec& spec, SmallCheckpoint& files) {
  try {
    check_tensors(spec, files.open());
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kInput);
    return error.what();
  }
  return "accepted";
}

constexpr const char* kDown = "model.layers.1.mlp.down_proj.weight";

TEST(CheckTensors, AcceptsWhatFitsAndReturnsTheUnknown) {
  const ModelSpec spec = small_spec();
  SmallCheckpoint files(spec);
  EXPECT_THAT(check_tensors(spec, files.open()), IsEmpty());
  files.add("model.layers.0.self_attn.rotary_emb.inv_freq", {1}, DType::kF32);
  files.add("score.weight", {2, 4}, DType::kI64);
  EXPECT_THAT(check_tensors(spec, files.open()),
              ElementsAre("model.layers.0.self_attn.rotary_emb.inv_freq", "score.weight"));
}

// Some files repeat the embedding under the head's name: no tensor to take along.
TEST(CheckTensors, TiedModelNeedsNoHeadAndKnowsIt) {
  const ModelSpec spec = small_spec(true);
  SmallCheckpoint files(spec);
  EXPECT_THAT(check_tensors(spec, files.open()), IsEmpty());
  files.add("lm_head.weight", {8, 4});
  EXPECT_THAT(check_tensors(spec, files.open()), IsEmpty());
  files.add("lm_head.bias", {8});
  EXPECT_THAT(check_tensors(spec, files.open()), ElementsAre("lm_head.bias"));
}

TEST(CheckTensors, MissingTensorNamesTheNearest) {
  const ModelSpec spec = small_spec();
  SmallCheckpoint files(spec);
  files.remove(kDown);
  files.add("model.layers.1.mlp.downproj.weight", {4, 6});
  EXPECT_THAT(refusal(spec, files),
              HasSubstr("tensor model.layers.1.mlp.down_proj.weight [4, 6] is missing (nearest: "
                        "model.layers.1.mlp.downproj.weight)"));
}

TEST(CheckTensors, ShapeThatContradictsTheConfig) {
  const ModelSpec spec = small_spec();
  SmallCheckpoint files(spec);
  files.add(kDown, {4, 7});
  EXPECT_THAT(
      refusal(spec, files),
      HasSubstr(
          "model.layers.1.mlp.down_proj.weight has shape [4, 7], config.json implies [4, 6]"));
  files.add(kDown, {24});
  EXPECT_THAT(refusal(spec, files), HasSubstr("has shape [24]"));
}

TEST(CheckTensors, UnsupportedAndMixedDtypes) {
  const ModelSpec spec = small_spec();
  SmallCheckpoint files(spec);
  files.add(kDown, {4, 6}, DType::kF8E5M2);
  EXPECT_THAT(refusal(spec, files),
              HasSubstr("unsupported dtype F8_E5M2 for model.layers.1.mlp.down_proj.weight; "
                        "supported: F16, BF16, F32"));
  files.add(kDown, {4, 6}, DType::kF16);
  EXPECT_THAT(
      refusal(spec, files),
      HasSubstr("model.layers.1.mlp.down_proj.weight is F16, but "
                "model.layers.0.self_attn.q_proj.weight is BF16: all linears must have one dtype"));
  files.add(kDown, {4, 6});
  files.add("model.norm.weight", {4}, DType::kF32);  // norms may be wider than the linears
  EXPECT_THAT(check_tensors(spec, files.open()), IsEmpty());
}

TEST(CheckTensors, NamesAtMostTen) {
  const ModelSpec spec = small_spec();
  SmallCheckpoint files(spec);
  for (const BlockSpec& block : spec.blocks)
    for (const LinearSpec& linear : block.linears) files.remove(linear.weight_name());
  const std::string message = refusal(spec, files);
  EXPECT_THAT(message, HasSubstr("model.layers.1.self_attn.v_proj.weight"));
  EXPECT_THAT(message, ::testing::Not(HasSubstr("model.layers.1.self_attn.o_proj.weight")));
  EXPECT_THAT(message, HasSubstr("; and 4 more"));
}

TEST(CheckTensors, PackedLinearsAreTheirFormatsBusiness) {
  const ModelSpec spec = small_spec();
  SmallCheckpoint files(spec);
  files.remove(kDown);
  files.add("model.layers.1.mlp.down_proj.qweight", {1, 4}, DType::kI32);
  files.add("model.layers.1.mlp.down_proj.scales", {1, 4}, DType::kF16);
  const auto packed = [](const std::string& module) {
    return module == "model.layers.1.mlp.down_proj";
  };
  EXPECT_THAT(check_tensors(spec, files.open(), packed), IsEmpty());
  EXPECT_THAT(refusal(spec, files), HasSubstr("down_proj.weight [4, 6] is missing"));
  files.remove("model.norm.weight");
  const Checkpoint checkpoint = files.open();
  EXPECT_THROW(check_tensors(spec, checkpoint, packed), Error);
}

}  // namespace
}  // namespace bitmill
