// Llama: attention_bias puts a bias on all four attention linears, mlp_bias on the MLP's three.
#include "models/layers.h"
#include "io/json.h"

namespace bitmill {

namespace {

class Llama final : public DecoderFamily {
 public:
  Llama() : DecoderFamily("llama", "LlamaForCausalLM") {}

  ModelSpec describe(const Json& config) const override {
    const ConfigKeys keys(config);
    DecoderTraits traits;
    traits.default_max_positions = 2048;
    traits.qkv_bias = traits.o_bias = keys.flag_or("attention_bias", false);
    traits.mlp_bias = keys.flag_or("mlp_bias", false);
    return describe_decoder(config, name(), traits);
  }
};

}  // namespace

const ModelFamily& llama_family() {
  static const Llama family;
  return family;
}

}  // namespace bitmill
