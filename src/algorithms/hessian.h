// Sums over calibration tokens that have the same bits for any number of ranks and threads.
//
// H = 2/samples * sum x x^T is kept as an un-normalised sum plus sample and token counts. Samples
// belong to fixed lanes; inside a lane micro-batches add up in order; lanes fold as a fixed binary
// tree over their numbers, in binary-counter order, so that at most log2(lanes)+1 partial sums live
// (docs/algorithms.md).
//
// Several holders may sum one range of lanes each. A holder folds the subtrees that lie in its lanes
// alone; `fold_parts` finishes the tree from what all of them hold, element by element.
#pragma once

#include <utility>
#include <vector>

#include "backends/backend.h"

namespace bitmill {

// Lanes [first, end) that one holder sums; those before and behind are somebody else's.
struct LaneRange {
  int first = 0, end = 1 << 30;
};

// A subtree of lanes that is summed up, under the number of its first lane with samples.
struct LanePart {
  int lane = 0;
  Tensor sum;
};

// The binary counter: finished subtrees, left to right. A lane without samples adds no zeros: its
// sibling moves up unchanged, so the tree's shape depends only on which lanes have samples.
class LaneTree {
 public:
  explicit LaneTree(Backend& backend, LaneRange lanes = {}) : backend_(backend), lanes_(lanes) {}
  // Folds every subtree that is complete when `lane` begins. Call it before `push`.
  void fold_below(int lane);
  // A part behind all that came.
  void push(LanePart part) { parts_.push_back(std::move(part)); }
  // All parts as one; empty without parts. The tree is then empty.
  Tensor finish();
  // What is left after folding all that needs nobody else's lanes. The tree is then empty.
  std::vector<LanePart> take();

 private:
  void fold_top();  // the two newest subtrees become one

  Backend& backend_;
  LaneRange lanes_;
  std::vector<LanePart> parts_;
};

// The whole from the parts of all holders, in ascending order of lanes; empty without parts. The
// parts may be equal slices of sums: folding adds element by element.
Tensor fold_parts(std::vector<LanePart> parts, Backend& backend);

// One tensor summed lane by lane.
class LaneSum {
 public:
  // `shape` of the sum, `dtype` kF32, or kF64 for reference checks.
  LaneSum(Shape shape, DType dtype, Backend& backend, LaneRange lanes = {});
  // The sum of `lane`, zeros at first, to be added to. Lanes come in ascending order; the reference
  // holds until the next call.
  Tensor& open(int lane);
  // Folds what is open and returns the whole; empty when no lane was opened. The sum then starts
  // anew. Of a sum of all lanes.
  Tensor finish();
  // What is summed up, in order of lanes, for `fold_parts`. The sum then starts anew.
  std::vector<LanePart> take_parts();
  const Shape& shape() const { return shape_; }
  DType dtype() const { return dtype_; }

 private:
  void close_lane();

  Shape shape_;
  DType dtype_;
  Backend& backend_;
  LaneRange lanes_;
  Tensor open_;  // the lane being summed
  int lane_ = -1;
  LaneTree tree_;
};

// A finished Hessian of one distinct input.
struct Hessian {
  int64_t columns = 0;
  int64_t samples = 0;  // sequences: the N of 2/N
  int64_t tokens = 0;
  Tensor sum;  // packed lower triangle (backend.h), F32 or F64; empty when tokens == 0
  double factor() const { return samples > 0 ? 2.0 / static_cast<double>(samples) : 0.0; }
};

class HessianAccumulator {
 public:
  // `dtype` kF32, or kF64 for reference checks.
  HessianAccumulator(int64_t columns, DType dtype, Backend& backend, LaneRange lanes = {});
  // Adds one micro-batch x [tokens, columns] of `samples` sequences to `lane`. Lanes come in
  // ascending order.
  void add(TensorView x, int64_t samples, int lane);
  // False when a NaN or infinity in what was added to the newest lane, or a sum beyond fp32, shows on its diagonal, where
  // squares add up.
  bool finite();
  // The whole; the accumulator is then empty. Zero tokens is a legal result.
  Hessian finish();
  // For callers who merge the sums of several holders.
  LaneSum& sum() { return sum_; }
  int64_t columns() const { return columns_; }
  int64_t samples() const { return samples_; }
  int64_t tokens() const { return tokens_; }

 private:
  int64_t columns_;
  Backend& backend_;
  LaneSum sum_;
  int lane_ = -1;  // the newest
  int64_t samples_ = 0, tokens_ = 0;
};

// What the inputs of a cut lost against the float model, for gptaq: sums over the tokens of a
// Hessian, un-normalised like it. x: inputs as the quantized blocks before give them, x_float:
// those of the float model, h and h_float: the residual stream that the cut's output is added to.
struct InputMismatch {
  Tensor inputs;    // [n, n], sum (x_float - x)^T x
  Tensor residual;  // [hidden, n], sum (h_float - h)^T x; empty where the output is not added to h
};

class MismatchAccumulator {
 public:
  // hidden 0: no residual.
  MismatchAccumulator(int64_t columns, int64_t hidden, DType dtype, Backend& backend,
                      LaneRange lanes = {});
  // x, x_float [tokens, columns] in the compute type (or F64); h, h_float [tokens, hidden] of one
  // type, empty without a residual. Differences are rounded to x's type.
  void add(TensorView x, TensorView x_float, TensorView h, TensorView h_float, int lane);
  InputMismatch finish();
  LaneSum& inputs() { return inputs_; }
  LaneSum& residual() { return residual_; }

 private:
  void add_product(TensorView value, TensorView value_float, TensorView x, Tensor& sum);

  Backend& backend_;
  LaneSum inputs_, residual_;
};

}  // namespace bitmill
