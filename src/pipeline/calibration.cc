#include "pipeline/calibration.h"

#include <algorithm>

namespace bitmill {

std::vector<BatchRange> plan_batches(int64_t samples, int64_t length, int lanes, int64_t microbatch_tokens) {
  std::vector<BatchRange> batches;
  const int64_t per_batch = std::max<int64_t>(1, microbatch_tokens / std::max<int64_t>(1, length));
  for (int lane = 0; lane < lanes; ++lane) {
    const int64_t end = (lane + 1) * samples / lanes;
    for (int64_t first = lane * samples / lanes; first < end; first += per_batch)
      batches.push_back({lane, first, std::min(per_batch, end - first)});
  }
  return batches;
}

}  // namespace bitmill
