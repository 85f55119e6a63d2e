#include "pipeline/cost.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "core/error.h"

namespace bitmill {
namespace {

double& slot(CostSeconds& seconds, CostPhase phase) {
  return seconds[static_cast<size_t>(phase)];
}

// Sums of the lane tree over lanes [first, end), as LaneTree in algorithms/hessian.h folds them: by
// the first lane with samples of each subtree that is summed up.
class LaneCounter {
 public:
  explicit LaneCounter(int first) : first_(first) {}
  // Folds what is complete before `lane` begins.
  void fold_below(int lane) {
    while (lanes_.size() >= 2) {
      const int right = lanes_.back(), left = lanes_[lanes_.size() - 2];
      const int level = meeting_level(left, right);
      if (level >= meeting_level(right, lane) || (left >> level) << level < first_) return;
      lanes_.pop_back();
    }
  }
  void push(int lane) { lanes_.push_back(lane); }
  int count() const { return static_cast<int>(lanes_.size()); }

 private:
  static int meeting_level(int a, int b) {
    return std::bit_width(static_cast<unsigned>(a) ^ static_cast<unsigned>(b));
  }
  int first_;
  std::vector<int> lanes_;
};

// What one cut takes; `split`: the part of its tiles or experts that the busiest member has.
struct CutSeconds {
  double forward = 0, hessian = 0, exchange = 0, factor = 0, sweep = 0, grid = 0, search = 0;
};

class CutCost {
 public:
  CutCost(const CutWork& cut, const CostShape& shape, const Rates& rates)
      : cut_(cut),
        shape_(shape),
        rates_(rates),
        n_(static_cast<double>(cut.in)),
        rows_(static_cast<double>(cut.rows)) {
    const double width = shape.width;
    // Experts: the tokens of all samples, on the member that owns them.
    own_ = cut.expert ? std::ceil(static_cast<double>(cut.count) / width) : 1;
    tokens_ = static_cast<double>(shape.tokens) * cut.token_share * (cut.expert ? 1 : shape.share);
    const double tiles = std::max<double>(1, static_cast<double>(cut.tiles));
    split_ = cut.expert ? 1 : std::ceil(tiles / width) / tiles;
  }

  CutSeconds seconds() const {
    CutSeconds s;
    if (shape_.calibrated) s.forward = own_ * 2 * n_ * rows_ * tokens_ / rates_.forward_flops;
    if (cut_.hessian) {
      s.hessian = own_ * hessian_flop() / rates_.hessian_flops;
      s.factor = own_ * (n_ * n_ * n_ / 3 + 512 * n_ * n_) / factor_rate(rates_, cut_.in);
      s.sweep = own_ * split_ * sweep_flop() / rates_.sweep_flops;
    }
    s.grid = own_ * split_ * cut_.grid_weights / rates_.grid_elements;
    s.exchange = exchange_bytes() / rates_.link_bandwidth + messages() * rates_.latency;
    if (cut_.scaled && shape_.calibrated) s.search = search_seconds();
    return s;
  }

  double exchange_bytes() const {
    if (shape_.width == 1) return 0;
    const double others = 1 - 1.0 / shape_.width;
    double results = rows_ * n_ * static_cast<double>(cut_.count) * others;
    if (!cut_.expert) {
      if (shape_.calibrated && (shape_.whole_block || shape_.float_stream))
        results *= 1 + static_cast<double>(shape_.element_bytes);
      const double triangle = cut_.hessian ? 4 * static_cast<double>(hessian_elements(cut_.in)) : 0;
      return triangle * others * (shape_.partials + 1) + results;
    }
    const double routed = static_cast<double>(shape_.tokens) * shape_.share * cut_.token_share *
                          static_cast<double>(cut_.count) * others;
    if (!shape_.calibrated) return results;
    return results + (cut_.adds_to_hidden
                          ? routed * rows_ * 4
                          : routed * n_ * static_cast<double>(shape_.element_bytes));
  }

