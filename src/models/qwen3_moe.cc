// Qwen3 with routed experts: attention as Qwen3; dense MLPs in mlp_only_layers and between sparse
// steps. Described for the plan only.
#include <algorithm>

#include "io/json.h"
#include "models/experts.h"
#include "models/layers.h"

namespace bitmill {

namespace {

class Qwen3Moe final : public DecoderFamily {
 public:
  Qwen3Moe() : DecoderFamily("qwen3_moe", "Qwen3MoeForCausalLM") {}

  ModelSpec describe(const Json& config) const override {
    const ConfigKeys keys(config);
    DecoderTraits traits;
    traits.default_max_positions = 32768;
    traits.default_kv_heads = 4;
    traits.qkv_bias = traits.o_bias = keys.flag_or("attention_bias", false);
    traits.qk_norm = true;
    traits.windows = qwen_windows(keys);
    ModelSpec spec = describe_decoder(config, name(), traits);
    ExpertTraits experts;
    experts.count = keys.size_or("num_experts", 128);
    experts.top_k = keys.size_or("num_experts_per_tok", 8);
    experts.width = keys.size_or("moe_intermediate_size", 768);
    check_experts(experts, static_cast<int64_t>(spec.blocks.size()), "num_experts");
    const int64_t step = keys.size_or("decoder_sparse_step", 1);
    const std::vector<int64_t> dense = dense_blocks(keys);
    for (BlockSpec& block : spec.blocks) {
      const bool listed = std::find(dense.begin(), dense.end(), block.index) != dense.end();
      if (!listed && (block.index + 1) % step == 0) replace_mlp(block, spec.hidden, experts);
    }
    return spec;
  }

  std::unique_ptr<BlockGraph> graph(const ModelSpec&, int64_t, TensorView) const override {
    refuse_forward(name());
  }

 private:
  static std::vector<int64_t> dense_blocks(const ConfigKeys& keys) {
    if (!keys.has("mlp_only_layers")) return {};
    const Json& list = keys.json().at("mlp_only_layers");
    std::vector<int64_t> blocks;
    for (const Json& entry : list) {
      if (!list.is_array() || !entry.is_number_integer())
        fail(ExitCode::kInput, "config.json: mlp_only_layers is {}, expected block numbers",
             list.dump());
      blocks.push_back(entry.get<int64_t>());
    }
    return blocks;
  }
  // The dense MLP of the shared decoder, its last three linears and two cuts, makes way.
  static void replace_mlp(BlockSpec& block, int64_t hidden, const ExpertTraits& experts) {
    block.linears.resize(block.linears.size() - 3);
    block.cuts.resize(block.cuts.size() - 2);
    add_experts(block, fmt::format("model.layers.{}.mlp.", block.index), hidden, experts);
  }
};

}  // namespace

const ModelFamily& qwen3_moe_family() {
  static const Qwen3Moe family;
  return family;
}

}  // namespace bitmill
