#include "report/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "support/paths.h"
#include "io/json.h"

namespace bitmill {
namespace {
using ::testing::HasSubstr;

LinearEvent event() {
  LinearEvent e;
  e.block = 3;
  e.rank = 1;
  e.record.module = "model.layers.3.mlp.down_proj";
  e.record.method = "rtn";
  e.record.note = "no tokens, \"rounded\"";
  e.record.bits = 4;
  e.record.group_size = 128;
  e.record.out = 2;
  e.record.in = 5;
  e.record.damp = 0.1;
  e.record.retries = 1;
  return e;
}

RankSummary summary(int rank, double forward, int64_t first, int64_t end) {
  RankSummary s;
  s.rank = rank;
  s.first_block = first;
  s.end_block = end;
  s.phases[static_cast<size_t>(Phase::kForward)] = forward;
  s.peak_resident_bytes = 1000 * (rank + 1);
  return s;
}

TEST(Records, TravelAsTextUnchanged) {
  const LinearEvent back = linear_event_from(Json::parse(to_text(event())));
  EXPECT_EQ(record_json(back.record), record_json(event().record));
  EXPECT_EQ(back.block, 3);
  EXPECT_EQ(back.rank, 1);
  const RankSummary s = rank_summary_from(Json::parse(to_text(summary(2, 1.5, 0, 4))));
  EXPECT_EQ(s.phases[static_cast<size_t>(Phase::kForward)], 1.5);
  EXPECT_EQ(s.end_block, 4);
}

TEST(LayersCsv, QuotesAndNamesColumns) {
  const std::string csv = layers_csv({event()});
  EXPECT_THAT(csv, ::testing::StartsWith("block,module,method,bits"));
  EXPECT_THAT(csv, HasSubstr("3,model.layers.3.mlp.down_proj,rtn,4,128,2,5"));
  EXPECT_THAT(csv, HasSubstr("\"no tokens, \"\"rounded\"\"\""));
}

TEST(PhaseTable, SpreadIgnoresIdleRanks) {
  const std::string table = phase_table({summary(0, 1, 0, 2), summary(1, 3, 2, 4), summary(2, 0, 0, 0)});
  EXPECT_THAT(table, ::testing::ContainsRegex("forward +1\\.000 +2\\.000 +3\\.000 +50% +100\\.0%"));
}

TEST(RunReport, WritesStatusThroughTheRun) {
  testing::TemporaryDirectory directory;
  Plan plan;
  plan.ranks.resize(1);
  plan.ranks[0].blocks = {0, 2};
  RunReport report(directory.path(), plan, 7);
  report.on_phase("quantize");
  EXPECT_EQ(read_json(directory.file("status.json")).at("phase"), "quantize");
  report.on_linear(event());
  report.on_block({1, 0, 100, 0.5});
  EXPECT_EQ(read_json(directory.file("status.json")).at("block"), 1);
  report.failed(Error(ExitCode::kInput, "tensor X is odd"), 0);
  const Json failed = read_json(directory.file("status.json"));
  EXPECT_EQ(failed.at("state"), "failed");
  EXPECT_EQ(failed.at("code"), 3);
  EXPECT_EQ(failed.at("message"), "tensor X is odd");
  EXPECT_EQ(failed.at("module"), "model.layers.3.mlp.down_proj");
}

TEST(RunReport, FinishLeavesTheRecords) {
  testing::TemporaryDirectory directory;
  Plan plan;
  plan.ranks.resize(1);
  RunReport report(directory.path(), plan, 1);
  QuantizeOutcome outcome;
  outcome.linears.push_back(event());
  outcome.ranks.push_back(summary(0, 2, 0, 1));
  RunFacts facts;
  facts.after.emplace();
  facts.after->perplexity = 20.08;
  report.finish(outcome, facts);
  const Json json = read_json(directory.file("report.json"));
  EXPECT_EQ(json.at("layers").size(), 1u);
  EXPECT_EQ(json.at("layers")[0].at("note"), "no tokens, \"rounded\"");
  EXPECT_EQ(json.at("after").at("perplexity"), 20.08);
  EXPECT_TRUE(json.at("before").is_null());
  EXPECT_TRUE(std::filesystem::exists(directory.file("layers.csv")));
  EXPECT_EQ(read_json(directory.file("status.json")).at("state"), "complete");
}

}  // namespace
}  // namespace bitmill
