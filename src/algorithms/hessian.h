// Hessian accumulation that gives the same bits for any number of ranks and threads.
//
// H = 2/samples * sum x x^T is kept as an un-normalised sum plus sample and token counts. Samples belong to fixed lanes;
// inside a lane micro-batches add up in order; lanes fold as a fixed binary tree over their numbers, in binary-counter
// order, so that at most log2(lanes)+1 partial sums live (docs/algorithms.md).
#pragma once

#include <vector>

#include "backends/backend.h"

namespace bitmill {

// A finished Hessian of one distinct input.
struct Hessian {
  int64_t columns = 0;
  int64_t samples = 0;  // sequences: the N of 2/N
  int64_t tokens = 0;
  Tensor sum;           // packed lower triangle (backend.h), F32 or F64; empty when tokens == 0
  double factor() const { return samples > 0 ? 2.0 / static_cast<double>(samples) : 0.0; }
};

class HessianAccumulator {
 public:
  // `dtype` kF32, or kF64 for reference checks.
  HessianAccumulator(int64_t columns, DType dtype, Backend& backend);
  // Adds one micro-batch x [tokens, columns] of `samples` sequences to `lane`. Lanes come in ascending order.
  void add(TensorView x, int64_t samples, int lane);
  // Folds what is open and returns the whole; the accumulator is then empty. Zero tokens is a legal result.
  Hessian finish();

 private:
  void close_lane();
  void fold_top();            // the two newest subtrees become one
  void fold_below(int lane);  // folds every subtree that is complete when `lane` begins

  int64_t columns_;
  DType dtype_;
  Backend& backend_;
  Tensor open_;        // the lane being summed
  int lane_ = -1;
  int64_t samples_ = 0, tokens_ = 0;
  // Finished subtrees, left to right, each under the number of its first lane with samples. A lane without samples adds no
  // zero matrix: its sibling moves up unchanged, so the tree's shape depends only on which lanes have samples.
  std::vector<std::pair<int, Tensor>> counter_;
};

}  // namespace bitmill
