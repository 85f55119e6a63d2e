#include "support/modelled_backend.h"

#include <algorithm>
#include <cstring>

namespace bitmill::testing {
namespace {

class ModelledWeight final : public PreparedWeight {
 public:
  explicit ModelledWeight(Shape shape) : shape_(shape) {}
  int64_t out() const override { return shape_[0]; }
  int64_t in() const override { return shape_[1]; }
  int64_t bytes() const override { return 0; }

 private:
  Shape shape_;
};

double count(TensorView tensor) {
  return static_cast<double>(tensor.elements());
}

void fill(TensorView tensor, double value) {
  if (tensor.dtype == DType::kF64)
    std::fill_n(tensor.as<double>(), tensor.elements(), value);
  else
    std::fill_n(tensor.as<float>(), tensor.elements(), static_cast<float>(value));
}

void fill_zero(TensorView tensor) {
  std::memset(tensor.data, 0, static_cast<size_t>(tensor.bytes()));
}

}  // namespace

std::unique_ptr<PreparedWeight> ModelledBackend::prepare_linear(TensorView weight) {
  return std::make_unique<ModelledWeight>(weight.shape);
}

void ModelledBackend::linear(TensorView x, const PreparedWeight& weight, TensorView, TensorView,
                             TensorView) {
  BITMILL_CHECK(x.cols() == weight.in());
  clock_.spend(2 * count(x) * static_cast<double>(weight.out()) / rates_.forward_flops);
}

void ModelledBackend::gated_linear(TensorView x, const PreparedWeight& gate, TensorView gate_bias,
                                   const PreparedWeight& up, TensorView up_bias, Activation,
                                   TensorView out) {
  linear(x, gate, gate_bias, {}, out);
  linear(x, up, up_bias, {}, out);
}

void ModelledBackend::attention(TensorView, TensorView, TensorView, const AttentionShape& shape,
                                TensorView) {
  const int64_t columns = shape.heads * 2 * shape.head_dim;
  clock_.spend(static_cast<double>(shape.sequences * shape.length * shape.length * columns) /
               rates_.forward_flops);
}

void ModelledBackend::token_nll(TensorView, TensorView, TensorView nll) {
  fill_zero(nll);
}

void ModelledBackend::token_kl(TensorView, TensorView, TensorView kl, TensorView agree) {
  fill_zero(kl);
  fill_zero(agree);
}

void ModelledBackend::hessian_update(TensorView x, TensorView h) {
  clock_.spend(2 * count(h) * static_cast<double>(x.rows()) / rates_.hessian_flops);
}

void ModelledBackend::cross_update(TensorView a, TensorView b, TensorView) {
  clock_.spend(2 * count(a) * static_cast<double>(b.cols()) / rates_.hessian_flops);
}

void ModelledBackend::hessian_diagonal(TensorView, int64_t, TensorView out) {
  fill(out, 1);
}

FactorState ModelledBackend::factorize(TensorView a) {
  const int64_t n = a.rows();
  const double columns = static_cast<double>(n);
  clock_.spend(columns * columns * columns / 3 / factor_rate(rates_, n));
  const TensorView elements = a.reshaped({n * n});
  for (int64_t i = 0; i < n; ++i) fill(elements.slice(i * (n + 1), i * (n + 1) + 1), 1);
  return {true, -1, 1};
}

void ModelledBackend::feedback_variance(TensorView factor, TensorView variance) {
  clock_.spend(512 * count(factor) / factor_rate(rates_, factor.rows()));
  fill(variance, 0);
}

void ModelledBackend::correct_weight(TensorView w, TensorView, double, TensorView, double,
                                     TensorView, TensorView, TensorView out) {
  clock_.spend(4 * count(w) * static_cast<double>(w.cols()) / rates_.sweep_flops);
  std::memcpy(out.data, w.data, static_cast<size_t>(w.bytes()));
}

void ModelledBackend::fit(TensorView weight, const GridOptions& options,
                          const ColumnStatsView& columns, TensorView scales, TensorView zeros) {
  const double tried = options.mse ? 81 : columns.importance.data != nullptr ? 31 : 1;
  clock_.spend(tried * count(weight) / rates_.grid_elements);
  fill(scales, 1);
  fill(zeros, 1 << (options.bits - 1));
}

bool ModelledBackend::fit_grids(TensorView weight, const GridOptions& options, int64_t,
                                const ColumnStatsView& columns, TensorView scales,
                                TensorView zeros) {
  fit(weight, options, columns, scales, zeros);
  return true;
}

void ModelledBackend::round_to_grid(TensorView, TensorView, TensorView, TensorView, CodeType,
                                    TensorView codes) {
  fill_zero(codes);
}

void ModelledBackend::scaling_errors(TensorView weight, const GridOptions&, int64_t,
                                     TensorView scales, TensorView, TensorView errors) {
  const double candidates = static_cast<double>(scales.rows());
  clock_.spend(
      candidates * count(weight) *
      (static_cast<double>(weight.cols()) / rates_.sweep_flops + 1 / rates_.grid_elements));
  fill(errors, 1);
}

void ModelledBackend::clip_limits(TensorView, const GridOptions&, int64_t, TensorView,
                                  TensorView limits) {
  fill(limits, 1);
}

void ModelledBackend::sweep(TensorView factor, TensorView, int64_t,
                            std::span<const SweepItem> items) {
  const double n = static_cast<double>(factor.rows());
  for (const SweepItem& item : items) {
    clock_.spend(count(item.weight) * (n + 128) / rates_.sweep_flops);
    if (item.refit_grids) fit(item.weight, item.grid, item.columns, item.scales, item.zeros);
    fill_zero(item.codes);
    fill_zero(item.row_loss);
    if (item.row_error.data != nullptr) fill_zero(item.row_error);
  }
}

void ModelledBackend::layer_errors(TensorView w, TensorView, TensorView, double,
                                   TensorView errors) {
  clock_.spend(count(w) * static_cast<double>(w.cols()) / rates_.sweep_flops);
  fill(errors, 1);
}

}  // namespace bitmill::testing
