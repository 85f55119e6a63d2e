#include "pipeline/awq_pass.h"

#include <algorithm>
#include <set>

namespace bitmill {
namespace {

bool is_awq(const RunOptions& options, const LinearSpec& linear) {
  const QuantizeSettings settings = options.settings_for(linear.module);
  return !settings.skip && find_quantizer(settings.algorithm).scales_weights();
}

bool uses_awq(const RunOptions& options, const BlockSpec& block, const CutSpec& cut) {
  return std::any_of(cut.linears.begin(), cut.linears.end(),
                     [&](int linear) { return is_awq(options, block.linears[linear]); });
}

// Rows of the largest linear that a search looks at. An error summed over hundreds of rows ranks
// the candidates as one over thousands does, and costs rows * in^2 for each of them.
constexpr int64_t kSearchRows = 256;

// Every n-th row of each problem, n the same for all of a group; `storage` owns the weights.
std::vector<LinearProblem> sample_rows(std::span<const LinearProblem> problems,
                                       std::vector<Tensor>& storage) {
  int64_t most = 0;
  for (const LinearProblem& problem : problems) most = std::max(most, problem.weight.rows());
  const int64_t step = (most + kSearchRows - 1) / kSearchRows;
  std::vector<LinearProblem> sampled(problems.begin(), problems.end());
  if (step == 1) return sampled;
  for (LinearProblem& problem : sampled) {
    const int64_t rows = (problem.weight.rows() + step - 1) / step, cols = problem.weight.cols();
    storage.emplace_back(DType::kF32, Shape{rows, cols});
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(problem.weight.as<float>() + r * step * cols, cols,
                  storage.back().as<float>() + r * cols);
    problem.weight = storage.back();
  }
  return sampled;
}

// Is there anything before the cut that takes scales?
bool foldable(const CutSpec& cut) {
  return cut.fold.norm >= 0 || cut.fold.linear >= 0;
}

// Names that a fold changes besides the weights of linears.
std::vector<std::string> folded_floats(const BlockSpec& block, const CutSpec& cut) {
  std::vector<std::string> names;
  if (cut.fold.norm >= 0) names.push_back(block.norms[cut.fold.norm].name);
  if (cut.fold.linear >= 0 && block.linears[cut.fold.linear].bias)
    names.push_back(block.linears[cut.fold.linear].bias_name());
  for (const TensorSpec& consumer : cut.fold.consumers) names.push_back(consumer.name);
  return names;
}

}  // namespace

bool uses_awq(const RunOptions& options, const BlockSpec& block) {
  return std::any_of(block.cuts.begin(), block.cuts.end(),
                     [&](const CutSpec& cut) { return uses_awq(options, block, cut); });
}

std::string fold_obstacle(const RunOptions& options, const BlockSpec& block, const CutSpec& cut) {
  if (!foldable(cut)) return "nothing before it takes scales";
  std::vector<int> touched = cut.linears;
  if (cut.fold.linear >= 0) touched.push_back(cut.fold.linear);
  for (int linear : touched)
    if (!is_awq(options, block.linears[linear]))
      return fmt::format("{} is not quantized with awq", block.linears[linear].module);
  return "";
}

std::vector<std::string> folded_tensors(const RunOptions& options, const ModelSpec& spec) {
  std::set<std::string> names;
  for (const BlockSpec& block : spec.blocks) {
    for (const LinearSpec& linear : block.linears)
      if (is_awq(options, linear)) names.insert(linear.weight_name());
    for (const CutSpec& cut : block.cuts)
      if (fold_obstacle(options, block, cut).empty())
        for (const std::string& name : folded_floats(block, cut)) names.insert(name);
  }
  return {names.begin(), names.end()};
}

void BlockChange::apply(int linear, TensorView weight, int64_t first_row, bool clip,
                        Backend& backend) const {
  const auto found = linears_.find(linear);
  if (found == linears_.end()) return;
  const Linear& change = found->second;
  if (!change.columns.empty()) multiply_columns(weight, change.columns, backend);
  const auto rows_of = [&](TensorView x) { return x.slice(first_row, first_row + weight.rows()); };
  if (clip && !change.limits.empty())
    clamp_groups(weight, change.group_size, rows_of(change.limits), backend);
  if (!change.rows.empty()) divide_rows(weight, rows_of(change.rows), backend);
}

void BlockChange::describe(int linear, QuantizeRecord& record) const {
  const auto found = linears_.find(linear);
  if (found == linears_.end()) return;
  record.awq_ratio = found->second.ratio;
  record.awq_weighted = found->second.weighted;
  record.awq_gain = found->second.gain;
  if (record.note.empty()) record.note = found->second.note;
}

// One block's pass.
class AwqPass {
 public:
  AwqPass(const BlockContext& context, const BlockSpec& block, const BlockGraph& graph,
          Activations& activations)
      : context_(context),
        options_(context.options),
        source_(context.source),
        format_(context.format),
        block_(block),
        graph_(graph),
        backend_(context.backend),
        phases_(context.phases),
        weights_(source_.read_block_floats(block, backend_)) {
    for (size_t i = 0; i < activations.batches.size(); ++i) {
      const BatchRange& range = activations.ranges[i];
      if (range.first_sample * activations.length >= options_.awq.tokens) break;
      activations.await(i);
      const MicroBatch& given = activations.batches[i];
      batches_.push_back({given.sequences, given.length, clone(given.hidden), Tensor()});
      ranges_.push_back(range);
    }
  }

