// Bytes that one cut of a block takes on one member of its stage: the terms of which
// pipeline/memory.h makes moments.
#pragma once

#include "pipeline/memory.h"

namespace bitmill {

// Buffers that a run bounds whatever the model: their sizes are constants of the code that holds
// them.
struct FixedBuffers {
  static constexpr int64_t kWriteQueue = 64 << 20;  // rank_work.cc: tensors that wait for the disk
  static constexpr int64_t kReadAhead = 32 << 20;   // block_solver.cc
  static constexpr int64_t kReadPiece = 16 << 20;   // loader.cc: what is read and converted at once
  static constexpr int64_t kInFlight = 4;           // batch_flow.h: micro-batches, at each end
};

struct CutMemory {
  int64_t elements = 0;   // weights of the cut (of one expert)
  int64_t own = 0;        // of them, rows of the tiles that the member solves
  int64_t largest = 0;    // weights of its largest linear
  int64_t prepared = 0;   // all weights in the compute type
  int64_t preparing = 0;  // a second copy of the largest linear while it gets its final layout
  int64_t grids = 0;      // F32 scales and zero points of all rows
  int64_t hessian = 0;    // one packed triangle, F32
  int64_t mismatch = 0;   // gptaq's sums
  int64_t live = 0, partials = 0;  // sums while summing, and when the lanes are done

  int64_t sums() const { return hessian + mismatch; }
};

// What a member does with a cut in which order, in bytes.
class CutMemoryModel {
 public:
  CutMemoryModel(const PlanInput& input, const Member& member);

  CutMemory of(const CutWork& cut) const;
  // Weights in F32, codes and grids of what is being solved; the factor and its threads' tiles.
  int64_t solving(const CutWork& cut) const;
  int64_t factoring(const CutWork& cut) const;
  // The same for linears that need no Hessian: one after the other, in pieces of rows.
  int64_t rounding(const CutWork& cut) const;
  // Codes and grids of the linear that is packed while the cut's weights become those of the
  // output.
  int64_t packing(const CutWork& cut) const;

  // Activations of `tokens` tokens at a cut: residual stream plus stored carry (see MicroBatch),
  // twice with a float stream.
  int64_t activations(const BlockWork& block, size_t cut, int64_t tokens) const;
  // Temporaries of one micro-batch while a cut's linears run, and while its input is added to its
  // sums.
  int64_t running(const BlockWork& block, size_t cut) const;
  int64_t summing(const CutWork& cut) const;
  int64_t batch_tokens() const { return member_.share.batch_samples * input_.job.length; }
  int64_t tokens() const { return tokens_; }
  int64_t compute() const { return compute_; }
  int64_t own_experts(const CutWork& cut) const {
    return (cut.count + member_.width - 1) / member_.width;
  }

 private:
  int64_t carry(const BlockWork& block, size_t cut) const;
  double split(const CutWork& cut) const;
  int64_t sweep_tiles(const CutWork& cut) const;

  const PlanInput& input_;
  const Member& member_;
  int64_t compute_, hidden_, tokens_;
  int64_t all_live_;  // live sums of a member with all lanes: an expert's owner
};

}  // namespace bitmill
