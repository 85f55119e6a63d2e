#include <algorithm>

#include "core/log.h"
#include "pipeline/memory.h"

namespace bitmill {
namespace {

// Lines 0..count-1. Of a run of more than three alike only the first and the last are written, with a line between them
// that says how many are left out: a plan may be for a million ranks.
template <typename Alike, typename Line>
std::string lines_text(int64_t count, const Alike& alike, const Line& line) {
  std::string text;
  for (int64_t first = 0; first < count;) {
    int64_t end = first + 1;
    while (end < count && alike(first, end)) ++end;
    if (end - first > 3) {
      text += line(first);
      text += fmt::format("  ... {} more like this\n", end - first - 2);
      first = end - 1;
    }
    for (; first < end; ++first) text += line(first);
  }
  return text;
}

std::string rank_line(const RankPlan& rank, bool device) {
  const std::string blocks = rank.blocks.count() == 0 ? std::string("idle")
                             : fmt::format("{}-{}{}{}", rank.blocks.first, rank.blocks.end - 1,
                                           rank.embeds ? " +embed" : "", rank.last ? " +head" : "");
  std::string text = fmt::format("  {:>5} {:>5} {:>14} {:>5.1f}% {:>10}", rank.rank, rank.node, blocks,
                                 100 * rank.cost, human_bytes(total(rank.peak)));
  for (int64_t bytes : rank.peak) text += fmt::format(" {:>11}", human_bytes(bytes));
  if (device) text += fmt::format(" {:>11}", human_bytes(total(rank.host_peak)));
  return text + "  " + rank.peak_at + "\n";
}

std::string rank_table(const Plan& plan) {
  std::string text = fmt::format("  {:>5} {:>5} {:>14} {:>6} {:>10}", "rank", "node", "blocks", "work", "peak");
  for (int kind = 0; kind < kMemoryKinds; ++kind)
    text += fmt::format(" {:>11}", memory_kind_name(static_cast<MemoryKind>(kind)));
  if (plan.machine.device) text += fmt::format(" {:>11}", "on the host");
  const auto alike = [&](int64_t i, int64_t j) {
    const RankPlan &a = plan.ranks[static_cast<size_t>(i)], &b = plan.ranks[static_cast<size_t>(j)];
    return a.blocks.count() == b.blocks.count() && a.embeds == b.embeds && a.last == b.last && a.peak == b.peak;
  };
  return text + "  at\n" + lines_text(static_cast<int64_t>(plan.ranks.size()), alike, [&](int64_t i) {
           return rank_line(plan.ranks[static_cast<size_t>(i)], plan.machine.device);
         });
}

// Where the estimated time goes, in the mean over working ranks; nothing for phases below 0.05%.
std::string time_line(const Plan& plan) {
  std::string text = fmt::format("estimate: {}", duration_text(plan.seconds));
  const char* before = " = ";
  for (int i = 0; i < kCostPhases; ++i) {
    const double seconds = plan.phases[static_cast<size_t>(i)];
    if (seconds < 0.0005 * plan.seconds) continue;
    text += fmt::format("{}{} {}", before, cost_phase_name(static_cast<CostPhase>(i)),
                        duration_text(seconds));
    before = ", ";
  }
  return text + (plan.rates.assumed ? "; at assumed rates (bitmill doctor --benchmark)\n" : "\n");
}

std::string layout_line(const Plan& plan) {
  std::string text =
      fmt::format("stages: {} of width {}, propagation {}", plan.stages, plan.width,
                  plan.full ? "full" : "quantized");
  size_t waves = 0;
  for (const RankPlan& rank : plan.ranks) waves = std::max(waves, rank.waves.size());
  if (plan.full) text += fmt::format(", {} wave{} of blocks at most", waves, waves == 1 ? "" : "s");
  return text + "\n";
}

std::string file_table(const Plan& plan) {
  const auto bytes = [&](int64_t i) {
    return plan.joined ? plan.output_bytes : plan.shards[static_cast<size_t>(i)].tensor_bytes;
  };
  return lines_text(
      static_cast<int64_t>(plan.files.size()), [&](int64_t i, int64_t j) { return bytes(i) == bytes(j); },
      [&](int64_t i) { return fmt::format("  {} {}\n", plan.files[static_cast<size_t>(i)], human_bytes(bytes(i))); });
}

std::string load_table(const Plan& plan) {
  if (plan.load_warnings.empty()) return "  loads at tensor parallel 1, 2, 4 and 8\n";
  std::string text;
  for (int tp : {1, 2, 4, 8}) {
    bool fine = true;
    for (const LoadWarning& warning : plan.load_warnings)
      if (warning.tensor_parallel == tp) {
        fine = false;
        text += fmt::format("  TP {}: {}: {}\n", tp, warning.module, warning.reason);
      }
    if (fine) text += fmt::format("  TP {}: loads\n", tp);
  }
  return text;
}

}  // namespace

std::string plan_text(const Plan& plan, const ModelSpec& spec) {
  std::string text = fmt::format(
      "model: {} ({} blocks, hidden {}, vocabulary {}), {} in float\n"
      "calibration: {} x {} tokens in {} micro-batches, compute {}\n"
      "output: {} in {} tensor file{}, {:.3f} bits per quantized weight\n"
      "ranks: {} ({} working)\n"
      "{}{}",
      spec.model_type, spec.blocks.size(), spec.hidden, spec.vocab, human_bytes(plan.source_bytes), plan.job.samples,
      plan.job.length, plan.micro_batches, plan.job.compute == DType::kBF16 ? "bfloat16" : "float32",
      human_bytes(plan.output_bytes), plan.files.size(), plan.files.size() == 1 ? "" : "s", plan.bits_per_weight,
      plan.machine.ranks, plan.active_ranks(), layout_line(plan), time_line(plan));
  text += rank_table(plan);
  text += fmt::format("  beside these peaks each rank takes about {} of host memory for itself\n",
                      human_bytes(kStartBytes));
  for (const std::string& note : plan.notes) text += "  note: " + note + "\n";
  for (const std::string& hint : plan.hints) text += "  hint: " + hint + "\n";
  text += "files:\n" + file_table(plan);
  return text + "engines:\n" + load_table(plan);
}

namespace {

Json memory_json(const MemoryBytes& bytes) {
  Json json = Json::object();
  for (int kind = 0; kind < kMemoryKinds; ++kind)
    json[std::string(memory_kind_name(static_cast<MemoryKind>(kind)))] =
        bytes[static_cast<size_t>(kind)];
  return json;
}

Json seconds_json(const CostSeconds& seconds) {
  Json json = Json::object();
  for (int phase = 0; phase < kCostPhases; ++phase)
    json[std::string(cost_phase_name(static_cast<CostPhase>(phase)))] =
        seconds[static_cast<size_t>(phase)];
  return json;
}

Json rank_json(const RankPlan& rank) {
  Json waves = Json::array();
  for (const BlockRange& wave : rank.waves) waves.push_back({wave.first, wave.end});
  return {{"rank", rank.rank}, {"node", rank.node}, {"stage", rank.stage}, {"member", rank.member},
          {"first_block", rank.blocks.first}, {"end_block", rank.blocks.end}, {"waves", waves},
          {"work", rank.cost}, {"seconds", seconds_json(rank.seconds)},
          {"peak_bytes", total(rank.peak)}, {"peak_by_kind", memory_json(rank.peak)},
          {"peak_at", rank.peak_at}, {"host_peak_bytes", total(rank.host_peak)},
          {"host_peak_by_kind", memory_json(rank.host_peak)}};
}

Json rates_json(const Rates& rates) {
  return {{"forward_flops", rates.forward_flops}, {"hessian_flops", rates.hessian_flops},
          {"factor_flops", rates.factor_flops}, {"factor_half_columns", rates.factor_half_columns},
          {"sweep_flops", rates.sweep_flops}, {"grid_elements", rates.grid_elements},
          {"read_bandwidth", rates.read_bandwidth}, {"write_bandwidth", rates.write_bandwidth},
          {"link_bandwidth", rates.link_bandwidth}, {"storage_bandwidth", rates.storage_bandwidth},
          {"latency", rates.latency}, {"assumed", rates.assumed}};
}

}  // namespace

Json plan_json(const Plan& plan) {
  Json ranks = Json::array(), shards = Json::array(), warnings = Json::array();
  for (const RankPlan& rank : plan.ranks)
    if (rank.blocks.count() > 0) ranks.push_back(rank_json(rank));
  for (size_t i = 0; i < plan.shards.size(); ++i) {
    const ShardPlan& shard = plan.shards[i];
    shards.push_back({{"key", shard.key}, {"rank", shard.rank}, {"tensors", shard.tensors.size()},
                      {"bytes", shard.tensor_bytes}, {"file", plan.files[plan.joined ? 0 : i]}});
  }
  for (const LoadWarning& w : plan.load_warnings)
    warnings.push_back({{"tensor_parallel", w.tensor_parallel}, {"module", w.module}, {"reason", w.reason}});
  return {{"ranks", ranks}, {"shards", shards}, {"files", plan.files}, {"notes", plan.notes},
          {"hints", plan.hints}, {"mode", plan.full ? "full" : "quantized"},
          {"stages", plan.stages}, {"width", plan.width}, {"estimated_seconds", plan.seconds},
          {"estimated_seconds_by_phase", seconds_json(plan.phases)},
          {"rates", rates_json(plan.rates)},
          {"source_bytes", plan.source_bytes}, {"output_bytes", plan.output_bytes},
          {"bits_per_weight", plan.bits_per_weight}, {"samples", plan.job.samples}, {"length", plan.job.length},
          {"micro_batches", plan.micro_batches}, {"start_bytes", kStartBytes}, {"active_ranks", plan.active_ranks()},
          {"idle_ranks", plan.machine.ranks - plan.active_ranks()}, {"load_warnings", warnings},
          {"compute", plan.job.compute == DType::kBF16 ? "bfloat16" : "float32"}};
}

}  // namespace bitmill
