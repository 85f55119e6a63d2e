#include "pipeline/block_solver.h"

#include <algorithm>
#include <map>

#include "pipeline/row_pieces.h"

namespace bitmill {
namespace {

// The next piece of a linear that is quantized in pieces; the next cut of linears that are solved whole.
constexpr int64_t kReadAheadBytes = 32 << 20;
constexpr int64_t kCutAheadBytes = 256 << 20;

// The linears of a cut that are quantized, by algorithm: those of one share Hessian and factor.
std::map<std::string, std::vector<int>> by_algorithm(const BlockContext& context, const BlockSpec& block, int cut) {
  std::map<std::string, std::vector<int>> groups;
  for (int linear : block.cuts[cut].linears) {
    const QuantizeSettings settings = context.settings(block.linears[linear]);
    if (!settings.skip) groups[settings.algorithm].push_back(linear);
  }
  return groups;
}

// Who of the stage solves which rows of linears that are solved together.
std::vector<std::vector<RowRange>> shares_of(const BlockContext& context, const BlockSpec& block,
                                             const std::vector<int>& linears) {
  std::vector<int64_t> rows;
  for (int linear : linears) rows.push_back(block.linears[linear].out);
  return share_rows(rows, context.group.size());
}

}  // namespace

void read_ahead(const BlockContext& context, const BlockSpec& block, int cut) {
  if (cut >= static_cast<int>(block.cuts.size())) return;
  std::vector<ModelSource::LinearRows> wanted;
  for (const auto& [algorithm, linears] : by_algorithm(context, block, cut)) {
    if (!find_quantizer(algorithm).needs_hessian()) continue;
    const auto shares = shares_of(context, block, linears);
    for (size_t i = 0; i < linears.size(); ++i) {
      const RowRange mine = shares[i][context.group.member()];
      if (mine.count() > 0) wanted.push_back({block.linears[linears[i]], mine.first, mine.end});
    }
  }
  if (!wanted.empty()) context.source.prefetch(wanted, kCutAheadBytes);
}

Tensor BlockSolver::read_float(const std::string& name) const {
  const auto folded = change_.floats().find(name);
  return folded != change_.floats().end() ? clone(folded->second) : context_.source.read_float(name, context_.backend);
}

void BlockSolver::solve(int cut, const CutSums* sums, BlockWeights* weights) {
  for (int linear : block_.cuts[cut].linears)
    if (context_.settings(block_.linears[linear]).skip) keep_float(linear, weights);
  for (const auto& [algorithm, linears] : by_algorithm(context_, block_, cut)) {
    if (!find_quantizer(algorithm).needs_hessian()) {
      // Nothing is shared between them: one linear at a time, and a few of its rows.
      for (int linear : linears) keep(linear, quantize_alone(linear, sums), weights);
      continue;
    }
    std::vector<QuantizeResult> results = quantize(linears, sums);
    for (size_t i = 0; i < linears.size(); ++i) keep(linears[i], std::move(results[i]), weights);
  }
}

// Each member its rows; then all rows on all members.
std::vector<QuantizeResult> BlockSolver::quantize(const std::vector<int>& linears, const CutSums* sums) {
  const auto shares = shares_of(context_, block_, linears);
  std::vector<Tensor> weights;
  std::vector<LinearProblem> problems;
  for (size_t i = 0; i < linears.size(); ++i) {
    const LinearSpec& spec = block_.linears[linears[i]];
    const RowRange mine = shares[i][context_.group.member()];
    PhaseTimer timer(context_.phases, Phase::kRead);
    weights.push_back(context_.source.read_weight_rows(spec, mine.first, mine.end, DType::kF32, context_.backend));
    change_.apply(linears[i], weights.back(), mine.first, true, context_.backend);
    LinearProblem problem;
    problem.module = spec.module;
    problem.weight = weights.back();
    problem.first_row = mine.first;
    problem.may_zero_columns = true;
    problem.settings = context_.settings(spec);
    problem.scale_dtype = context_.format.scale_dtype(context_.source.spec().dtype);
    problems.push_back(std::move(problem));
  }
  const Quantizer& quantizer = find_quantizer(problems.front().settings.algorithm);
  if (quantizer.compares_with_float() && sums != nullptr && !sums->mismatch.inputs.empty())
    for (LinearProblem& problem : problems) problem.mismatch = &sums->mismatch;
  PhaseTimer timer(context_.phases, Phase::kSolve);
  const Hessian* hessian = sums != nullptr ? &sums->hessian : nullptr;
  std::vector<QuantizeResult> results = quantizer.quantize(problems, hessian, context_.backend, context_.group);
  context_.meet();
  PhaseTimer exchange(context_.phases, Phase::kExchange);
  for (size_t i = 0; i < results.size(); ++i) results[i] = context_.group.join(std::move(results[i]), shares[i]);
  return results;
}

QuantizeResult BlockSolver::quantize_alone(int linear, const CutSums* sums) {
  const LinearSpec& spec = block_.linears[linear];
  const auto shares = share_rows({spec.out}, context_.group.size())[0];
  const RowRange mine = shares[context_.group.member()];
  LinearProblem problem;
  problem.module = spec.module;
  problem.settings = context_.settings(spec);
  problem.scale_dtype = context_.format.scale_dtype(context_.source.spec().dtype);
  const int64_t step = rows_per_piece(spec.in);
  const auto read = [&](int64_t first, int64_t end) {
    PhaseTimer timer(context_.phases, Phase::kRead);
    Tensor weight = context_.source.read_weight_rows(spec, first, end, DType::kF32, context_.backend);
    if (end < mine.end)
      context_.source.prefetch({{spec, end, std::min(mine.end, end + step)}}, kReadAheadBytes);
    change_.apply(linear, weight, first, true, context_.backend);
    return weight;
  };
  PhaseTimer solving(context_.phases, Phase::kSolve);
  QuantizeResult result = quantize_in_pieces(problem, spec.in, mine, read, sums != nullptr ? &sums->hessian : nullptr,
                                             find_quantizer(problem.settings.algorithm), context_.backend);
  context_.meet();
  PhaseTimer exchange(context_.phases, Phase::kExchange);
  return context_.group.join(std::move(result), shares);
}

void BlockSolver::add_tensor(NamedTensor tensor) {
  if (!context_.wants(tensor.name)) return;
  if (context_.on_tensor) context_.on_tensor(std::move(tensor));
  else packed_.tensors.push_back(std::move(tensor));
}

void BlockSolver::pack(int linear, const QuantizedLinear& quantized) {
  const LinearSpec& spec = block_.linears[linear];
  const auto specs = context_.format.packed_specs(spec, context_.settings(spec), context_.source.spec().dtype);
  if (std::none_of(specs.begin(), specs.end(), [&](const PackedSpec& s) { return context_.wants(s.name); })) return;
  PhaseTimer timer(context_.phases, Phase::kPack);
  const Tensor bias = spec.bias ? read_float(spec.bias_name()) : Tensor();
  for (NamedTensor& tensor : context_.format.pack(spec, quantized, bias)) add_tensor(std::move(tensor));
}

void BlockSolver::keep(int linear, QuantizeResult result, BlockWeights* weights) {
  pack(linear, result.linear);
  if (weights != nullptr) {
    PhaseTimer timer(context_.phases, Phase::kForward);
    const LinearSpec& spec = block_.linears[linear];
    Tensor dense = context_.backend.allocate(context_.backend.compute(), {spec.out, spec.in});
    context_.backend.dequantize(result.linear, dense);
    weights->set_linear(linear, dense, context_.backend);
  }
  change_.describe(linear, result.record);
  packed_.failed |= result.record.failed;
  context_.on_record(result.record);
  packed_.records.push_back(std::move(result.record));
}

void BlockSolver::keep_float(int linear, BlockWeights* weights) {
  const LinearSpec& spec = block_.linears[linear];
  Backend& backend = context_.backend;
  PhaseTimer timer(context_.phases, Phase::kRead);
  if (weights != nullptr)
    weights->set_linear(linear, context_.source.read_weight(spec, backend.compute(), backend), backend);
  if (context_.wants(spec.weight_name()))
    add_tensor({spec.weight_name(), context_.source.read_float(spec.weight_name(), backend)});
  if (spec.bias && context_.wants(spec.bias_name()))
    add_tensor({spec.bias_name(), context_.source.read_bias(spec, backend)});
}

PackedBlock BlockSolver::finish() {
  for (const TensorSpec& norm : block_.norms)
    if (context_.wants(norm.name)) add_tensor({norm.name, read_float(norm.name)});
  return std::move(packed_);
}

}  // namespace bitmill
