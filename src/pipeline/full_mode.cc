#include "pipeline/full_mode.h"

#include "pipeline/stage.h"

namespace bitmill {

FullWave::FullWave(const BlockContext& context, BlockRange blocks, TensorView rope) : context_(context), range_(blocks) {
  const ModelSource& source = context.source;
  for (int64_t b = blocks.first; b < blocks.end; ++b)
    blocks_.push_back({source.spec().blocks[b], source.family().graph(source.spec(), b, rope)});
}

void FullWave::capture(Activations& activations, bool last_wave, bool output_needed) {
  for (Block& block : blocks_) {
    // AWQ looks at the block's own input, so the plan gives it waves of one block.
    if (uses_awq(context_.options, block.spec)) {
      BITMILL_CHECK(blocks_.size() == 1);
      block.change = find_block_change(context_, block.spec, *block.graph, activations);
    }
    block.weights = read_changed_block(context_, block.spec, block.change);
    for (int cut = 0; cut < static_cast<int>(block.spec.cuts.size()); ++cut)
      block.captures.emplace_back(context_, block.spec, cut, false);
  }
  for (size_t i = 0; i < activations.batches.size(); ++i) {
    activations.await(i);
    MicroBatch& batch = activations.batches[i];
    for (Block& block : blocks_) {
      const bool final_block = last_wave && &block == &blocks_.back();
      run_float_block(context_, block.spec, *block.graph, block.weights, activations.ranges[i], batch, block.captures,
                      !final_block || output_needed);
    }
    if (!last_wave) continue;
    if (activations.leave) activations.leave(i);
    else if (!output_needed) batch = MicroBatch();
  }
  for (Block& block : blocks_) {
    block.weights = BlockWeights(block.spec);
    for (CutCapture& capture : block.captures) block.sums.push_back(capture.merge());
    block.captures.clear();
  }
}

PackedBlock FullWave::solve(int64_t index) {
  Block& block = blocks_[static_cast<size_t>(index - range_.first)];
  BlockSolver solver(context_, block.spec, block.change);
  read_ahead(context_, block.spec, 0);
  for (int cut = 0; cut < static_cast<int>(block.spec.cuts.size()); ++cut) {
    const bool needed = needs_hessian(context_.options, block.spec, cut);
    solver.solve(cut, needed ? &block.sums[cut] : nullptr, nullptr);
    block.sums[cut] = CutSums();
    read_ahead(context_, block.spec, cut + 1);
  }
  return solver.finish();
}

}  // namespace bitmill
