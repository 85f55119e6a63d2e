// Stage: quantizes one block on one rank, segment by segment ("capture is propagation").
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
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "core/options.h"
#include "pipeline/calibration.h"
#include "pipeline/loader.h"
#include "pipeline/records.h"

namespace bitmill {

// Micro-batches of this rank between two blocks, with their lanes.
struct Activations {
  std::vector<BatchRange> ranges;
  std::vector<MicroBatch> batches;
  // The same tokens as the float model has them, for gptaq; empty when nothing compares with it.
  std::vector<MicroBatch> float_batches;
};

// What a block becomes: tensors for its shard.
struct PackedBlock {
  std::vector<NamedTensor> tensors;
  std::vector<QuantizeRecord> records;
  bool failed = false;  // some module met on_failed=fail
};

class Stage {
 public:
  // All references outlive the stage. `on_record` is called once per finished linear.
  Stage(const RunOptions& options, const ModelSource& source, const OutputFormat& format, Backend& backend,
        PhaseSeconds& phases, std::function<void(const QuantizeRecord&)> on_record);

  // Quantizes block `index`; activations (may be empty: nothing needs calibration) become the block's output.
  PackedBlock run(int64_t index, const BlockGraph* graph, Activations& activations);
  // Quantizes the head behind the last block: its Hessian is that of the final norm's output.
  // `activations` (may be empty, as above) stay as they are; the tensors are the head's alone.
  PackedBlock run_head(Activations& activations);

 private:
  struct Work;     // state of the block being quantized
  struct Capture;  // sums of one cut while its inputs pass by
  struct CutSums;  // what a cut is solved with
  void run_cuts(Work& work);
  void check_finite(const Work& work, int cut, TensorView x, const BatchRange& range) const;
  Capture start_capture(const Work& work, int cut) const;
  CutSums collect(Work& work, int cut);
  void collect_whole_block(Work& work);
  void solve(Work& work, int cut, const CutSums* sums);
  void advance(Work& work, int cut, Capture* next);
  void advance_float(Work& work, int cut, MicroBatch& batch);
  std::vector<QuantizeResult> quantize_group(Work& work, const std::vector<int>& linears, const CutSums* sums);
  void keep(Work& work, int linear, QuantizeResult result);
  void keep_float(Work& work, int linear);
  void add_input(Work& work, int cut, const MicroBatch& batch, const BatchRange& range, HessianAccumulator& sum);
  void add_inputs(Work& work, int cut, size_t batch, Capture& capture);
  bool needs_hessian(const BlockSpec& block, int cut) const;
  bool needs_mismatch(const BlockSpec& block, int cut) const;
  Tensor read_float(const Work& work, const std::string& name) const;
  BlockWeights read_changed_block(const Work& work);

  const RunOptions& options_;
  const ModelSource& source_;
  const OutputFormat& format_;
  Backend& backend_;
  PhaseSeconds& phases_;
  std::function<void(const QuantizeRecord&)> on_record_;
};

// Does any module of the model compare its inputs with the float model's?
bool needs_float_stream(const RunOptions& options, const ModelSpec& spec);
// Does any module of the model need calibration data with these options?
bool needs_calibration(const RunOptions& options, const ModelSpec& spec);
// How many of `samples` samples of `length` tokens a run looks at: all where a Hessian is collected, the first awq.tokens
// tokens where activations only decide scales, none for plain rounding.
int64_t samples_needed(const RunOptions& options, const ModelSpec& spec, int64_t samples, int64_t length);

}  // namespace bitmill
