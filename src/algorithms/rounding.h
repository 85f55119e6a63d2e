// What rtn and gptq share: checking a problem, its grids, plain rounding, and the stored form of a
// result.
#pragma once

#include "algorithms/quantizer.h"

namespace bitmill {

// Scales and zeros of one linear in the weight's type, [out, groups], and the group of each column,
// I32 [in].
struct GridTensors {
  Tensor scales, zeros, column_group;
};

// Error(kInput), naming module and element, for a weight that is not finite.
void check_weight(const LinearProblem& problem, Backend& backend);
// Uninitialised grids of the right shapes with column_group = column / group_size.
GridTensors make_grids(const LinearProblem& problem);
// Grids of `weight` (the problem's, or a copy with dead columns zeroed), their ranges searched
// where `columns` is not empty. Error(kInput) for a scale
// beyond its stored type.
GridTensors fit_problem_grids(const LinearProblem& problem, TensorView weight,
                              const ColumnStatsView& columns, Backend& backend);
// Error(kInput) naming module and stored type.
[[noreturn]] void fail_scale(const LinearProblem& problem);
GridOptions grid_options(const LinearProblem& problem);

// The record's fields that are known before any arithmetic. `hessian` may be null.
QuantizeRecord start_record(const LinearProblem& problem, const Hessian* hessian);
// Packs codes and grids into a QuantizedLinear with scales in their stored type.
QuantizedLinear make_linear(const LinearProblem& problem, Tensor codes, GridTensors grids);

// Rounds to nearest, with errors measured against `hessian` where it is given and has tokens.
// Needs one copy of the weight besides the codes.
QuantizeResult round_to_nearest(const LinearProblem& problem, const Hessian* hessian,
                                Backend& backend);

// Throws kUsage for settings that no algorithm takes: bits outside 2..8, a group size that is
// neither -1 nor positive.
void check_grid_settings(const QuantizeSettings& settings);

}  // namespace bitmill
