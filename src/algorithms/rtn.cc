// Round to nearest, and the parts it shares with GPTQ.
#include "algorithms/rounding.h"

#include <algorithm>
#include <chrono>
#include <numeric>

namespace bitmill {
namespace {

// Squared norms of the rows of w - w_hat and of w.
template <typename T>
void square_rows(TensorView w, TensorView w_hat, RowSums& rows) {
  for (int64_t r = 0; r < w.rows(); ++r) {
    double error = 0, signal = 0;
    for (int64_t i = r * w.cols(); i < (r + 1) * w.cols(); ++i) {
      const double e = static_cast<double>(w.as<T>()[i] - w_hat.as<T>()[i]);
      const double value = static_cast<double>(w.as<T>()[i]);
      error += e * e;
      signal += value * value;
    }
    rows.error.as<double>()[r] = error;
    rows.signal.as<double>()[r] = signal;
  }
}

double total(const Tensor& values) {
  if (values.empty()) return 0;
  return std::accumulate(values.as<double>(), values.as<double>() + values.elements(), 0.0);
}

// Fills the row sums of a finished result.
void measure(const LinearProblem& problem, const Hessian* hessian, Backend& backend,
             QuantizeResult& result) {
  const TensorView w = problem.weight;
  Tensor w_hat = backend.allocate(w.dtype, w.shape);
  backend.dequantize(result.linear, w_hat);
  result.rows.error = Tensor(DType::kF64, {w.rows()});
  result.rows.signal = Tensor(DType::kF64, {w.rows()});
  if (hessian && hessian->tokens > 0) {
    backend.layer_errors(w, w_hat, hessian->sum, hessian->factor(), result.rows.error);
    backend.layer_errors(w, TensorView(), hessian->sum, hessian->factor(), result.rows.signal);
  } else if (w.dtype == DType::kF64) {
    square_rows<double>(w, w_hat, result.rows);
  } else {
    square_rows<float>(w, w_hat, result.rows);
  }
  sum_rows(result);
}

// Zero points as U8.
Tensor integers(const Tensor& zeros) {
  Tensor out(DType::kU8, zeros.shape());
  for (int64_t i = 0; i < zeros.elements(); ++i) {
    const double zero = zeros.dtype() == DType::kF64 ? zeros.as<double>()[i] : zeros.as<float>()[i];
    out.as<uint8_t>()[i] = static_cast<uint8_t>(zero);
  }
  return out;
}

class Rtn final : public Quantizer {
 public:
  std::string name() const override { return "rtn"; }
  bool needs_hessian() const override { return false; }
  void check(const QuantizeSettings& settings) const override { check_grid_settings(settings); }

