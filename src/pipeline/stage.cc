#include "pipeline/stage.h"

#include <algorithm>
#include <optional>

#include "pipeline/awq_pass.h"
#include "pipeline/forward.h"
#include "pipeline/plan.h"

namespace bitmill {

struct Stage::CutSums {
  Hessian hessian;
  InputMismatch mismatch;  // empty where nothing compares with the float model
};

struct Stage::Capture {
  HessianAccumulator hessian;
  std::optional<MismatchAccumulator> mismatch;
  CutSums finish() {
    return {hessian.finish(), mismatch ? mismatch->finish() : InputMismatch()};
  }
};

struct Stage::Work {
  const BlockSpec& spec;
  const BlockGraph* graph;  // nullptr: no activations flow
  Activations& activations;
  bool propagates;  // the activations go on through the quantized linears
  BlockWeights weights;
  std::vector<CutSums> sums;  // per cut, only when the whole block is collected at once
  PackedBlock packed;
  Tensor scratch, float_scratch;
  BlockChange change;  // AWQ's, before anything is quantized
  BlockWeights dense;  // of the float stream, where there is one
  bool compares() const { return !activations.float_batches.empty(); }
};

Stage::Stage(const RunOptions& options, const ModelSource& source, const OutputFormat& format, Backend& backend,
             PhaseSeconds& phases, std::function<void(const QuantizeRecord&)> on_record)
    : options_(options), source_(source), format_(format), backend_(backend), phases_(phases),
      on_record_(std::move(on_record)) {}

namespace {

bool wants_hessian(const QuantizeSettings& settings) {
  return !settings.skip && find_quantizer(settings.algorithm).needs_hessian();
}

bool compares(const QuantizeSettings& settings) {
  return !settings.skip && find_quantizer(settings.algorithm).compares_with_float();
}

}  // namespace

bool needs_float_stream(const RunOptions& options, const ModelSpec& spec) {
  for (const BlockSpec& block : spec.blocks)
    for (const LinearSpec& linear : block.linears)
      if (compares(options.settings_for(linear.module))) return true;
  const auto head = head_to_quantize(options, spec);
  return head && compares(options.settings_for(head->module));
}

bool needs_calibration(const RunOptions& options, const ModelSpec& spec) {
  return samples_needed(options, spec, 1, 1) > 0;
}

int64_t samples_needed(const RunOptions& options, const ModelSpec& spec, int64_t samples, int64_t length) {
  bool scales = false;
  for (const BlockSpec& block : spec.blocks) {
    scales |= uses_awq(options, block);
    for (const LinearSpec& linear : block.linears)
      if (wants_hessian(options.settings_for(linear.module))) return samples;
  }
  const auto head = head_to_quantize(options, spec);
  if (head && wants_hessian(options.settings_for(head->module))) return samples;
  return scales ? std::min(samples, (options.awq.tokens + length - 1) / length) : 0;
}

bool Stage::needs_hessian(const BlockSpec& block, int cut) const {
  const std::vector<int>& linears = block.cuts[cut].linears;
  return std::any_of(linears.begin(), linears.end(), [&](int linear) {
    return wants_hessian(options_.settings_for(block.linears[linear].module));
  });
}

bool Stage::needs_mismatch(const BlockSpec& block, int cut) const {
  const std::vector<int>& linears = block.cuts[cut].linears;
  return std::any_of(linears.begin(), linears.end(), [&](int linear) {
    return compares(options_.settings_for(block.linears[linear].module));
  });
}

PackedBlock Stage::run(int64_t index, const BlockGraph* graph, Activations& activations) {
  const BlockSpec& spec = source_.spec().blocks[index];
  Work work{spec, graph, activations, graph != nullptr, BlockWeights(spec), {}, {}, {}, {}, {},
            BlockWeights(spec)};
  if (graph != nullptr && uses_awq(options_, spec))
    work.change = find_block_change(options_, source_, format_, spec, *graph, activations, backend_, phases_);
  {
    PhaseTimer timer(phases_, Phase::kRead);
    work.weights = source_.read_block_floats(spec, backend_);
    for (const auto& [name, value] : work.change.floats()) work.weights.set_float(name, value, backend_);
  }
  if (work.compares()) work.dense = read_changed_block(work);
  run_cuts(work);
  for (const TensorSpec& norm : spec.norms)
    work.packed.tensors.push_back({norm.name, read_float(work, norm.name)});
  return std::move(work.packed);
}

PackedBlock Stage::run_head(Activations& activations) {
  const BlockSpec spec = head_block(source_.spec());
  const auto graph = activations.batches.empty() ? nullptr : head_graph(source_, backend_);
  Work work{spec, graph.get(), activations, false, BlockWeights(spec), {}, {}, {}, {}, {},
            BlockWeights(spec)};
  run_cuts(work);
  return std::move(work.packed);
}

void Stage::run_cuts(Work& work) {
  const BlockSpec& spec = work.spec;
  const int cuts = static_cast<int>(spec.cuts.size());
  const bool whole = work.propagates && !options_.quantize.true_sequential;
  if (whole) collect_whole_block(work);

  CutSums ahead;  // of the cut to be solved next
  if (work.graph != nullptr && !whole && needs_hessian(spec, 0)) ahead = collect(work, 0);
  for (int cut = 0; cut < cuts; ++cut) {
    const CutSums& sums = whole ? work.sums[cut] : ahead;
    solve(work, cut, needs_hessian(spec, cut) ? &sums : nullptr);
    ahead = CutSums();
    if (!work.propagates) continue;
    const bool collect_next = !whole && cut + 1 < cuts && needs_hessian(spec, cut + 1);
    if (collect_next) {
      Capture next = start_capture(work, cut + 1);
      advance(work, cut, &next);
      ahead = next.finish();
    } else {
      advance(work, cut, nullptr);
    }
    for (int linear : spec.cuts[cut].linears) work.weights.drop_linear(linear);
  }
}

// NaN and Inf spread to every later activation: the first module to see one, in the first sample
// that holds it, is where to look.
void Stage::check_finite(const Work& work, int cut, TensorView x, const BatchRange& range) const {
  const int64_t bad = backend_.first_non_finite(x);
  if (bad < 0) return;
  const int64_t token = bad / x.cols(), length = x.rows() / std::max<int64_t>(1, range.samples);
  fail(ExitCode::kInput,
       "{}: its input is not finite in calibration sample {} (token {}, channel {}): the "
       "activations overflow in an earlier layer, or a weight is far out of range",
       work.spec.linears[work.spec.cuts[cut].linears.front()].module,
       range.first_sample + token / length, token % length, bad % x.cols());
}

// A norm or bias as it is stored in the output.
Tensor Stage::read_float(const Work& work, const std::string& name) const {
  const auto folded = work.change.floats().find(name);
  return folded != work.change.floats().end() ? clone(folded->second) : source_.read_float(name, backend_);
}

// The float block after scaling (and before clipping): it computes what the source's does.
BlockWeights Stage::read_changed_block(const Work& work) {
  PhaseTimer timer(phases_, Phase::kRead);
  BlockWeights dense = source_.read_block(work.spec, backend_);
  for (const auto& [name, value] : work.change.floats()) dense.set_float(name, value, backend_);
  for (int linear = 0; linear < static_cast<int>(work.spec.linears.size()); ++linear) {
    if (!work.change.changes(linear)) continue;
    const Tensor weight = source_.read_weight(work.spec.linears[linear], DType::kF32, backend_);
    work.change.apply(linear, weight, false, backend_);
    dense.set_linear(linear, weight, backend_);
  }
  return dense;
}

void Stage::add_input(Work& work, int cut, const MicroBatch& batch, const BatchRange& range,
                      HessianAccumulator& sum) {
  TensorView x;
  {
    PhaseTimer timer(phases_, Phase::kForward);
    x = work.graph->input(cut, work.weights, batch, backend_, work.scratch);
  }
  PhaseTimer timer(phases_, Phase::kHessian);
  sum.add(x, range.samples, range.lane);
  if (!sum.finite()) check_finite(work, cut, x, range);
}

Stage::Capture Stage::start_capture(const Work& work, int cut) const {
  const CutSpec& spec = work.spec.cuts[cut];
  Capture capture{HessianAccumulator(spec.in, DType::kF32, backend_), std::nullopt};
  if (work.compares() && needs_mismatch(work.spec, cut)) {
    const int64_t hidden = spec.adds_to_hidden ? work.spec.linears[spec.linears.front()].out : 0;
    capture.mismatch.emplace(spec.in, hidden, DType::kF32, backend_);
  }
  return capture;
}

// The input of a cut in micro-batch `i`, next to the float model's where that is wanted.
void Stage::add_inputs(Work& work, int cut, size_t i, Capture& capture) {
  const MicroBatch& batch = work.activations.batches[i];
  const BatchRange& range = work.activations.ranges[i];
  add_input(work, cut, batch, range, capture.hessian);
  if (!capture.mismatch) return;
  const MicroBatch& other = work.activations.float_batches[i];
  TensorView x, x_float;
  {
    PhaseTimer timer(phases_, Phase::kForward);
    x = work.graph->input(cut, work.weights, batch, backend_, work.scratch);
    x_float = work.graph->input(cut, work.dense, other, backend_, work.float_scratch);
  }
  PhaseTimer timer(phases_, Phase::kHessian);
  const bool residual = work.spec.cuts[cut].adds_to_hidden;
  capture.mismatch->add(x, x_float, residual ? batch.hidden.view() : TensorView(),
                        residual ? other.hidden.view() : TensorView(), range.lane);
}

Stage::CutSums Stage::collect(Work& work, int cut) {
  Capture capture = start_capture(work, cut);
  for (size_t i = 0; i < work.activations.batches.size(); ++i) add_inputs(work, cut, i, capture);
  PhaseTimer timer(phases_, Phase::kHessian);
  return capture.finish();
}

// One float forward of the block; the activations themselves stay as they are.
void Stage::collect_whole_block(Work& work) {
  const int cuts = static_cast<int>(work.spec.cuts.size());
  const BlockWeights dense = read_changed_block(work);
  std::vector<HessianAccumulator> sums;
  for (const CutSpec& cut : work.spec.cuts) sums.emplace_back(cut.in, DType::kF32, backend_);
  for (size_t i = 0; i < work.activations.batches.size(); ++i) {
    const MicroBatch& given = work.activations.batches[i];
    MicroBatch copy{given.sequences, given.length, clone(given.hidden), Tensor()};
    for (int cut = 0; cut < cuts; ++cut) {
      if (needs_hessian(work.spec, cut)) add_input(work, cut, copy, work.activations.ranges[i], sums[cut]);
      if (cut + 1 == cuts) break;  // nobody needs the block's float output
      PhaseTimer timer(phases_, Phase::kForward);
      const TensorView x = work.graph->input(cut, dense, copy, backend_, work.scratch);
      work.graph->advance(cut, dense, x, copy, backend_);
    }
  }
  PhaseTimer timer(phases_, Phase::kHessian);
  for (HessianAccumulator& sum : sums) work.sums.push_back({sum.finish(), InputMismatch()});
}

void Stage::advance_float(Work& work, int cut, MicroBatch& batch) {
  PhaseTimer timer(phases_, Phase::kForward);
  const TensorView x = work.graph->input(cut, work.dense, batch, backend_, work.float_scratch);
  work.graph->advance(cut, work.dense, x, batch, backend_);
}

void Stage::advance(Work& work, int cut, Capture* next) {
  for (size_t i = 0; i < work.activations.batches.size(); ++i) {
    MicroBatch& batch = work.activations.batches[i];
    {
      PhaseTimer timer(phases_, Phase::kForward);
      const TensorView x = work.graph->input(cut, work.weights, batch, backend_, work.scratch);
      if (!needs_hessian(work.spec, cut)) check_finite(work, cut, x, work.activations.ranges[i]);
      work.graph->advance(cut, work.weights, x, batch, backend_);
    }
    if (work.compares()) advance_float(work, cut, work.activations.float_batches[i]);
    if (next != nullptr) add_inputs(work, cut + 1, i, *next);
  }
  work.scratch.reset();
  work.float_scratch.reset();
}

void Stage::solve(Work& work, int cut, const CutSums* sums) {
  std::map<std::string, std::vector<int>> by_algorithm;
  for (int linear : work.spec.cuts[cut].linears) {
    const QuantizeSettings settings = options_.settings_for(work.spec.linears[linear].module);
    if (settings.skip) keep_float(work, linear);
    else by_algorithm[settings.algorithm].push_back(linear);
  }
  for (const auto& [algorithm, linears] : by_algorithm) {
    std::vector<QuantizeResult> results = quantize_group(work, linears, sums);
    for (size_t i = 0; i < linears.size(); ++i) keep(work, linears[i], std::move(results[i]));
  }
}

std::vector<QuantizeResult> Stage::quantize_group(Work& work, const std::vector<int>& linears,
                                                  const CutSums* sums) {
  std::vector<Tensor> weights;
  std::vector<LinearProblem> problems;
  for (int linear : linears) {
    const LinearSpec& spec = work.spec.linears[linear];
    PhaseTimer timer(phases_, Phase::kRead);
    weights.push_back(source_.read_weight(spec, DType::kF32, backend_));
    work.change.apply(linear, weights.back(), true, backend_);
    problems.push_back({spec.module, weights.back(), options_.settings_for(spec.module),
                        format_.scale_dtype(source_.spec().dtype)});
    if (compares(problems.back().settings) && sums != nullptr && !sums->mismatch.inputs.empty())
      problems.back().mismatch = &sums->mismatch;
  }
  PhaseTimer timer(phases_, Phase::kSolve);
  const Hessian* hessian = sums != nullptr ? &sums->hessian : nullptr;
  return find_quantizer(problems.front().settings.algorithm).quantize(problems, hessian, backend_);
}

void Stage::keep(Work& work, int linear, QuantizeResult result) {
  const LinearSpec& spec = work.spec.linears[linear];
  {
    PhaseTimer timer(phases_, Phase::kPack);
    const Tensor bias = spec.bias ? read_float(work, spec.bias_name()) : Tensor();
    for (NamedTensor& tensor : format_.pack(spec, result.linear, bias)) work.packed.tensors.push_back(std::move(tensor));
  }
  if (work.propagates) {
    PhaseTimer timer(phases_, Phase::kForward);
    Tensor dense = backend_.allocate(backend_.compute(), {spec.out, spec.in});
    backend_.dequantize(result.linear, dense);
    work.weights.set_linear(linear, dense, backend_);
  }
  work.change.describe(linear, result.record);
  work.packed.failed |= result.record.failed;
  on_record_(result.record);
  work.packed.records.push_back(std::move(result.record));
}

void Stage::keep_float(Work& work, int linear) {
  const LinearSpec& spec = work.spec.linears[linear];
  PhaseTimer timer(phases_, Phase::kRead);
  Tensor stored = source_.read_float(spec.weight_name(), backend_);
  if (work.propagates)
    work.weights.set_linear(linear, source_.read_weight(spec, backend_.compute(), backend_), backend_);
  work.packed.tensors.push_back({spec.weight_name(), std::move(stored)});
  if (spec.bias) work.packed.tensors.push_back({spec.bias_name(), source_.read_bias(spec, backend_)});
}

}  // namespace bitmill
