#include "pipeline/partition.h"

#include <algorithm>
#include <limits>

namespace bitmill {
namespace {

// Can the blocks be cut into exactly `stages` non-empty ranges of cost at most `limit`? Greedy from the front; every
// later stage must keep at least one block. Fills `ranges` when it works.
bool split(const std::vector<double>& costs, int stages, double limit, std::vector<BlockRange>& ranges) {
  const int64_t n = static_cast<int64_t>(costs.size());
  ranges.clear();
  int64_t at = 0;
  for (int stage = 0; stage < stages; ++stage) {
    const int64_t keep = stages - stage - 1;  // blocks the later stages need
    BlockRange range{at, at};
    double sum = 0;
    while (range.end < n - keep && (range.count() == 0 || sum + costs[range.end] <= limit)) {
      sum += costs[range.end++];
      if (sum > limit) return false;
    }
    at = range.end;
    ranges.push_back(range);
  }
  return at == n;
}

}  // namespace

std::vector<BlockRange> partition_blocks(const std::vector<double>& costs, int stages, double extra_first,
                                         double extra_last) {
  if (costs.empty()) return {};
  std::vector<double> total = costs;
  total.front() += extra_first;
  total.back() += extra_last;
  stages = std::min<int>(stages, static_cast<int>(costs.size()));

  // The least feasible limit is the sum of some range: test those sums in ascending order by bisection.
  std::vector<double> limits;
  for (size_t i = 0; i < total.size(); ++i) {
    double sum = 0;
    for (size_t j = i; j < total.size(); ++j) limits.push_back(sum += total[j]);
  }
  std::sort(limits.begin(), limits.end());
  std::vector<BlockRange> ranges;
  size_t low = 0, high = limits.size() - 1;  // the largest sum (everything) is always enough
  while (low < high) {
    const size_t middle = (low + high) / 2;
    if (split(total, stages, limits[middle], ranges)) high = middle;
    else low = middle + 1;
  }
  split(total, stages, limits[low], ranges);
  return ranges;
}

}  // namespace bitmill
