// How a job is laid out over ranks: width of the stages, blocks of each, waves, and what that costs
// in memory and time. Arithmetic over PlanInput.
#pragma once

#include <string>
#include <vector>

#include "pipeline/memory.h"

namespace bitmill {

struct StageLayout {
  BlockRange blocks;
  std::vector<BlockRange> waves;  // full mode only
  CostSeconds seconds{};          // of the busiest member, kWait included: sum = Layout::seconds
};

struct Layout {
  int width = 1;
  std::vector<StageLayout> stages;
  double seconds = 0;    // of the whole run, as cost.h has it
  CostSeconds phases{};  // mean over working ranks; sum = seconds
  int used_ranks() const { return width * static_cast<int>(stages.size()); }
};

// Stages of `width` ranks: as many as there are, at most one per block.
Layout lay_out(const PlanInput& input, int width);
// Member `member` of stage `stage`.
Member member_of(const PlanInput& input, const Layout& layout, int stage, int member);
// The least memory per rank this layout needs beyond the machine's: 0 where every rank fits.
int64_t missing_memory(const PlanInput& input, const Layout& layout);

// Widths worth trying: every small one, and for each number of stages the largest; none beyond what
// lanes, tiles or experts can keep busy.
std::vector<int> candidate_widths(const PlanInput& input);
// The fastest of the candidates that fit the machine's memory; of equal ones (within 0.5%) that
// with fewer idle ranks, then the narrowest. Where none fits, the one that misses least.
Layout choose_layout(const PlanInput& input);

// Why a job does not fit, what would: every change named here was planned and fits. Throws
// Error(kDoesNotFit).
[[noreturn]] void refuse_too_large(const PlanInput& input, const Layout& layout, int rank,
                                   const Peak& peak);

}  // namespace bitmill
