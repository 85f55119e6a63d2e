#include "algorithms/awq.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "algorithms/rounding.h"

namespace bitmill {
namespace {

constexpr int64_t kRowsPerItem = 16;

// Calls body(pointer to row, row) for every row of an F32/F64 matrix.
template <typename Body>
void over_rows(TensorView weight, Backend& backend, const Body& body) {
  const int64_t rows = weight.rows(), cols = weight.cols();
  backend.host_threads().parallel_for(
      (rows + kRowsPerItem - 1) / kRowsPerItem, [&](int64_t item, int) {
        const int64_t last = std::min(rows, (item + 1) * kRowsPerItem);
        for (int64_t r = item * kRowsPerItem; r < last; ++r) {
          if (weight.dtype == DType::kF64)
            body(weight.as<double>() + r * cols, r);
          else
            body(weight.as<float>() + r * cols, r);
        }
      });
}

constexpr double kSmallestScale = 1e-4;  // before centering, for columns that are never active

// Divides by the root of the largest times the smallest.
void center(TensorView scales) {
  double *s = scales.as<double>(), smallest = std::numeric_limits<double>::infinity(), largest = 0;
  for (int64_t c = 0; c < scales.elements(); ++c) {
    smallest = std::min(smallest, s[c]);
    largest = std::max(largest, s[c]);
  }
  const double middle = std::sqrt(largest * smallest);
  for (int64_t c = 0; c < scales.elements(); ++c) s[c] /= middle;
}

// sums[c] += |w| / (largest |w| of the row's group), over rows.
template <typename T>
void add_relative(const T* w, int64_t rows, int64_t cols, int64_t group_size, double* sums) {
  for (int64_t r = 0; r < rows; ++r, w += cols)
    for (int64_t first = 0; first < cols; first += group_size) {
      const int64_t last = std::min(cols, first + group_size);
      T top = 0;
      for (int64_t c = first; c < last; ++c) top = std::max(top, std::abs(w[c]));
      if (top == 0) continue;
      for (int64_t c = first; c < last; ++c) sums[c] += static_cast<double>(std::abs(w[c]) / top);
    }
}

// The grid a search rounds with.
GridOptions search_grid(const LinearProblem& problem) {
  GridOptions options = grid_options(problem);
  options.mse = false;  // 80 ranges per candidate would cost more than they tell about scales
  return options;
}

// The other programs have no shorter last group, and neither has any format that stores AWQ
// results.
void check_groups(const LinearProblem& problem) {
  const int64_t size = problem.settings.group_size, in = problem.weight.cols();
  if (size != -1 && in % size != 0)
    fail(ExitCode::kInput,
         "{}: awq needs whole groups, but {} columns are no multiple of quantize.group_size={}",
         problem.module, in, size);
}

// Rounds to nearest, or solves, weights that the caller has scaled and clipped.
class Awq final : public Quantizer {
 public:
  Awq(std::string name, const Quantizer& solver) : name_(std::move(name)), solver_(solver) {}
  std::string name() const override { return name_; }
  bool needs_hessian() const override { return solver_.needs_hessian(); }
  bool compares_with_float() const override { return solver_.compares_with_float(); }
  bool scales_weights() const override { return true; }
  void check(const QuantizeSettings& settings) const override { solver_.check(settings); }

  std::vector<QuantizeResult> quantize(std::span<const LinearProblem> problems,
                                       const Hessian* hessian, Backend& backend,
                                       const RowPeers& peers) const override {
    for (const LinearProblem& problem : problems) check_groups(problem);
    std::vector<QuantizeResult> results = solver_.quantize(problems, hessian, backend, peers);
    for (QuantizeResult& result : results)  // a solver that gave up has rounded the scaled weights
      result.record.method = result.record.method == "rtn" ? "awq" : name_;
    return results;
  }

