#include "pipeline/records.h"

#include <cmath>

#include "core/error.h"

namespace bitmill {

// A span as [what, block, start, end] in whole microseconds: there may be hundreds per rank.
void to_json(Json& json, const Span& span) {
  json = {static_cast<int>(span.what), span.block, std::llround(1e6 * span.start), std::llround(1e6 * span.end)};
}
void from_json(const Json& json, Span& span) {
  const int what = json.at(0);
  BITMILL_CHECK(what >= 0 && what < kActivities);
  span = {static_cast<Activity>(what), json.at(1), 1e-6 * json.at(2).get<double>(), 1e-6 * json.at(3).get<double>()};
}

// The field list of a record, once for writer and reader.
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(QuantizeRecord, module, method, note, failed, bits, group_size, out, in, samples, tokens,
                                   damp, retries, smallest_pivot, dead_columns, loss, error, relative_error, seconds,
                                   awq_ratio, awq_weighted, awq_gain)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(RankSummary, rank, host, first_block, end_block, seconds, phases, spans,
                                   peak_tensor_bytes,
                                   start_resident_bytes, peak_resident_bytes)

Json record_json(const QuantizeRecord& record) { return record; }

std::string to_text(const LinearEvent& e) {
  return Json{{"kind", "linear"}, {"block", e.block}, {"rank", e.rank}, {"record", e.record}}.dump();
}

LinearEvent linear_event_from(const Json& j) {
  return {j.at("block"), j.at("rank"), j.at("record").get<QuantizeRecord>()};
}

std::string to_text(const BlockEvent& e) {
  return Json{{"kind", "block"}, {"block", e.block}, {"rank", e.rank}, {"bytes", e.bytes}, {"seconds", e.seconds}}
      .dump();
}

BlockEvent block_event_from(const Json& j) {
  return {j.at("block"), j.at("rank"), j.at("bytes"), j.at("seconds")};
}

std::string to_text(const RankSummary& summary) {
  Json json = summary;
  json["kind"] = "summary";
  return json.dump();
}

RankSummary rank_summary_from(const Json& json) { return json.get<RankSummary>(); }

}  // namespace bitmill
