#include "pipeline/records.h"

namespace bitmill {

std::string_view phase_name(Phase phase) {
  static constexpr std::array<std::string_view, kPhases> kNames{
      "read", "forward", "hessian", "solve", "pack", "write", "transfer", "wait", "gather"};
  return kNames[static_cast<size_t>(phase)];
}

Json record_json(const QuantizeRecord& r) {
  return {{"module", r.module},     {"method", r.method},
          {"note", r.note},         {"failed", r.failed},
          {"bits", r.bits},         {"group_size", r.group_size},
          {"out", r.out},           {"in", r.in},
          {"samples", r.samples},   {"tokens", r.tokens},
          {"damp", r.damp},         {"retries", r.retries},
          {"smallest_pivot", r.smallest_pivot}, {"dead_columns", r.dead_columns},
          {"loss", r.loss},         {"error", r.error},
          {"relative_error", r.relative_error}, {"seconds", r.seconds}};
}

namespace {

QuantizeRecord record_from(const Json& j) {
  QuantizeRecord r;
  j.at("module").get_to(r.module);
  j.at("method").get_to(r.method);
  j.at("note").get_to(r.note);
  j.at("failed").get_to(r.failed);
  j.at("bits").get_to(r.bits);
  j.at("group_size").get_to(r.group_size);
  j.at("out").get_to(r.out);
  j.at("in").get_to(r.in);
  j.at("samples").get_to(r.samples);
  j.at("tokens").get_to(r.tokens);
  j.at("damp").get_to(r.damp);
  j.at("retries").get_to(r.retries);
  j.at("smallest_pivot").get_to(r.smallest_pivot);
  j.at("dead_columns").get_to(r.dead_columns);
  j.at("loss").get_to(r.loss);
  j.at("error").get_to(r.error);
  j.at("relative_error").get_to(r.relative_error);
  j.at("seconds").get_to(r.seconds);
  return r;
}

}  // namespace

std::string to_text(const LinearEvent& e) {
  return Json{{"kind", "linear"}, {"block", e.block}, {"rank", e.rank}, {"record", record_json(e.record)}}.dump();
}

LinearEvent linear_event_from(const Json& j) {
  return {j.at("block"), j.at("rank"), record_from(j.at("record"))};
}

std::string to_text(const BlockEvent& e) {
  return Json{{"kind", "block"}, {"block", e.block}, {"rank", e.rank}, {"bytes", e.bytes}, {"seconds", e.seconds}}
      .dump();
}

BlockEvent block_event_from(const Json& j) {
  return {j.at("block"), j.at("rank"), j.at("bytes"), j.at("seconds")};
}

std::string to_text(const RankSummary& s) {
  return Json{{"kind", "summary"},
              {"rank", s.rank},
              {"host", s.host},
              {"first_block", s.first_block},
              {"end_block", s.end_block},
              {"phases", s.phases},
              {"peak_tensor_bytes", s.peak_tensor_bytes},
              {"peak_resident_bytes", s.peak_resident_bytes}}
      .dump();
}

RankSummary rank_summary_from(const Json& j) {
  RankSummary s;
  j.at("rank").get_to(s.rank);
  j.at("host").get_to(s.host);
  j.at("first_block").get_to(s.first_block);
  j.at("end_block").get_to(s.end_block);
  j.at("phases").get_to(s.phases);
  j.at("peak_tensor_bytes").get_to(s.peak_tensor_bytes);
  j.at("peak_resident_bytes").get_to(s.peak_resident_bytes);
  return s;
}

}  // namespace bitmill
