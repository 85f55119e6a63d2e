// RunReport: what people see while a run goes on (a line per linear, a bar on a terminal, a table of phases at the end) and
// what stays behind in OUT/bitmill: status.json, layers.csv, report.json.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/log.h"
#include "pipeline/evaluate.h"
#include "pipeline/pipeline.h"

namespace bitmill {

// State of a run for machines and for people who come back later. `phase` is one of calibrate, gather, done.
struct RunStatus {
  std::string state = "running";  // "running" | "complete" | "failed"
  int code = 0;
  int rank = 0;
  std::string phase;
  int64_t block = -1;  // the last one that finished; -1: none
  std::string module;  // the last linear that finished
  std::string message;
};

// Durable status.json in `directory` (OUT/bitmill).
void write_status(const std::string& directory, const RunStatus& status);

// What report.json holds besides the records.
struct RunFacts {
  std::string output;             // directory
  std::string effective_config;   // text, "key = value" lines
  std::string backend;            // Backend::description
  double seconds = 0;             // of the whole command
  double quantize_seconds = 0;    // from the first block to the last durable shard
  int64_t source_bytes = 0;       // tensors of the source checkpoint
  int64_t output_bytes = 0;       // tensors of the output
  std::optional<EvalResult> before, after;
};

class RunReport final : public RunObserver {
 public:
  // `directory` is OUT/bitmill; files are written by rank 0 only.
  RunReport(std::string directory, const Plan& plan, int64_t linears);
  void on_linear(const LinearEvent& event) override;
  void on_block(const BlockEvent& event) override;
  void on_own_linear(const LinearEvent& event) override;
  void on_phase(const std::string& phase) override;

  // Marks status.json failed with the error's code and message.
  void failed(const Error& error, int rank);

  // Writes layers.csv and report.json: once when the checkpoint is whole, and again when evaluations are known.
  void write_records(const QuantizeOutcome& outcome, const RunFacts& facts);
  // Prints the phase table and totals, writes the records, and marks status.json complete.
  void finish(const QuantizeOutcome& outcome, const RunFacts& facts);

 private:
  std::string directory_;
  const Plan& plan_;
  int64_t blocks_done_ = 0;
  std::unique_ptr<ProgressBar> bar_;
  RunStatus status_;
};

// ---- tables.cc ----
// CSV of all linears; the first line names the columns.
std::string layers_csv(const std::vector<LinearEvent>& linears);
// "q_proj [384, 384] gptq 4-bit g128 loss 1.2e-3 ...": one line per linear.
std::string linear_line(const LinearEvent& event);
// Sizes, bits per weight, modules that fell back.
std::string totals_text(const QuantizeOutcome& outcome, const Plan& plan, const RunFacts& facts);
Json report_json(const QuantizeOutcome& outcome, const Plan& plan, const RunFacts& facts);

// ---- phases.cc ----
// What the plan foresees for a measured phase, seconds in the mean over working ranks: of kSolve its
// factor, sweep and grid. None for what it does not count.
std::optional<double> planned_seconds(const Plan& plan, Phase phase);
// Seconds per phase: the plan's; average, its ratio to the plan, min and max over the working ranks;
// imbalance (max/avg - 1) and share of the total. Phases below half a millisecond are left out.
std::string phase_table(const std::vector<RankSummary>& ranks, const Plan& plan);
// The same as {"forward": {"planned", "avg", "ratio", "min", "max"}, ...}: all phases, null for none.
Json phases_json(const std::vector<RankSummary>& ranks, const Plan& plan);

// ---- timeline.cc ----
// What ranks did when: a line per working rank (evenly chosen ones of more than 32), 80 letters for
// the time of the run, each for what took most of its slice. Empty for one rank.
std::string timeline_text(const std::vector<RankSummary>& ranks);
// [{"rank", "what", "block", "start", "end"}, ...] by rank and time.
Json timeline_json(const std::vector<RankSummary>& ranks);

}  // namespace bitmill
