#include "pipeline/stage.h"

#include <algorithm>

#include "pipeline/forward.h"
#include "pipeline/plan.h"

namespace bitmill {

struct Stage::Work {
  const BlockSpec& spec;
  const BlockGraph* graph;  // nullptr: no activations flow
  Activations& activations;
  const BlockChange& change;  // AWQ's, before anything is quantized
  BlockSolver& solver;
  bool propagates = false;  // the activations go on through the quantized linears
  bool output_needed = false;  // through those of the last cut, too
  BlockWeights weights = BlockWeights(spec);
  BlockWeights dense = BlockWeights(spec);  // of the float stream, where there is one
  Tensor scratch = {}, float_scratch = {};
  bool compares() const { return !activations.float_batches.empty(); }
};

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

BlockWeights read_changed_block(const BlockContext& context, const BlockSpec& block, const BlockChange& change) {
  PhaseTimer timer(context.phases, Phase::kRead);
  Backend& backend = context.backend;
  BlockWeights dense = context.source.read_block_floats(block, backend);
  for (const auto& [name, value] : change.floats()) dense.set_float(name, value, backend);
  for (int linear = 0; linear < static_cast<int>(block.linears.size()); ++linear) {
    const LinearSpec& spec = block.linears[linear];
    const DType dtype = change.changes(linear) ? DType::kF32 : backend.compute();
    const auto shares = share_rows({spec.out}, context.group.size()).front();
    const RowRange mine = shares[context.group.member()];
    Tensor rows = context.source.read_weight_rows(spec, mine.first, mine.end, dtype, backend);
    change.apply(linear, rows, mine.first, false, backend);
    dense.set_linear(linear, context.group.whole(std::move(rows), shares), backend);
  }
  return dense;
}

bool Stage::needs_hessian(const Work& work, int cut) const {
  return work.graph != nullptr && bitmill::needs_hessian(context_.options, work.spec, cut);
}

PackedBlock Stage::run(int64_t index, const BlockGraph* graph, Activations& activations, bool output_needed) {
  const BlockSpec& spec = context_.source.spec().blocks[index];
  BlockChange change;
  if (graph != nullptr && uses_awq(context_.options, spec))
    change = find_block_change(context_, spec, *graph, activations);
  BlockSolver solver(context_, spec, change);
  Work work{spec, graph, activations, change, solver, graph != nullptr, output_needed};
  {
    PhaseTimer timer(context_.phases, Phase::kRead);
    work.weights = context_.source.read_block_floats(spec, context_.backend);
    for (const auto& [name, value] : change.floats()) work.weights.set_float(name, value, context_.backend);
  }
  if (work.compares()) work.dense = read_changed_block(context_, spec, change);
  run_cuts(work);
  return solver.finish();
}

PackedBlock Stage::run_head(Activations& activations) {
  const BlockSpec spec = head_block(context_.source.spec());
  const auto graph = activations.batches.empty() ? nullptr : head_graph(context_.source, context_.backend);
  const BlockChange change;
  BlockSolver solver(context_, spec, change);
  Work work{spec, graph.get(), activations, change, solver};
  run_cuts(work);
  return solver.finish();
}

void Stage::run_cuts(Work& work) {
  const BlockSpec& spec = work.spec;
  const int cuts = static_cast<int>(spec.cuts.size());
  const bool whole = work.propagates && !context_.options.quantize.true_sequential;
  std::vector<CutSums> sums(static_cast<size_t>(cuts));
  read_ahead(context_, spec, 0);
  if (whole) sums = collect_whole_block(work);
  else if (needs_hessian(work, 0)) sums[0] = collect(work, 0);
  for (int cut = 0; cut < cuts; ++cut) {
    if (whole) read_ahead(context_, spec, cut + 1);
    const bool goes_on = work.propagates && (cut + 1 < cuts || work.output_needed);
    work.solver.solve(cut, needs_hessian(work, cut) ? &sums[cut] : nullptr, goes_on ? &work.weights : nullptr);
    sums[cut] = CutSums();
    if (!whole) read_ahead(context_, spec, cut + 1);
    if (!goes_on) continue;
    if (!whole && cut + 1 < cuts && needs_hessian(work, cut + 1)) {
      CutCapture next(context_, spec, cut + 1, work.compares());
      advance(work, cut, &next);
      sums[cut + 1] = next.merge();
    } else {
      advance(work, cut, nullptr);
    }
    for (int linear : spec.cuts[cut].linears) work.weights.drop_linear(linear);
  }
}

// The input of a cut in micro-batch `i`, next to the float model's where that is wanted.
void Stage::add_inputs(Work& work, int cut, size_t i, CutCapture& capture) {
  const MicroBatch& batch = work.activations.batches[i];
  const BatchRange& range = work.activations.ranges[i];
  TensorView x, x_float;
  {
    PhaseTimer timer(context_.phases, Phase::kForward);
    x = work.graph->input(cut, work.weights, batch, context_.backend, work.scratch);
    if (capture.compares_with_float())
      x_float = work.graph->input(cut, work.dense, work.activations.float_batches[i], context_.backend,
                                  work.float_scratch);
  }
  capture.add(x, range);
  if (capture.compares_with_float()) capture.compare(x, x_float, batch, work.activations.float_batches[i], range);
}

CutSums Stage::collect(Work& work, int cut) {
  CutCapture capture(context_, work.spec, cut, work.compares());
  for (size_t i = 0; i < work.activations.batches.size(); ++i) {
    work.activations.await(i);
    add_inputs(work, cut, i, capture);
  }
  return capture.merge();
}

// One float forward of the block; the activations themselves stay as they are.
std::vector<CutSums> Stage::collect_whole_block(Work& work) {
  const int cuts = static_cast<int>(work.spec.cuts.size());
  const BlockWeights dense = read_changed_block(context_, work.spec, work.change);
  std::vector<CutCapture> captures;
  for (int cut = 0; cut < cuts; ++cut) captures.emplace_back(context_, work.spec, cut, false);
  for (size_t i = 0; i < work.activations.batches.size(); ++i) {
    work.activations.await(i);
    const MicroBatch& given = work.activations.batches[i];
    MicroBatch copy{given.sequences, given.length, clone(given.hidden), Tensor()};
    run_float_block(context_, work.spec, *work.graph, dense, work.activations.ranges[i], copy, captures, false);
  }
  std::vector<CutSums> sums;
  for (int cut = 0; cut < cuts; ++cut) sums.push_back(captures[cut].merge());
  return sums;
}

void Stage::advance_float(Work& work, int cut, MicroBatch& batch) {
  PhaseTimer timer(context_.phases, Phase::kForward);
  const TensorView x = work.graph->input(cut, work.dense, batch, context_.backend, work.float_scratch);
  work.graph->advance(cut, work.dense, x, batch, context_.backend);
}

void Stage::advance(Work& work, int cut, CutCapture* next) {
  Activations& activations = work.activations;
  const bool last = cut + 1 == static_cast<int>(work.spec.cuts.size());
  std::optional<Error> refused;  // of a cut whose capture did not look
  for (size_t i = 0; i < activations.batches.size(); ++i) {
    activations.await(i);
    MicroBatch& batch = activations.batches[i];
    {
      PhaseTimer timer(context_.phases, Phase::kForward);
      const TensorView x = work.graph->input(cut, work.weights, batch, context_.backend, work.scratch);
      if (!needs_hessian(work, cut))
        note_finite(context_.backend, work.spec, cut, x, activations.ranges[i], refused);
      if (context_.group.size() == 1) context_.group.agree(refused);  // nobody to wait for
      work.graph->advance(cut, work.weights, x, batch, context_.backend);
    }
    if (work.compares()) advance_float(work, cut, activations.float_batches[i]);
    if (next != nullptr) add_inputs(work, cut + 1, i, *next);
    if (last && activations.leave) activations.leave(i);
  }
  work.scratch.reset();
  work.float_scratch.reset();
  if (!needs_hessian(work, cut)) context_.group.agree(refused);
}

}  // namespace bitmill
