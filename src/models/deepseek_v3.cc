// DeepSeek-V3: attention over low-rank latents (MLA), first_k_dense_replace dense blocks, then
// blocks of shared and routed experts. Kimi-K2 has the same architecture. Described for the plan
// only; the extra prediction block (num_nextn_predict_layers) is no part of the model here.
#include <cmath>

#include "io/json.h"
#include "models/experts.h"
#include "models/layers.h"

namespace bitmill {

namespace {

// Ranks and head sizes of the attention.
struct Latents {
  int64_t q = 0;  // q_lora_rank; 0: q is projected at once
  int64_t kv = 0;
  int64_t plain = 0, rotated = 0,
          value = 0;  // columns of one head: q and k without and with rope, v
  bool bias = false;  // of q_a, kv_a and o
};

Latents read_latents(const ConfigKeys& keys) {
  Latents latents;
  latents.q = keys.size_or_off("q_lora_rank", 1536);
  latents.kv = keys.size("kv_lora_rank");
  latents.plain = keys.size("qk_nope_head_dim");
  latents.rotated = keys.size("qk_rope_head_dim");
  latents.value = keys.size("v_head_dim");
  latents.bias = keys.flag_or("attention_bias", false);
  return latents;
}

FoldSpec norm_fold(int norm) {
  FoldSpec fold;
  fold.norm = norm;
  return fold;
}

// Linears, norms and cuts up to the residual addition of o.
void add_attention(BlockSpec& block, const ModelSpec& spec, const Latents& latents) {
  const std::string prefix = fmt::format("model.layers.{}.", block.index);
  const std::string attention = prefix + "self_attn.";
  const int64_t q = spec.heads * (latents.plain + latents.rotated);
  const int64_t kv = spec.heads * (latents.plain + latents.value);
  block.norms = {{prefix + "input_layernorm.weight", {spec.hidden}},
                 {prefix + "post_attention_layernorm.weight", {spec.hidden}},
                 {attention + "kv_a_layernorm.weight", {latents.kv}}};
  const LinearSpec kv_a{attention + "kv_a_proj_with_mqa", latents.kv + latents.rotated, spec.hidden,
                        latents.bias};
  if (latents.q > 0) {
    block.norms.push_back({attention + "q_a_layernorm.weight", {latents.q}});
    block.linears = {{attention + "q_a_proj", latents.q, spec.hidden, latents.bias},
                     kv_a,
                     {attention + "q_b_proj", q, latents.q}};
    block.cuts = {{"q_a_kv_a", {0, 1}, spec.hidden, norm_fold(0)},
                  {"q_b", {2}, latents.q, norm_fold(3)}};
  } else {
    block.linears = {{attention + "q_proj", q, spec.hidden}, kv_a};
    block.cuts = {{"q_kv_a", {0, 1}, spec.hidden, norm_fold(0)}};
  }
  const int next = static_cast<int>(block.linears.size());
  block.linears.push_back({attention + "kv_b_proj", kv, latents.kv});
  block.linears.push_back(
      {attention + "o_proj", spec.hidden, spec.heads * latents.value, latents.bias});
  block.cuts.push_back({"kv_b", {next}, latents.kv, norm_fold(2)});
  block.cuts.push_back({"o", {next + 1}, spec.heads * latents.value, {}, true});
}

class DeepseekV3 final : public DecoderFamily {
 public:
  DeepseekV3() : DecoderFamily("deepseek_v3", "DeepseekV3ForCausalLM") {}

  ModelSpec describe(const Json& config) const override {
    const ConfigKeys keys(config);
    DecoderTraits traits;
    traits.default_max_positions = 4096;
    ModelSpec spec = describe_shared_keys(config, name(), traits);
    const Latents latents = read_latents(keys);
    spec.heads = spec.kv_heads = keys.size("num_attention_heads");
    spec.head_dim = latents.plain + latents.rotated;
    spec.value_dim = latents.value;
    spec.attention_scale = static_cast<float>(1 / std::sqrt(static_cast<double>(spec.head_dim)));
    spec.rope = parse_rope(config, latents.rotated, spec.max_positions);
    ExpertTraits experts{keys.size("n_routed_experts"), keys.size("num_experts_per_tok"),
                         keys.size("moe_intermediate_size")};
    const int64_t blocks = block_count(keys), shared = keys.count("n_shared_experts");
    check_experts(experts, blocks, "n_routed_experts");
    const int64_t dense =
        keys.has("first_k_dense_replace") ? keys.count("first_k_dense_replace") : 3;
    for (int64_t index = 0; index < blocks; ++index) {
      BlockSpec block;
      block.index = index;
      add_attention(block, spec, latents);
      const std::string mlp = fmt::format("model.layers.{}.mlp.", index);
      if (index < dense)
        add_mlp(block, mlp, "", spec.hidden, spec.intermediate);
      else
        add_moe(block, mlp, spec.hidden, shared, experts);
      spec.blocks.push_back(std::move(block));
    }
    return spec;
  }

  std::unique_ptr<BlockGraph> graph(const ModelSpec&, int64_t, TensorView) const override {
    refuse_forward(name());
  }

 private:
  // All shared experts are stored as one wider MLP.
  static void add_moe(BlockSpec& block, const std::string& mlp, int64_t hidden, int64_t shared,
                      const ExpertTraits& experts) {
    if (shared > 0)
      add_mlp(block, mlp + "shared_experts.", "shared_", hidden, shared * experts.width);
    block.norms.push_back({mlp + "gate.e_score_correction_bias", {experts.count}});
    add_experts(block, mlp, hidden, experts);
  }
};

}  // namespace

const ModelFamily& deepseek_v3_family() {
  static const DeepseekV3 family;
  return family;
}

}  // namespace bitmill
