// Qwen2: biases on q, k and v; windows as qwen_windows in layers.h says.
#include "models/layers.h"
#include "io/json.h"

namespace bitmill {

namespace {

class Qwen2 final : public DecoderFamily {
 public:
  Qwen2() : DecoderFamily("qwen2", "Qwen2ForCausalLM") {}

  ModelSpec describe(const Json& config) const override {
    DecoderTraits traits;
    traits.default_max_positions = 32768;
    traits.default_kv_heads = 32;
    traits.qkv_bias = true;
    traits.windows = qwen_windows(ConfigKeys(config));
    return describe_decoder(config, name(), traits);
  }
};

}  // namespace

const ModelFamily& qwen2_family() {
  static const Qwen2 family;
  return family;
}

}  // namespace bitmill
