#include "pipeline/layout.h"

#include <algorithm>
#include <numeric>
#include <set>

namespace bitmill {
namespace {

double& slot(CostSeconds& seconds, CostPhase phase) {
  return seconds[static_cast<size_t>(phase)];
}

// Members of a stage by what they get: beyond one lane each the others get none.
int sharing(const PlanInput& input, int width) {
  return static_cast<int>(std::min<int64_t>(width, input.lanes));
}

LaneShare share_of(const PlanInput& input, int width, int member) {
  return lane_share(input.job.samples, input.job.length, static_cast<int>(input.lanes),
                    input.microbatch_tokens, width, member);
}

// Every number is the largest of any member.
LaneShare busiest(const PlanInput& input, int width) {
  LaneShare most;
  const int members = sharing(input, width);
  for (int member = 0; member < members; ++member) {
    const LaneShare share = share_of(input, members, member);
    most.samples = std::max(most.samples, share.samples);
    most.batches = std::max(most.batches, share.batches);
    most.partials = std::max(most.partials, share.partials);
    most.live = std::max(most.live, share.live);
    most.batch_samples = std::max(most.batch_samples, share.batch_samples);
    most.lanes.resize(std::max(most.lanes.size(), share.lanes.size()));
    for (size_t i = 0; i < share.lanes.size(); ++i) {
      LaneShare::Lane& lane = most.lanes[i];
      lane.samples_left = std::max(lane.samples_left, share.lanes[i].samples_left);
      lane.live = std::max(lane.live, share.lanes[i].live);
    }
  }
  return most;
}

// Whole micro-batches, the first of which begins among the first awq.tokens tokens of the job.
int64_t searched_tokens(const PlanInput& input, const LaneShare& share) {
  const int64_t length = input.job.length, batch = share.batch_samples * length;
  const int64_t wanted = input.options.awq.tokens - share.first_sample * length;
  if (wanted <= 0 || batch == 0) return 0;
  return std::min(share.samples * length, (wanted + batch - 1) / batch * batch);
}

int all_partials(const PlanInput& input, int width) {
  const int members = sharing(input, width);
  int sum = 0;
  for (int member = 0; member < members; ++member) sum += share_of(input, members, member).partials;
  return sum;
}

CostShape cost_shape(const PlanInput& input, int width, int stages, const LaneShare& share) {
  CostShape shape;
  shape.tokens = input.job.samples * input.job.length;
  shape.length = input.job.length;
  shape.calibrated = input.job.calibrated;
  shape.full = input.full;
  shape.whole_block = input.whole_block;
  shape.float_stream = input.float_stream;
  shape.awq_tokens = input.options.awq.tokens;
  shape.awq_ratios = input.options.awq.ratios;
  shape.element_bytes = dtype_bits(input.job.compute) / 8;
  shape.stages = stages;
  shape.width = width;
  shape.share = static_cast<double>(share.samples) / static_cast<double>(input.job.samples);
  shape.batches = share.batches;
  shape.partials = share.partials;
  return shape;
}

// Seconds to read tensors and write them again, by one member.
double copy_seconds(int64_t bytes, const Rates& rates) {
  return static_cast<double>(bytes) * (1 / rates.read_bandwidth + 1 / rates.write_bandwidth);
}

int64_t other_bytes(const PlanInput& input) {
  int64_t bytes = input.head_bytes;
  for (const PackedSpec& other : input.job.other) bytes += packed_bytes(other);
  return bytes;
}

// The way of all micro-batches through the stages.
class Timeline {
 public:
  Timeline(const PlanInput& input, Layout& layout, const CostShape& shape,
           const std::vector<BlockSeconds>& blocks)
      : input_(input), layout_(layout), shape_(shape), blocks_(blocks) {}

  void run() {
    Stream stream;
    for (size_t s = 0; s < layout_.stages.size(); ++s) {
      const StageEnd end = run_stage(s, input_.job.calibrated ? stream : Stream());
      layout_.seconds = std::max(layout_.seconds, end.done);
      if (s + 1 == layout_.stages.size() || !input_.job.calibrated) continue;
      const double hop = hop_seconds();
      slot(layout_.stages[s].seconds, CostPhase::kTransfer) += hop;
      stream = pass(end.out, hop, shape_.batches);
    }
    for (StageLayout& stage : layout_.stages) {
      slot(stage.seconds, CostPhase::kWait) = std::max(0.0, layout_.seconds - total(stage.seconds));
      for (size_t i = 0; i < kCostPhases; ++i)
        layout_.phases[i] += stage.seconds[i] / static_cast<double>(layout_.stages.size());
    }
  }

 private:
  double hop_seconds() const {
    const double bytes =
        static_cast<double>(shape_.tokens * input_.spec.hidden * shape_.element_bytes) *
        shape_.share * (shape_.float_stream ? 2 : 1);
    return bytes / input_.rates.link_bandwidth +
           static_cast<double>(shape_.batches) * input_.rates.latency;
  }

