// A backend that computes nothing: operations cost their modelled time on a virtual clock and leave
// results that the callers can go on with. For simulations of the pipeline.
//
//   linear, gated_linear   2 n R tokens               at Rates::forward_flops
//   attention              L w tokens, w columns of q k^T and p v       the same
//   hessian_update         2 e tokens                 at hessian_flops; cross_update likewise
//   factorize              n^3/3, feedback_variance 512 n^2, at factor_rate(n)
//   sweep                  R n (n + 128)              at sweep_flops
//   layer_errors           R n^2, correct_weight 4 R n^2, the same
//   fit_grids              weights times grids tried  at grid_elements
//   scaling_errors         R n^2 and R n per candidate
//   all others             nothing
//
// Results: Hessian diagonals, pivots and scales are 1, zeros the middle of their range, codes,
// losses and variances 0; other outputs stay as they were allocated. Nothing is ever found to be
// not finite. Memory is the host's, so sizes should be small and rates lower by as much.
#pragma once

#include "backends/backend.h"
#include "pipeline/rates.h"
#include "support/simulated_machine.h"

namespace bitmill::testing {

class ModelledBackend final : public Backend {
 public:
  // Of the rank whose clock it is; the clock outlives it.
  ModelledBackend(const Rates& rates, DType compute, VirtualClock& clock)
      : rates_(rates), compute_(compute), clock_(clock) {}

  std::string name() const override { return "modelled"; }
  std::string description() const override { return "a model of a device: computes nothing"; }
  DType compute() const override { return compute_; }
  Allocator& allocator() override { return HostAllocator::instance(); }
  void synchronize() override {}
  ThreadPool& host_threads() override { return pool_; }

  Tensor upload(Tensor host) override { return host; }
  Tensor download(Tensor device) override { return device; }
  void convert(TensorView, TensorView) override {}

  void embed(TensorView, TensorView, TensorView) override {}
  void rms_norm(TensorView, TensorView, float, TensorView) override {}
  std::unique_ptr<PreparedWeight> prepare_linear(TensorView weight) override;
  void linear(TensorView x, const PreparedWeight& weight, TensorView bias, TensorView residual,
              TensorView out) override;
  void rope(TensorView, int64_t, int64_t, TensorView) override {}
  void attention(TensorView q, TensorView k, TensorView v, const AttentionShape& shape,
                 TensorView out) override;
  void gated_activation(TensorView, TensorView, Activation, TensorView) override {}
  void gated_linear(TensorView x, const PreparedWeight& gate, TensorView gate_bias,
                    const PreparedWeight& up, TensorView up_bias, Activation activation,
                    TensorView out) override;
  void token_nll(TensorView, TensorView, TensorView nll) override;
  void token_kl(TensorView, TensorView, TensorView kl, TensorView agree) override;

  void hessian_update(TensorView x, TensorView h) override;
  void add_magnitudes(TensorView, TensorView) override {}
  void add(TensorView, TensorView) override {}
  void cross_update(TensorView a, TensorView b, TensorView m) override;
  void difference(TensorView, TensorView, TensorView) override {}
  void hessian_diagonal(TensorView h, int64_t n, TensorView out) override;
  void hessian_gather(TensorView, TensorView, double, TensorView, TensorView) override {}

  FactorState factorize(TensorView a) override;
  void feedback_variance(TensorView factor, TensorView variance) override;
  void correct_weight(TensorView w, TensorView c, double c_factor, TensorView r, double r_factor,
                      TensorView l, TensorView order, TensorView out) override;
  bool fit_grids(TensorView weight, const GridOptions& options, int64_t group_size,
                 const ColumnStatsView& columns, TensorView scales, TensorView zeros) override;
  void round_to_grid(TensorView weight, TensorView scales, TensorView zeros,
                     TensorView column_group, CodeType type, TensorView codes) override;
  void scaling_errors(TensorView weight, const GridOptions& options, int64_t group_size,
                      TensorView scales, TensorView h, TensorView errors) override;
  void clip_limits(TensorView weight, const GridOptions& options, int64_t group_size, TensorView h,
                   TensorView limits) override;
  void sweep(TensorView factor, TensorView order, int64_t block_size,
             std::span<const SweepItem> items) override;
  void dequantize(const QuantizedLinear&, TensorView) override {}
  void layer_errors(TensorView w, TensorView w_hat, TensorView h, double factor,
                    TensorView errors) override;
  int64_t first_non_finite(TensorView) override { return -1; }

 private:
  void fit(TensorView weight, const GridOptions& options, const ColumnStatsView& columns,
           TensorView scales, TensorView zeros);

  const Rates rates_;
  const DType compute_;
  VirtualClock& clock_;
  ThreadPool pool_{1};
};

}  // namespace bitmill::testing
