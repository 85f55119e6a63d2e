// AWQ: per-column scales that protect the weights of large activations (Lin et al., arXiv
// 2306.00978; docs/algorithms.md).
//
// A group of linears that share the input x computes the same with weights w * s and inputs x / s;
// rounding then errs less in columns with large s. The search tries s = mean|x|^ratio and keeps
// what disturbs the group's output least; folding moves 1/s into whatever makes x; clipping then
// shrinks the range of a row's group where that helps.
//
// All arithmetic exists in float and double: problems of F32 or F64 weights with a Hessian of the
// same type.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "algorithms/quantizer.h"

namespace bitmill {

// What the search knows about the input of a group.
struct InputStatistics {
  Tensor magnitudes;  // F64 [in], host: sum over tokens of |x|
  Hessian hessian;    // un-normalised sum and counts of the same tokens
};

// Candidate scales s [in], F64: max(mean^ratio, 1e-4), divided by the root of their largest times
// their smallest. `mean` F64 [in]; 0^0 = 1.
Tensor awq_scales(TensorView mean, double ratio);
// The same for max(mean^ratio / (weight^(1 - ratio) + 1e-4), 1e-4): columns whose weights are small
// against their group lose most by rounding and are raised too. `weight` F64 [in].
Tensor awq_scales(TensorView mean, TensorView weight, double ratio);
// Mean over the rows of all problems of |w| / (largest |w| of the row's group), F64 [in]; 0 in
// groups of zeros. The problems share their input.
Tensor relative_weights(std::span<const LinearProblem> problems);
// magnitudes / tokens, F64 [in].
Tensor mean_magnitudes(const InputStatistics& statistics);

struct ScaleSearch {
  Tensor scales;               // F64 [in]
  int best = 0;                // ratio best / ratios
  bool weighted = false;       // of the candidates with weights
  std::vector<double> losses;  // one per candidate: the plain ones, then the weighted ones
  double gain = 1;             // smallest loss over that without scaling (ratio 0)
};

// Mean squared output error of each candidate; candidates F64 [count, in].
using ScaleLoss = std::function<std::vector<double>(TensorView candidates)>;

// Tries ratio i / ratios for i = 0 .. ratios-1, plain and, unless `weight` is an empty view,
// weighted; keeps the first smallest loss and passes over losses that are not numbers.
// Error(kInput) naming `group` when all are. The scales are all 1 (exactly) where the plain ratio 0
// wins.
ScaleSearch search_scales(TensorView mean, TensorView weight, int ratios, const ScaleLoss& loss,
                          const std::string& group);

// The loss of linears side by side: sum over them of tr(E H E^T) / (tokens * outputs), E = W - Q(W
// s) / s on each problem's own grid (quantize.mse is left out). The arguments must outlive the
// function.
ScaleLoss group_loss(std::span<const LinearProblem> problems, const InputStatistics& statistics,
                     Backend& backend);

// Divides values of the previous op by s as far as its stored type allows: values' = stored((offset
// + values) / s - offset). values any float type [n], `offset` 0 or 1 (Gemma's 1 + w). Returns
// values' in values' type and replaces s (F64 [n]) by the effective scale (offset + values) /
// (offset + values'). Where offset + values is 0, or values' would be 0 or not finite, the value
// stays and s becomes 1, or remains as it is with `keep_scale_of_zero` (the bias of a linear: its
// weight row takes any s).
Tensor fold_into(TensorView values, double offset, bool keep_scale_of_zero, TensorView scales);

// In place on weight F32/F64 [rows, in]: columns times s [in]; rows divided by s [rows]; row r's
// group g clamped to +-limits[r, g], F64 [rows, groups].
void multiply_columns(TensorView weight, TensorView scales, Backend& backend);
void divide_rows(TensorView weight, TensorView scales, Backend& backend);
void clamp_groups(TensorView weight, int64_t group_size, TensorView limits, Backend& backend);

// A float consumer of the scaled input (a router) [*, in]: columns times s, in the consumer's
// stored type.
Tensor scaled_consumer(TensorView stored, TensorView scales, Backend& backend);

// In place on a packed Hessian: that of x / s.
void unscale_hessian(TensorView packed, TensorView scales);

// Clipping limits F64 [out, groups] of a scaled weight under the Hessian of its scaled input.
Tensor search_clip(const LinearProblem& problem, const Hessian& hessian, Backend& backend);

}  // namespace bitmill
