#include "pipeline/pipeline.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <map>
#include <thread>

namespace bitmill {
namespace {

// Ranks that were done before the last one waited for it.
void wait_for_last(QuantizeOutcome& outcome) {
  for (const RankSummary& rank : outcome.ranks) outcome.seconds = std::max(outcome.seconds, rank.seconds);
  for (RankSummary& rank : outcome.ranks) {
    if (rank.end_block == rank.first_block || rank.seconds == outcome.seconds) continue;
    rank.phases[static_cast<size_t>(Phase::kWait)] += outcome.seconds - rank.seconds;
    const int64_t block = rank.spans.empty() ? -1 : rank.spans.back().block;
    rank.spans.push_back({Activity::kWait, block, rank.seconds, outcome.seconds});
    rank.seconds = outcome.seconds;
  }
}

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
    wait_for_last(outcome);
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

// A line of /proc/self/status, which counts in kilobytes; 0 where there is none.
int64_t status_bytes(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;)
    if (word == key) {
      int64_t kilobytes = 0;
      status >> kilobytes;
      return kilobytes * 1024;
    }
  return 0;
}

// A timeline needs a few spans per block: it grows with the model, not with the calibration data.
size_t most_spans(const RankPlan& rank) { return 32 + 16 * static_cast<size_t>(rank.blocks.count()); }

}  // namespace

QuantizeOutcome run_quantize(QuantizeJob& job, Communicator& comm, Transport& transport, Backend& backend,
                             RunObserver& observer) {
  const RankPlan& mine = job.plan.ranks[comm.rank()];
  Communicator stage_comm = comm.split(mine.stage);
  const std::unique_ptr<Transport> stage = make_transport(job.options.run.transport, stage_comm);
  EventChannel events(comm, observer);
  RankSummary summary;
  summary.rank = comm.rank();
  summary.host = host_name();
  summary.first_block = mine.blocks.first;
  summary.end_block = mine.blocks.end;
  summary.start_resident_bytes = resident_bytes();
  comm.barrier();  // the clocks of all ranks start here, so that their times can be compared
  RankClock clock(most_spans(mine));
  if (mine.blocks.count() > 0)
    run_rank(job, mine, transport, *stage, backend,
             {[&](const LinearEvent& event) { events.tell(event); }, [&](const BlockEvent& event) { events.tell(event); }},
             clock);
  clock.stop();
  summary.seconds = clock.elapsed();
  summary.phases = clock.seconds();
  summary.spans = clock.take_spans();
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

int64_t peak_resident_bytes() { return status_bytes("VmHWM:"); }

int64_t resident_bytes() { return status_bytes("VmRSS:"); }

std::string host_name() {
  char name[256] = {};
  gethostname(name, sizeof name - 1);
  return name;
}

}  // namespace bitmill
