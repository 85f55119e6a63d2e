// GPTQ in factor form (docs/algorithms.md): damped Hessian -> one Cholesky factor in solving order
// -> column sweep.
//
// Linears that share an input share the Hessian, and the factor too where order, damping and block
// size agree. What can go wrong numerically is a recorded state: no tokens, no signal, a Hessian
// that is not positive definite at any damping.
//
// Peak memory besides the weights and the packed Hessian: one n x n factor, the codes and grids of
// the linears that share it, a second copy of a weight only where columns are dead or inputs are
// compared with the float model's, and per thread
// a sweep tile of 256 x n weights and codes.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "algorithms/rounding.h"

namespace bitmill {
namespace {

// Problems of one group are solved with one factor.
struct FactorKey {
  bool by_diagonal;  // columns by descending diagonal instead of ascending index
  double damp, step, limit;
  int64_t block;
  bool operator==(const FactorKey&) const = default;
};

FactorKey key_of(const QuantizeSettings& s) {
  return {s.act_order != ActOrder::kNone, s.damp, s.damp_step, s.damp_max, s.block_size};
}

// Where the damping ladder stopped.
struct Damping {
  bool ok = false;
  double fraction = 0, added = 0;  // added = fraction * mean(diagonal)
  int retries = 0;
  double smallest_pivot = 0;
};

// Buffers of one linear during the sweep.
struct Work {
  bool corrected = false;  // `live` holds the corrected weight (gptaq)
  Tensor live;  // the weight with its correction, dead columns zeroed; empty: as given
  GridTensors grids;
  Tensor codes, row_loss, row_error;
};

// What the range search is told about columns: how much an error counts, and how far error feedback
// will move the value that is rounded (docs/algorithms.md, "Range search").
struct ColumnKnowledge {
  Tensor importance, noise;  // [n] by original column; empty: no problem of the group searches
  ColumnStatsView view(const LinearProblem& problem) const {
    if (!searches(problem)) return {};
    return {importance, noise};
  }
  static bool searches(const LinearProblem& problem) {
    return problem.settings.range_search && !problem.settings.mse;
  }
};

template <typename T>
void fill_knowledge(const Tensor& factor, const Tensor& variance, const Tensor& order,
                    const std::vector<double>& diagonal, double added, ColumnKnowledge& columns) {
  // Rounding errors are uniform over a step, variance 1/12, while nothing clips. Clipping adds to
  // them, which the factor stands for: 1.5 was best of 1, 1.5 and 2 at 2 and 3 bits.
  constexpr double kClipping = 1.5;
  const int64_t n = order.elements();
  for (int64_t k = 0; k < n; ++k) {
    const int64_t column = order.as<int32_t>()[k];
    const double pivot = static_cast<double>(factor.as<T>()[k * n + k]);
    columns.importance.as<T>()[column] =
        static_cast<T>(pivot * std::sqrt(diagonal[column] + added));
    columns.noise.as<T>()[column] =
        static_cast<T>(kClipping * std::sqrt(static_cast<double>(variance.as<T>()[k]) / 12));
  }
}

template <typename T>
void zero_columns(TensorView weight, const std::vector<double>& diagonal) {
  const int64_t cols = weight.cols();
  for (int64_t r = 0; r < weight.rows(); ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      if (diagonal[c] == 0) weight.as<T>()[r * cols + c] = 0;
    }
  }
}

bool all_finite(const Tensor& values) {
  return std::all_of(values.as<double>(), values.as<double>() + values.elements(),
                     [](double value) { return std::isfinite(value); });
}

// One cut with a Hessian that has a signal.
class Solver {
 public:
  Solver(std::span<const LinearProblem> problems, const Hessian& hessian,
         std::vector<double> diagonal, Backend& backend, const RowPeers& peers)
      : problems_(problems),
        hessian_(hessian),
        backend_(backend),
        peers_(peers),
        n_(hessian.columns),
        diagonal_(std::move(diagonal)),
        solved_diagonal_(diagonal_),
        results_(problems.size()) {
    for (double& d : solved_diagonal_) {
      if (d != 0) continue;
      d = 1;
      ++dead_;
    }
  }

  std::vector<QuantizeResult> run() {
    std::vector<bool> done(problems_.size());
    for (size_t i = 0; i < problems_.size(); ++i) {
      if (done[i]) continue;
      const FactorKey key = key_of(problems_[i].settings);
      std::vector<size_t> group;
      for (size_t j = i; j < problems_.size(); ++j) {
        if (done[j] || !(key_of(problems_[j].settings) == key)) continue;
        done[j] = true;
        group.push_back(j);
      }
      solve(key, group);
    }
    return std::move(results_);
  }

