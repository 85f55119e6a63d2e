// CpuBackend: host memory, immediate execution; the definition that every other backend is checked
// against. One class, its operations by area: cpu_matmul.cc (oneDNN), cpu_layers.cc,
// cpu_attention.cc, cpu_hessian.cc, cpu_factor.cc (LAPACKE tiles), cpu_quantize.cc (grids),
// cpu_sweep.cc (column sweep).
#pragma once

#include <memory>
#include <vector>

#include "backends/backend.h"
#include "core/thread_pool.h"

namespace bitmill {

class MatmulContext;  // cpu/matmul.h

class CpuBackend final : public Backend {
 public:
  // compute kBF16 or kF32; `threads` >= 1 workers including the caller.
  CpuBackend(DType compute, int threads);
  ~CpuBackend() override;

  std::string name() const override { return "cpu"; }
  std::string description() const override;
  DType compute() const override { return compute_; }
  Allocator& allocator() override { return HostAllocator::instance(); }
  void synchronize() override {}
  ThreadPool& host_threads() override { return pool_; }

  Tensor upload(Tensor host) override { return host; }
  Tensor download(Tensor device) override { return device; }
  void convert(TensorView in, TensorView out) override;

  void embed(TensorView ids, TensorView table, TensorView out) override;
  void rms_norm(TensorView x, TensorView weight, float eps, TensorView out) override;
  std::unique_ptr<PreparedWeight> prepare_linear(TensorView weight) override;
  void linear(TensorView x, const PreparedWeight& weight, TensorView bias, TensorView residual,
              TensorView out) override;
  void rope(TensorView x, int64_t heads, int64_t head_dim, TensorView table) override;
  void attention(TensorView q, TensorView k, TensorView v, const AttentionShape& shape,
                 TensorView out) override;
  void gated_activation(TensorView gate, TensorView up, Activation activation,
                        TensorView out) override;
  void gated_linear(TensorView x, const PreparedWeight& gate, TensorView gate_bias,
                    const PreparedWeight& up, TensorView up_bias, Activation activation,
                    TensorView out) override;
  void token_nll(TensorView logits, TensorView targets, TensorView nll) override;
  void token_kl(TensorView reference, TensorView logits, TensorView kl, TensorView agree) override;

  void hessian_update(TensorView x, TensorView h) override;
  void add_magnitudes(TensorView x, TensorView sums) override;
  void add(TensorView a, TensorView b) override;
  void cross_update(TensorView a, TensorView b, TensorView m) override;
  void difference(TensorView a, TensorView b, TensorView out) override;
  void hessian_diagonal(TensorView h, int64_t n, TensorView out) override;
  void hessian_gather(TensorView h, TensorView order, double factor, TensorView diagonal,
                      TensorView out) override;

  FactorState factorize(TensorView a) override;
  void correct_weight(TensorView w, TensorView c, double c_factor, TensorView r, double r_factor,
                      TensorView l, TensorView order, TensorView out) override;
  void feedback_variance(TensorView factor, TensorView variance) override;
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
  void dequantize(const QuantizedLinear& linear, TensorView out) override;
  void layer_errors(TensorView w, TensorView w_hat, TensorView h, double factor,
                    TensorView errors) override;
  int64_t first_non_finite(TensorView x) override;

 private:
  void hessian_update_amx(TensorView x, TensorView h);

  DType compute_;
  ThreadPool pool_;
  bool amx_;  // bf16 products run on our AMX kernels (amx.h)
  std::vector<std::unique_ptr<MatmulContext>> contexts_;  // one per thread of the pool
};

}  // namespace bitmill
