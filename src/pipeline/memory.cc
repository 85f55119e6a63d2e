#include "pipeline/memory.h"

#include <algorithm>
#include <cmath>

#include "pipeline/stage.h"

namespace bitmill {
namespace {

int64_t element_bytes(DType dtype) {
  return dtype_bits(dtype) / 8;
}

int64_t& slot(MemoryBytes& bytes, MemoryKind kind) {
  return bytes[static_cast<size_t>(kind)];
}

int64_t rounded(double bytes) {
  return static_cast<int64_t>(std::ceil(bytes));
}

// Moments of one member, and the worst of them.
class MemoryWalk {
 public:
  MemoryWalk(const PlanInput& input, const Member& member)
      : input_(input),
        member_(member),
        compute_(element_bytes(input.job.compute)),
        length_(input.job.length),
        hidden_(input.spec.hidden),
        tokens_(member.share.samples * input.job.length),
        all_tokens_(input.job.samples * input.job.length),
        all_live_(lane_share(input.job.samples, length_, static_cast<int>(input.lanes),
                             input.microbatch_tokens, 1, 0)
                      .live) {}

  void copies();
  void quantized_block(const BlockWork& block, const std::string& name);
  // Blocks [first, end) at once; `kept`: the stage has several waves, activations wait between
  // them.
  void wave(const BlockRange& range, bool kept);
  Peak take() { return std::move(peak_); }
  bool fits() const {
    return input_.machine.memory_per_rank == 0 ||
           total(peak_.limited) <= input_.machine.memory_per_rank;
  }

 private:
  // Bytes of one cut: all its weights in a type, what this member solves of them, ...
  struct CutBytes {
    int64_t elements = 0;            // weights of the cut (of one expert)
    int64_t own = 0;                 // of them, rows of the tiles that the member solves
    int64_t hessian = 0;             // one packed triangle, F32
    int64_t mismatch = 0;            // gptaq's sums
    int64_t factor = 0;              // F32 [n, n]
    int64_t live = 0, partials = 0;  // triangles while summing, and when the lanes are done
  };
  CutBytes cut_bytes(const CutWork& cut) const;
  // Bytes of a wave: float weights, sums while they are made, when the lanes are done, and folded.
  struct WaveBytes {
    int64_t weights = 0, live = 0, partials = 0, folded = 0, scratch = 0;
  };
  WaveBytes wave_bytes(const BlockRange& range) const;
  void solve_in_wave(const BlockWork& block, const std::string& name, const WaveBytes& bytes,
                     int64_t boundary);
  int64_t own_experts(const CutWork& cut) const {
    return (cut.count + member_.width - 1) / member_.width;
  }
  int64_t batch_tokens() const {
    const int64_t per_batch = std::max<int64_t>(1, input_.microbatch_tokens / length_) * length_;
    return std::min(per_batch, input_.job.samples * length_);
  }
  int64_t carry(const BlockWork& block, size_t cut) const;
  int64_t activations(const BlockWork& block, size_t cut, int64_t tokens) const;
  int64_t scratch(const CutWork& cut) const;
  int64_t prepared(const BlockWork& block) const;
  void scaling(const BlockWork& block, const std::string& name);
  void collect(const BlockWork& block, const std::string& name);
  void run_cut(const BlockWork& block, size_t cut, bool whole, int64_t kept, int64_t packed,
               int64_t floats, const std::string& name);
  void merge(const CutWork& cut, MemoryBytes moment, const std::string& name);
  MemoryBytes solve(const CutWork& cut, int64_t packed, int64_t hessians) const;
  void consider(const MemoryBytes& moment, const std::string& name);