 private:
  double messages() const {
    return shape_.width == 1 ? 0 : (cut_.hessian ? 3.0 : 1.0) * (shape_.width - 1);
  }
  bool compares() const { return cut_.mismatch && shape_.float_stream; }
  double hessian_flop() const {
    double flop = 2 * static_cast<double>(hessian_elements(cut_.in)) * tokens_;
    if (compares()) flop += 2 * n_ * (n_ + static_cast<double>(cut_.residual)) * tokens_;
    return flop;
  }
  double sweep_flop() const {
    return rows_ * n_ * (2 * n_ + 128) + (compares() ? 4 * rows_ * n_ * n_ : 0);
  }
  // The subset of tokens once through the float cut, its Hessian, and every candidate's error.
  double search_seconds() const {
    const double part =
        std::min(1.0, static_cast<double>(shape_.awq_tokens) / static_cast<double>(shape_.tokens));
    return own_ * (part * (2 * n_ * rows_ * tokens_ / rates_.forward_flops +
                           hessian_flop() / rates_.hessian_flops) +
                   split_ * 2 * shape_.awq_ratios * rows_ * n_ *
                       (n_ / rates_.sweep_flops + 1 / rates_.grid_elements));
  }

  const CutWork& cut_;
  const CostShape& shape_;
  const Rates& rates_;
  double n_, rows_;
  double own_ = 1, tokens_ = 0, split_ = 1;
};

// Bytes at a rank's own rate, or at its part of what `ranks` get together from the file system.
double file_seconds(double bytes, double rate, double ranks, const Rates& rates) {
  return std::max(bytes / rate, bytes * ranks / rates.storage_bandwidth);
}

// Reading and writing go on beside the arithmetic; what is longer counts.
void add_files(const BlockWork& work, const CostShape& shape, const Rates& rates,
               BlockSeconds& block) {
  const double width = shape.width, source = static_cast<double>(work.source_bytes());
  // Rows that the member solves; once more its part of the block where that runs in float first.
  const bool whole = shape.calibrated && (shape.whole_block || shape.float_stream);
  const double bytes = source / width * (whole ? 2 : 1);
  const bool together = shape.full || !shape.calibrated;  // all stages at the same time
  const double ranks = width * (together ? shape.stages : 1);
  const double read = file_seconds(bytes, rates.read_bandwidth, ranks, rates);
  const double packed = static_cast<double>(work.packed_bytes()) / width;  // shards in turn
  const double write = file_seconds(packed, rates.write_bandwidth, ranks, rates);
  const double arithmetic = total(block.phases);
  slot(block.phases, CostPhase::kRead) = std::max(0.0, read - arithmetic);
  slot(block.phases, CostPhase::kWrite) = std::max(0.0, write - std::max(read, arithmetic));
}

}  // namespace

std::string_view cost_phase_name(CostPhase phase) {
  static constexpr std::array<std::string_view, kCostPhases> kNames{
      "read", "forward", "hessian", "exchange", "factor", "sweep",
      "grid", "search",  "write",   "transfer", "wait"};
  return kNames[static_cast<size_t>(phase)];
}

double total(const CostSeconds& seconds) {
  return std::accumulate(seconds.begin(), seconds.end(), 0.0);
}

std::string duration_text(double seconds) {
  if (seconds < 10) return fmt::format("{:.2f} s", seconds);
  if (seconds < 120) return fmt::format("{:.0f} s", seconds);
  if (seconds < 7200) return fmt::format("{:.0f} min", seconds / 60);
  return fmt::format("{:.1f} h", seconds / 3600);
}

LaneShare lane_share(int64_t samples, int64_t length, int lanes, int64_t microbatch_tokens,
                     int width, int member) {
  const auto lane_start = [&](int64_t lane) { return lane * samples / lanes; };
  const int first = static_cast<int>(int64_t{member} * lanes / width);
  const int end = static_cast<int>(int64_t{member + 1} * lanes / width);
  const int64_t per_batch = std::max<int64_t>(1, microbatch_tokens / std::max<int64_t>(1, length));
  LaneShare share;
  share.first_sample = lane_start(first);
  share.samples = lane_start(end) - lane_start(first);
  LaneCounter sums(first);
  for (int lane = first; lane < end; ++lane) {
    const int64_t in_lane = lane_start(lane + 1) - lane_start(lane);
    share.batches += (in_lane + per_batch - 1) / per_batch;
    share.batch_samples = std::max(share.batch_samples, std::min(per_batch, in_lane));
    if (in_lane == 0) continue;
    sums.fold_below(lane);
    sums.push(lane);
    share.live = std::max(share.live, sums.count());
    share.lanes.push_back({lane_start(end) - lane_start(lane), sums.count()});
  }
  sums.fold_below(end);
  share.partials = sums.count();
  return share;
}

double exchange_bytes(const BlockWork& work, const CostShape& shape) {
  double bytes = 0;
  for (const CutWork& cut : work.cuts) bytes += CutCost(cut, shape, Rates{}).exchange_bytes();
  return bytes;
}

BlockSeconds block_seconds(const BlockWork& work, const CostShape& shape, const Rates& rates) {
  BlockSeconds block;
  const double attention = shape.calibrated ? static_cast<double>(shape.tokens * shape.length) *
                                                  shape.share * work.attention / rates.forward_flops
                                            : 0;
  const double again = shape.float_stream ? 2 : 1;  // the float model runs in step
  double forward = attention * again, last = 0, first = 0;
  for (size_t i = 0; i < work.cuts.size(); ++i) {
    const CutSeconds s = CutCost(work.cuts[i], shape, rates).seconds();
    forward += s.forward * again;
    if (i == 0) first = s.hessian;
    last = work.cuts[i].expert ? 0 : s.forward * again;
    slot(block.phases, CostPhase::kHessian) += s.hessian;
    slot(block.phases, CostPhase::kExchange) += s.exchange;
    slot(block.phases, CostPhase::kFactor) += s.factor;
    slot(block.phases, CostPhase::kSweep) += s.sweep;
    slot(block.phases, CostPhase::kGrid) += s.grid;
    slot(block.phases, CostPhase::kSearch) += s.search;
  }
  const double hessian = slot(block.phases, CostPhase::kHessian);
  const bool twice = shape.whole_block && !shape.full;
  slot(block.phases, CostPhase::kForward) = forward * (twice ? 2 : 1);
  if (shape.whole_block) {
    block.capture = forward + hessian;
    block.propagate = shape.full ? 0 : forward;
  } else {
    block.capture = first;
    block.propagate = last;
  }
  add_files(work, shape, rates, block);
  block.solve = total(block.phases) - block.capture - block.propagate;
  return block;
}

Stream pass(Stream in, double seconds, int64_t batches) {
  const double one = seconds / static_cast<double>(std::max<int64_t>(1, batches));
  return {in.first + one, std::max(in.last + one, in.first + seconds)};
}

StageEnd run_quantized_stage(Stream in, double ready, const std::vector<BlockSeconds>& blocks,
                             int64_t batches) {
  Stream stream{std::max(in.first, ready), std::max(in.last, ready)};
  for (const BlockSeconds& block : blocks) {
    const double solved = pass(stream, block.capture, batches).last + block.solve;
    stream = pass({solved, solved}, block.propagate, batches);
    if (&block != &blocks.back()) stream.first = stream.last;  // one thing at a time
  }
  return {stream.last, stream};
}

StageEnd run_full_stage(Stream in, double ready,
                        const std::vector<std::vector<BlockSeconds>>& waves, int64_t batches) {
  Stream stream{std::max(in.first, ready), std::max(in.last, ready)};
  double done = 0;
  for (const std::vector<BlockSeconds>& wave : waves) {
    double capture = 0, solve = 0;
    for (const BlockSeconds& block : wave) {
      capture += block.capture;
      solve += block.solve;
    }
    if (&wave != &waves.front()) stream = {done, done};  // the activations were kept
    stream = pass(stream, capture, batches);
    done = stream.last + solve;
  }
  return {done, stream};
}

}  // namespace bitmill
