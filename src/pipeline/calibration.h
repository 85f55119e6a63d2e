// How samples fall into lanes and micro-batches: pure arithmetic, part of what the result's bytes depend on.
#pragma once

#include <cstdint>
#include <vector>

namespace bitmill {

// One micro-batch: consecutive samples of one lane.
struct BatchRange {
  int lane = 0;
  int64_t first_sample = 0;
  int64_t samples = 0;
};

// Lane l of L holds samples [l*S/L, (l+1)*S/L); inside a lane micro-batches take as many whole samples as fit into
// `microbatch_tokens` (at least one). No micro-batch crosses a lane. Order: by sample.
// Example: 10 samples of 512 tokens, 4 lanes, 1024 tokens -> lanes {0,1} {2,3,4} {5,6} {7,8,9}
//          -> batches 0-1 | 2-3 4 | 5-6 | 7-8 9.
std::vector<BatchRange> plan_batches(int64_t samples, int64_t length, int lanes, int64_t microbatch_tokens);
// Those of `batches` whose lanes are in [first, end).
std::vector<BatchRange> batches_of_lanes(const std::vector<BatchRange>& batches, int first, int end);
// plan_batches(...).size() without the list: a plan may be for any number of samples.
int64_t count_batches(int64_t samples, int64_t length, int lanes, int64_t microbatch_tokens);

}  // namespace bitmill
