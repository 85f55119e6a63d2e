#include "core/log.h"
#include "pipeline/plan.h"

namespace bitmill {
namespace {

std::string rank_table(const Plan& plan) {
  std::string text = fmt::format("  {:>5} {:>5} {:>14} {:>6} {:>10}", "rank", "node", "blocks", "work", "peak");
  for (int kind = 0; kind < kMemoryKinds; ++kind)
    text += fmt::format(" {:>11}", memory_kind_name(static_cast<MemoryKind>(kind)));
  text += "  at\n";
  for (const RankPlan& rank : plan.ranks) {
    const std::string blocks = rank.blocks.count() == 0 ? std::string("idle")
                               : fmt::format("{}-{}{}{}", rank.blocks.first, rank.blocks.end - 1,
                                             rank.embeds ? " +embed" : "", rank.last ? " +head" : "");
    text += fmt::format("  {:>5} {:>5} {:>14} {:>5.1f}% {:>10}", rank.rank, rank.node, blocks, 100 * rank.cost,
                        human_bytes(total(rank.peak)));
    for (int64_t bytes : rank.peak) text += fmt::format(" {:>11}", human_bytes(bytes));
    text += "  " + rank.peak_at + "\n";
  }
  return text;
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
      "ranks: {} ({} working)\n",
      spec.model_type, spec.blocks.size(), spec.hidden, spec.vocab, human_bytes(plan.source_bytes), plan.job.samples,
      plan.job.length, plan.micro_batches, plan.job.compute == DType::kBF16 ? "bfloat16" : "float32",
      human_bytes(plan.output_bytes), plan.files.size(), plan.files.size() == 1 ? "" : "s", plan.bits_per_weight,
      plan.machine.ranks, plan.active_ranks());
  text += rank_table(plan);
  for (const std::string& note : plan.notes) text += "  note: " + note + "\n";
  text += "files:\n";
  for (size_t i = 0; i < plan.files.size(); ++i)
    text += fmt::format("  {} {}\n", plan.files[i],
                        human_bytes(plan.joined ? plan.output_bytes : plan.shards[i].tensor_bytes));
  return text + "engines:\n" + load_table(plan);
}

Json plan_json(const Plan& plan) {
  Json ranks = Json::array(), shards = Json::array(), warnings = Json::array();
  for (const RankPlan& rank : plan.ranks) {
    Json peak = Json::object();
    for (int kind = 0; kind < kMemoryKinds; ++kind)
      peak[std::string(memory_kind_name(static_cast<MemoryKind>(kind)))] = rank.peak[static_cast<size_t>(kind)];
    ranks.push_back({{"rank", rank.rank}, {"node", rank.node}, {"first_block", rank.blocks.first},
                     {"end_block", rank.blocks.end}, {"idle", rank.blocks.count() == 0}, {"work", rank.cost},
                     {"peak_bytes", total(rank.peak)}, {"peak_by_kind", peak}, {"peak_at", rank.peak_at}});
  }
  for (size_t i = 0; i < plan.shards.size(); ++i) {
    const ShardPlan& shard = plan.shards[i];
    shards.push_back({{"key", shard.key}, {"rank", shard.rank}, {"tensors", shard.tensors.size()},
                      {"bytes", shard.tensor_bytes}, {"file", plan.files[plan.joined ? 0 : i]}});
  }
  for (const LoadWarning& w : plan.load_warnings)
    warnings.push_back({{"tensor_parallel", w.tensor_parallel}, {"module", w.module}, {"reason", w.reason}});
  return {{"ranks", ranks}, {"shards", shards}, {"files", plan.files}, {"notes", plan.notes},
          {"source_bytes", plan.source_bytes}, {"output_bytes", plan.output_bytes},
          {"bits_per_weight", plan.bits_per_weight}, {"samples", plan.job.samples}, {"length", plan.job.length},
          {"micro_batches", plan.micro_batches}, {"active_ranks", plan.active_ranks()}, {"load_warnings", warnings},
          {"compute", plan.job.compute == DType::kBF16 ? "bfloat16" : "float32"}};
}

}  // namespace bitmill