  const PlanInput& input_;
  const Member& member_;
  int64_t compute_, length_, hidden_, tokens_, all_tokens_;
  int64_t all_live_;  // live sums of a member with all lanes: an expert's owner
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

MemoryWalk::CutBytes MemoryWalk::cut_bytes(const CutWork& cut) const {
  CutBytes b;
  b.elements = cut.in * cut.rows;
  const double tiles = static_cast<double>(std::max<int64_t>(1, cut.tiles));
  const double split = cut.expert ? 1 : std::ceil(tiles / member_.width) / tiles;
  b.own = rounded(static_cast<double>(b.elements) * split);
  if (!input_.job.calibrated) return b;
  b.hessian = hessian_elements(cut.in) * 4;
  b.factor = cut.in * cut.in * 4;
  if (cut.mismatch && input_.float_stream) b.mismatch = cut.in * (cut.in + cut.residual) * 4;
  b.live = cut.expert ? all_live_ : member_.share.live;
  b.partials = cut.expert ? 1 : member_.share.partials;
  return b;
}

// Columns that a cut consumes and that are no function of the residual stream.
int64_t MemoryWalk::carry(const BlockWork& block, size_t i) const {
  const auto carried = [&](size_t at) {
    return at < block.cuts.size() && !block.cuts[at].expert && !block.cuts[at].adds_to_hidden &&
           block.cuts[at].in != hidden_;
  };
  if (!carried(i))
    return block.cuts[i].adds_to_hidden && !block.cuts[i].expert ? block.cuts[i].in : 0;
  size_t first = i;
  while (first > 0 && carried(first - 1)) --first;
  int64_t columns = 0;
  for (; carried(first); ++first) columns += block.cuts[first].in;
  return columns;
}

// Activation bytes of `tokens` tokens while a cut is solved: residual stream plus stored carry (see
// MicroBatch), twice with a float stream. After the first addition the stream is F32.
int64_t MemoryWalk::activations(const BlockWork& block, size_t cut, int64_t tokens) const {
  const bool added = std::any_of(block.cuts.begin(), block.cuts.begin() + static_cast<int64_t>(cut),
                                 [](const CutWork& before) { return before.adds_to_hidden; });
  const int64_t bytes = tokens * (hidden_ * (added ? 4 : compute_) + carry(block, cut) * compute_);
  return bytes * (input_.float_stream ? 2 : 1);
}

// Largest temporaries of one micro-batch while a cut's linears run; an expert takes its tokens of
// all samples at once.
int64_t MemoryWalk::scratch(const CutWork& cut) const {
  const int64_t tokens =
      cut.expert ? rounded(static_cast<double>(all_tokens_) * cut.token_share) : batch_tokens();
  return tokens * (cut.in * compute_ + cut.rows * 4 + hidden_ * 4);
}

// Float weights of a whole block in the compute type; of experts those the member owns.
int64_t MemoryWalk::prepared(const BlockWork& block) const {
  int64_t bytes = 0;
  for (const CutWork& cut : block.cuts)
    bytes += cut.in * cut.rows * compute_ * (cut.expert ? own_experts(cut) : 1);
  return bytes;
}

// The search for AWQ's scales, one cut at a time, at the block's start: float weights with a scaled
// copy of one linear, one Hessian, and a copy of the subset's stream and carries.
void MemoryWalk::scaling(const BlockWork& block, const std::string& name) {
  const int64_t subset = std::min(tokens_, input_.options.awq.tokens + input_.microbatch_tokens);
  for (const CutWork& cut : block.cuts) {
    const CutBytes b = cut_bytes(cut);
    MemoryBytes moment{};
    slot(moment, MemoryKind::kWeights) = b.elements * (4 + compute_);
    slot(moment, MemoryKind::kHessians) = b.hessian * b.live;
    slot(moment, MemoryKind::kScratch) = scratch(cut) + subset * (hidden_ + cut.in) * 4;
    slot(moment, MemoryKind::kActivations) = activations(block, 0, tokens_);
    consider(moment, fmt::format("{}, scale {}", name, cut.name));
  }
}

// quantize.true_sequential=false: one float forward of the block with all its weights, on a copy of
// each micro-batch, sums all Hessians at once.
void MemoryWalk::collect(const BlockWork& block, const std::string& name) {
  MemoryBytes moment{};
  slot(moment, MemoryKind::kWeights) = prepared(block);
  int64_t temporaries = 0, copy = 0;
  for (size_t i = 0; i < block.cuts.size(); ++i) {
    const CutBytes b = cut_bytes(block.cuts[i]);
    slot(moment, MemoryKind::kHessians) +=
        b.hessian * b.live * (block.cuts[i].expert ? own_experts(block.cuts[i]) : 1);
    temporaries = std::max(temporaries, scratch(block.cuts[i]));
    copy = std::max(copy, activations(block, i, batch_tokens()));
  }
  slot(moment, MemoryKind::kScratch) = temporaries + copy;
  slot(moment, MemoryKind::kActivations) = activations(block, 0, tokens_);
  consider(moment, name + ", collect");
}

// The members' sums of a cut become one: own partials beside the parts that come in and the whole.
void MemoryWalk::merge(const CutWork& cut, MemoryBytes moment, const std::string& name) {
  if (member_.width == 1 || cut.expert || !input_.job.calibrated) return;
  const CutBytes b = cut_bytes(cut);
  const int64_t others = member_.stage_partials - member_.share.partials;
  slot(moment, MemoryKind::kExchange) = b.hessian + b.hessian * others / member_.width;
  consider(moment, name + ", merge " + cut.name);
}

// A cut being solved: its own rows and their working copy in F32, codes and weights of all rows.
MemoryBytes MemoryWalk::solve(const CutWork& cut, int64_t packed, int64_t hessians) const {
  const CutBytes b = cut_bytes(cut);
  MemoryBytes moment{};
  slot(moment, MemoryKind::kPacked) = packed;
  slot(moment, MemoryKind::kWeights) = b.own * 4 + b.elements;
  slot(moment, MemoryKind::kHessians) = hessians;
  // The factor and the sweep's working copy; a corrected weight is one more.
  slot(moment, MemoryKind::kFactor) = b.factor + b.own * 4 * (b.mismatch > 0 ? 2 : 1);
  return moment;
}

void MemoryWalk::quantized_block(const BlockWork& block, const std::string& name) {
  // The head, a block of one cut, has nothing to run ahead of.
  const bool calibrated = input_.job.calibrated;
  const bool whole = calibrated && input_.whole_block && block.cuts.size() > 1;
  const bool scaled = std::any_of(block.cuts.begin(), block.cuts.end(),
                                  [](const CutWork& cut) { return cut.scaled; });
  const int64_t floats = input_.float_stream ? prepared(block) : 0;
  int64_t packed = 0, kept = 0;  // kept: Hessians that wait for their cut
  if (calibrated && scaled) scaling(block, name);
  if (whole) collect(block, name);
  for (const CutWork& cut : block.cuts)
    if (whole) kept += cut_bytes(cut).hessian * (cut.expert ? own_experts(cut) : 1);
  for (size_t i = 0; i < block.cuts.size(); ++i) {
    const CutWork& cut = block.cuts[i];
    const CutBytes b = cut_bytes(cut);
    packed += cut.packed_bytes * cut.count;
    MemoryBytes moment = solve(cut, packed, whole ? kept : b.hessian + b.mismatch);
    slot(moment, MemoryKind::kWeights) += b.elements * compute_ + floats;
    if (calibrated) slot(moment, MemoryKind::kActivations) = activations(block, i, tokens_);
    consider(moment, fmt::format("{}, solve {}", name, cut.name));
    if (!calibrated) continue;
    run_cut(block, i, whole, kept, packed, floats, name);
  }
}

// A cut's linears run with their quantized weights while the next cut's Hessian is summed.
void MemoryWalk::run_cut(const BlockWork& block, size_t i, bool whole, int64_t kept, int64_t packed,
                         int64_t floats, const std::string& name) {
  const CutWork& cut = block.cuts[i];
  const bool last = i + 1 == block.cuts.size();
  const CutBytes next = last ? CutBytes{} : cut_bytes(block.cuts[i + 1]);
  MemoryBytes moment{};
  slot(moment, MemoryKind::kPacked) = packed;
  slot(moment, MemoryKind::kWeights) = cut_bytes(cut).elements * compute_ + floats;
  slot(moment, MemoryKind::kActivations) = activations(block, last ? i : i + 1, tokens_);
  slot(moment, MemoryKind::kHessians) = whole ? kept : (next.hessian + next.mismatch) * next.live;
  slot(moment, MemoryKind::kScratch) = scratch(cut);
  consider(moment, fmt::format("{}, run {}", name, cut.name));
  if (last || whole) return;
  slot(moment, MemoryKind::kScratch) = 0;
  slot(moment, MemoryKind::kHessians) = (next.hessian + next.mismatch) * next.partials;
  merge(block.cuts[i + 1], moment, name);
}

// Everything that is alive while a wave's Hessians are summed, and what of it stays for the solve.
MemoryWalk::WaveBytes MemoryWalk::wave_bytes(const BlockRange& range) const {
  WaveBytes wave;
  for (int64_t b = range.first; b < range.end; ++b) {
    const BlockWork& block = input_.blocks[static_cast<size_t>(b)];
    wave.weights += prepared(block);
    for (size_t i = 0; i < block.cuts.size(); ++i) {
      const CutBytes bytes = cut_bytes(block.cuts[i]);
      const int64_t sums = bytes.hessian * (block.cuts[i].expert ? own_experts(block.cuts[i]) : 1);
      wave.live += sums * bytes.live;
      wave.partials += sums * bytes.partials;
      wave.folded += sums;
      wave.scratch = std::max(wave.scratch,
                              scratch(block.cuts[i]) + 2 * activations(block, i, batch_tokens()));
    }
  }
  return wave;
}

void MemoryWalk::wave(const BlockRange& range, bool kept) {
  const WaveBytes bytes = wave_bytes(range);
  const int64_t boundary = tokens_ * hidden_ * compute_;
  MemoryBytes capture{};
  slot(capture, MemoryKind::kWeights) = bytes.weights;
  slot(capture, MemoryKind::kHessians) = bytes.live;
  slot(capture, MemoryKind::kScratch) = bytes.scratch;
  // The first stage embeds all its samples; elsewhere micro-batches pass through.
  if (kept || member_.embeds) slot(capture, MemoryKind::kActivations) = boundary;
  const std::string name = range.count() == 1
                               ? fmt::format("block {}", range.first)
                               : fmt::format("blocks {}-{}", range.first, range.end - 1);
  consider(capture, name + ", collect");
  for (int64_t b = range.first; b < range.end; ++b)
    solve_in_wave(input_.blocks[static_cast<size_t>(b)], fmt::format("block {}", b), bytes,
                  kept ? boundary : 0);
}

// One block of a wave: the float weights and sums of all its blocks are still there.
void MemoryWalk::solve_in_wave(const BlockWork& block, const std::string& name,
                               const WaveBytes& bytes, int64_t boundary) {
  if (std::any_of(block.cuts.begin(), block.cuts.end(), [](const CutWork& c) { return c.scaled; }))
    scaling(block, name);
  int64_t packed = 0;
  for (const CutWork& cut : block.cuts) {
    MemoryBytes merging{};
    slot(merging, MemoryKind::kWeights) = bytes.weights;
    slot(merging, MemoryKind::kHessians) = bytes.partials;
    slot(merging, MemoryKind::kActivations) = boundary;
    slot(merging, MemoryKind::kPacked) = packed;
    merge(cut, merging, name);
    packed += cut.packed_bytes * cut.count;
    MemoryBytes moment = solve(cut, packed, bytes.folded);
    slot(moment, MemoryKind::kWeights) += bytes.weights;
    slot(moment, MemoryKind::kActivations) = boundary;
    consider(moment, fmt::format("{}, solve {}", name, cut.name));
  }
}

// What a rank needs besides its blocks: tensors that are only copied.
void MemoryWalk::copies() {
  if (member_.embeds) {
    MemoryBytes moment{};
    slot(moment, MemoryKind::kEmbedding) = input_.embedding_bytes;
    if (input_.job.calibrated)
      slot(moment, MemoryKind::kActivations) =
          tokens_ * hidden_ * compute_ * (input_.float_stream ? 2 : 1);
    consider(moment, "embedding");
  }
  if (!member_.last) return;
  MemoryBytes head{};
  slot(head, MemoryKind::kEmbedding) = input_.head_bytes;
  consider(head, "head");
  std::vector<PackedSpec> other = input_.job.other;  // copied shard by shard, each held whole
  std::sort(other.begin(), other.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  for (const auto& [first, end] : cut_shards(other, input_.options.output.shard_size)) {
    MemoryBytes moment{};
    for (size_t i = first; i < end; ++i)
      slot(moment, MemoryKind::kPacked) += packed_bytes(other[i]);
    consider(moment, "other tensors");
  }
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
         a.share.partials == b.share.partials && a.blocks.first == b.blocks.first &&
         a.blocks.end == b.blocks.end && a.embeds == b.embeds && a.last == b.last;
}

Peak peak_memory(const PlanInput& input, const Member& member) {
  MemoryWalk walk(input, member);
  walk.copies();
  if (input.full) {
    for (const BlockRange& wave : member.waves) walk.wave(wave, member.waves.size() > 1);
  } else {
    for (int64_t b = member.blocks.first; b < member.blocks.end; ++b)
      walk.quantized_block(input.blocks[static_cast<size_t>(b)], fmt::format("block {}", b));
  }
  if (member.last && input.head) walk.quantized_block(*input.head, "head");
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
