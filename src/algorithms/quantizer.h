// The Quantizer interface and the table of algorithms. A quantizer knows weights, a Hessian and settings; no model, file or
// rank. Numeric trouble is a recorded state, never an exception (except non-finite input, which is refused).
#pragma once

#include <span>
#include <string>
#include <vector>

#include "algorithms/hessian.h"
#include "core/options.h"
#include "core/quantized.h"

namespace bitmill {

// One linear of a cut.
struct LinearProblem {
  std::string module;
  TensorView weight;          // host [rows, in]: F32, or F64 in the golden suite
  int64_t first_row = 0;      // of the linear, where `weight` is a tile of its rows (for messages)
  QuantizeSettings settings;  // bits, grid, order: resolved for this module
  DType scale_dtype = DType::kF16;  // the stored type, chosen by the output format; kF64: unrounded (weight's type)
  bool static_groups = false;       // group grids taken before the sweep also with act_order=none
  // Reference checks only (core/grid.h): no option sets them, because no output format stores
  // ternary codes, and the other ranges clip.
  GridKind kind = GridKind::kUniform;
  GridRange range = GridRange::kMirrored;
  // gptaq: what the input lost against the float model; null: nothing is known of it.
  const InputMismatch* mismatch = nullptr;
  // The caller does not need the weight afterwards: columns that are never active may be zeroed in
  // it, which saves a copy of it.
  bool may_zero_columns = false;
};

// What happened to one linear; goes into layers.csv and report.json as it is.
struct QuantizeRecord {
  std::string module;
  std::string method;        // really used: "gptq", "gptaq", "rtn", "awq", "awq+gptq", "awq+gptaq"
  std::string note;          // empty, or why the method is not the one asked for
  bool failed = false;       // the policy on_failed=fail applies
  int bits = 0;
  int64_t group_size = 0;
  int64_t out = 0, in = 0;
  int64_t samples = 0, tokens = 0;
  double damp = 0;           // fraction used
  int retries = 0;           // steps of the damping ladder
  double smallest_pivot = 0;
  int64_t dead_columns = 0;
  double loss = 0;           // sum over rows and columns of D_k (t_k - q_k)^2 / 2 (gptq)
  double error = 0;          // tr(E H E^T), H undamped, E from the corrected weight (gptaq); 0 without a Hessian
  double relative_error = 0; // error / tr(W H W^T); ||E||^2/||W||^2 without a Hessian
  double seconds = 0;        // wall time of its share of the cut
  double awq_ratio = -1;     // exponent of mean |x| that the search chose; -1: not scaled
  bool awq_weighted = false; // scales mean|x|^ratio / weight^(1-ratio) instead of mean|x|^ratio
  double awq_gain = 1;       // group's error with the chosen scales over that without scales
};

// What the sums of a record are made of, F64 [rows] each, one value per row of the weight.
struct RowSums {
  Tensor loss;    // sum over columns of D_k (t_k - q_k)^2 / 2; empty: no sweep
  Tensor error;   // e H e^T, or |e|^2 without a Hessian; may be a little below 0 by rounding
  Tensor signal;  // w H w^T, or |w|^2
};

struct QuantizeResult {
  QuantizedLinear linear;
  QuantizeRecord record;
  RowSums rows;
};

// Fills loss, error and relative_error of the record from the row sums, added in order of rows. The quantizers have done
// it; a caller who joins the rows of several results does it again.
void sum_rows(QuantizeResult& result);

// A linear may be solved in tiles of 256 rows on several ranks: rows depend on each other in nothing but what is decided
// here, for all of them. Every holder of rows of the linear calls in the same order, those without any rows too.
class RowPeers {
 public:
  virtual ~RowPeers() = default;
  // Does any holder say yes? Alone: what this one says.
  virtual bool any(bool mine) const { return mine; }
};

class Quantizer {
 public:
  virtual ~Quantizer() = default;
  virtual std::string name() const = 0;
  virtual bool needs_hessian() const = 0;
  // Does the caller follow the float model's activations too, and set LinearProblem::mismatch?
  virtual bool compares_with_float() const { return false; }
  // Does the caller scale weights by activations first (algorithms/awq.h)?
  virtual bool scales_weights() const { return false; }
  // Throws kUsage naming the key when the settings are impossible for this algorithm (bits, group size, order).
  virtual void check(const QuantizeSettings& settings) const = 0;
  // Quantizes linears that share one input. `hessian` may be null when needs_hessian() is false. All problems have the
  // same `in`; settings may differ (the factor is shared where order and damping agree). Problems may be row tiles of
  // their linears, which begin at multiples of 256 rows; `peers` then reaches the holders of the others.
  // Error(kInput) on a non-finite weight or Hessian (names the module and the element).
  virtual std::vector<QuantizeResult> quantize(std::span<const LinearProblem> problems, const Hessian* hessian,
                                               Backend& backend, const RowPeers& peers = RowPeers()) const = 0;
};

const std::vector<const Quantizer*>& quantizers();
// Error(kUsage) listing the known ones.
const Quantizer& find_quantizer(const std::string& name);

}  // namespace bitmill
