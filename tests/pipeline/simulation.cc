#include "pipeline/rank_clock.h"
#include "pipeline/simulation.h"

#include <atomic>
#include <numeric>

#include "pipeline/rank_work.h"
#include "support/modelled_backend.h"
#include "support/sparse_checkpoint.h"

namespace bitmill::testing {
namespace {

constexpr int64_t kLength = 8;  // tokens of a sample
constexpr int64_t kSamples = 128;
constexpr int kLanes = 8;
constexpr double kFree = 1e30;  // bytes/s that take no time

// Seconds of one block on one rank.
constexpr double kForward = 4, kHessian = 3, kSplits = 1.6, kFactor = 0.4;

std::string write_model(const std::string& directory, const SparseModel& model) {
  write_sparse_model(directory, model);
  return directory;
}

// What ranks tell, from their threads.
struct Told {
  std::string algorithm;
  std::atomic<int64_t> linears = 0, blocks = 0;
  RankEvents events() {
    return {[this](const LinearEvent& event) {
              BITMILL_CHECK(event.record.method == algorithm && event.record.retries == 0);
              ++linears;
            },
            [this](const BlockEvent&) { ++blocks; }};
  }
};

std::vector<int> all_ranks(int count, int first = 0) {
  std::vector<int> ranks(static_cast<size_t>(count));
  std::iota(ranks.begin(), ranks.end(), first);
  return ranks;
}

}  // namespace

Simulation::Simulation(int64_t blocks, int64_t hidden, int64_t intermediate)
    : source_(ModelSource::open(
          write_model(directory_.file("model"), {blocks, hidden, intermediate, 256}))) {
  set_rates();
}

// At rates of 1 a block's seconds are its FLOPs.
void Simulation::set_rates() {
  Rates one{1, 1, 1, 0, 1, 1, kFree, kFree, kFree, kFree, 0, false};
  CostShape shape;
  shape.tokens = kSamples * kLength;
  shape.length = kLength;
  const BlockSpec& block = source_.spec().blocks.front();
  const auto dtypes = [](const std::string&) { return DType::kBF16; };
  const BlockWork work =
      block_work(RunOptions(), source_.spec(), block, find_format("gptq"), dtypes);
  rates_ = assumed_rates(false, DType::kBF16);
  one.factor_half_columns = rates_.factor_half_columns;  // not an option: the plan's own
  const BlockSeconds flops = block_seconds(work, shape, one);
  const auto rate = [&](CostPhase phase, double seconds) {
    return flops.phases[static_cast<size_t>(phase)] / seconds;
  };
  rates_.forward_flops = rate(CostPhase::kForward, kForward);
  rates_.hessian_flops = rate(CostPhase::kHessian, kHessian);
  rates_.factor_flops = rate(CostPhase::kFactor, kFactor);
  rates_.sweep_flops = rate(CostPhase::kSweep, kSplits / 2);
  rates_.grid_elements = rate(CostPhase::kGrid, kSplits / 2);
}

RunOptions Simulation::options_of(const SimulatedRun& run) const {
  RunOptions options;
  options.propagation.mode = run.mode;
  options.quantize.algorithm = run.algorithm;
  options.quantize.true_sequential = run.true_sequential;
  options.run.stage_width = std::to_string(run.width);
  options.run.microbatch_tokens = kLength;
  options.run.reduction_lanes = kLanes;
  RunOptions::Machine& machine = options.machine;
  machine.forward_flops = rates_.forward_flops;
  machine.hessian_flops = rates_.hessian_flops;
  machine.factor_flops = rates_.factor_flops;
  machine.sweep_flops = rates_.sweep_flops;
  machine.grid_elements = rates_.grid_elements;
  machine.read_bandwidth = machine.write_bandwidth = machine.storage_bandwidth = kFree;
  machine.link_bandwidth = run.link_bytes_per_second;
  return options;
}

Plan Simulation::plan_of(const SimulatedRun& run, const RunOptions& options) const {
  PlanMachine machine;
  machine.ranks = machine.ranks_per_node = run.stages * run.width;
  machine.memory_per_rank = run.memory_per_rank;
  machine.memory_name = "memory";
  PlanJob job;
  job.samples = run.samples;
  job.length = kLength;
  const auto dtypes = [&](const std::string& name) { return source_.checkpoint().at(name).dtype; };
  return make_plan(options, source_.spec(), find_format("gptq"), machine, job, dtypes);
}

SimulatedResult Simulation::run(const SimulatedRun& run) const {
  const RunOptions options = options_of(run);
  const Plan plan = plan_of(run, options);
  BITMILL_CHECK(plan.stages == run.stages && plan.width == run.width);
  const TemporaryDirectory folder;
  const OutputDirectory output(folder.file("out"));
  output.prepare(plan, {}, {});
  const int ranks = run.stages * run.width;
  SimulatedMachine machine(ranks, {run.link_bytes_per_second, run.latency});
  Told told{run.algorithm};
  const RankEvents events = told.events();
  machine.run([&](int rank) {
    const RankPlan& mine = plan.ranks[static_cast<size_t>(rank)];
    const auto pipe = machine.transport("pipe", all_ranks(ranks), rank);
    const int first = mine.stage * run.width;
    const auto stage = machine.transport("stage", all_ranks(run.width, first), mine.member);
    ModelledBackend backend(plan.rates, plan.job.compute, machine.clock(rank));
    QuantizeJob job{options, source_, find_format("gptq"), plan, output, {}};
    if (rank == 0) job.ids = Tensor::zeros(DType::kI32, {run.samples, kLength});
    RankClock phases(0);  // of this process, not of the simulation
    run_rank(job, mine, *pipe, *stage, backend, events, phases);
  });
  SimulatedResult result{plan.seconds, machine.seconds(), 0, run.samples / run.width, 0,
                         told.linears, told.blocks};
  for (int rank = 0; rank < ranks; ++rank) {
    const VirtualClock& clock = machine.clock(rank);
    result.busy += (clock.now() - clock.waited()) / machine.seconds() / ranks;
    const RankPlan& mine = plan.ranks[static_cast<size_t>(rank)];
    result.waves = std::max(result.waves, static_cast<int>(mine.waves.size()));
  }
  return result;
}

}  // namespace bitmill::testing
