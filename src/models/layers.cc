#include "models/layers.h"
#include "io/json.h"

#include <cmath>

namespace bitmill {

// ---- description
// --------------------------------------------------------------------------------------------

namespace {

// Positions in BlockSpec::linears, ::norms and ::cuts.
enum Linear { kQ, kK, kV, kO, kGate, kUp, kDown };
enum Norm { kInputNorm, kMlpNorm, kQNorm, kKNorm };
enum Cut { kQkvCut, kOCut, kGateUpCut, kDownCut };

DType parse_dtype(const ConfigKeys& keys) {
  const std::string key = keys.has("dtype") ? "dtype" : "torch_dtype";
  const std::string text = keys.text_or(key, "float32");  // what the files mean by leaving it out
  if (text == "bfloat16") return DType::kBF16;
  if (text == "float16") return DType::kF16;
  if (text == "float32") return DType::kF32;
  fail(ExitCode::kInput, "config.json: {} is {}; supported: bfloat16, float16, float32", key,
       quote_name(text));
}

Activation parse_activation(const ConfigKeys& keys) {
  const std::string key = keys.has("hidden_act") ? "hidden_act" : "hidden_activation";
  const std::string text = keys.text_or(key, "silu");
  if (text == "silu" || text == "swish") return Activation::kSilu;
  if (text == "gelu_pytorch_tanh" || text == "gelu_new") return Activation::kGeluTanh;
  if (text == "relu") return Activation::kRelu;
  fail(ExitCode::kInput,
       "config.json: {} is {}; known: silu, swish, gelu_pytorch_tanh, gelu_new, relu", key,
       quote_name(text));
}

void read_heads(const ConfigKeys& keys, const DecoderTraits& traits, ModelSpec& spec) {
  spec.heads = keys.size("num_attention_heads");
  const int64_t kv_heads = keys.size_or_off("num_key_value_heads", traits.default_kv_heads);
  spec.kv_heads = kv_heads == 0 ? spec.heads : kv_heads;
  if (spec.heads % spec.kv_heads != 0)
    fail(ExitCode::kInput,
         "config.json: num_key_value_heads {}{} does not divide num_attention_heads {}",
         spec.kv_heads, keys.has("num_key_value_heads") ? "" : " (the family's default)",
         spec.heads);
  const bool derived = !keys.has("head_dim") && traits.default_head_dim == 0;
  if (derived && spec.hidden % spec.heads != 0)
    fail(ExitCode::kInput,
         "config.json: num_attention_heads {} does not divide hidden_size {} and there is no "
         "head_dim",
         spec.heads, spec.hidden);
  spec.head_dim =
      derived ? spec.hidden / spec.heads : keys.size_or("head_dim", traits.default_head_dim);
  spec.attention_scale = static_cast<float>(1 / std::sqrt(static_cast<double>(spec.head_dim)));
}

BlockSpec describe_block(const ModelSpec& spec, const DecoderTraits& traits, int64_t index) {
  const std::string prefix = fmt::format("model.layers.{}.", index);
  const std::string attention = prefix + "self_attn.", mlp = prefix + "mlp.";
  const int64_t q = spec.heads * spec.head_dim, kv = spec.kv_heads * spec.head_dim;
  BlockSpec block;
  block.index = index;
  block.linears = {
      {attention + "q_proj", q, spec.hidden, traits.qkv_bias},
      {attention + "k_proj", kv, spec.hidden, traits.qkv_bias},
      {attention + "v_proj", kv, spec.hidden, traits.qkv_bias},
      {attention + "o_proj", spec.hidden, q, traits.o_bias},
      {mlp + "gate_proj", spec.intermediate, spec.hidden, traits.mlp_bias},
      {mlp + "up_proj", spec.intermediate, spec.hidden, traits.mlp_bias},
      {mlp + "down_proj", spec.hidden, spec.intermediate, traits.mlp_bias},
  };
  block.linears[kQ].clip = block.linears[kK].clip = false;
  block.norms = {{prefix + "input_layernorm.weight", {spec.hidden}},
                 {prefix + "post_attention_layernorm.weight", {spec.hidden}}};
  if (traits.qk_norm) {
    block.norms.push_back({attention + "q_norm.weight", {spec.head_dim}});
    block.norms.push_back({attention + "k_norm.weight", {spec.head_dim}});
  }
  FoldSpec input_norm, values, mlp_norm, up;
  input_norm.norm = kInputNorm;
  if (spec.heads == spec.kv_heads) values.linear = kV;
  mlp_norm.norm = kMlpNorm;
  up.linear = kUp;
  block.cuts = {{"qkv", {kQ, kK, kV}, spec.hidden, input_norm},
                {"o", {kO}, q, values, true},
                {"gate_up", {kGate, kUp}, spec.hidden, mlp_norm},
                {"down", {kDown}, spec.intermediate, up, true}};
  if (!traits.windows.empty()) block.sliding_window = traits.windows.at(index);
  return block;
}

}  // namespace

int64_t block_count(const ConfigKeys& keys) {
  const int64_t blocks = keys.size("num_hidden_layers");
  if (blocks > 10000)  // a typing error should not allocate specs without end
    fail(ExitCode::kInput, "config.json: num_hidden_layers is {}, expected at most 10000", blocks);
  return blocks;
}

std::vector<int64_t> windows_from_layer_types(const ConfigKeys& keys, int64_t window) {
  const std::vector<std::string> types = keys.texts("layer_types");
  if (static_cast<int64_t>(types.size()) != block_count(keys))
    fail(ExitCode::kInput, "config.json: layer_types has {} entries, expected num_hidden_layers {}",
         types.size(), block_count(keys));
  std::vector<int64_t> windows;
  for (const std::string& type : types) {
    if (type != "full_attention" && type != "sliding_attention")
      fail(ExitCode::kInput,
           "config.json: layer_types holds {}; known: full_attention, sliding_attention",
           quote_name(type));
    if (type == "sliding_attention" && window == 0)
      fail(ExitCode::kInput,
           "config.json: layer_types holds sliding_attention, but sliding_window is off");
    windows.push_back(type == "sliding_attention" ? window : 0);
  }
  return windows;
}

std::vector<int64_t> qwen_windows(const ConfigKeys& keys) {
  const bool on = keys.flag_or("use_sliding_window", false);
  const int64_t window = on ? keys.size_or_off("sliding_window", 4096) : 0;
  if (keys.has("layer_types")) return windows_from_layer_types(keys, window);
  std::vector<int64_t> windows(block_count(keys), 0);
  if (window == 0) return windows;
  const int64_t first = keys.has("max_window_layers") ? keys.count("max_window_layers") : 28;
  for (int64_t i = first; i < static_cast<int64_t>(windows.size()); ++i) windows[i] = window;
  return windows;
}

ModelSpec describe_shared_keys(const Json& config, const std::string& family,
                               const DecoderTraits& traits) {
  const ConfigKeys keys(config);
  ModelSpec spec;
  spec.family = family;
  spec.model_type = keys.text_or("model_type", family);
  spec.dtype = parse_dtype(keys);
  spec.dtype_given = keys.has("dtype") || keys.has("torch_dtype");
  spec.vocab = keys.size("vocab_size");
  spec.hidden = keys.size("hidden_size");
  spec.intermediate = keys.size("intermediate_size");
  const char* positions = "max_position_embeddings";
  spec.max_positions = traits.default_max_positions == 0
                           ? keys.size(positions)
                           : keys.size_or(positions, traits.default_max_positions);
  spec.norm_eps = static_cast<float>(keys.positive_or("rms_norm_eps", 1e-6));
  spec.activation = parse_activation(keys);
  spec.tied = keys.flag_or("tie_word_embeddings", traits.tied_by_default);
  spec.qk_norm = traits.qk_norm;
  spec.embedding = {"model.embed_tokens.weight", {spec.vocab, spec.hidden}};
  spec.final_norm = {"model.norm.weight", {spec.hidden}};
  spec.head = spec.tied ? spec.embedding : TensorSpec{"lm_head.weight", {spec.vocab, spec.hidden}};
  return spec;
}

ModelSpec describe_decoder(const Json& config, const std::string& family,
                           const DecoderTraits& traits) {
  const ConfigKeys keys(config);
  ModelSpec spec = describe_shared_keys(config, family, traits);
  read_heads(keys, traits, spec);
  spec.rope = parse_rope(config, spec.head_dim, spec.max_positions);
  const int64_t blocks = block_count(keys);
  for (int64_t index = 0; index < blocks; ++index)
    spec.blocks.push_back(describe_block(spec, traits, index));
  return spec;
}

// ---- forward
// ------------------------------------------------------------------------------------------------

namespace {

// Holds copies, so that it outlives the spec it was made from; the rope table stays the caller's.
class DecoderGraph final : public BlockGraph {
 public:
  DecoderGraph(const ModelSpec& spec, int64_t block, TensorView rope)
      : block_(spec.blocks.at(block)),
        heads_(spec.heads),
        kv_heads_(spec.kv_heads),
        head_dim_(spec.head_dim),
        scale_(spec.attention_scale),
        eps_(spec.norm_eps),
        activation_(spec.activation),
        qk_norm_(spec.qk_norm),
        rope_(rope) {}

