// Full mode: the inputs of every block come from the float model, so a stage need not wait for the solves of the stages
// before it. Micro-batches stream through the float blocks of a stage while its Hessians are summed, one micro-batch being
// computed while the next arrives and the last one leaves; then all stages solve at the same time.
//
//   stage 0   f0 f1 f2 f3 f4 | solve block 0 | solve block 1 ...
//   stage 1      f0 f1 f2 f3 f4 | solve block 2 | ...
//
// A stage whose Hessians do not fit at once works in waves of consecutive blocks (RankPlan): all micro-batches through the
// first wave's blocks, its solves, all through the next wave's. The activations then stay in memory between waves, and only
// the last wave's leave the stage.
#pragma once

#include <memory>
#include <vector>

#include "pipeline/block_solver.h"
#include "pipeline/capture.h"
#include "pipeline/partition.h"

namespace bitmill {

class FullWave {
 public:
  // Reads the wave's blocks in float. `rope` outlives the wave.
  FullWave(const BlockContext& context, BlockRange blocks, TensorView rope);
  // Runs all micro-batches through the blocks, awaiting each; those of the last wave leave the stage. `output_needed`: does
  // anything follow the stage's last block? Ends with the float weights freed and the sums merged. Collective.
  void capture(Activations& activations, bool last_wave, bool output_needed);
  // Quantizes one block from its sums, which are then freed. Collective.
  PackedBlock solve(int64_t block);

 private:
  struct Block {
    const BlockSpec& spec;
    std::unique_ptr<BlockGraph> graph;
    BlockChange change = {};
    BlockWeights weights = BlockWeights(spec);
    std::vector<CutCapture> captures = {};
    std::vector<CutSums> sums = {};
  };

  const BlockContext& context_;
  BlockRange range_;
  std::vector<Block> blocks_;
};

}  // namespace bitmill
