// What a run tells: records of linears, phases and progress. Plain data; src/report makes files and tables of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "algorithms/quantizer.h"
#include "io/json.h"
#include "pipeline/rank_clock.h"

namespace bitmill {

// One finished linear.
struct LinearEvent {
  int64_t block = 0;
  int rank = 0;
  QuantizeRecord record;
};

// One finished block: packed, durable.
struct BlockEvent {
  int64_t block = 0;
  int rank = 0;
  int64_t bytes = 0;  // of its shards
  double seconds = 0;
};

// What one rank has to say at the end.
struct RankSummary {
  int rank = 0;
  std::string host;
  int64_t first_block = 0, end_block = 0;
  double seconds = 0;      // until its last shard was durable
  PhaseSeconds phases{};   // their sum is `seconds`
  std::vector<Span> spans; // in order of time, without gaps
  int64_t peak_tensor_bytes = 0;    // of the tracked allocator
  int64_t peak_resident_bytes = 0;  // of the process (VmHWM)
  int64_t start_resident_bytes = 0; // of the process when the first block began (VmRSS)
};

// Receives a run's events, all on rank 0 in order of arrival (and its own on every rank). The only way from pipeline to report.
class RunObserver {
 public:
  virtual ~RunObserver() = default;
  virtual void on_linear(const LinearEvent&) {}
  virtual void on_block(const BlockEvent&) {}
  // A linear of this rank itself was finished; on every rank, so that a failing one can say where it was.
  virtual void on_own_linear(const LinearEvent&) {}
  // A step of the whole run began ("calibrate", "gather"), for status.json.
  virtual void on_phase(const std::string&) {}
};

// Records travel from rank to rank as JSON text.
std::string to_text(const LinearEvent& event);
std::string to_text(const BlockEvent& event);
std::string to_text(const RankSummary& summary);
LinearEvent linear_event_from(const Json& json);
BlockEvent block_event_from(const Json& json);
RankSummary rank_summary_from(const Json& json);
Json record_json(const QuantizeRecord& record);

}  // namespace bitmill
