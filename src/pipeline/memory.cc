#include "pipeline/memory.h"

#include <algorithm>
#include <bit>
#include <cctype>
#include <fstream>

#include "pipeline/stage.h"

#include "pipeline/awq_pass.h"

namespace bitmill {
namespace {

int64_t element_bytes(DType dtype) { return dtype_bits(dtype) / 8; }

// Activation bytes of `tokens` tokens while cut `cut` is solved: residual stream plus stored carry (see MicroBatch).
int64_t activation_bytes(const ModelSpec& spec, const PlanJob& job, const BlockSpec& block, size_t cut, int64_t tokens) {
  const int64_t c = element_bytes(job.compute);
  const bool in_block = cut >= 2;          // after the first residual addition the stream is F32
  const bool carries = cut % 2 == 1;       // o and down consume a stored carry
  return tokens * (spec.hidden * (in_block ? 4 : c) + (carries ? block.cuts[cut].in * c : 0));
}

int64_t batch_tokens(const RunOptions& options, const PlanJob& job) {
  const int64_t per_batch = std::max<int64_t>(1, options.run.microbatch_tokens / job.length) * job.length;
  return std::min(per_batch, job.samples * job.length);
}

// Largest temporaries of one micro-batch while a cut's linears run.
int64_t scratch_bytes(const RunOptions& options, const ModelSpec& spec, const PlanJob& job, const BlockSpec& block,
                      size_t cut) {
  int64_t outputs = 0;
  for (int linear : block.cuts[cut].linears) outputs += block.linears[linear].out;
  return batch_tokens(options, job) *
         (block.cuts[cut].in * element_bytes(job.compute) + outputs * 4 + spec.hidden * 4);
}

struct CutMemory {
  int64_t weights = 0, codes = 0, prepared = 0, hessian = 0, factor = 0;
};

CutMemory cut_memory(const PlanJob& job, const BlockSpec& block, size_t cut) {
  CutMemory m;
  const int64_t n = block.cuts[cut].in;
  for (int linear : block.cuts[cut].linears) {
    const int64_t elements = block.linears[linear].out * n;
    m.weights += elements * 4;
    m.codes += elements;
    m.prepared += elements * element_bytes(job.compute);
  }
  if (job.calibrated) {
    m.hessian = hessian_elements(n) * 4;
    m.factor = n * n * 4;
  }
  return m;
}

// Live partial sums while a Hessian is collected: the open lane, and one finished subtree per level of the lane tree.
int64_t live_partials(int lanes) { return 2 + std::bit_width(static_cast<unsigned>(lanes)) - 1; }

// The search for AWQ's scales, one cut at a time, at the block's start: float weights with a scaled copy of one linear, one
// Hessian, and a copy of the subset's stream and carries.
MemoryBytes awq_memory(const RunOptions& options, const ModelSpec& spec, const PlanJob& job, const BlockSpec& block,
                       size_t cut) {
  const CutMemory m = cut_memory(job, block, cut);
  const int64_t tokens = std::min(job.samples * job.length, options.awq.tokens + options.run.microbatch_tokens);
  MemoryBytes moment{};
  moment[static_cast<size_t>(MemoryKind::kWeights)] = m.weights + m.prepared;
  moment[static_cast<size_t>(MemoryKind::kHessians)] = m.hessian * live_partials(options.run.reduction_lanes);
  moment[static_cast<size_t>(MemoryKind::kScratch)] =
      scratch_bytes(options, spec, job, block, cut) + tokens * (spec.hidden + block.cuts[cut].in) * 4;
  moment[static_cast<size_t>(MemoryKind::kActivations)] =
      activation_bytes(spec, job, block, 0, job.samples * job.length);
  return moment;
}

void consider(RankPlan& rank, const MemoryBytes& moment, const std::string& name) {
  if (total(moment) <= total(rank.peak)) return;
  rank.peak = moment;
  rank.peak_at = name;
}

// What following the float model (gptaq) adds to a block: its weights, and the activations twice.
struct FloatStream {
  int64_t streams = 1, weights = 0;
};

FloatStream float_stream(const RunOptions& options, const ModelSpec& spec, const PlanJob& job,
                         const BlockSpec& block) {
  if (!needs_float_stream(options, spec)) return {};
  FloatStream stream{2, 0};
  for (size_t cut = 0; cut < block.cuts.size(); ++cut)
    stream.weights += cut_memory(job, block, cut).prepared;
  return stream;
}

// Sums of InputMismatch of one cut.
int64_t mismatch_bytes(const RunOptions& options, const ModelSpec& spec, const BlockSpec& block,
                       size_t cut) {
  const CutSpec& c = block.cuts[cut];
  const bool compares = std::any_of(c.linears.begin(), c.linears.end(), [&](int linear) {
    const QuantizeSettings settings = options.settings_for(block.linears[linear].module);
    return !settings.skip && find_quantizer(settings.algorithm).compares_with_float();
  });
  return compares ? c.in * (c.in + (c.adds_to_hidden ? spec.hidden : 0)) * 4 : 0;
}

int64_t& slot(MemoryBytes& bytes, MemoryKind kind) { return bytes[static_cast<size_t>(kind)]; }

using Dtypes = std::function<DType(const std::string&)>;

// What a rank needs besides its blocks: tensors that are only copied.
void consider_copies(const RunOptions& options, const ModelSpec& spec, const PlanJob& job, const Dtypes& dtypes,
                     RankPlan& rank) {
  const auto bytes = [&](const TensorSpec& t) { return t.shape.elements() * element_bytes(dtypes(t.name)); };
  if (rank.embeds) {
    MemoryBytes moment{};
    slot(moment, MemoryKind::kEmbedding) = bytes(spec.embedding);
    if (job.calibrated)
      slot(moment, MemoryKind::kActivations) = job.samples * job.length * spec.hidden * element_bytes(job.compute) *
                                               (needs_float_stream(options, spec) ? 2 : 1);
    consider(rank, moment, "embedding");
  }
  if (!rank.last) return;
  MemoryBytes head{};
  if (!spec.tied && !head_to_quantize(options, spec)) slot(head, MemoryKind::kEmbedding) = bytes(spec.head);
  consider(rank, head, "head");
  std::vector<PackedSpec> other = job.other;  // unknown tensors are copied shard by shard, each held whole
  std::sort(other.begin(), other.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  for (const auto& [first, end] : cut_shards(other, options.output.shard_size)) {
    MemoryBytes moment{};
    for (size_t i = first; i < end; ++i) slot(moment, MemoryKind::kPacked) += packed_bytes(other[i]);
    consider(rank, moment, "other tensors");
  }
}

// true_sequential=false: one float forward of the block with all its weights, on a copy of each micro-batch, sums all
// Hessians at once.
MemoryBytes collect_moment(const RunOptions& options, const ModelSpec& spec, const PlanJob& job,
                           const BlockSpec& block) {
  const int64_t batch = batch_tokens(options, job);
  MemoryBytes moment{};
  int64_t scratch = 0, copy = 0;
  for (size_t cut = 0; cut < block.cuts.size(); ++cut) {
    const CutMemory m = cut_memory(job, block, cut);
    slot(moment, MemoryKind::kWeights) += m.prepared;
    slot(moment, MemoryKind::kHessians) += m.hessian * live_partials(options.run.reduction_lanes);
    scratch = std::max(scratch, scratch_bytes(options, spec, job, block, cut));
    copy = std::max(copy, activation_bytes(spec, job, block, cut, batch));
  }
  slot(moment, MemoryKind::kScratch) = scratch + copy;
  slot(moment, MemoryKind::kActivations) = activation_bytes(spec, job, block, 0, job.samples * job.length);
  return moment;
}

void consider_block(const RunOptions& options, const ModelSpec& spec, const PlanJob& job, const OutputFormat& format,
                    const BlockSpec& block, const std::string& name, RankPlan& rank) {
  const int64_t tokens = job.samples * job.length;
  // The head, a block of one cut, has nothing to run ahead of.
  const bool whole = job.calibrated && !options.quantize.true_sequential && block.cuts.size() > 1;
  const FloatStream floats = float_stream(options, spec, job, block);
  int64_t packed = 0, kept = 0;  // kept: Hessians that wait for their cut
  if (whole) {
    consider(rank, collect_moment(options, spec, job, block), name + ", collect");
    for (const CutSpec& cut : block.cuts) kept += hessian_elements(cut.in) * 4;
  }
  for (size_t cut = 0; cut < block.cuts.size(); ++cut) {
    if (job.calibrated && uses_awq(options, block))
      consider(rank, awq_memory(options, spec, job, block, cut),
               fmt::format("{}, scale {}", name, block.cuts[cut].name));
    const CutMemory m = cut_memory(job, block, cut);
    for (int linear : block.cuts[cut].linears)
      for (const PackedSpec& tensor :
           format.packed_specs(block.linears[linear], options.settings_for(block.linears[linear].module), spec.dtype))
        packed += packed_bytes(tensor);
    MemoryBytes solve{};
    slot(solve, MemoryKind::kPacked) = packed;
    slot(solve, MemoryKind::kWeights) = m.weights + m.codes + m.prepared + floats.weights;
    const int64_t mismatch = mismatch_bytes(options, spec, block, cut);
    slot(solve, MemoryKind::kHessians) = whole ? kept : m.hessian + mismatch;
    // The factor and the sweep's working copy; a corrected weight is one more.
    slot(solve, MemoryKind::kFactor) = m.factor + m.weights * (mismatch > 0 ? 2 : 1);
    if (job.calibrated)
      slot(solve, MemoryKind::kActivations) = activation_bytes(spec, job, block, cut, tokens) * floats.streams;
    consider(rank, solve, fmt::format("{}, solve {}", name, block.cuts[cut].name));
    if (!job.calibrated) continue;
    MemoryBytes advance{};
    slot(advance, MemoryKind::kPacked) = packed;
    slot(advance, MemoryKind::kWeights) = m.prepared + floats.weights;
    const bool last = cut + 1 == block.cuts.size();
    const int64_t next = last ? 0
                              : hessian_elements(block.cuts[cut + 1].in) * 4 +
                                    mismatch_bytes(options, spec, block, cut + 1);
    slot(advance, MemoryKind::kHessians) = whole ? kept : next * live_partials(options.run.reduction_lanes);
    slot(advance, MemoryKind::kScratch) = scratch_bytes(options, spec, job, block, cut);
    slot(advance, MemoryKind::kActivations) =
        activation_bytes(spec, job, block, last ? cut : cut + 1, tokens) * floats.streams;
    consider(rank, advance, fmt::format("{}, run {}", name, block.cuts[cut].name));
  }
}

}  // namespace

void plan_memory(const RunOptions& options, const ModelSpec& spec, const PlanJob& job, const OutputFormat& format,
                 const std::function<DType(const std::string&)>& dtypes, RankPlan& rank) {
  consider_copies(options, spec, job, dtypes, rank);
  for (int64_t b = rank.blocks.first; b < rank.blocks.end; ++b)
    consider_block(options, spec, job, format, spec.blocks[b], fmt::format("block {}", b), rank);
  if (rank.last && head_to_quantize(options, spec))
    consider_block(options, spec, job, format, head_block(spec), "head", rank);
}

int64_t host_memory_per_rank(int ranks_on_node) {
  int64_t bytes = 0;
  std::ifstream meminfo("/proc/meminfo");
  for (std::string word; meminfo >> word;)
    if (word == "MemTotal:") {
      meminfo >> bytes;
      bytes *= 1024;
      break;
    }
  std::ifstream cgroup("/sys/fs/cgroup/memory.max");
  std::string limit;
  if (cgroup >> limit && !limit.empty() && std::isdigit(static_cast<unsigned char>(limit[0])))
    bytes = std::min<int64_t>(bytes == 0 ? INT64_MAX : bytes, std::stoll(limit));
  return bytes / std::max(1, ranks_on_node);
}

}  // namespace bitmill
