#include "report/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>

#include "support/paths.h"
#include "io/json.h"

namespace bitmill {
namespace {
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;

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
  s.spans = {{Activity::kCapture, first, 0, forward}};
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
  ASSERT_EQ(s.spans.size(), 1u);
  EXPECT_EQ(s.spans[0].what, Activity::kCapture);
  EXPECT_EQ(s.spans[0].block, 0);
  EXPECT_EQ(s.spans[0].end, 1.5);
}

TEST(LayersCsv, QuotesAndNamesColumns) {
  const std::string csv = layers_csv({event()});
  EXPECT_THAT(csv, ::testing::StartsWith("block,module,method,bits"));
  EXPECT_THAT(csv, HasSubstr("3,model.layers.3.mlp.down_proj,rtn,4,128,2,5"));
  EXPECT_THAT(csv, HasSubstr("\"no tokens, \"\"rounded\"\"\""));
}

TEST(PhaseTable, SpreadIgnoresIdleRanks) {
  const std::string table =
      phase_table({summary(0, 1, 0, 2), summary(1, 3, 2, 4), summary(2, 0, 0, 0)}, Plan());
  EXPECT_THAT(table, ContainsRegex("forward +0\\.000 +2\\.000 +- +1\\.000 +3\\.000 +50% +100\\.0%"));
  EXPECT_THAT(table, Not(HasSubstr("hessian"))) << "neither planned nor measured";
}

Plan planned() {
  Plan plan;
  plan.seconds = 4;
  plan.phases[static_cast<size_t>(CostPhase::kForward)] = 0.5;
  plan.phases[static_cast<size_t>(CostPhase::kFactor)] = 1;
  plan.phases[static_cast<size_t>(CostPhase::kSweep)] = 2;
  plan.phases[static_cast<size_t>(CostPhase::kGrid)] = 0.25;
  plan.phases[static_cast<size_t>(CostPhase::kSearch)] = 0.25;
  return plan;
}

TEST(PhaseTable, PlanBesideMeasured) {
  RankSummary rank = summary(0, 2, 0, 2);
  rank.phases[static_cast<size_t>(Phase::kSolve)] = 6.5;  // factor, sweep and grid: 3.25 planned
  rank.phases[static_cast<size_t>(Phase::kPack)] = 1.5;   // not in the plan
  Plan plan = planned();
  const std::string table = phase_table({rank}, plan);
  EXPECT_THAT(table, ContainsRegex("forward +0\\.500 +2\\.000 +4\\.00 "));
  EXPECT_THAT(table, ContainsRegex("solve +3\\.250 +6\\.500 +2\\.00 "));
  EXPECT_THAT(table, ContainsRegex("search +0\\.250 +0\\.000 +0\\.00 ")) << "planned, but not met";
  EXPECT_THAT(table, ContainsRegex("pack +- +1\\.500 +- "));
  EXPECT_THAT(table, ContainsRegex("total +4\\.000 +10\\.000 +2\\.50 "));
  EXPECT_THAT(table, HasSubstr("at the rates of [machine]"));
  plan.rates.assumed = true;
  EXPECT_THAT(phase_table({rank}, plan), HasSubstr("at assumed rates"));
}

TEST(PhaseTable, EveryPlannedPhaseIsShownOnce) {
  Plan plan;
  for (double& seconds : plan.phases) seconds = 1;
  double shown = 0;
  for (int phase = 0; phase < kPhases; ++phase)
    shown += planned_seconds(plan, static_cast<Phase>(phase)).value_or(0);
  EXPECT_EQ(shown, kCostPhases);
}

TEST(PhaseTable, JsonHasBoth) {
  const Json json = phases_json({summary(0, 1, 0, 2), summary(1, 3, 2, 4)}, planned());
  EXPECT_EQ(json.at("forward").at("planned"), 0.5);
  EXPECT_EQ(json.at("forward").at("avg"), 2);
  EXPECT_EQ(json.at("forward").at("ratio"), 4);
  EXPECT_EQ(json.at("forward").at("max"), 3);
  EXPECT_TRUE(json.at("pack").at("planned").is_null());
  EXPECT_TRUE(json.at("hessian").at("ratio").is_null());
}

// 80 letters for 8 seconds.
TEST(Timeline, LettersSayWhatTookMostOfASlice) {
  RankSummary a = summary(0, 2, 0, 2), b = summary(1, 1, 2, 4);
  a.spans = {{Activity::kCapture, 0, 0, 4.03}, {Activity::kSolve, 0, 4.03, 6}, {Activity::kWait, 1, 6, 8}};
  b.spans = {{Activity::kWait, -1, 0, 0.06}, {Activity::kCapture, 2, 0.06, 8}};
  const std::string text = timeline_text({a, b, summary(2, 0, 0, 0)});
  EXPECT_THAT(text, HasSubstr("0 |" + std::string(40, 'C') + std::string(20, 'S') + std::string(20, '.') + "|"));
  EXPECT_THAT(text, HasSubstr("1 |." + std::string(79, 'C') + "|"));
  EXPECT_THAT(text, HasSubstr("C capture, S solve, . wait\n"));
  EXPECT_THAT(text, Not(HasSubstr("R read"))) << "only letters that occur are explained";
  EXPECT_THAT(text, Not(HasSubstr("     2 |"))) << "an idle rank has no line";
  EXPECT_EQ(timeline_text({a}), "");
}

TEST(Timeline, ManyRanksAreChosenEvenly) {
  std::vector<RankSummary> ranks;
  for (int r = 0; r < 100; ++r) ranks.push_back(summary(r, 1, r, r + 1));
  const std::string text = timeline_text(ranks);
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 32);
  EXPECT_THAT(text, HasSubstr("32 of 100 ranks"));
  EXPECT_THAT(text, HasSubstr("\n    96 |C"));
}

TEST(Timeline, Json) {
  const Json json = timeline_json({summary(0, 1, 0, 2), summary(1, 3, 2, 4)});
  ASSERT_EQ(json.size(), 2u);
  EXPECT_EQ(json[1], (Json{{"rank", 1}, {"what", "capture"}, {"block", 2}, {"start", 0.0}, {"end", 3.0}}));
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