 private:
  void solve(const FactorKey& key, const std::vector<size_t>& group) {
    const Tensor order = solving_order(key.by_diagonal);
    Tensor factor = backend_.allocate(hessian_.sum.dtype(), {n_, n_});
    const Damping damping = climb(key, order, factor);
    if (!damping.ok) {
      factor.reset();
      for (size_t i : group)
        give_up(i, damping, fmt::format("not positive definite at damping up to {:g}", damping.fraction));
      return;
    }
    const ColumnKnowledge columns = learn(factor, order, damping, group);
    std::vector<Work> works;
    for (size_t i : group) works.push_back(prepare(problems_[i], factor, order, columns));
    std::vector<SweepItem> items;
    for (size_t k = 0; k < group.size(); ++k)
      items.push_back(sweep_item(problems_[group[k]], works[k], columns));
    backend_.sweep(factor, order, key.block, items);
    factor.reset();
    for (size_t k = 0; k < group.size(); ++k) finish(group[k], damping, std::move(works[k]));
  }

  // Importance is sqrt(D_k H_kk): D_k counts what a rounding error costs when the columns after it
  // compensate as well as they can, H_kk what it costs when none does.
  ColumnKnowledge learn(const Tensor& factor, const Tensor& order, const Damping& damping,
                        const std::vector<size_t>& group) const {
    ColumnKnowledge columns;
    if (std::none_of(group.begin(), group.end(),
                     [&](size_t i) { return ColumnKnowledge::searches(problems_[i]); }))
      return columns;
    const DType type = factor.dtype();
    columns.importance = Tensor(type, {n_});
    columns.noise = Tensor(type, {n_});
    Tensor variance(type, {n_});
    backend_.feedback_variance(factor, variance);
    const auto fill = type == DType::kF64 ? fill_knowledge<double> : fill_knowledge<float>;
    fill(factor, variance, order, solved_diagonal_, damping.added, columns);
    return columns;
  }

  // Position n-1 is solved first, so the processing order stands reversed. Equal diagonals keep
  // ascending columns.
  Tensor solving_order(bool by_diagonal) const {
    std::vector<int32_t> processing(n_);
    std::iota(processing.begin(), processing.end(), 0);
    if (by_diagonal) {
      std::stable_sort(processing.begin(), processing.end(), [&](int32_t a, int32_t b) {
        return solved_diagonal_[a] > solved_diagonal_[b];
      });
    }
    Tensor order(DType::kI32, {n_});
    std::copy(processing.rbegin(), processing.rend(), order.as<int32_t>());
    return order;
  }

  // The damping ladder: every step gathers the packed Hessian anew, so no copy of it is kept.
  Damping climb(const FactorKey& key, const Tensor& order, Tensor& factor) const {
    const double mean =
        std::accumulate(solved_diagonal_.begin(), solved_diagonal_.end(), 0.0) / double(n_);
    Damping damping;
    for (double p = key.damp; p <= key.limit * (1 + 1e-12);
         p = std::max(key.step * p, 1e-4), ++damping.retries) {
      damping.fraction = p;
      damping.added = p * mean;
      backend_.hessian_gather(hessian_.sum, order, hessian_.factor(),
                              damped_diagonal(damping.added), factor);
      const FactorState state = backend_.factorize(factor);
      damping.smallest_pivot = state.ok ? state.smallest_pivot : 0;
      damping.ok = state.ok;
      if (state.ok) break;
    }
    return damping;
  }

  Tensor damped_diagonal(double added) const {
    Tensor diagonal(hessian_.sum.dtype(), {n_});
    for (int64_t c = 0; c < n_; ++c) {
      const double value = solved_diagonal_[c] + added;
      if (diagonal.dtype() == DType::kF64) {
        diagonal.as<double>()[c] = value;
      } else {
        diagonal.as<float>()[c] = static_cast<float>(value);
      }
    }
    return diagonal;
  }

  static bool refits(const LinearProblem& problem) {
    const QuantizeSettings& s = problem.settings;
    return s.group_size != -1 && s.act_order != ActOrder::kStatic && !problem.static_groups;
  }

