// The rates of [machine], measured with the operations that a run is made of.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "comm/communicator.h"
#include "core/options.h"

namespace bitmill {

// Option name and value, in the order of the table: forward_flops, hessian_flops, factor_flops,
// sweep_flops, grid_elements, read_bandwidth, write_bandwidth, and link_bandwidth where there are
// two ranks. All ranks measure at the same time, as they work in a run; the slowest rank's value
// counts. Files are written beside `directory` (output.path or what exists of it; empty: files are
// not measured) and removed. Reading follows writing, so what the system caches is read from its
// cache. A few seconds in all. Collective; throws AgreedError.
using MeasuredRates = std::vector<std::pair<std::string, double>>;
MeasuredRates measure_rates(const RunOptions& options, const std::string& directory, int threads,
                            Communicator& comm);

}  // namespace bitmill
