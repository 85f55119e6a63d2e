// Pipeline: walks this rank's blocks of a quantization run. Everything that decides is in the plan; this file acts.
#pragma once

#include <vector>

#include "pipeline/rank_work.h"

namespace bitmill {

// What rank 0 knows at the end; empty elsewhere.
struct QuantizeOutcome {
  std::vector<LinearEvent> linears;  // in order of the forward pass
  std::vector<RankSummary> ranks;    // times include waiting for the slowest rank at the end
  double seconds = 0;                // from the common start to the last durable shard of any rank
};

// Quantizes the rank's blocks and writes their shards. Collective. Events reach `observer` on rank 0 as they happen.
// Rank 0 returns when every rank's shards are durable.
QuantizeOutcome run_quantize(QuantizeJob& job, Communicator& comm, Transport& transport, Backend& backend,
                             RunObserver& observer);

// Error(kNumeric) naming every module that met quantize.on_failed=fail.
void refuse_failures(const QuantizeOutcome& outcome);

// Resident memory of this process, bytes: its peak (VmHWM), and what it is now (VmRSS).
int64_t peak_resident_bytes();
int64_t resident_bytes();
std::string host_name();

}  // namespace bitmill
