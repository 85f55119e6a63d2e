// What a model is, as plain data (ModelSpec), and how its blocks compute (ModelFamily, BlockGraph).
//
// A new family is one file (models/NAME.cc), one line in the table of family.cc and one CMake line. It reads config.json,
// lists its tensors, and either uses the shared decoder graph of layers.h or brings its own BlockGraph.
//
// Segments. A block's forward is cut at the inputs of its linears: qkv | o | gate,up | down. `input` gives what the linears
// of a cut consume, `advance` runs them and everything up to the next cut. The pipeline can therefore collect Hessians at a
// cut, quantize its linears, and run each linear exactly once, with its quantized weight.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backends/backend.h"
#include "io/checkpoint.h"

namespace bitmill {

// A float tensor of the checkpoint.
struct TensorSpec {
  std::string name;
  Shape shape;
};

// A linear layer y = x W^T + b of a block.
struct LinearSpec {
  std::string module;  // "model.layers.0.self_attn.q_proj"; tensors are module + ".weight" / ".bias"
  int64_t out = 0, in = 0;
  bool bias = false;
  bool clip = true;  // AWQ may clip the weight; not that of q and k, whose errors grow in the softmax
  // The checkpoint stores the weight as [in, out], y = x W + b (GPT-2's Conv1D). Readers transpose
  // it, so that everything else sees [out, in]; a module left in float is written as it was. No
  // family of this version sets it.
  bool transposed = false;
  // Shape of the float weight in the checkpoint.
  Shape stored_shape() const { return transposed ? Shape{in, out} : Shape{out, in}; }
  std::string weight_name() const { return module + ".weight"; }
  std::string bias_name() const { return module + ".bias"; }
};

// What makes the input x of a cut, for AWQ: column j of x may be divided by s_j there and column j of every consumer
// multiplied by s_j without changing what the block computes.
//   norm:   x = norm(hidden) * (norm_offset + w); w changes.
//   linear: x_j is proportional to output j of that linear (up -> down, v -> o); its row j and bias j change.
// At most one of the two; none: the input cannot be scaled (grouped v heads feed several columns of o).
struct FoldSpec {
  int norm = -1;             // index into BlockSpec::norms
  double norm_offset = 0;    // 1 where the family multiplies by 1 + w
  int linear = -1;           // index into BlockSpec::linears; its `out` equals the cut's `in`
  std::vector<TensorSpec> consumers;  // float tensors [*, in] that see x too (routers): their columns are multiplied
};

// The linears that share one input, and so one Hessian. `fused` engines load them as one matrix: one scheme for all.
struct CutSpec {
  std::string name;          // "qkv", "o", "gate_up", "down"
  std::vector<int> linears;  // indices into BlockSpec::linears
  int64_t in = 0;
  FoldSpec fold = {};
  bool adds_to_hidden = false;  // its output is added to the residual stream (o, down)
  // A routed expert of the block, by number; -1: the cut sees every token.
  int expert = -1;
  // Part of the tokens that reaches the cut, in the mean over experts: top_k / n_experts.
  double token_share = 1;
};

struct BlockSpec {
  int64_t index = 0;                // global block number
  std::vector<LinearSpec> linears;  // in order of the forward pass
  std::vector<TensorSpec> norms;    // float tensors of the block besides linears (norm weights)
  std::vector<CutSpec> cuts;
  int64_t sliding_window = 0;       // 0: full attention
};

enum class RopeKind { kDefault, kLinear, kDynamic, kLlama3, kYarn, kLongRope };

// Rotary embedding; every variant of docs/models.md.
struct RopeSpec {
  RopeKind kind = RopeKind::kDefault;
  double theta = 10000;
  int64_t dims = 0;  // rotated dims of each head (head_dim * partial_rotary_factor)
  double factor = 1;
  double low_freq_factor = 1, high_freq_factor = 4;  // llama3
  int64_t original_max_positions = 0;
  int64_t max_positions = 0;
  double beta_fast = 32, beta_slow = 1;              // yarn
  double attention_factor = 0;                       // 0: derived from the kind
  double mscale = 0, mscale_all_dim = 0;             // yarn; 0: absent
  bool truncate = true;                              // yarn
  std::vector<double> short_factor, long_factor;     // longrope
};

struct ModelSpec {
  std::string family;        // "llama"
  std::string model_type;    // as in config.json
  DType dtype = DType::kBF16;  // of the source weights, as config.json says
  // False when config.json has neither dtype nor torch_dtype: `describe` then says F32, and the
  // loader, which sees the tensors, puts the weights' dtype in its place.
  bool dtype_given = true;
  int64_t vocab = 0, hidden = 0, intermediate = 0;
  int64_t heads = 0, kv_heads = 0, head_dim = 0;  // head_dim: of q and k
  int64_t value_dim = 0;  // of v, where it differs from head_dim; 0: head_dim
  int64_t max_positions = 0;
  float norm_eps = 1e-6f;
  float attention_scale = 0;
  Activation activation = Activation::kSilu;
  RopeSpec rope;
  bool tied = false;         // head shares the embedding
  bool qk_norm = false;      // RMSNorm per head on q and k before rope (Qwen3)
  TensorSpec embedding, final_norm, head;  // head.name == embedding.name when tied
  std::vector<BlockSpec> blocks;