  std::vector<QuantizeResult> quantize(std::span<const LinearProblem> problems,
                                       const Hessian* hessian, Backend& backend,
                                       const RowPeers& /*peers*/) const override {
    std::vector<QuantizeResult> results;
    for (const LinearProblem& problem : problems) {
      check(problem.settings);
      check_weight(problem, backend);
      const auto start = std::chrono::steady_clock::now();
      results.push_back(round_to_nearest(problem, hessian, backend));
      results.back().record.seconds =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    return results;
  }
};

}  // namespace

void check_grid_settings(const QuantizeSettings& settings) {
  if (settings.bits < 2 || settings.bits > 8) {
    fail(ExitCode::kUsage, "quantize.bits={}: expected 2 to 8", settings.bits);
  }
  if (settings.group_size != -1 && settings.group_size < 1) {
    fail(ExitCode::kUsage,
         "quantize.group_size={}: expected -1 (one group per row) or a positive number",
         settings.group_size);
  }
}

void check_weight(const LinearProblem& problem, Backend& backend) {
  const int64_t index = backend.first_non_finite(problem.weight);
  if (index < 0) return;
  const int64_t cols = problem.weight.cols();
  fail(ExitCode::kInput, "{}.weight: element {} (row {}, column {}) is not a finite number",
       problem.module, problem.first_row * cols + index, problem.first_row + index / cols,
       index % cols);
}

void fail_scale(const LinearProblem& problem) {
  fail(ExitCode::kInput,
       "{}.weight: a quantization scale is beyond {}, the type the output format stores",
       problem.module, dtype_name(problem.scale_dtype));
}

GridOptions grid_options(const LinearProblem& problem) {
  const QuantizeSettings& s = problem.settings;
  return {s.bits, s.symmetric, s.mse, problem.scale_dtype, problem.kind, problem.range};
}

GridTensors make_grids(const LinearProblem& problem) {
  const TensorView w = problem.weight;
  const int64_t size = problem.settings.group_size, groups = group_count(w.cols(), size);
  GridTensors grids{Tensor(w.dtype, {w.rows(), groups}), Tensor(w.dtype, {w.rows(), groups}),
                    Tensor(DType::kI32, {w.cols()})};
  for (int64_t c = 0; c < w.cols(); ++c) {
    grids.column_group.as<int32_t>()[c] = size == -1 ? 0 : static_cast<int32_t>(c / size);
  }
  return grids;
}

GridTensors fit_problem_grids(const LinearProblem& problem, TensorView weight,
                              const ColumnStatsView& columns, Backend& backend) {
  GridTensors grids = make_grids(problem);
  if (!backend.fit_grids(weight, grid_options(problem), problem.settings.group_size, columns,
                         grids.scales, grids.zeros)) {
    fail_scale(problem);
  }
  return grids;
}

QuantizeRecord start_record(const LinearProblem& problem, const Hessian* hessian) {
  QuantizeRecord record;
  record.module = problem.module;
  record.method = "rtn";
  record.bits = problem.settings.bits;
  record.group_size = problem.settings.group_size;
  record.out = problem.weight.rows();
  record.in = problem.weight.cols();
  if (hessian) record.samples = hessian->samples, record.tokens = hessian->tokens;
  return record;
}

QuantizedLinear make_linear(const LinearProblem& problem, Tensor codes, GridTensors grids) {
  QuantizedLinear linear;
  linear.bits = problem.settings.bits;
  linear.group_size = problem.settings.group_size;
  linear.symmetric = problem.settings.symmetric;
  linear.kind = problem.kind;
  linear.codes = std::move(codes);
  linear.zeros =
      problem.kind == GridKind::kUniform ? integers(grids.zeros) : std::move(grids.zeros);
  linear.g_idx = std::move(grids.column_group);
  if (problem.scale_dtype == DType::kF64 || problem.scale_dtype == grids.scales.dtype()) {
    linear.scales = std::move(grids.scales);
  } else {
    linear.scales = Tensor(problem.scale_dtype, grids.scales.shape());
    convert(grids.scales, linear.scales);  // exact: they were rounded when they were made
  }
  return linear;
}

void sum_rows(QuantizeResult& result) {
  QuantizeRecord& record = result.record;
  const double error = std::max(0.0, total(result.rows.error)), signal = total(result.rows.signal);
  record.loss = total(result.rows.loss);
  record.error = record.tokens > 0 ? error : 0;
  record.relative_error = signal > 0 ? error / signal : 0;
}

QuantizeResult round_to_nearest(const LinearProblem& problem, const Hessian* hessian,
                                Backend& backend) {
  QuantizeResult result;
  result.record = start_record(problem, hessian);
  GridTensors grids = fit_problem_grids(problem, problem.weight, {}, backend);
  Tensor codes = backend.allocate(DType::kU8, problem.weight.shape);
  backend.round_to_grid(problem.weight, grids.scales, grids.zeros, grids.column_group,
                        grid_options(problem).codes(), codes);
  result.linear = make_linear(problem, std::move(codes), std::move(grids));
  measure(problem, hessian, backend, result);
  return result;
}

const Quantizer& rtn_quantizer() {
  static const Rtn quantizer;
  return quantizer;
}

}  // namespace bitmill
