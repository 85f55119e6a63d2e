#include "report/report.h"

#include <chrono>

#include "io/durable.h"

namespace bitmill {
namespace {

std::string utc_now() {
  const std::time_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

}  // namespace

void write_status(const std::string& directory, const RunStatus& status) {
  const OrderedJson json{{"state", status.state},     {"code", status.code},   {"rank", status.rank},
                         {"host", host_name()},       {"phase", status.phase}, {"block", status.block},
                         {"module", status.module},   {"message", status.message},
                         {"updated", utc_now()}};
  write_file_durably(directory + "/status.json", json.dump(1) + "\n");
}

RunReport::RunReport(std::string directory, const Plan& plan, int64_t linears)
    : directory_(std::move(directory)), plan_(plan) {
  if (log_rank() == 0) bar_ = std::make_unique<ProgressBar>(linears, "linears");
}

void RunReport::on_linear(const LinearEvent& event) {
  status_.module = event.record.module;
  info("{}", linear_line(event));
  if (bar_) bar_->advance(1, event.record.module);
}

void RunReport::on_block(const BlockEvent& event) {
  status_.block = event.block;
  ++blocks_done_;
  int64_t blocks = 0;
  for (const RankPlan& rank : plan_.ranks)
    if (rank.member == 0) blocks += rank.blocks.count();  // members of a stage share its blocks
  info("block {} done on rank {}: {} in {} ({} of {} blocks)", event.block, event.rank, human_bytes(event.bytes),
       human_seconds(event.seconds), blocks_done_, blocks);
  write_status(directory_, status_);
}

void RunReport::on_own_linear(const LinearEvent& event) {
  status_.block = event.block;
  status_.module = event.record.module;
}

void RunReport::on_phase(const std::string& phase) {
  status_.phase = phase;
  write_status(directory_, status_);
}

void RunReport::failed(const Error& error, int rank) {
  bar_.reset();
  status_.state = "failed";
  status_.code = static_cast<int>(error.code());
  status_.rank = rank;
  status_.message = error.what();
  try {
    write_status(directory_, status_);
  } catch (const Error& second) {  // the disk may be what failed; the first error is the one to report
    warn("{}", second.what());
  }
}

void RunReport::write_records(const QuantizeOutcome& outcome, const RunFacts& facts) {
  write_file_durably(directory_ + "/layers.csv", layers_csv(outcome.linears));
  write_file_durably(directory_ + "/report.json", report_json(outcome, plan_, facts).dump(1) + "\n");
}

void RunReport::finish(const QuantizeOutcome& outcome, const RunFacts& facts) {
  bar_.reset();
  info("{}", phase_table(outcome.ranks, plan_));
  const std::string timeline = timeline_text(outcome.ranks);
  if (!timeline.empty()) info("{}", timeline);
  info("{}", totals_text(outcome, plan_, facts));
  write_records(outcome, facts);
  status_.state = "complete";
  status_.phase = "done";
  write_status(directory_, status_);
}

}  // namespace bitmill
