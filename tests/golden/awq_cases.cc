#include "golden/awq_cases.h"

#include <algorithm>

#include "algorithms/awq_module.h"

namespace bitmill::golden {
namespace {

constexpr int kRatios = 20;
constexpr int64_t kClipTokens = 512;  // the suite's clip search looks at about so many

Tensor converted(TensorView source, DType dtype) {
  Tensor out(dtype, source.shape);
  convert(source, out);
  return out;
}

Tensor widened(TensorView source) {
  return converted(source, DType::kF64);
}

LinearProblem problem_of(const Json& options, const std::string& name, TensorView weight) {
  LinearProblem problem;
  problem.module = name;
  problem.weight = weight;
  problem.settings.algorithm = "awq";
  problem.settings.bits = options.value("bits", 4);
  problem.settings.group_size = options.value("group_size", -1);
  problem.settings.symmetric = !options.value("zero_point", true);
  problem.scale_dtype = options.value("scale_f16", false) ? DType::kF16 : DType::kF64;
  problem.range = options.value("awq_range", "raw") == std::string("raw") ? GridRange::kAwqRaw
                                                                          : GridRange::kAwqZero;
  return problem;
}

QuantizedLinear quantize(const LinearProblem& problem, Backend& backend) {
  return std::move(find_quantizer("awq").quantize({&problem, 1}, nullptr, backend)[0].linear);
}

// Every step-th token of x [sequences, length, in].
Tensor tokens_of(const Tensor& x, DType dtype, int64_t step) {
  const int64_t tokens = x.shape()[0] * x.shape()[1], in = x.shape()[2],
                kept = (tokens + step - 1) / step;
  const Tensor all = converted(x.view().reshaped({tokens, in}), dtype);
  Tensor out(dtype, {kept, in});
  const int64_t bytes = in * dtype_bits(dtype) / 8;
  for (int64_t t = 0; t < kept; ++t)
    std::copy_n(static_cast<const char*>(all.data()) + t * step * bytes, bytes,
                static_cast<char*>(out.data()) + t * bytes);
  return out;
}

InputStatistics statistics_of(TensorView x, Backend& backend) {
  InputStatistics statistics;
  statistics.magnitudes = Tensor::zeros(DType::kF64, {x.cols()});
  backend.add_magnitudes(x, statistics.magnitudes);
  HessianAccumulator sum(x.cols(), x.dtype, backend);
  sum.add(x, 1, 0);
  statistics.hessian = sum.finish();
  return statistics;
}

int64_t clip_step(const Tensor& x) {
  return std::max<int64_t>(1, x.shape()[0] * x.shape()[1] / kClipTokens);
}

Tensor with_unit_axis(Tensor limits) {
  limits.reshape({limits.rows(), limits.cols(), 1});
  return limits;
}

// A case of kind awq_search or awq_group: weights by name, those that are scaled as problems.
class Group {
 public:
  Group(const Json& options, const Tensors& inputs, DType dtype, Backend& backend)
      : options_(options), x_(inputs.at("in.x")), dtype_(dtype), backend_(backend) {
    for (const auto& [name, tensor] : inputs)
      if (name != "in.x" && name != "in.norm") weights_[name.substr(3)] = converted(tensor, dtype);
    options.at("scaled").get_to(scaled_);
    for (const std::string& name : scaled_)
      problems_.push_back(problem_of(options, name, weights_.at(name)));
  }

  ScaleSearch search(Outcome& outcome) const {
    const InputStatistics statistics = statistics_of(tokens_of(x_, dtype_, 1), backend_);
    const Tensor mean = mean_magnitudes(statistics);
    ScaleSearch found = run_search(mean, statistics);
    outcome.tensors["out.s"] = clone(found.scales);
    outcome.tensors["out.x_mean"] = clone(mean);
    outcome.tensors["out.best"] = Tensor(DType::kI32, {1});
    *outcome.tensors["out.best"].as<int32_t>() = found.best;
    outcome.tensors["out.losses"] = Tensor(DType::kF64, {kRatios});
    std::copy(found.losses.begin(), found.losses.end(), outcome.tensors["out.losses"].as<double>());
    return found;
  }

