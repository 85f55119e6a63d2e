// What everything that works on blocks needs, in one place. All of it outlives its users.
#pragma once

#include <functional>

#include "core/options.h"
#include "formats/format.h"
#include "pipeline/loader.h"
#include "pipeline/records.h"
#include "pipeline/stage_group.h"

namespace bitmill {

struct BlockContext {
  const RunOptions& options;
  const ModelSource& source;
  const OutputFormat& format;
  Backend& backend;
  const StageGroup& group;  // the ranks that share the block
  RankClock& phases;
  // Called once per finished linear, on every member.
  std::function<void(const QuantizeRecord&)> on_record;
  // Which tensors of the output this rank writes; empty: all.
  std::function<bool(const std::string& tensor)> writes;
  // Takes each of them as soon as it is finished; empty: they gather in the PackedBlock.
  std::function<void(NamedTensor)> on_tensor;

  bool wants(const std::string& tensor) const { return !writes || writes(tensor); }
  QuantizeSettings settings(const LinearSpec& linear) const { return options.settings_for(linear.module); }
  // Waits for the other members of the stage, so that their lateness does not count as the exchange that follows.
  void meet() const {
    PhaseTimer timer(phases, Phase::kWait);
    group.any(false);
  }
  LaneRange lanes() const { return share_lanes(options.run.reduction_lanes, group.member(), group.size()); }
};

}  // namespace bitmill
