// Pipeline: walks this rank's blocks of a quantization run. Everything that decides is in the plan; this file acts.
#pragma once

#include <vector>

#include "comm/transport.h"
#include "pipeline/loader.h"
#include "pipeline/output.h"
#include "pipeline/plan.h"
#include "pipeline/records.h"

namespace bitmill {

// A resolved job, the same on every rank (ids: rank 0 only).
struct QuantizeJob {
  const RunOptions& options;
  const ModelSource& source;
  const OutputFormat& format;
  const Plan& plan;
  const OutputDirectory& output;
  Tensor ids;  // I32 [samples, length]
};

// What rank 0 knows at the end; empty elsewhere.
struct QuantizeOutcome {
  std::vector<LinearEvent> linears;  // in order of the forward pass
  std::vector<RankSummary> ranks;
};

// Quantizes the rank's blocks and writes their shards. Collective. Events reach `observer` on rank 0 as they happen.
// Rank 0 returns when every rank's shards are durable.
QuantizeOutcome run_quantize(QuantizeJob& job, Communicator& comm, Transport& transport, Backend& backend,
                             RunObserver& observer);

// Error(kNumeric) naming every module that met quantize.on_failed=fail.
void refuse_failures(const QuantizeOutcome& outcome);

// Peak resident memory of this process (VmHWM), bytes.
int64_t peak_resident_bytes();
std::string host_name();

}  // namespace bitmill
