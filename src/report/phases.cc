#include <algorithm>
#include <numeric>

#include "report/report.h"

namespace bitmill {
namespace {

constexpr double kShown = 0.0005;  // seconds; less would read 0.000

std::vector<const RankSummary*> working(const std::vector<RankSummary>& ranks) {
  std::vector<const RankSummary*> list;
  for (const RankSummary& rank : ranks)
    if (rank.end_block > rank.first_block) list.push_back(&rank);
  return list;
}

struct Spread {
  double low = 0, mean = 0, high = 0;
};

Spread spread(const std::vector<double>& seconds) {
  Spread s;
  if (seconds.empty()) return s;
  s.low = *std::min_element(seconds.begin(), seconds.end());
  s.high = *std::max_element(seconds.begin(), seconds.end());
  s.mean =
      std::accumulate(seconds.begin(), seconds.end(), 0.0) / static_cast<double>(seconds.size());
  return s;
}

Spread spread(const std::vector<const RankSummary*>& ranks, int phase) {
  std::vector<double> seconds;
  for (const RankSummary* rank : ranks) seconds.push_back(rank->phases[static_cast<size_t>(phase)]);
  return spread(seconds);
}

Spread spread_of_all(const std::vector<const RankSummary*>& ranks) {
  std::vector<double> seconds;
  for (const RankSummary* rank : ranks)
    seconds.push_back(std::accumulate(rank->phases.begin(), rank->phases.end(), 0.0));
  return spread(seconds);
}

// Measured over planned; nothing where the plan foresees (almost) nothing.
std::optional<double> ratio(double measured, const std::optional<double>& planned) {
  if (!planned || *planned < kShown) return std::nullopt;
  return measured / *planned;
}

std::string cell(const std::optional<double>& value, int digits) {
  return value ? fmt::format("{:.{}f}", *value, digits) : "-";
}

std::string table_line(std::string_view name, const std::optional<double>& planned, const Spread& s,
                       double all) {
  return fmt::format("{:<9}{:>9}{:>9.3f}{:>8}{:>9.3f}{:>9.3f}{:>10.0f}%{:>7.1f}%\n", name,
                     cell(planned, 3), s.mean, cell(ratio(s.mean, planned), 2), s.low, s.high,
                     s.mean > 0 ? 100 * (s.high / s.mean - 1) : 0.0,
                     all > 0 ? 100 * s.mean / all : 0.0);
}

}  // namespace

std::optional<double> planned_seconds(const Plan& plan, Phase phase) {
  const auto of = [&](CostPhase p) { return plan.phases[static_cast<size_t>(p)]; };
  switch (phase) {
    case Phase::kRead:
      return of(CostPhase::kRead);
    case Phase::kForward:
      return of(CostPhase::kForward);
    case Phase::kHessian:
      return of(CostPhase::kHessian);
    case Phase::kExchange:
      return of(CostPhase::kExchange);
    case Phase::kSolve:
      return of(CostPhase::kFactor) + of(CostPhase::kSweep) + of(CostPhase::kGrid);
    case Phase::kSearch:
      return of(CostPhase::kSearch);
    case Phase::kWrite:
      return of(CostPhase::kWrite);
    case Phase::kTransfer:
      return of(CostPhase::kTransfer);
    case Phase::kWait:
      return of(CostPhase::kWait);
    case Phase::kPack:
    case Phase::kOther:
      return std::nullopt;
  }
  return std::nullopt;
}

std::string phase_table(const std::vector<RankSummary>& ranks, const Plan& plan) {
  const auto list = working(ranks);
  const Spread all = spread_of_all(list);
  std::string text = fmt::format("{:<9}{:>9}{:>9}{:>8}{:>9}{:>9}{:>11}{:>8}\n", "phase", "plan s",
                                 "avg s", "ratio", "min s", "max s", "imbalance", "share");
  for (int phase = 0; phase < kPhases; ++phase) {
    const Spread s = spread(list, phase);
    const auto planned = planned_seconds(plan, static_cast<Phase>(phase));
    if (s.high < kShown && planned.value_or(0) < kShown) continue;
    text += table_line(phase_name(static_cast<Phase>(phase)), planned, s, all.mean);
  }
  text += table_line("total", plan.seconds, all, all.mean);
  text +=
      plan.rates.assumed
          ? "the plan's seconds are at assumed rates: bitmill doctor --benchmark measures them\n"
          : "the plan's seconds are at the rates of [machine]\n";
  int64_t resident = 0;
  for (const RankSummary* rank : list) resident = std::max(resident, rank->peak_resident_bytes);
  return text + fmt::format("peak resident memory of a rank: {}", human_bytes(resident));
}

Json phases_json(const std::vector<RankSummary>& ranks, const Plan& plan) {
  const auto value = [](const std::optional<double>& x) { return x ? Json(*x) : Json(); };
  const auto list = working(ranks);
  Json json = Json::object();
  for (int phase = 0; phase < kPhases; ++phase) {
    const Spread s = spread(list, phase);
    const auto planned = planned_seconds(plan, static_cast<Phase>(phase));
    json[std::string(phase_name(static_cast<Phase>(phase)))] = {
        {"planned", value(planned)},
        {"avg", s.mean},
        {"ratio", value(ratio(s.mean, planned))},
        {"min", s.low},
        {"max", s.high}};
  }
  return json;
}

}  // namespace bitmill
