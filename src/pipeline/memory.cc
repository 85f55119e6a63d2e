#include "pipeline/memory.h"

#include <algorithm>

#include "pipeline/cut_memory.h"
#include "pipeline/stage.h"

namespace bitmill {
namespace {

int64_t& slot(MemoryBytes& bytes, MemoryKind kind) {
  return bytes[static_cast<size_t>(kind)];
}

// Moments of one member, and the worst of them.
class MemoryWalk {
 public:
  MemoryWalk(const PlanInput& input, const Member& member)
      : input_(input), member_(member), model_(input, member) {}

  void copies();
  void quantized_block(const BlockWork& block, const std::string& name, bool propagates);
  // Blocks [first, end) at once; `kept`: the stage has several waves, activations wait between
  // them.
  void wave(const BlockRange& range, bool kept);
  Peak take() { return std::move(peak_); }
  bool fits() const {
    return input_.machine.memory_per_rank == 0 ||
           total(peak_.limited) <= input_.machine.memory_per_rank;
  }

 private:
  // What is there besides a cut and its own work.
  struct Around {
    std::string name;      // of the block
    int64_t weights = 0;   // float weights of other cuts
    int64_t hessians = 0;  // sums of other cuts
    int64_t activations = 0;
    int64_t packed = 0;       // of the block, before the cut
    bool propagates = false;  // the cut's weights are kept for its own run
  };
  // Bytes of a wave: float weights, a sum of each dense cut, those of experts while they are made,
  // and all when the lanes are done and folded.
  struct WaveBytes {
    int64_t weights = 0, dense = 0, experts = 0, partials = 0, folded = 0, scratch = 0;
  };
  WaveBytes wave_bytes(const BlockRange& range) const;
  void solve_wave(const BlockRange& range, WaveBytes bytes, int64_t boundary);
  int64_t prepared(const BlockWork& block) const;
  int64_t all_sums(const BlockWork& block, int64_t CutMemory::*copies) const;
  void scaling(const BlockWork& block, const std::string& name);
  void collect(const BlockWork& block, const std::string& name);
  void first_sums(const BlockWork& block, const Around& around);
  void run_cut(const BlockWork& block, size_t cut, bool whole, const Around& around);
  void merge(const CutWork& cut, const Around& around);
  void solve(const CutWork& cut, const Around& around);
  void consider(const MemoryBytes& moment, const std::string& name);