  Work prepare(const LinearProblem& problem, const Tensor& factor, const Tensor& order,
               const ColumnKnowledge& columns) const {
    Work work;
    const TensorView w = problem.weight;
    if (problem.mismatch != nullptr) {
      // The whole correction is best for this linear alone, but moves weights up to three times as
      // far as rounding does and serves the rest of the model no better: 1 and 1, 0.75 and 0.5,
      // 0.5 and 0.5 were tried on two models at 2 and 3 bits (docs/algorithms.md).
      constexpr double kInputShare = 0.75, kResidualShare = 0.5;
      const double normal = hessian_.factor();
      work.live = Tensor(w.dtype, w.shape);
      const Tensor& residual = problem.mismatch->residual;
      const TensorView rows =  // one per row of the linear
          residual.empty() ? TensorView()
                           : residual.view().slice(problem.first_row, problem.first_row + w.rows());
      backend_.correct_weight(w, problem.mismatch->inputs, kInputShare * normal, rows,
                              kResidualShare * normal, factor, order, work.live);
      work.corrected = !peers_.any(backend_.first_non_finite(work.live) >= 0);
      if (!work.corrected) work.live.reset();
    }
    fit_and_zero(problem, columns, work);
    work.codes = backend_.allocate(DType::kU8, w.shape);
    work.row_loss = Tensor(DType::kF64, {w.rows()});
    work.row_error = Tensor(DType::kF64, {w.rows()});
    return work;
  }

  // The grids, and dead columns to zero. A row grid comes from the weight as given, group grids
  // from the weight without its dead columns.
  void fit_and_zero(const LinearProblem& problem, const ColumnKnowledge& columns,
                    Work& work) const {
    const TensorView w = problem.weight;
    const bool refit = refits(problem);
    const bool fit_first =
        dead_ == 0 || (problem.settings.group_size == -1 && work.live.empty());
    const auto fit = [&] {
      const TensorView given = work.live.empty() ? w : work.live.view();
      work.grids = fit_problem_grids(problem, given, columns.view(problem), backend_);
    };
    if (refit) work.grids = make_grids(problem);
    else if (fit_first) fit();
    if (dead_ == 0) return;
    // Nothing that follows sees what was there: these columns of the Hessian are zero.
    if (work.live.empty() && !problem.may_zero_columns) work.live = clone(w);
    const TensorView zeroed = work.live.empty() ? w : work.live.view();
    if (w.dtype == DType::kF64) zero_columns<double>(zeroed, diagonal_);
    else zero_columns<float>(zeroed, diagonal_);
    if (!refit && !fit_first) fit();
  }

  static SweepItem sweep_item(const LinearProblem& problem, const Work& work,
                              const ColumnKnowledge& columns) {
    SweepItem item;
    item.weight = work.live.empty() ? problem.weight : work.live.view();
    item.scales = work.grids.scales;
    item.zeros = work.grids.zeros;
    item.column_group = work.grids.column_group;
    item.codes = work.codes;
    item.row_loss = work.row_loss;
    item.row_error = work.row_error;
    item.bits = problem.settings.bits;
    item.refit_grids = refits(problem);
    item.group_size = problem.settings.group_size;
    item.grid = grid_options(problem);
    item.columns = columns.view(problem);
    return item;
  }

  void finish(size_t i, const Damping& damping, Work work) {
    const LinearProblem& problem = problems_[i];
    if (backend_.first_non_finite(work.grids.scales) >= 0) fail_scale(problem);
    if (peers_.any(!all_finite(work.row_loss))) return give_up(i, damping, "the sweep overflowed");
    QuantizeResult& result = results_[i];
    result.record = start(problem, damping);
    result.record.method = work.corrected ? "gptaq" : "gptq";
    if (problem.mismatch != nullptr && !work.corrected)
      result.record.note = "the correction overflowed";
    // 2 loss = tr(E H' E^T) with H' = H + added I; dead columns have no error (0 is on every grid),
    // and none in H.
    const double *loss = work.row_loss.as<double>(), *square = work.row_error.as<double>();
    result.rows.error = Tensor(DType::kF64, work.row_loss.shape());
    for (int64_t r = 0; r < problem.weight.rows(); ++r)
      result.rows.error.as<double>()[r] = 2 * loss[r] - damping.added * square[r];
    result.rows.loss = std::move(work.row_loss);
    result.rows.signal = Tensor(DType::kF64, result.rows.loss.shape());
    backend_.layer_errors(problem.weight, TensorView(), hessian_.sum, hessian_.factor(),
                          result.rows.signal);
    sum_rows(result);
    result.linear = make_linear(problem, std::move(work.codes), std::move(work.grids));
  }

  // The policy of a failed module; its codes are rounded to nearest either way, so that nothing is
  // undefined.
  void give_up(size_t i, const Damping& damping, const std::string& note) {
    results_[i] = round_to_nearest(problems_[i], &hessian_, backend_);
    QuantizeRecord& record = results_[i].record;
    const QuantizeRecord known = start(problems_[i], damping);
    record.damp = known.damp;
    record.retries = known.retries;
    record.smallest_pivot = known.smallest_pivot;
    record.dead_columns = known.dead_columns;
    record.note = note;
    record.failed = problems_[i].settings.on_failed == OnFailed::kFail;
  }

