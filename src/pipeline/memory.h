// Peak memory of a rank, from shapes alone (docs/architecture.md, "Memory").
#pragma once

#include "pipeline/plan.h"

namespace bitmill {

// Peak of a rank that owns `blocks`: by kind at the worst moment, and which moment that is.
void plan_memory(const RunOptions& options, const ModelSpec& spec, const PlanJob& job, const OutputFormat& format,
                 const std::function<DType(const std::string&)>& dtypes, RankPlan& rank);

// What this process may use: the smaller of MemTotal and the cgroup limit, divided by the ranks of the node. 0: unknown.
int64_t host_memory_per_rank(int ranks_on_node);

}  // namespace bitmill
