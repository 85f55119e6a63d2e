#include "pipeline/calibration.h"

#include <algorithm>
#include <iterator>

namespace bitmill {

namespace {

int64_t samples_per_batch(int64_t length, int64_t microbatch_tokens) {
  return std::max<int64_t>(1, microbatch_tokens / std::max<int64_t>(1, length));
}

// First sample of a lane; that of lane `lanes` is the number of samples.
int64_t lane_start(int64_t samples, int lane, int lanes) { return lane * samples / lanes; }

}  // namespace

std::vector<BatchRange> plan_batches(int64_t samples, int64_t length, int lanes, int64_t microbatch_tokens) {
  std::vector<BatchRange> batches;
  const int64_t per_batch = samples_per_batch(length, microbatch_tokens);
  for (int lane = 0; lane < lanes; ++lane) {
    const int64_t end = lane_start(samples, lane + 1, lanes);
    for (int64_t first = lane_start(samples, lane, lanes); first < end; first += per_batch)
      batches.push_back({lane, first, std::min(per_batch, end - first)});
  }
  return batches;
}

std::vector<BatchRange> batches_of_lanes(const std::vector<BatchRange>& batches, int first, int end) {
  std::vector<BatchRange> mine;
  std::copy_if(batches.begin(), batches.end(), std::back_inserter(mine),
               [&](const BatchRange& batch) { return batch.lane >= first && batch.lane < end; });
  return mine;
}

int64_t count_batches(int64_t samples, int64_t length, int lanes, int64_t microbatch_tokens) {
  const int64_t per_batch = samples_per_batch(length, microbatch_tokens);
  int64_t count = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    const int64_t in_lane = lane_start(samples, lane + 1, lanes) - lane_start(samples, lane, lanes);
    count += (in_lane + per_batch - 1) / per_batch;
  }
  return count;
}

}  // namespace bitmill
