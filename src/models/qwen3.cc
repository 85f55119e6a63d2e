// Qwen3: RMSNorm per head on q and k before rope, head_dim independent of hidden_size (128 when
// absent).
#include "models/layers.h"
#include "io/json.h"

namespace bitmill {

namespace {

class Qwen3 final : public DecoderFamily {
 public:
  Qwen3() : DecoderFamily("qwen3", "Qwen3ForCausalLM") {}

  ModelSpec describe(const Json& config) const override {
    const ConfigKeys keys(config);
    DecoderTraits traits;
    traits.default_max_positions = 32768;
    traits.default_kv_heads = 32;
    traits.qkv_bias = traits.o_bias = keys.flag_or("attention_bias", false);
    traits.qk_norm = true;
    traits.default_head_dim = 128;
    traits.windows = qwen_windows(keys);
    return describe_decoder(config, name(), traits);
  }
};

}  // namespace

const ModelFamily& qwen3_family() {
  static const Qwen3 family;
  return family;
}

}  // namespace bitmill
