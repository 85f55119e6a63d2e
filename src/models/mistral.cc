// Mistral: no biases; sliding_window (absent: 4096, null: none) holds for every block unless
// layer_types says otherwise.
#include "models/layers.h"
#include "io/json.h"

namespace bitmill {

namespace {

class Mistral final : public DecoderFamily {
 public:
  Mistral() : DecoderFamily("mistral", "MistralForCausalLM") {}

  ModelSpec describe(const Json& config) const override {
    const ConfigKeys keys(config);
    const int64_t window = keys.size_or_off("sliding_window", 4096);
    DecoderTraits traits;
    traits.default_max_positions = 131072;
    traits.default_kv_heads = 8;
    traits.windows = keys.has("layer_types") ? windows_from_layer_types(keys, window)
                                             : std::vector<int64_t>(block_count(keys), window);
    return describe_decoder(config, name(), traits);
  }
};

}  // namespace

const ModelFamily& mistral_family() {
  static const Mistral family;
  return family;
}

}  // namespace bitmill