  TensorView input(int cut, const BlockWeights& weights, const MicroBatch& batch, Backend& backend,
                   Tensor& scratch) const override;
  void advance(int cut, const BlockWeights& weights, TensorView input, MicroBatch& batch,
               Backend& backend) const override;

 private:
  // x W^T + b in F32, into a new tensor.
  Tensor project(int linear, const BlockWeights& weights, TensorView input, Backend& backend) const;
  // hidden += x W^T + b; hidden is F32 afterwards.
  void add_to_hidden(int linear, const BlockWeights& weights, TensorView input, MicroBatch& batch,
                     Backend& backend) const;
  // Per-head norm (where the family has one) and rotary embedding, in place.
  void position(TensorView x, int64_t heads, int norm, const BlockWeights& weights,
                Backend& backend) const;
  void attend(const BlockWeights& weights, TensorView input, MicroBatch& batch,
              Backend& backend) const;
  void gate(const BlockWeights& weights, TensorView input, MicroBatch& batch,
            Backend& backend) const;

  BlockSpec block_;
  int64_t heads_, kv_heads_, head_dim_;
  float scale_, eps_;
  Activation activation_;
  bool qk_norm_;
  TensorView rope_;
};

TensorView DecoderGraph::input(int cut, const BlockWeights& weights, const MicroBatch& batch,
                               Backend& backend, Tensor& scratch) const {
  if (cut == kOCut || cut == kDownCut) return batch.carry.view();
  const std::string& norm = block_.norms[cut == kQkvCut ? kInputNorm : kMlpNorm].name;
  const bool fits = !scratch.empty() && scratch.shape() == batch.hidden.shape() &&
                    scratch.dtype() == backend.compute();
  if (!fits) {
    scratch.reset();
    scratch = backend.allocate(backend.compute(), batch.hidden.shape());
  }
  backend.rms_norm(batch.hidden, weights.floats(norm), eps_, scratch);
  return scratch.view();
}

void DecoderGraph::advance(int cut, const BlockWeights& weights, TensorView input,
                           MicroBatch& batch, Backend& backend) const {
  switch (cut) {
    case kQkvCut:
      return attend(weights, input, batch, backend);
    case kOCut:
      return add_to_hidden(kO, weights, input, batch, backend);
    case kGateUpCut:
      return gate(weights, input, batch, backend);
    case kDownCut:
      add_to_hidden(kDown, weights, input, batch, backend);
      break;
    default:
      fail(ExitCode::kInternal, "a decoder block has no cut {}", cut);
  }
  if (backend.compute() == DType::kF32) return;
  Tensor rounded = backend.allocate(backend.compute(), batch.hidden.shape());
  backend.convert(batch.hidden, rounded);
  batch.hidden = std::move(rounded);
}

Tensor DecoderGraph::project(int linear, const BlockWeights& weights, TensorView input,
                             Backend& backend) const {
  const LinearSpec& spec = block_.linears[linear];
  Tensor out = backend.allocate(DType::kF32, {input.rows(), spec.out});
  const TensorView bias = spec.bias ? weights.floats(spec.bias_name()) : TensorView{};
  backend.linear(input, weights.linear(linear), bias, {}, out);
  return out;
}

void DecoderGraph::add_to_hidden(int linear, const BlockWeights& weights, TensorView input,
                                 MicroBatch& batch, Backend& backend) const {
  const LinearSpec& spec = block_.linears[linear];
  const TensorView bias = spec.bias ? weights.floats(spec.bias_name()) : TensorView{};
  if (batch.hidden.dtype() == DType::kF32) {
    backend.linear(input, weights.linear(linear), bias, batch.hidden, batch.hidden);
  } else {
    Tensor sum = backend.allocate(DType::kF32, batch.hidden.shape());
    backend.linear(input, weights.linear(linear), bias, batch.hidden, sum);
    batch.hidden = std::move(sum);
  }
  batch.carry.reset();  // `input` was a view of it
}

void DecoderGraph::position(TensorView x, int64_t heads, int norm, const BlockWeights& weights,
                            Backend& backend) const {
  if (qk_norm_) {
    const TensorView rows = x.reshaped({x.rows() * heads, head_dim_});
    backend.rms_norm(rows, weights.floats(block_.norms[norm].name), eps_, rows);
  }
  backend.rope(x, heads, head_dim_, rope_);
}

void DecoderGraph::attend(const BlockWeights& weights, TensorView input, MicroBatch& batch,
                          Backend& backend) const {
  BITMILL_CHECK(rope_.rows() == batch.length && input.rows() == batch.tokens());
  const Tensor q = project(kQ, weights, input, backend);
  const Tensor k = project(kK, weights, input, backend);
  const Tensor v = project(kV, weights, input, backend);
  position(q, heads_, kQNorm, weights, backend);
  position(k, kv_heads_, kKNorm, weights, backend);
  batch.carry = backend.allocate(backend.compute(), {batch.tokens(), heads_ * head_dim_});
  AttentionShape shape;
  shape.sequences = batch.sequences;
  shape.length = batch.length;
  shape.heads = heads_;
  shape.kv_heads = kv_heads_;
  shape.head_dim = head_dim_;
  shape.scale = scale_;
  shape.sliding_window = block_.sliding_window;
  backend.attention(q, k, v, shape, batch.carry);
}

void DecoderGraph::gate(const BlockWeights& weights, TensorView input, MicroBatch& batch,
                        Backend& backend) const {
  const auto bias = [&](int linear) {
    const LinearSpec& spec = block_.linears[linear];
    return spec.bias ? weights.floats(spec.bias_name()) : TensorView{};
  };
  batch.carry = backend.allocate(backend.compute(), {batch.tokens(), block_.linears[kGate].out});
  backend.gated_linear(input, weights.linear(kGate), bias(kGate), weights.linear(kUp), bias(kUp), activation_,
                       batch.carry);
}

}  // namespace

std::unique_ptr<BlockGraph> DecoderFamily::graph(const ModelSpec& spec, int64_t block,
                                                 TensorView rope) const {
  return std::make_unique<DecoderGraph>(spec, block, rope);
}

}  // namespace bitmill