  StageEnd run_stage(size_t s, Stream in) {
    StageLayout& stage = layout_.stages[s];
    const bool last = s + 1 == layout_.stages.size();
    int64_t copied = s == 0 ? input_.embedding_bytes : 0;
    if (last) copied += other_bytes(input_);
    const double ready = copy_seconds(copied, input_.rates);
    slot(stage.seconds, CostPhase::kRead) +=
        static_cast<double>(copied) / input_.rates.read_bandwidth;
    slot(stage.seconds, CostPhase::kWrite) +=
        static_cast<double>(copied) / input_.rates.write_bandwidth;
    std::vector<std::vector<BlockSeconds>> waves;
    for (const BlockRange& range :
         input_.full ? stage.waves : std::vector<BlockRange>{stage.blocks})
      waves.emplace_back(blocks_.begin() + range.first, blocks_.begin() + range.end);
    if (last && input_.head)
      waves.back().push_back(block_seconds(*input_.head, shape_, input_.rates));
    for (const auto& wave : waves)
      for (const BlockSeconds& block : wave)
        for (size_t i = 0; i < kCostPhases; ++i) stage.seconds[i] += block.phases[i];
    return input_.full ? run_full_stage(in, ready, waves, shape_.batches)
                       : run_quantized_stage(in, ready, waves.front(), shape_.batches);
  }

  const PlanInput& input_;
  Layout& layout_;
  const CostShape& shape_;
  const std::vector<BlockSeconds>& blocks_;
};

std::vector<BlockRange> stage_ranges(const PlanInput& input,
                                     const std::vector<BlockSeconds>& blocks,
                                     const CostShape& shape) {
  std::vector<double> seconds;
  for (const BlockSeconds& block : blocks) seconds.push_back(total(block.phases) + 1e-9);
  const double head = input.head ? total(block_seconds(*input.head, shape, input.rates).phases) : 0;
  return partition_blocks(seconds, input.machine.ranks / shape.width,
                          copy_seconds(input.embedding_bytes, input.rates),
                          head + copy_seconds(other_bytes(input), input.rates));
}

// Work beyond which more ranks in a stage have nothing to do.
int64_t most_parts(const PlanInput& input) {
  int64_t most = input.job.calibrated ? input.lanes : 1;
  for (const BlockWork& block : input.blocks)
    for (const CutWork& cut : block.cuts) most = std::max(most, cut.expert ? cut.count : cut.tiles);
  return most;
}

}  // namespace

Layout lay_out(const PlanInput& input, int width) {
  Layout layout;
  layout.width = width;
  const LaneShare share = busiest(input, width);
  const int stages =
      std::min<int>(input.machine.ranks / width, static_cast<int>(input.blocks.size()));
  const CostShape shape = cost_shape(input, width, stages, share);
  std::vector<BlockSeconds> blocks;
  for (const BlockWork& block : input.blocks)
    blocks.push_back(block_seconds(block, shape, input.rates));
  Member member{width, share, all_partials(input, width), searched_tokens(input, share), {}, {},
                false, false};
  const std::vector<BlockRange> ranges = stage_ranges(input, blocks, shape);
  for (size_t s = 0; s < ranges.size(); ++s) {
    member.blocks = ranges[s];
    member.embeds = s == 0;
    layout.stages.push_back({ranges[s], plan_waves(input, member)});
  }
  Timeline(input, layout, shape, blocks).run();
  return layout;
}

Member member_of(const PlanInput& input, const Layout& layout, int stage, int member) {
  const StageLayout& its = layout.stages[static_cast<size_t>(stage)];
  const LaneShare share = share_of(input, layout.width, member);
  return {layout.width,
          share,
          all_partials(input, layout.width),
          searched_tokens(input, share),
          its.blocks,
          its.waves,
          stage == 0,
          stage + 1 == static_cast<int>(layout.stages.size())};
}

int64_t missing_memory(const PlanInput& input, const Layout& layout) {
  const int64_t limit = input.machine.memory_per_rank;
  if (limit == 0) return 0;
  const LaneShare share = busiest(input, layout.width);
  const int partials = all_partials(input, layout.width);
  int64_t missing = 0;
  for (size_t s = 0; s < layout.stages.size(); ++s) {
    const Member member{layout.width,
                        share,
                        partials,
                        searched_tokens(input, share),
                        layout.stages[s].blocks,
                        layout.stages[s].waves,
                        s == 0,
                        s + 1 == layout.stages.size()};
    missing = std::max(missing, total(peak_memory(input, member).limited) - limit);
  }
  return missing;
}

std::vector<int> candidate_widths(const PlanInput& input) {
  const int ranks = input.machine.ranks;
  const int most = static_cast<int>(std::min<int64_t>(ranks, most_parts(input)));
  std::vector<int> widths;
  for (int width = 1; width <= most; ++width) {
    const bool widest = width == most || ranks / (width + 1) < ranks / width;
    if (width <= 16 || widest) widths.push_back(width);
  }
  return widths;
}

Layout choose_layout(const PlanInput& input) {
  const int ranks = input.machine.ranks;
  std::vector<Layout> layouts;
  for (const int width : candidate_widths(input)) layouts.push_back(lay_out(input, width));
  std::stable_sort(layouts.begin(), layouts.end(),
                   [](const Layout& a, const Layout& b) { return a.seconds < b.seconds; });
  const Layout *best = nullptr, *nearest = nullptr;
  int64_t least = 0;
  for (const Layout& layout : layouts) {
    if (best != nullptr && layout.seconds > best->seconds * 1.005) break;
    const int64_t missing = missing_memory(input, layout);
    if (missing > 0) {
      if (nearest == nullptr || missing < least) {
        nearest = &layout;
        least = missing;
      }
      continue;
    }
    const auto order = [&](const Layout& l) { return std::pair(ranks - l.used_ranks(), l.width); };
    if (best == nullptr || order(layout) < order(*best)) best = &layout;
  }
  return best != nullptr ? *best : *nearest;
}

}  // namespace bitmill
