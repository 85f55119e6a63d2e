// What would make a job fit: every change is planned before it is named.
#include <algorithm>
#include <optional>

#include "core/log.h"
#include "pipeline/layout.h"

namespace bitmill {
namespace {

bool fits(const PlanInput& input, int width) {
  return missing_memory(input, lay_out(input, width)) == 0;
}

// Widths of this machine that fit: powers of two and the largest possible.
std::vector<int> fitting_widths(const PlanInput& input) {
  std::vector<int> widths, fitting;
  const std::vector<int> all = candidate_widths(input);
  for (int width = 1; width < all.back(); width *= 2) widths.push_back(width);
  widths.push_back(all.back());
  for (const int width : widths)
    if (fits(input, width)) fitting.push_back(width);
  return fitting;
}

// The least number of ranks above this machine's, up to 65,536, of which some width fits.
std::optional<std::string> more_ranks(PlanInput input) {
  constexpr int kMost = 65536;
  int low = input.machine.ranks, high = low;
  std::vector<int> widths;
  while (widths.empty() && high < kMost) {
    low = high;
    high = std::min(2 * high, kMost);
    input.machine.ranks = high;
    widths = fitting_widths(input);
  }
  if (widths.empty()) return std::nullopt;
  while (high - low > 1) {
    input.machine.ranks = (low + high) / 2;
    const std::vector<int> some = fitting_widths(input);
    (some.empty() ? low : high) = input.machine.ranks;
    if (!some.empty()) widths = some;
  }
  return fmt::format("{} ranks with run.stage_width={}", high, widths.front());
}

// Halves `value` down to `least` until the job fits with it.
std::optional<int64_t> halved(PlanInput input, int64_t PlanInput::*value, int64_t least,
                              int width) {
  while (input.*value > least) {
    input.*value = std::max(least, input.*value / 2);
    if (fits(input, width)) return input.*value;
  }
  return std::nullopt;
}

std::optional<int64_t> fewer_samples(PlanInput input, int width) {
  while (input.job.samples > 1) {
    input.job.samples /= 2;
    if (fits(input, width)) return input.job.samples;
  }
  return std::nullopt;
}

// The least memory per rank that any width of this machine gets by with.
int64_t least_memory(PlanInput input) {
  int64_t least = INT64_MAX;
  const int64_t limit = input.machine.memory_per_rank;
  const std::vector<int> all = candidate_widths(input);
  for (int width = 1; width <= all.back(); width *= 2)
    least = std::min(least, limit + missing_memory(input, lay_out(input, width)));
  return std::min(least, limit + missing_memory(input, lay_out(input, all.back())));
}

std::vector<std::string> what_helps(const PlanInput& input, int width) {
  std::vector<std::string> helps;
  std::vector<std::string> widths;
  for (const int fitting : fitting_widths(input)) widths.push_back(std::to_string(fitting));
  if (!widths.empty())
    helps.push_back(fmt::format("run.stage_width={}", fmt::join(widths, " or ")));
  if (input.full) {
    PlanInput other = input;
    set_mode(other, false);
    if (missing_memory(other, lay_out(other, width)) == 0)
      helps.push_back("propagation.mode=quantized");
  }
  if (const auto samples = fewer_samples(input, width))
    helps.push_back(fmt::format("calibration.samples={}", *samples));
  if (const auto tokens = halved(input, &PlanInput::microbatch_tokens, 1, width))
    helps.push_back(fmt::format("run.microbatch_tokens={}", *tokens));
  if (const auto lanes = halved(input, &PlanInput::lanes, 1, width))
    helps.push_back(fmt::format("run.reduction_lanes={}", *lanes));
  if (widths.empty())
    if (const auto ranks = more_ranks(input)) helps.push_back(*ranks);
  return helps;
}

}  // namespace

void refuse_too_large(const PlanInput& input, const Layout& layout, int rank, const Peak& peak) {
  const MemoryBytes& bytes = peak.limited;
  const size_t largest =
      static_cast<size_t>(std::max_element(bytes.begin(), bytes.end()) - bytes.begin());
  std::vector<std::string> helps = what_helps(input, layout.width);
  if (helps.empty())
    helps.push_back(
        fmt::format("ranks with {} each; with {} no width, number of ranks or samples does",
                    human_bytes(least_memory(input)), human_bytes(input.machine.memory_per_rank)));
  fail(ExitCode::kDoesNotFit,
       "rank {} needs {} at {} but has {} of {} ({} rank{}, run.stage_width={}); the largest part "
       "is "
       "{} ({}); what fits: {}",
       rank, human_bytes(total(bytes)), peak.at, human_bytes(input.machine.memory_per_rank),
       input.machine.memory_name, input.machine.ranks, input.machine.ranks == 1 ? "" : "s",
       layout.width, memory_kind_name(static_cast<MemoryKind>(largest)),
       human_bytes(bytes[largest]), fmt::join(helps, "; or "));
}

}  // namespace bitmill
