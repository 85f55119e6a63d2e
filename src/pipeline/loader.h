// ModelSource: a checkpoint as the pipeline sees it, float or quantized by any of our formats. Reads byte ranges on
// demand, refuses non-finite weights, and gives every linear as one dense weight.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "formats/format.h"
#include "models/family.h"

namespace bitmill {

class ModelSource {
 public:
  // Opens and checks `directory` on this rank alone.
  static ModelSource open(const std::string& directory);
  // Collective: rank 0 reads config and headers and checks them, the others get the result; all throw the same Error.
  static ModelSource open(const std::string& directory, Communicator& comm);

  const std::string& directory() const { return checkpoint_.directory(); }
  const Json& config() const { return config_; }
  const ModelSpec& spec() const { return spec_; }
  const ModelFamily& family() const { return *family_; }
  const Checkpoint& checkpoint() const { return checkpoint_; }
  const OutputFormat* format() const { return format_; }  // nullptr: a float checkpoint
  // Tensors of the checkpoint that the family does not know.
  const std::vector<std::string>& unknown_tensors() const { return unknown_; }

  // A float tensor as stored; Error(kInput) naming tensor and first index when it holds NaN or Inf.
  Tensor read_float(const std::string& name, Backend& backend) const;
  // Dense weight [out, in] of a linear in `dtype` (F32, or the compute type), dequantized if it is
  // packed, transposed if it is stored as [in, out]. `linear` may be the spec's head_linear(),
  // whose float weight is the embedding when tied.
  Tensor read_weight(const LinearSpec& linear, DType dtype, Backend& backend) const;
  // Rows [first, end) of that weight: [end - first, in].
  Tensor read_weight_rows(const LinearSpec& linear, int64_t first, int64_t end, DType dtype, Backend& backend) const;
  // Does the head have a packed weight of its own?
  bool head_packed() const;
  // Bias as stored, empty when there is none.
  Tensor read_bias(const LinearSpec& linear, Backend& backend) const;
  // Norms and biases of a block; linears are left to the caller.
  BlockWeights read_block_floats(const BlockSpec& block, Backend& backend) const;
  // Everything of a block, ready to run.
  BlockWeights read_block(const BlockSpec& block, Backend& backend) const;

 private:
  ModelSource(Json config, Checkpoint checkpoint);

  Json config_;
  Checkpoint checkpoint_;
  const ModelFamily* family_;
  ModelSpec spec_;
  const OutputFormat* format_ = nullptr;
  std::vector<std::string> unknown_;
};

// float32 or bfloat16 for this model on these ranks: auto = bfloat16 where every rank's hardware has it and the model is
// bf16. Collective.
DType resolve_compute(Compute wanted, const ModelSpec& spec, Communicator& comm);

}  // namespace bitmill
