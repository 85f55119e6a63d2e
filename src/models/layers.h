// The decoder block that most families share: RMSNorm, grouped-query attention with rotary
// embedding, gated MLP.
//
//   hidden -> norm -> [qkv] q, k, v -> (q/k norm) -> rope -> attention -> [o] o + hidden
//          -> norm -> [gate_up] act(gate) * up -> [down] down + hidden -> next block
//
// [name] is a cut. A family of this shape is a `describe` that fills DecoderTraits from its
// config.json.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "models/config_keys.h"
#include "models/family.h"

namespace bitmill {

// Where families of this shape differ.
struct DecoderTraits {
  bool qkv_bias = false, o_bias = false, mlp_bias = false;
  bool qk_norm = false;
  int64_t default_head_dim = 0;       // 0: hidden_size / num_attention_heads
  // num_key_value_heads of a config.json without the key; 0, and a null in the file: as many as heads.
  int64_t default_kv_heads = 0;
  int64_t default_max_positions = 0;  // 0: max_position_embeddings must be there
  bool tied_by_default = false;
  std::vector<int64_t> windows;  // sliding window of each block, 0: full attention; empty: all full
};

// What every decoder's config.json says alike: sizes, dtype, norms, embedding and head. Heads, rope
// and blocks are left to the caller.
ModelSpec describe_shared_keys(const Json& config, const std::string& family,
                               const DecoderTraits& traits);
// The spec from the keys that all these families share (docs/models.md lists them).
ModelSpec describe_decoder(const Json& config, const std::string& family,
                           const DecoderTraits& traits);

// num_hidden_layers, 1 to 10,000.
int64_t block_count(const ConfigKeys& keys);
// Windows from layer_types ("full_attention" | "sliding_attention"); `window` is sliding_window, 0
// where null or off.
std::vector<int64_t> windows_from_layer_types(const ConfigKeys& keys, int64_t window);
// Qwen: sliding_window (4096 when absent, none when null) counts only with use_sliding_window, for
// the blocks from max_window_layers (28 when absent) on or as layer_types says.
std::vector<int64_t> qwen_windows(const ConfigKeys& keys);

// A family that is the shared decoder; files of families derive from it.
class DecoderFamily : public ModelFamily {
 public:
  DecoderFamily(std::string name, std::string architecture)
      : name_(std::move(name)), architecture_(std::move(architecture)) {}
  std::string name() const override { return name_; }
  // The architecture decides where there is one; older files have only model_type.
  bool matches(const std::string& architecture, const std::string& model_type) const override {
    return architecture.empty() ? model_type == name_ : architecture == architecture_;
  }
  std::unique_ptr<BlockGraph> graph(const ModelSpec& spec, int64_t block,
                                    TensorView rope) const override;

 private:
  std::string name_, architecture_;
};

// One line per family file.
const ModelFamily& llama_family();
const ModelFamily& mistral_family();
const ModelFamily& qwen2_family();
const ModelFamily& qwen3_family();
const ModelFamily& qwen3_moe_family();
const ModelFamily& deepseek_v3_family();

}  // namespace bitmill
