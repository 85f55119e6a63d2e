#include "pipeline/pipeline.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <map>
#include <thread>

#include "pipeline/forward.h"

namespace bitmill {
namespace {

// Collects events on rank 0: its own directly, the others' as posts.
class EventChannel {
 public:
  EventChannel(Communicator& comm, RunObserver& observer) : comm_(comm), observer_(observer) {}

  void tell(const LinearEvent& event) {
    observer_.on_own_linear(event);
    if (comm_.rank() == 0) take(event);
    else comm_.post(to_text(event));
    drain();
  }
  void tell(const BlockEvent& event) {
    if (comm_.rank() == 0) observer_.on_block(event);
    else comm_.post(to_text(event));
    drain();
  }
  void tell(const RankSummary& summary) {
    if (comm_.rank() == 0) summaries_[summary.rank] = summary;
    else comm_.post(to_text(summary));
  }

  // Rank 0 listens until every rank has said its summary.
  QuantizeOutcome finish() {
    if (comm_.rank() != 0) return {};
    while (static_cast<int>(summaries_.size()) < comm_.size()) {
      drain();
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    QuantizeOutcome outcome;
    // Ranks run at their own pace; the table is in order of the model.
    std::stable_sort(linears_.begin(), linears_.end(),
                     [](const LinearEvent& a, const LinearEvent& b) { return a.block < b.block; });
    outcome.linears = std::move(linears_);
    for (auto& [rank, summary] : summaries_) outcome.ranks.push_back(std::move(summary));
    return outcome;
  }

 private:
  void take(const LinearEvent& event) {
    observer_.on_linear(event);
    linears_.push_back(event);
  }
  void drain() {
    if (comm_.rank() != 0) return;
    while (const auto text = comm_.poll_post()) {
      const Json json = parse_json(*text, "a record of another rank");
      const std::string kind = json.at("kind");
      if (kind == "linear") take(linear_event_from(json));
      else if (kind == "block") observer_.on_block(block_event_from(json));
      else {
        const RankSummary summary = rank_summary_from(json);
        summaries_[summary.rank] = summary;
      }
    }
  }

  Communicator& comm_;
  RunObserver& observer_;
  std::vector<LinearEvent> linears_;
  std::map<int, RankSummary> summaries_;
};

constexpr int64_t kCopyQueueBytes = 64 << 20;  // a few pieces of ModelSource::read_pieces

// A tensor that the output takes as it is, never whole in memory. `check`: NaN and Inf are refused.
void copy_tensor(const QuantizeJob& job, const std::string& name, bool check, Backend& backend,
                 KeyWriter& writer) {
  job.source.read_pieces(name, check, backend, [&](int64_t offset, Tensor piece) {
    writer.write_part(name, offset, std::move(piece));
  });
}

void write_tensor(const QuantizeJob& job, const std::string& key, const std::string& name,
                  Backend& backend, WriteBehind& queue) {
  KeyWriter writer = job.output.start_shards(job.plan, key, queue);
  copy_tensor(job, name, true, backend, writer);
  writer.finish();
}

// Embedding, final norm, a head in float and unknown tensors: copied by the first and last stage.
void write_float_shards(const QuantizeJob& job, const RankPlan& mine, Backend& backend,
                        PhaseSeconds& phases) {
  PhaseTimer timer(phases, Phase::kWrite);
  const ModelSpec& spec = job.source.spec();
  WriteBehind queue(kCopyQueueBytes);
  if (mine.embeds) write_tensor(job, "embedding", spec.embedding.name, backend, queue);
  if (mine.last) {
    write_tensor(job, "norm", spec.final_norm.name, backend, queue);
    if (!spec.tied && !head_to_quantize(job.options, spec))
      write_tensor(job, "head", spec.head.name, backend, queue);
    KeyWriter writer = job.output.start_shards(job.plan, "other", queue);
    for (const PackedSpec& other : job.plan.job.other)
      copy_tensor(job, other.name, false, backend, writer);
    writer.finish();
  }
  queue.drain();
}

Activations first_activations(QuantizeJob& job, const RankPlan& mine, Transport& transport, Backend& backend,
                              PhaseSeconds& phases) {
  if (!job.plan.job.calibrated) return {};
  const PlanJob& shape = job.plan.job;
  const RunOptions::Run& run = job.options.run;
  Activations activations = make_activations(
      plan_batches(shape.samples, shape.length, run.reduction_lanes, run.microbatch_tokens), shape.length);
  const bool compares = needs_float_stream(job.options, job.source.spec());
  if (mine.embeds) {
    PhaseTimer timer(phases, Phase::kForward);
    embed_tokens(job.source, job.ids, activations, backend);
    if (compares) start_float_stream(activations);
    job.ids.reset();
  } else {
    PhaseTimer timer(phases, Phase::kWait);
    if (compares) expect_float_stream(activations);
    receive_activations(activations, job.source.spec().hidden, mine.rank - 1, transport, backend);
  }
  return activations;
}

void run_blocks(QuantizeJob& job, const RankPlan& mine, Transport& transport, Backend& backend, EventChannel& events,
                PhaseSeconds& phases) {
  const ModelSpec& spec = job.source.spec();
  const bool flows = job.plan.job.calibrated;
  Activations activations = first_activations(job, mine, transport, backend, phases);
  const Tensor rope = flows ? backend.upload(rope_table(spec.rope, job.plan.job.length)) : Tensor();
  int64_t block = 0;
  Stage stage(job.options, job.source, job.format, backend, phases,
              [&](const QuantizeRecord& record) { events.tell(LinearEvent{block, mine.rank, record}); });
  for (block = mine.blocks.first; block < mine.blocks.end; ++block) {
    const Stopwatch watch;
    const auto graph = flows ? job.source.family().graph(spec, block, rope) : nullptr;
    const PackedBlock packed = stage.run(block, graph.get(), activations);
    int64_t bytes = 0;
    {
      PhaseTimer timer(phases, Phase::kWrite);
      bytes = job.output.write_shards(job.plan, fmt::format("block-{:05}", block), packed.tensors);
    }
    events.tell(BlockEvent{block, mine.rank, bytes, watch.seconds()});
  }
  if (mine.last &&
      head_to_quantize(job.options, spec)) {  // its records carry the number behind the last block
    const PackedBlock packed = stage.run_head(activations);
    PhaseTimer timer(phases, Phase::kWrite);
    job.output.write_shards(job.plan, "head", packed.tensors);
  }
  if (flows && !mine.last) {
    PhaseTimer timer(phases, Phase::kTransfer);
    send_activations(activations, mine.rank + 1, transport, backend);
  }
}

}  // namespace

QuantizeOutcome run_quantize(QuantizeJob& job, Communicator& comm, Transport& transport, Backend& backend,
                             RunObserver& observer) {
  const RankPlan& mine = job.plan.ranks[comm.rank()];
  EventChannel events(comm, observer);
  RankSummary summary{comm.rank(), host_name(), mine.blocks.first, mine.blocks.end, {}, 0, 0};
  if (mine.blocks.count() > 0) {
    write_float_shards(job, mine, backend, summary.phases);
    run_blocks(job, mine, transport, backend, events, summary.phases);
  }
  summary.peak_tensor_bytes = backend.allocator().peak_bytes();
  summary.peak_resident_bytes = peak_resident_bytes();
  events.tell(summary);
  return events.finish();
}

void refuse_failures(const QuantizeOutcome& outcome) {
  std::string names;
  int failures = 0;
  for (const LinearEvent& event : outcome.linears)
    if (event.record.failed) {
      names += fmt::format("{}{} ({})", failures++ == 0 ? "" : ", ", event.record.module, event.record.note);
    }
  if (failures > 0)
    fail(ExitCode::kNumeric, "quantize.on_failed=fail: {} module{} failed: {}", failures, failures == 1 ? "" : "s", names);
}

int64_t peak_resident_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;)
    if (word == "VmHWM:") {
      int64_t kilobytes = 0;
      status >> kilobytes;
      return kilobytes * 1024;
    }
  return 0;
}

std::string host_name() {
  char name[256] = {};
  gethostname(name, sizeof name - 1);
  return name;
}

}  // namespace bitmill