  BlockChange run() {
    int last = static_cast<int>(block_.cuts.size()) - 1;
    while (last > 0 && !uses_awq(options_, block_, block_.cuts[last])) --last;
    for (int cut = 0; cut <= last; ++cut) {
      std::vector<Tensor> weights = read(cut);
      if (uses_awq(options_, block_, block_.cuts[cut])) decide(cut, weights);
      if (cut < last) advance(cut);
    }
    return std::move(change_);
  }

 private:
  // The cut's weights in F32, prepared for the forward pass too.
  std::vector<Tensor> read(int cut) {
    PhaseTimer timer(phases_, Phase::kRead);
    std::vector<Tensor> weights;
    for (int linear : block_.cuts[cut].linears) {
      weights.push_back(source_.read_weight(block_.linears[linear], DType::kF32, backend_));
      weights_.set_linear(linear, weights.back(), backend_);
    }
    return weights;
  }

  InputStatistics collect(int cut) {
    const int64_t in = block_.cuts[cut].in;
    HessianAccumulator sum(in, DType::kF32, backend_, context_.lanes());
    LaneSum magnitudes({in}, DType::kF64, backend_, context_.lanes());
    for (size_t i = 0; i < batches_.size(); ++i) {
      const TensorView x = graph_.input(cut, weights_, batches_[i], backend_, scratch_);
      sum.add(x, ranges_[i].samples, ranges_[i].lane);
      backend_.add_magnitudes(x, magnitudes.open(ranges_[i].lane));
    }
    InputStatistics statistics;
    context_.meet();
    PhaseTimer timer(phases_, Phase::kExchange);
    statistics.hessian = context_.group.merge(sum);
    statistics.magnitudes = context_.group.merge(magnitudes);
    if (statistics.magnitudes.empty()) statistics.magnitudes = Tensor::zeros(DType::kF64, {in});
    return statistics;
  }

  void advance(int cut) {
    PhaseTimer timer(phases_, Phase::kSearch);
    for (MicroBatch& batch : batches_) {
      const TensorView x = graph_.input(cut, weights_, batch, backend_, scratch_);
      graph_.advance(cut, weights_, x, batch, backend_);
    }
    for (int linear : block_.cuts[cut].linears) weights_.drop_linear(linear);
    scratch_.reset();
  }

  // A solver that compensates rounding errors loses more by clipped weights than it gains by finer
  // grids (docs/algorithms.md has the numbers).
  bool clips(const LinearSpec& linear) const {
    return linear.clip && options_.awq.clip &&
           !find_quantizer(options_.settings_for(linear.module).algorithm).needs_hessian();
  }

  LinearProblem problem(int linear, TensorView weight) const {
    const std::string& module = block_.linears[linear].module;
    LinearProblem problem;
    problem.module = module;
    problem.weight = weight;
    problem.settings = options_.settings_for(module);
    problem.scale_dtype = format_.scale_dtype(source_.spec().dtype);
    return problem;
  }

