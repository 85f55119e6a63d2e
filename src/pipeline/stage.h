// Stage: quantizes one block on the ranks that share it, segment by segment ("capture is propagation").
//
// Quantized mode: for each cut of the block: the Hessian of its input over all micro-batches, the solve, then the cut's
// linears run once with their quantized weights, while the next cut's Hessian is already being summed:
//
//   collect(cut 0)  solve 0  advance 0 + collect 1  solve 1  advance 1 + collect 2  ...  advance last
//
// quantize.true_sequential=false: one float forward of the whole block collects all Hessians, then all cuts are solved and
// the block runs a second time with quantized weights.
//
// Where a linear uses gptaq, the float model's activations run in step, segment by segment, and the sums of a cut say how
// far its inputs are from them.
//
// Where a linear uses AWQ, a pass over the float block comes first (pipeline/awq_pass.h); all of the above then works on the
// scaled and clipped block.
//
// Each member of a stage runs the micro-batches of its lanes and solves its row tiles (pipeline/stage_group.h).
#pragma once

#include <vector>

#include "pipeline/batch_flow.h"
#include "pipeline/block_context.h"
#include "pipeline/block_solver.h"
#include "pipeline/capture.h"

namespace bitmill {

class Stage {
 public:
  explicit Stage(const BlockContext& context) : context_(context) {}

  // Quantizes block `index`; activations (may be empty: nothing needs calibration) become the block's output, or, where
  // nothing needs it, are left inside the block, before its last cut's linears. Collective among the members.
  PackedBlock run(int64_t index, const BlockGraph* graph, Activations& activations, bool output_needed = true);
  // Quantizes the head behind the last block: its Hessian is that of the final norm's output.
  // `activations` (may be empty, as above) stay as they are; the tensors are the head's alone.
  PackedBlock run_head(Activations& activations);

 private:
  struct Work;  // state of the block being quantized
  void run_cuts(Work& work);
  CutSums collect(Work& work, int cut);
  std::vector<CutSums> collect_whole_block(Work& work);
  void advance(Work& work, int cut, CutCapture* next);
  void advance_float(Work& work, int cut, MicroBatch& batch);
  void add_inputs(Work& work, int cut, size_t batch, CutCapture& capture);
  bool needs_hessian(const Work& work, int cut) const;

  const BlockContext& context_;
};

// The float block after AWQ's scaling (and before clipping): it computes what the source's does. Each member reads a part
// of the rows and gets the others from their readers. Collective.
BlockWeights read_changed_block(const BlockContext& context, const BlockSpec& block, const BlockChange& change);

// Does any module of the model compare its inputs with the float model's?
bool needs_float_stream(const RunOptions& options, const ModelSpec& spec);
// Does any module of the model need calibration data with these options?
bool needs_calibration(const RunOptions& options, const ModelSpec& spec);
// How many of `samples` samples of `length` tokens a run looks at: all where a Hessian is collected, the first awq.tokens
// tokens where activations only decide scales, none for plain rounding.
int64_t samples_needed(const RunOptions& options, const ModelSpec& spec, int64_t samples, int64_t length);

}  // namespace bitmill