 private:
  std::string name_;
  const Quantizer& solver_;
};

}  // namespace

Tensor mean_magnitudes(const InputStatistics& statistics) {
  Tensor mean = clone(statistics.magnitudes);
  for (int64_t c = 0; c < mean.elements(); ++c)
    mean.as<double>()[c] /= static_cast<double>(std::max<int64_t>(1, statistics.hessian.tokens));
  return mean;
}

Tensor awq_scales(TensorView mean, double ratio) {
  Tensor scales(DType::kF64, {mean.elements()});
  for (int64_t c = 0; c < mean.elements(); ++c)
    scales.as<double>()[c] = std::max(std::pow(mean.as<double>()[c], ratio), kSmallestScale);
  center(scales);
  return scales;
}

Tensor awq_scales(TensorView mean, TensorView weight, double ratio) {
  Tensor scales(DType::kF64, {mean.elements()});
  for (int64_t c = 0; c < mean.elements(); ++c) {
    const double raised = std::pow(weight.as<double>()[c], 1 - ratio) + kSmallestScale;
    scales.as<double>()[c] =
        std::max(std::pow(mean.as<double>()[c], ratio) / raised, kSmallestScale);
  }
  center(scales);
  return scales;
}

Tensor relative_weights(std::span<const LinearProblem> problems) {
  const int64_t n = problems.front().weight.cols();
  Tensor mean = Tensor::zeros(DType::kF64, {n});
  int64_t rows = 0;
  for (const LinearProblem& problem : problems) {
    const int64_t given = problem.settings.group_size, size = given == -1 ? n : given;
    rows += problem.weight.rows();
    if (problem.weight.dtype == DType::kF64)
      add_relative(problem.weight.as<double>(), problem.weight.rows(), n, size, mean.as<double>());
    else
      add_relative(problem.weight.as<float>(), problem.weight.rows(), n, size, mean.as<double>());
  }
  for (int64_t c = 0; c < n; ++c) mean.as<double>()[c] /= static_cast<double>(rows);
  return mean;
}

ScaleSearch search_scales(TensorView mean, TensorView weight, int ratios, const ScaleLoss& loss,
                          const std::string& group) {
  const int64_t n = mean.elements();
  const int count = weight.data == nullptr ? ratios : 2 * ratios;
  Tensor candidates(DType::kF64, {count, n});
  for (int i = 0; i < count; ++i) {
    const double ratio = static_cast<double>(i % ratios) / ratios;
    const Tensor scales = i < ratios ? awq_scales(mean, ratio) : awq_scales(mean, weight, ratio);
    std::copy_n(scales.as<double>(), n, candidates.as<double>() + i * n);
  }
  ScaleSearch found;
  found.losses = loss(candidates);
  int best = -1;
  for (int i = 0; i < count; ++i) {
    if (!std::isfinite(found.losses[i])) continue;
    if (best < 0 || found.losses[i] < found.losses[best]) best = i;
  }
  if (best < 0)
    fail(ExitCode::kInput,
         "{}: no scale gives a finite output error; its weights or activations overflow", group);
  found.scales = clone(candidates.view().slice(best, best + 1).reshaped({n}));
  found.best = best % ratios;
  found.weighted = best >= ratios;
  if (found.losses[0] > 0) found.gain = found.losses[best] / found.losses[0];
  return found;
}

ScaleLoss group_loss(std::span<const LinearProblem> problems, const InputStatistics& statistics,
                     Backend& backend) {
  return [problems, &statistics, &backend](TensorView candidates) {
    const int64_t count = candidates.rows();
    std::vector<double> losses(count);
    int64_t outputs = 0;
    Tensor errors(DType::kF64, {count});
    for (const LinearProblem& problem : problems) {
      check_groups(problem);
      backend.scaling_errors(problem.weight, search_grid(problem), problem.settings.group_size,
                             candidates, statistics.hessian.sum, errors);
      for (int64_t k = 0; k < count; ++k) losses[k] += errors.as<double>()[k];
      outputs += problem.weight.rows();
    }
    for (double& loss : losses)
      loss /= static_cast<double>(statistics.hessian.tokens) * static_cast<double>(outputs);
    return losses;
  };
}

Tensor fold_into(TensorView values, double offset, bool keep_scale_of_zero, TensorView scales) {
  const int64_t n = values.elements();
  Tensor exact(DType::kF64, {n}), folded(DType::kF64, {n});
  convert(values, exact);
  for (int64_t i = 0; i < n; ++i)
    folded.as<double>()[i] = (offset + exact.as<double>()[i]) / scales.as<double>()[i] - offset;
  Tensor stored(values.dtype, values.shape);
  convert(folded, stored);
  convert(stored, folded);  // as a reader sees them
  for (int64_t i = 0; i < n; ++i) {
    const double before = offset + exact.as<double>()[i], after = offset + folded.as<double>()[i];
    double& s = scales.as<double>()[i];
    if (before != 0 && after != 0 && std::isfinite(after)) {
      s = before / after;
    } else {
      folded.as<double>()[i] = exact.as<double>()[i];
      if (before != 0 || !keep_scale_of_zero) s = 1;
    }
  }
  convert(folded, stored);
  return stored;
}

void multiply_columns(TensorView weight, TensorView scales, Backend& backend) {
  const int64_t cols = weight.cols();
  const double* s = scales.as<double>();
  over_rows(weight, backend, [&](auto* row, int64_t) {
    using T = std::decay_t<decltype(*row)>;
    for (int64_t c = 0; c < cols; ++c) row[c] *= static_cast<T>(s[c]);
  });
}

void divide_rows(TensorView weight, TensorView scales, Backend& backend) {
  const int64_t cols = weight.cols();
  over_rows(weight, backend, [&](auto* row, int64_t r) {
    const auto s = static_cast<std::decay_t<decltype(*row)>>(scales.as<double>()[r]);
    for (int64_t c = 0; c < cols; ++c) row[c] /= s;
  });
}

void clamp_groups(TensorView weight, int64_t group_size, TensorView limits, Backend& backend) {
  const int64_t cols = weight.cols(), groups = limits.cols(),
                size = group_size == -1 ? cols : group_size;
  over_rows(weight, backend, [&](auto* row, int64_t r) {
    using T = std::decay_t<decltype(*row)>;
    for (int64_t c = 0; c < cols; ++c) {
      const T limit = static_cast<T>(limits.as<double>()[r * groups + c / size]);
      row[c] = std::min(std::max(row[c], -limit), limit);
    }
  });
}

Tensor scaled_consumer(TensorView stored, TensorView scales, Backend& backend) {
  Tensor exact(DType::kF64, stored.shape), out(stored.dtype, stored.shape);
  convert(stored, exact);
  multiply_columns(exact, scales, backend);
  convert(exact, out);
  return out;
}

void unscale_hessian(TensorView packed, TensorView scales) {
  const int64_t n = scales.elements(), edge = hessian_tile(n), tiles = (n + edge - 1) / edge;
  const double* s = scales.as<double>();
  const auto divide = [&](auto* h) {
    for (int64_t row = 0; row < tiles; ++row)
      for (int64_t i = row * edge; i < std::min(n, (row + 1) * edge); ++i)
        for (int64_t j = 0; j < std::min(n, (row + 1) * edge); ++j) {
          const int64_t width = std::min(edge, n - j / edge * edge);
          auto& value = h[hessian_tile_offset(n, row, j / edge) + i % edge * width + j % edge];
          value = static_cast<std::decay_t<decltype(value)>>(value / (s[i] * s[j]));
        }
  };
  if (packed.dtype == DType::kF64)
    divide(packed.as<double>());
  else
    divide(packed.as<float>());
}

Tensor search_clip(const LinearProblem& problem, const Hessian& hessian, Backend& backend) {
  check_groups(problem);
  check_weight(problem, backend);
  const int64_t size = problem.settings.group_size;
  Tensor limits(DType::kF64, {problem.weight.rows(), group_count(problem.weight.cols(), size)});
  backend.clip_limits(problem.weight, search_grid(problem), size, hessian.sum, limits);
  return limits;
}

const Quantizer& rtn_quantizer();
const Quantizer& gptq_quantizer();
const Quantizer& gptaq_quantizer();

const Quantizer& awq_quantizer() {
  static const Awq quantizer("awq", rtn_quantizer());
  return quantizer;
}

const Quantizer& awq_gptq_quantizer() {
  static const Awq quantizer("awq+gptq", gptq_quantizer());
  return quantizer;
}

const Quantizer& awq_gptaq_quantizer() {
  static const Awq quantizer("awq+gptaq", gptaq_quantizer());
  return quantizer;
}

}  // namespace bitmill
