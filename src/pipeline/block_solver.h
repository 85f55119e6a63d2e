// BlockSolver: quantizes the linears of a block, cut by cut, from the sums of their inputs. The members of a stage solve
// row tiles each, and every member ends with the whole of each linear.
#pragma once

#include <string>
#include <vector>

#include "pipeline/awq_pass.h"
#include "pipeline/block_context.h"
#include "pipeline/capture.h"

namespace bitmill {

// What a block becomes: tensors for its shards, those that this rank writes (none where BlockContext::on_tensor took them).
struct PackedBlock {
  std::vector<NamedTensor> tensors;
  std::vector<QuantizeRecord> records;
  bool failed = false;  // some module met on_failed=fail
};

// Starts reading the weights that solving a cut will want, in the background and within a bound; nothing for a cut that is
// not there. Changes nothing but time.
void read_ahead(const BlockContext& context, const BlockSpec& block, int cut);

class BlockSolver {
 public:
  // `change`: what AWQ decided about the block; it outlives the solver, as the others do.
  BlockSolver(const BlockContext& context, const BlockSpec& block, const BlockChange& change)
      : context_(context), block_(block), change_(change) {}

  // Quantizes the linears of a cut; `sums` may be null where nothing needs a Hessian. `weights`, unless null, gets what a
  // reader of the output computes with. Collective.
  void solve(int cut, const CutSums* sums, BlockWeights* weights);
  // The block's tensors, norms included. The solver is then done.
  PackedBlock finish();
  // A norm or bias as it is stored in the output.
  Tensor read_float(const std::string& name) const;

 private:
  std::vector<QuantizeResult> quantize(const std::vector<int>& linears, const CutSums* sums);
  QuantizeResult quantize_alone(int linear, const CutSums* sums);
  void keep(int linear, QuantizeResult result, BlockWeights* weights);
  void keep_float(int linear, BlockWeights* weights);
  void pack(int linear, const QuantizedLinear& quantized);
  void add_tensor(NamedTensor tensor);

  const BlockContext& context_;
  const BlockSpec& block_;
  const BlockChange& change_;
  PackedBlock packed_;
};

}  // namespace bitmill