  QuantizeRecord start(const LinearProblem& problem, const Damping& damping) const {
    QuantizeRecord record = start_record(problem, &hessian_);
    record.damp = damping.fraction;
    record.retries = damping.ok ? damping.retries : std::max(0, damping.retries - 1);
    record.smallest_pivot = damping.smallest_pivot;
    record.dead_columns = dead_;
    return record;
  }

  std::span<const LinearProblem> problems_;
  const Hessian& hessian_;
  Backend& backend_;
  const RowPeers& peers_;
  int64_t n_;
  std::vector<double> diagonal_;         // of the normalised Hessian, original column order
  std::vector<double> solved_diagonal_;  // the same with dead columns at 1
  int64_t dead_ = 0;
  std::vector<QuantizeResult> results_;
};

// Error(kInput) naming the module for a Hessian that is not finite; else its normalised diagonal.
std::vector<double> checked_diagonal(const LinearProblem& problem, const Hessian& hessian,
                                     Backend& backend) {
  const int64_t n = hessian.columns, bad = backend.first_non_finite(hessian.sum);
  if (bad >= 0) {
    fail(ExitCode::kInput,
         "{}: the Hessian of its input is not finite (packed element {}); its activations overflow",
         problem.module, bad);
  }
  Tensor raw(hessian.sum.dtype(), {n});
  backend.hessian_diagonal(hessian.sum, n, raw);
  std::vector<double> diagonal(n);
  for (int64_t c = 0; c < n; ++c) {
    const double value = raw.dtype() == DType::kF64 ? raw.as<double>()[c] : raw.as<float>()[c];
    diagonal[c] = value * hessian.factor();
  }
  return diagonal;
}

std::vector<QuantizeResult> all_to_nearest(std::span<const LinearProblem> problems,
                                           const Hessian& hessian, const char* note,
                                           Backend& backend) {
  std::vector<QuantizeResult> results;
  for (const LinearProblem& problem : problems) {
    results.push_back(round_to_nearest(problem, &hessian, backend));
    results.back().record.note = note;
  }
  return results;
}

class Gptq final : public Quantizer {
 public:
  std::string name() const override { return "gptq"; }
  bool needs_hessian() const override { return true; }

  void check(const QuantizeSettings& s) const override {
    check_grid_settings(s);
    if (s.block_size < 1)
      fail(ExitCode::kUsage, "quantize.block_size={}: expected a positive number", s.block_size);
    if (!(s.damp >= 0))
      fail(ExitCode::kUsage, "quantize.damp={}: expected a fraction of at least 0", s.damp);
    if (!(s.damp_step > 1))
      fail(ExitCode::kUsage, "quantize.damp_step={}: expected more than 1", s.damp_step);
    if (!(s.damp_max >= s.damp)) {
      fail(ExitCode::kUsage, "quantize.damp_max={}: expected at least quantize.damp={}", s.damp_max,
           s.damp);
    }
  }

  std::vector<QuantizeResult> quantize(std::span<const LinearProblem> problems,
                                       const Hessian* hessian, Backend& backend,
                                       const RowPeers& peers) const override {
    BITMILL_CHECK(hessian != nullptr);
    const auto start = std::chrono::steady_clock::now();
    int64_t rows = 0;
    for (const LinearProblem& problem : problems) {
      BITMILL_CHECK(problem.weight.cols() == hessian->columns);
      BITMILL_CHECK(hessian->sum.empty() || problem.weight.dtype == hessian->sum.dtype());
      check(problem.settings);
      check_weight(problem, backend);
      rows += problem.weight.rows();
    }
    std::vector<QuantizeResult> results = solve(problems, *hessian, backend, peers);
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    for (QuantizeResult& result : results) {
      result.record.seconds =
          seconds * static_cast<double>(result.record.out) /
          static_cast<double>(std::max<int64_t>(1, rows));
    }
    return results;
  }

 private:
  static std::vector<QuantizeResult> solve(std::span<const LinearProblem> problems,
                                           const Hessian& hessian, Backend& backend,
                                           const RowPeers& peers) {
    if (problems.empty()) return {};
    if (hessian.tokens == 0) return all_to_nearest(problems, hessian, "no tokens", backend);
    std::vector<double> diagonal = checked_diagonal(problems[0], hessian, backend);
    const bool signal =
        std::any_of(diagonal.begin(), diagonal.end(), [](double d) { return d != 0; });
    if (!signal) return all_to_nearest(problems, hessian, "no signal", backend);
    return Solver(problems, hessian, std::move(diagonal), backend, peers).run();
  }
};

}  // namespace

const Quantizer& gptq_quantizer() {
  static const Gptq quantizer;
  return quantizer;
}

}  // namespace bitmill