  // Search, fold, scale, clip, round.
  AwqLinears treat(const Tensor& norm, Outcome& outcome) {
    const ScaleSearch found = search(outcome);
    const Tensor effective = clone(found.scales);
    outcome.tensors["out.norm"] = fold_into(widened(norm), 0, false, effective);
    InputStatistics clip = statistics_of(tokens_of(x_, dtype_, clip_step(x_)), backend_);
    unscale_hessian(clip.hessian.sum, found.scales);
    AwqLinears linears;
    for (const LinearProblem& problem : problems_) {
      multiply_columns(problem.weight, found.scales, backend_);
      if (options_.value("clip", true) && problem.module != "q" && problem.module != "k") {
        Tensor limits = search_clip(problem, clip.hessian, backend_);
        clamp_groups(problem.weight, problem.settings.group_size, limits, backend_);
        outcome.tensors["out.clip." + problem.module] = with_unit_axis(std::move(limits));
      }
      linears["out." + problem.module + "."] = quantize(problem, backend_);
    }
    return linears;
  }

 private:
  ScaleSearch run_search(TensorView mean, const InputStatistics& statistics) const {
    const std::string kind = options_.at("module");
    if (kind == "linear" || kind == "concat")
      return search_scales(mean, TensorView(), kRatios, group_loss(problems_, statistics, backend_),
                           kind);
    AwqModule module;
    module.kind = kind == "mlp" ? ModuleKind::kMlp : ModuleKind::kAttention;
    for (const auto& [name, tensor] : weights_) module.weights[name] = tensor;
    const Tensor x = converted(x_, dtype_);
    module.x = x;
    module.heads = options_.value("heads", 0);
    module.kv_heads = options_.value("kv_heads", 0);
    return search_scales(mean, TensorView(), kRatios,
                         module_loss(module, scaled_, problems_, backend_), kind);
  }

  const Json& options_;
  const Tensor& x_;
  DType dtype_;
  Backend& backend_;
  std::map<std::string, Tensor> weights_;
  std::vector<std::string> scaled_;
  std::vector<LinearProblem> problems_;
};

void run_clip(const Json& options, const Tensors& inputs, DType dtype, Backend& backend,
              Outcome& outcome) {
  const Tensor weight = converted(inputs.at("in.weight"), dtype);
  const Tensor& x = inputs.at("in.x");
  const InputStatistics statistics = statistics_of(tokens_of(x, dtype, clip_step(x)), backend);
  const LinearProblem problem = problem_of(options, "layer", weight);
  Tensor limits = search_clip(problem, statistics.hessian, backend);
  clamp_groups(weight, problem.settings.group_size, limits, backend);
  outcome.tensors["out.weight"] = widened(weight);
  outcome.tensors["out.clip"] = with_unit_axis(std::move(limits));
}

}  // namespace

bool is_awq_kind(const std::string& kind) {
  return kind == "awq_quantize" || kind == "awq_search" || kind == "awq_clip" ||
         kind == "awq_group";
}

AwqLinears run_awq(const Json& golden_case, const Tensors& inputs, DType dtype, Backend& backend,
                   Outcome& outcome) {
  const std::string kind = golden_case.at("kind");
  const Json& options = golden_case.at("options");
  AwqLinears linears;
  if (kind == "awq_quantize") {
    const Tensor weight = converted(inputs.at("in.weight"), dtype);
    linears["out."] = quantize(problem_of(options, "layer", weight), backend);
  } else if (kind == "awq_clip") {
    run_clip(options, inputs, dtype, backend, outcome);
  } else if (kind == "awq_search") {
    Group(options, inputs, dtype, backend).search(outcome);
  } else {
    linears = Group(options, inputs, dtype, backend).treat(inputs.at("in.norm"), outcome);
  }
  return linears;
}

}  // namespace bitmill::golden
