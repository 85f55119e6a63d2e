// One rank's part of a quantization run: its blocks, in the propagation mode of the job. Knows the ranks before and behind
// only as ends of a transport, so that a test can drive many ranks in one process.
#pragma once

#include <functional>

#include "pipeline/block_context.h"
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

// What happens on a rank, as it happens. Of a stage's members the first tells of linears and blocks.
struct RankEvents {
  std::function<void(const LinearEvent&)> linear;
  std::function<void(const BlockEvent&)> block;
};

// Quantizes the rank's blocks and writes its shards; returns when they are durable. `pipe` reaches all ranks of the job,
// `stage` the members of the rank's stage. Idle ranks do not call it.
void run_rank(QuantizeJob& job, const RankPlan& mine, Transport& pipe, Transport& stage, Backend& backend,
              const RankEvents& events, RankClock& phases);

}  // namespace bitmill
