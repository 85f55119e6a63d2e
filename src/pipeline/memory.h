// Peak memory of a rank, from shapes alone (docs/scaling.md, "Memory").
#pragma once

#include <optional>

#include "pipeline/cost.h"
#include "pipeline/plan.h"

namespace bitmill {

// The model of a plan in numbers, and how the run goes through it.
struct PlanInput {
  const RunOptions& options;
  const ModelSpec& spec;
  PlanMachine machine;
  PlanJob job;
  Rates rates;
  bool full = false;         // propagation.mode=full of a calibrated job
  bool whole_block = false;  // a float forward of the block collects all its Hessians
  bool float_stream = false;  // gptaq: the float model runs in step
  std::vector<BlockWork> blocks = {};
  std::optional<BlockWork> head = {};  // quantized head
  int64_t embedding_bytes = 0;    // as stored
  int64_t head_bytes = 0;         // of a head that is copied; 0: tied or quantized
  int64_t lanes = 32, microbatch_tokens = 2048;
};

// Sets the mode and what follows from it: full mode has no float stream of its own, as its inputs are
// the float model's.
void set_mode(PlanInput& input, bool full);

// One member of a stage.
struct Member {
  int width = 1;
  LaneShare share;
  int stage_partials = 1;  // sums of all members together
  int64_t searched = 0;    // tokens of its samples that AWQ's search looks at
  BlockRange blocks;
  std::vector<BlockRange> waves;  // full mode only
  bool embeds = false, last = false;
};

bool same_memory(const Member& a, const Member& b);

// What a rank takes before it has any tensor: program, libraries, MPI, stacks. The report's
// start_resident_bytes is what it was; no plan's peak includes it.
constexpr int64_t kStartBytes = 35'000'000;

struct Peak {
  MemoryBytes limited{}, host{};  // worst moments, each by its own sum
  std::string at;                 // of `limited`
};
// With a device, `limited` is what lies in its memory and `host` the rest; without one, `limited` is
// everything and `host` is empty.
Peak peak_memory(const PlanInput& input, const Member& member);

// Full mode: the fewest consecutive runs of the member's blocks whose Hessians fit the machine's
// memory together; one run per block where any linear uses AWQ, or where not even one fits.
std::vector<BlockRange> plan_waves(const PlanInput& input, const Member& member);

// What this process may use: the smaller of MemTotal and the cgroup limit, divided by the ranks of the node. 0: unknown.
int64_t host_memory_per_rank(int ranks_on_node);

}  // namespace bitmill