  const PlanInput& input_;
  const Member& member_;
  CutMemoryModel model_;
  Peak peak_;
};

void MemoryWalk::consider(const MemoryBytes& moment, const std::string& name) {
  MemoryBytes limited = moment, host{};
  if (input_.machine.device)
    for (MemoryKind kind : {MemoryKind::kPacked, MemoryKind::kEmbedding})
      std::swap(slot(limited, kind), slot(host, kind));
  if (total(host) > total(peak_.host)) peak_.host = host;
  if (total(limited) <= total(peak_.limited)) return;
  peak_.limited = limited;
  peak_.at = name;
}

// Float weights of a whole block in the compute type; of experts those the member owns.
int64_t MemoryWalk::prepared(const BlockWork& block) const {
  int64_t bytes = 0;
  for (const CutWork& cut : block.cuts)
    bytes += model_.of(cut).prepared * (cut.expert ? model_.own_experts(cut) : 1);
  return bytes;
}

// Sums of all cuts of a block, each in as many copies; nullptr: folded.
int64_t MemoryWalk::all_sums(const BlockWork& block, int64_t CutMemory::*copies) const {
  int64_t bytes = 0;
  for (const CutWork& cut : block.cuts) {
    const CutMemory m = model_.of(cut);
    bytes += m.hessian * (copies != nullptr ? m.*copies : 1) *
             (cut.expert ? model_.own_experts(cut) : 1);
  }
  return bytes;
}

// The search for AWQ's scales, one cut at a time, at the block's start: float weights, also
// prepared for the forward pass, one Hessian, and a copy of the subset's stream and carries.
void MemoryWalk::scaling(const BlockWork& block, const std::string& name) {
  int64_t limits = 0;  // of clipped weights, one F64 a group
  for (size_t i = 0; i < block.cuts.size(); ++i) {
    const CutWork& cut = block.cuts[i];
    const CutMemory m = model_.of(cut);
    if (!cut.hessian) limits += m.grids;
    MemoryBytes moment{};
    slot(moment, MemoryKind::kWeights) = m.elements * 4 + m.prepared + m.preparing + limits;
    slot(moment, MemoryKind::kHessians) = hessian_elements(cut.in) * 4 * member_.share.live;
    slot(moment, MemoryKind::kScratch) = std::max(model_.running(block, i), model_.summing(cut)) +
                                         model_.activations(block, i, member_.searched);
    slot(moment, MemoryKind::kActivations) = model_.activations(block, 0, model_.tokens());
    consider(moment, fmt::format("{}, scale {}", name, cut.name));
  }
}

// quantize.true_sequential=false: one float forward of the block with all its weights, on a copy of
// each micro-batch, sums all Hessians at once.
void MemoryWalk::collect(const BlockWork& block, const std::string& name) {
  MemoryBytes moment{};
  slot(moment, MemoryKind::kWeights) = prepared(block);
  slot(moment, MemoryKind::kHessians) = all_sums(block, &CutMemory::live);
  int64_t scratch = 0;
  for (size_t i = 0; i < block.cuts.size(); ++i)
    scratch = std::max(scratch, std::max(model_.running(block, i), model_.summing(block.cuts[i])) +
                                    model_.activations(block, i, model_.batch_tokens()));
  slot(moment, MemoryKind::kScratch) = scratch;
  slot(moment, MemoryKind::kActivations) = model_.activations(block, 0, model_.tokens());
  consider(moment, name + ", collect");
}

// The members' sums of a cut become one: own parts beside the slice of everybody's, then the folded
// slice beside the whole. gptaq's sums follow the Hessian.
void MemoryWalk::merge(const CutWork& cut, const Around& around) {
  const CutMemory m = model_.of(cut);
  if (member_.width == 1 || cut.expert || m.hessian == 0) return;
  const auto add = [&](int64_t sums, int64_t exchange) {
    MemoryBytes moment{};
    slot(moment, MemoryKind::kWeights) = around.weights;
    slot(moment, MemoryKind::kHessians) = around.hessians + sums;
    slot(moment, MemoryKind::kActivations) = around.activations;
    slot(moment, MemoryKind::kPacked) = around.packed;
    slot(moment, MemoryKind::kExchange) = exchange;
    consider(moment, around.name + ", merge " + cut.name);
  };
  const auto slices = [&](int64_t bytes) { return bytes * member_.stage_partials / member_.width; };
  add(m.sums() * m.partials, slices(m.hessian));
  add(m.hessian + m.mismatch * m.partials, m.hessian / member_.width);
  add(m.hessian + m.mismatch * m.partials, slices(m.mismatch));
}

// A cut being solved, its results being gathered, and then packed and kept.
void MemoryWalk::solve(const CutWork& cut, const Around& around) {
  const CutMemory m = model_.of(cut);
  const auto add = [&](int64_t weights, int64_t factor, int64_t packed) {
    MemoryBytes moment{};
    slot(moment, MemoryKind::kWeights) = around.weights + weights;
    slot(moment, MemoryKind::kFactor) = factor;
    slot(moment, MemoryKind::kHessians) = around.hessians + m.sums();
    slot(moment, MemoryKind::kActivations) = around.activations;
    slot(moment, MemoryKind::kPacked) = packed;
    consider(moment, fmt::format("{}, solve {}", around.name, cut.name));
  };
  const int64_t waiting = std::min(around.packed, FixedBuffers::kWriteQueue);
  const int64_t kept = around.propagates ? m.prepared : 0;
  if (m.hessian > 0) {
    add(model_.solving(cut), model_.factoring(cut), waiting);
    if (member_.width > 1 && !cut.expert)
      add(m.own * 4 + m.elements + m.grids + m.largest, 0, waiting);
  }
  if (const int64_t rounding = model_.rounding(cut); rounding > 0)
    add(std::max<int64_t>(0, kept - m.preparing) + rounding, 0, waiting);
  const int64_t packed = around.packed + cut.packed_bytes * cut.count;
  add(kept + (around.propagates ? m.preparing : 0) + model_.packing(cut), 0,
      std::min(packed, FixedBuffers::kWriteQueue + cut.packed_bytes));
}

// `propagates`: the cuts' linears run with their quantized weights. Not the head's.
void MemoryWalk::quantized_block(const BlockWork& block, const std::string& name, bool propagates) {
  const bool calibrated = input_.job.calibrated;
  propagates &= calibrated;
  const bool whole = propagates && input_.whole_block;
  Around around{name, 0, 0, 0, 0, propagates};
  around.weights = propagates && input_.float_stream ? prepared(block) : 0;
  if (calibrated && std::any_of(block.cuts.begin(), block.cuts.end(),
                                [](const CutWork& cut) { return cut.scaled; }))
    scaling(block, name);
  if (whole)
    collect(block, name);
  else if (calibrated)
    first_sums(block, around);
  int64_t waiting = whole ? all_sums(block, nullptr) : 0;
  for (size_t i = 0; i < block.cuts.size(); ++i) {
    const CutWork& cut = block.cuts[i];
    const CutMemory m = model_.of(cut);
    if (whole) waiting -= m.hessian * (cut.expert ? model_.own_experts(cut) : 1);
    around.hessians = waiting;
    if (calibrated) around.activations = model_.activations(block, i, model_.tokens());
    solve(cut, around);
    around.packed += cut.packed_bytes * cut.count;
    if (propagates) run_cut(block, i, whole, around);
  }
}

// The sums of a block's first cut, whose input needs none of its linears.
void MemoryWalk::first_sums(const BlockWork& block, const Around& around) {
  const CutWork& cut = block.cuts.front();
  const CutMemory m = model_.of(cut);
  MemoryBytes moment{};
  slot(moment, MemoryKind::kWeights) = around.weights;
  slot(moment, MemoryKind::kHessians) = m.sums() * m.live;
  slot(moment, MemoryKind::kActivations) = model_.activations(block, 0, model_.tokens());
  slot(moment, MemoryKind::kScratch) = model_.summing(cut);
  consider(moment, fmt::format("{}, collect {}", around.name, cut.name));
  Around merging = around;
  merging.activations = slot(moment, MemoryKind::kActivations);
  merge(cut, merging);
}

// A cut's linears run with their quantized weights while the next cut's Hessian is summed.
void MemoryWalk::run_cut(const BlockWork& block, size_t i, bool whole, const Around& around) {
  const CutWork& cut = block.cuts[i];
  const bool last = i + 1 == block.cuts.size();
  const CutMemory next = last || whole ? CutMemory{} : model_.of(block.cuts[i + 1]);
  const int64_t tokens = model_.tokens();
  Around running = around;
  running.packed = std::min(around.packed, FixedBuffers::kWriteQueue);
  running.weights += model_.of(cut).prepared;
  running.activations = std::max(model_.activations(block, i, tokens),
                                 last ? 0 : model_.activations(block, i + 1, tokens));
  MemoryBytes moment{};
  slot(moment, MemoryKind::kPacked) = running.packed;
  slot(moment, MemoryKind::kWeights) = running.weights;
  slot(moment, MemoryKind::kActivations) = running.activations;
  slot(moment, MemoryKind::kHessians) = running.hessians + next.sums() * next.live;
  slot(moment, MemoryKind::kScratch) =
      std::max(model_.running(block, i), next.live > 0 ? model_.summing(block.cuts[i + 1]) : 0);
  consider(moment, fmt::format("{}, run {}", running.name, cut.name));
  if (!last && !whole) merge(block.cuts[i + 1], running);
}

// Everything that is alive while a wave's Hessians are summed, and what of it stays for the solve.
MemoryWalk::WaveBytes MemoryWalk::wave_bytes(const BlockRange& range) const {
  WaveBytes wave;
  for (int64_t b = range.first; b < range.end; ++b) {
    const BlockWork& block = input_.blocks[static_cast<size_t>(b)];
    wave.weights += prepared(block);
    for (const CutWork& cut : block.cuts) {
      const CutMemory m = model_.of(cut);
      if (cut.expert)
        wave.experts += m.hessian * m.live * model_.own_experts(cut);
      else
        wave.dense += m.hessian;
    }
    wave.partials += all_sums(block, &CutMemory::partials);
    wave.folded += all_sums(block, nullptr);
    for (size_t i = 0; i < block.cuts.size(); ++i)
      wave.scratch =
          std::max(wave.scratch, std::max(model_.running(block, i), model_.summing(block.cuts[i])) +
                                     model_.activations(block, i, model_.batch_tokens()));
  }
  return wave;
}

// The first stage embeds all its samples. Where no later wave and no head needs their outputs,
// micro-batches leave while the number of sums grows.
void MemoryWalk::wave(const BlockRange& range, bool kept) {
  const WaveBytes bytes = wave_bytes(range);
  const int64_t sample = input_.job.length * input_.spec.hidden * model_.compute();
  const int64_t in_flight = FixedBuffers::kInFlight * member_.share.batch_samples * sample;
  const bool stay = kept || (member_.last && input_.head);
  const std::string name = range.count() == 1
                               ? fmt::format("block {}", range.first)
                               : fmt::format("blocks {}-{}", range.first, range.end - 1);
  for (const LaneShare::Lane& lane : member_.share.lanes) {
    const int64_t left = lane.samples_left * sample;
    MemoryBytes capture{};
    slot(capture, MemoryKind::kWeights) = bytes.weights;
    slot(capture, MemoryKind::kHessians) = bytes.dense * lane.live + bytes.experts;
    slot(capture, MemoryKind::kScratch) = bytes.scratch;
    slot(capture, MemoryKind::kActivations) =
        stay ? member_.share.samples * sample
             : (member_.embeds ? left : std::min(left, in_flight)) + (member_.last ? 0 : in_flight);
    consider(capture, name + ", collect");
  }
  solve_wave(range, bytes, stay ? member_.share.samples * sample : 0);
}

// The float weights are gone, the sums of blocks that are not solved yet are still there.
void MemoryWalk::solve_wave(const BlockRange& range, WaveBytes bytes, int64_t boundary) {
  const BlockWork& front = input_.blocks[static_cast<size_t>(range.first)];
  for (const CutWork& cut : front.cuts) {
    const CutMemory m = model_.of(cut);
    merge(cut, {fmt::format("block {}", range.first), bytes.weights - prepared(front),
                bytes.partials - m.hessian * m.partials, boundary, 0, false});
  }
  for (int64_t b = range.first; b < range.end; ++b) {
    const BlockWork& block = input_.blocks[static_cast<size_t>(b)];
    Around around{fmt::format("block {}", b), 0, bytes.folded, boundary, 0, false};
    if (std::any_of(block.cuts.begin(), block.cuts.end(),
                    [](const CutWork& c) { return c.scaled; }))
      scaling(block, around.name);
    for (const CutWork& cut : block.cuts) {
      around.hessians -= model_.of(cut).hessian * (cut.expert ? model_.own_experts(cut) : 1);
      solve(cut, around);
      around.packed += cut.packed_bytes * cut.count;
    }
    bytes.folded = around.hessians;
  }
}

// Tensors that are only copied pass through in pieces; then the first stage embeds its samples.
void MemoryWalk::copies() {
  const auto copy = [&](int64_t bytes, const std::string& name) {
    MemoryBytes moment{};
    slot(moment, MemoryKind::kEmbedding) =
        std::min(bytes, FixedBuffers::kWriteQueue + FixedBuffers::kReadPiece);
    consider(moment, name);
  };
  if (member_.embeds) copy(input_.embedding_bytes, "embedding");
  if (!member_.last) return;
  copy(input_.head_bytes, "head");
  int64_t other = 0;
  for (const PackedSpec& tensor : input_.job.other) other += packed_bytes(tensor);
  copy(other, "other tensors");
}

}  // namespace

void set_mode(PlanInput& input, bool full) {
  const bool calibrated = input.job.calibrated;
  input.full = calibrated && full;
  input.whole_block = input.full || (calibrated && !input.options.quantize.true_sequential);
  input.float_stream = !input.full && needs_float_stream(input.options, input.spec);
}

bool same_memory(const Member& a, const Member& b) {
  return a.width == b.width && a.share.samples == b.share.samples && a.share.live == b.share.live &&
         a.share.batch_samples == b.share.batch_samples && a.share.partials == b.share.partials &&
         a.searched == b.searched && a.blocks.first == b.blocks.first &&
         a.blocks.end == b.blocks.end && a.embeds == b.embeds && a.last == b.last;
}

Peak peak_memory(const PlanInput& input, const Member& member) {
  MemoryWalk walk(input, member);
  walk.copies();
  if (input.full) {
    for (const BlockRange& wave : member.waves) walk.wave(wave, member.waves.size() > 1);
  } else {
    for (int64_t b = member.blocks.first; b < member.blocks.end; ++b)
      walk.quantized_block(input.blocks[static_cast<size_t>(b)], fmt::format("block {}", b), true);
  }
  if (member.last && input.head) walk.quantized_block(*input.head, "head", false);
  return walk.take();
}

std::vector<BlockRange> plan_waves(const PlanInput& input, const Member& member) {
  if (!input.full) return {};
  const auto fits = [&](const BlockRange& range) {
    const bool whole = range.first == member.blocks.first && range.end == member.blocks.end;
    MemoryWalk walk(input, member);
    walk.wave(range, !whole);
    return walk.fits();
  };
  bool scaled = false;
  std::vector<double> weight;
  for (int64_t b = member.blocks.first; b < member.blocks.end; ++b) {
    weight.push_back(1);
    for (const CutWork& cut : input.blocks[static_cast<size_t>(b)].cuts) scaled |= cut.scaled;
  }
  std::vector<BlockRange> waves;  // as full as they can be: their number is the least
  for (int64_t at = member.blocks.first; at < member.blocks.end;) {
    BlockRange range{at, at + 1};
    if (!scaled && at == member.blocks.first && fits(member.blocks)) return {member.blocks};
    while (!scaled && range.end < member.blocks.end && fits({at, range.end + 1})) ++range.end;
    waves.push_back(range);
    at = range.end;
  }
  // The same number, evenly, where that fits too.
  std::vector<BlockRange> even = partition_blocks(weight, static_cast<int>(waves.size()), 0, 0);
  for (BlockRange& range : even) {
    range.first += member.blocks.first;
    range.end += member.blocks.first;
  }
  return std::all_of(even.begin(), even.end(), fits) ? even : waves;
}

}  // namespace bitmill
