#include <algorithm>

#include "report/report.h"

namespace bitmill {
namespace {

std::string csv_text(const std::string& text) {
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (char c : text) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
  return quoted + "\"";
}

Json eval_json(const std::optional<EvalResult>& result) {
  if (!result) return nullptr;
  return {{"perplexity", result->perplexity}, {"nll", result->nll}, {"tokens", result->tokens}, {"seconds", result->seconds}};
}

}  // namespace

std::string layers_csv(const std::vector<LinearEvent>& linears) {
  std::string csv =
      "block,module,method,bits,group_size,out,in,samples,tokens,damp,retries,smallest_pivot,dead_columns,loss,error,"
      "relative_error,seconds,awq_ratio,awq_weighted,awq_gain,rank,note\n";
  for (const LinearEvent& event : linears) {
    const QuantizeRecord& r = event.record;
    csv += fmt::format("{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{:.6f},{},{},{},{},{}\n", event.block, csv_text(r.module),
                       r.method, r.bits, r.group_size, r.out, r.in, r.samples, r.tokens, r.damp, r.retries,
                       r.smallest_pivot, r.dead_columns, r.loss, r.error, r.relative_error, r.seconds, r.awq_ratio,
                       r.awq_weighted ? 1 : 0, r.awq_gain, event.rank,
                       csv_text(r.note));
  }
  return csv;
}

std::string linear_line(const LinearEvent& event) {
  const QuantizeRecord& r = event.record;
  std::string line = fmt::format("{} [{}, {}] {} {}-bit g{} error {:.3e} tokens {} {:.3f} s", r.module, r.out, r.in,
                                 r.method, r.bits, r.group_size, r.relative_error, r.tokens, r.seconds);
  if (r.awq_ratio >= 0) line += fmt::format(" scales x^{:g}{} gain {:.3f}", r.awq_ratio, r.awq_weighted ? " w" : "", r.awq_gain);
  if (r.method.ends_with("gptq")) line += fmt::format(" loss {:.4g} damp {:g}", r.loss, r.damp);
  if (!r.note.empty()) line += " (" + r.note + ")";
  return line;
}

std::string totals_text(const QuantizeOutcome& outcome, const Plan& plan, const RunFacts& facts) {
  int64_t fallbacks = 0;
  for (const LinearEvent& event : outcome.linears) fallbacks += !event.record.note.empty();
  std::string text = fmt::format(
      "{} linears at {:.3f} bits per weight ({} fell back, see layers.csv)\n"
      "tensors: {} -> {} ({:.2f}x smaller)\n",
      outcome.linears.size(), plan.bits_per_weight, fallbacks, human_bytes(facts.source_bytes),
      human_bytes(facts.output_bytes),
      static_cast<double>(facts.source_bytes) / static_cast<double>(std::max<int64_t>(1, facts.output_bytes)));
  if (facts.before) text += fmt::format("perplexity of the float model: {:.4f}\n", facts.before->perplexity);
  if (facts.after) text += fmt::format("perplexity of the output: {:.4f}\n", facts.after->perplexity);
  return text + fmt::format("quantized in {}, {} in all; output {}", human_seconds(facts.quantize_seconds),
                            human_seconds(facts.seconds), facts.output);
}

Json report_json(const QuantizeOutcome& outcome, const Plan& plan, const RunFacts& facts) {
  Json layers = Json::array(), ranks = Json::array();
  for (const LinearEvent& event : outcome.linears) {
    Json layer = record_json(event.record);
    layer["block"] = event.block;
    layer["rank"] = event.rank;
    layers.push_back(std::move(layer));
  }
  for (const RankSummary& rank : outcome.ranks) {
    Json seconds = Json::object();
    for (int phase = 0; phase < kPhases; ++phase)
      seconds[std::string(phase_name(static_cast<Phase>(phase)))] = rank.phases[phase];
    ranks.push_back({{"rank", rank.rank}, {"host", rank.host}, {"seconds", rank.seconds},
                     {"first_block", rank.first_block},
                     {"end_block", rank.end_block}, {"phases", seconds}, {"peak_tensor_bytes", rank.peak_tensor_bytes},
                     {"peak_resident_bytes", rank.peak_resident_bytes},
                     {"start_resident_bytes", rank.start_resident_bytes},
                     {"planned_peak_bytes", total(plan.ranks[rank.rank].peak)},
                     {"planned_peak_at", plan.ranks[rank.rank].peak_at}});
  }
  return {{"schema", 1},
          {"version", BITMILL_VERSION},
          {"output", facts.output},
          {"config", facts.effective_config},
          {"backend", facts.backend},
          {"seconds", facts.seconds},
          {"quantize_seconds", facts.quantize_seconds},
          {"source_bytes", facts.source_bytes},
          {"output_bytes", facts.output_bytes},
          {"bits_per_weight", plan.bits_per_weight},
          {"before", eval_json(facts.before)},
          {"after", eval_json(facts.after)},
          {"run_seconds", outcome.seconds},
          {"planned_seconds", plan.seconds},
          {"planned_at", plan.rates.assumed ? "assumed rates" : "given rates"},
          {"phases", phases_json(outcome.ranks, plan)},
          {"timeline", timeline_json(outcome.ranks)},
          {"ranks", ranks},
          {"layers", layers},
          {"plan", plan_json(plan)}};
}

}  // namespace bitmill