  void decide(int cut, const std::vector<Tensor>& weights) {
    const CutSpec& spec = block_.cuts[cut];
    const InputStatistics statistics = [&] {
      PhaseTimer timer(phases_, Phase::kSearch);
      return collect(cut);
    }();
    PhaseTimer timer(phases_, Phase::kSearch);
    std::vector<LinearProblem> problems;
    for (size_t i = 0; i < weights.size(); ++i)
      if (is_awq(options_, block_.linears[spec.linears[i]])) {
        problems.push_back(problem(spec.linears[i], weights[i]));
        change_.linears_[spec.linears[i]].group_size = problems.back().settings.group_size;
      }
    const bool seen = statistics.hessian.tokens > 0;
    const std::string obstacle = seen ? fold_obstacle(options_, block_, spec) : "no tokens";
    if (obstacle.empty()) scale(spec, problems, statistics);
    for (int linear : spec.linears)
      if (change_.changes(linear) && foldable(spec) && !obstacle.empty())
        change_.linears_[linear].note = "not scaled: " + obstacle;
    if (seen) clip(spec, weights, statistics);
  }

  // Searches scales, folds them, and records them for the consumers. The statistics become those of
  // x / s.
  void scale(const CutSpec& cut, std::span<const LinearProblem> problems,
             const InputStatistics& statistics) {
    std::vector<Tensor> rows;
    const std::vector<LinearProblem> sampled = sample_rows(problems, rows);
    const ScaleSearch found =
        search_scales(mean_magnitudes(statistics), relative_weights(sampled), options_.awq.ratios,
                      group_loss(sampled, statistics, backend_), problems.front().module);
    const Tensor scales = clone(found.scales);
    fold(cut, scales);
    unscale_hessian(statistics.hessian.sum, scales);
    for (int linear : cut.linears) {
      BlockChange::Linear& change = change_.linears_[linear];
      change.columns = clone(scales);
      change.ratio = static_cast<double>(found.best) / options_.awq.ratios;
      change.weighted = found.weighted;
      change.gain = found.gain;
    }
  }

  // Divides what makes the cut's input by s, as far as its stored type allows; s becomes what was
  // really divided by.
  void fold(const CutSpec& cut, TensorView scales) {
    const FoldSpec& fold = cut.fold;
    if (fold.norm >= 0) {
      const std::string& name = block_.norms[fold.norm].name;
      change_.floats_[name] =
          fold_into(source_.read_float(name, backend_), fold.norm_offset, false, scales);
    } else {
      const LinearSpec& producer = block_.linears[fold.linear];
      if (producer.bias)
        change_.floats_[producer.bias_name()] =
            fold_into(source_.read_bias(producer, backend_), 0, true, scales);
      change_.linears_.at(fold.linear).rows = clone(scales);
    }
    for (const TensorSpec& consumer : cut.fold.consumers)
      change_.floats_[consumer.name] =
          scaled_consumer(source_.read_float(consumer.name, backend_), scales, backend_);
  }

  void clip(const CutSpec& cut, const std::vector<Tensor>& weights,
            const InputStatistics& statistics) {
    for (size_t i = 0; i < weights.size(); ++i) {
      const int linear = cut.linears[i];
      if (!change_.changes(linear) || !clips(block_.linears[linear])) continue;
      BlockChange::Linear& change = change_.linears_[linear];
      if (!change.columns.empty()) multiply_columns(weights[i], change.columns, backend_);
      change.limits = limits_of(linear, weights[i], statistics);
    }
  }

  // Rows are clipped one by one: each member searches its own.
  Tensor limits_of(int linear, TensorView weight, const InputStatistics& statistics) {
    const auto shares = share_rows({weight.rows()}, context_.group.size()).front();
    const RowRange mine = shares[context_.group.member()];
    const Tensor found = search_clip(problem(linear, weight.slice(mine.first, mine.end)),
                                     statistics.hessian, backend_);
    Tensor limits(DType::kF64, {weight.rows(), found.cols()});
    std::copy_n(found.as<double>(), found.elements(),
                limits.view().slice(mine.first, mine.end).as<double>());
    context_.group.gather_rows(limits, shares);
    return limits;
  }

  const BlockContext& context_;
  const RunOptions& options_;
  const ModelSource& source_;
  const OutputFormat& format_;
  const BlockSpec& block_;
  const BlockGraph& graph_;
  Backend& backend_;
  RankClock& phases_;
  BlockWeights weights_;
  std::vector<MicroBatch> batches_;
  std::vector<BatchRange> ranges_;
  Tensor scratch_;
  BlockChange change_;
};

BlockChange find_block_change(const BlockContext& context, const BlockSpec& block,
                              const BlockGraph& graph, Activations& activations) {
  return AwqPass(context, block, graph, activations).run();
}

}  // namespace bitmill
