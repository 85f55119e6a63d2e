// Which rank owns which blocks.
#pragma once

#include <cstdint>
#include <vector>

namespace bitmill {

struct BlockRange {
  int64_t first = 0, end = 0;  // [first, end); empty for an idle rank
  int64_t count() const { return end - first; }
};

// Splits blocks 0..n-1 into at most `stages` contiguous non-empty ranges so that the largest sum of costs is least, and
// among those splits the one whose early stages are fullest (deterministic). costs[b] > 0 is a block's bytes and work in
// one unit; extra_first and extra_last are what embedding and head add to the first and last stage.
// Returns min(stages, n) ranges. Example: costs 1 1 1 1 4, 2 stages -> [0,4) [4,5).
std::vector<BlockRange> partition_blocks(const std::vector<double>& costs, int stages, double extra_first,
                                         double extra_last);

}  // namespace bitmill
