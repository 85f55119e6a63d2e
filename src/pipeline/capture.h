// Capture: what is summed up of a cut's input while micro-batches pass by.
#pragma once

#include <optional>

#include "pipeline/batch_flow.h"
#include "pipeline/block_context.h"

namespace bitmill {

// What a cut is solved with.
struct CutSums {
  Hessian hessian;
  InputMismatch mismatch;  // empty where nothing compares with the float model
};

// Does a linear of the cut need the Hessian of its input, or the comparison with the float model's?
bool needs_hessian(const RunOptions& options, const BlockSpec& block, int cut);
bool needs_mismatch(const RunOptions& options, const BlockSpec& block, int cut);

// Error(kInput) naming module, sample, token and channel where a cut's input x [tokens, in] holds a NaN or infinity, which
// would spread to every later activation: the first module to see one is where to look.
void check_finite(Backend& backend, const BlockSpec& block, int cut, TensorView x, const BatchRange& range);
// The same, kept for StageGroup::agree: of all members' samples the first is to be named.
void note_finite(Backend& backend, const BlockSpec& block, int cut, TensorView x, const BatchRange& range,
                 std::optional<Error>& refused);

// The sums of one cut on this rank, lane by lane.
class CutCapture {
 public:
  // `compares`: a float stream runs along.
  CutCapture(const BlockContext& context, const BlockSpec& block, int cut, bool compares);
  // One micro-batch: x of the cut and its residual stream, and the float model's where `compares_with_float`.
  void add(TensorView x, const BatchRange& range);
  void compare(TensorView x, TensorView x_float, const MicroBatch& batch, const MicroBatch& float_batch,
               const BatchRange& range);
  bool compares_with_float() const { return mismatch_.has_value(); }
  // The sums of all members of the stage. Error(kInput), on all of them, for the first sample that was not finite.
  // Collective.
  CutSums merge();

 private:
  const BlockContext& context_;
  const BlockSpec& block_;
  int cut_;
  std::optional<Error> refused_;  // the first input of this member that is not finite
  HessianAccumulator hessian_;
  std::optional<MismatchAccumulator> mismatch_;
};

// Runs one micro-batch through a block with float weights, adding the input of each cut to its capture. `to_the_end`: the
// batch becomes the block's output; without it the last cut's linears are not run, and the batch is left inside the block.
void run_float_block(const BlockContext& context, const BlockSpec& block, const BlockGraph& graph,
                     const BlockWeights& weights, const BatchRange& range, MicroBatch& batch,
                     std::vector<CutCapture>& captures, bool to_the_end);

}  // namespace bitmill