  // The head as a linear, for its packed form: "lm_head" [vocab, hidden] without bias. Its float
  // weight is `head`, which has another name when tied.
  LinearSpec head_linear() const {
    LinearSpec linear;
    linear.module = "lm_head";
    linear.out = vocab;
    linear.in = hidden;
    return linear;
  }
};

// cos and sin of positions 0..length-1: F32 [length, dims], the first dims/2 columns cos, the rest sin, attention factor
// included. Angles are computed in double and rounded once. `length` also decides dynamic and longrope variants.
Tensor rope_table(const RopeSpec& rope, int64_t length);

// Parses the rope keys of config.json in both spellings (rope_theta + rope_scaling, or rope_parameters).
// Error(kInput) on an unknown rope_type or a missing or nonsensical key.
RopeSpec parse_rope(const Json& config, int64_t head_dim, int64_t max_positions);

// Weights of one block on one backend: prepared linears, biases and norms. `replace` swaps in a quantized weight.
class BlockWeights {
 public:
  explicit BlockWeights(const BlockSpec& spec);
  // Norm and bias tensors (any source float type), kept as F32 on the backend. Key: tensor name.
  void set_float(const std::string& name, TensorView value, Backend& backend);
  // `weight` [out, in] in F32 or the compute type.
  void set_linear(int linear, TensorView weight, Backend& backend);
  void drop_linear(int linear);
  const PreparedWeight& linear(int linear) const;
  // F32 [n]; empty view for an absent bias.
  TensorView floats(const std::string& name) const;

 private:
  std::vector<std::unique_ptr<PreparedWeight>> linears_;
  std::vector<std::pair<std::string, Tensor>> floats_;
};

// One micro-batch between two points of a block.
struct MicroBatch {
  int64_t sequences = 0, length = 0;  // tokens = sequences * length
  Tensor hidden;  // residual stream [tokens, hidden]: compute type at a block boundary, F32 after the first addition
  Tensor carry;   // what the next cut consumes when that is not a function of `hidden` (attention output, gated act)
  int64_t tokens() const { return sequences * length; }
};

// The forward pass of one block, stateless but for its specs; owned by the model.
class BlockGraph {
 public:
  virtual ~BlockGraph() = default;
  // Input of cut `cut`'s linears, C [tokens, in]. Norms are recomputed (cheap), stored carries are returned as a view into
  // `batch`; `scratch` owns what is computed.
  virtual TensorView input(int cut, const BlockWeights& weights, const MicroBatch& batch, Backend& backend,
                           Tensor& scratch) const = 0;
  // Runs the linears of `cut` on `input` and all up to the next cut's carry, or to the block's end, where batch.hidden is
  // rounded to the compute type. Frees what is not needed any more.
  virtual void advance(int cut, const BlockWeights& weights, TensorView input, MicroBatch& batch,
                       Backend& backend) const = 0;
};

// A model family. Never touches files or ranks.
class ModelFamily {
 public:
  virtual ~ModelFamily() = default;
  virtual std::string name() const = 0;
  virtual bool matches(const std::string& architecture, const std::string& model_type) const = 0;
  // Error(kInput) naming the key that is missing or contradicts another.
  virtual ModelSpec describe(const Json& config) const = 0;
  // Graph of spec.blocks[block] for sequences of `length` tokens. The rope table is shared by the caller's blocks.
  virtual std::unique_ptr<BlockGraph> graph(const ModelSpec& spec, int64_t block, TensorView rope) const = 0;
};

// The families of this build, in table order.
const std::vector<const ModelFamily*>& model_families();
// The family of a config.json. Error(kInput) naming architecture and model_type and listing the known families.
const ModelFamily& find_family(const Json& config);

// Checks the checkpoint's tensors against the spec: all present, shapes as config.json implies, dtypes F16/BF16/F32 (one
// dtype for all linears). Error(kInput) naming up to 10 tensors, found and expected. Tensors the spec does not know are
// returned (they are copied or dropped by the caller, who says so). A tied model's lm_head.weight is known, though unused:
// it repeats the embedding, so no output takes it along and nothing of it is checked.
std::vector<std::string> check_tensors(const ModelSpec& spec, const Checkpoint& checkpoint);
// The same for a checkpoint with quantized linears: those whose module `packed` accepts need no
// float weight, and all tensors under their module name count as known (their format checks them);
// biases, norms and the rest are checked. It is asked for every block linear and for the head
// ("lm_head").
using PackedPredicate = std::function<bool(const std::string& module)>;
std::vector<std::string> check_tensors(const ModelSpec& spec, const Checkpoint& checkpoint,
                                       const PackedPredicate& packed);

}  // namespace bitmill
