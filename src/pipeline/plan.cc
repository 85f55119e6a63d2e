#include "pipeline/plan.h"

#include <algorithm>
#include <numeric>

#include "algorithms/quantizer.h"
#include "core/log.h"
#include "pipeline/memory.h"

namespace bitmill {

std::string_view memory_kind_name(MemoryKind kind) {
  static constexpr std::array<std::string_view, kMemoryKinds> kNames{
      "activations", "scratch", "weights", "hessians", "factor", "packed", "embedding"};
  return kNames[static_cast<size_t>(kind)];
}

int64_t total(const MemoryBytes& bytes) { return std::accumulate(bytes.begin(), bytes.end(), int64_t{0}); }

int64_t packed_bytes(const PackedSpec& spec) { return spec.shape.elements() * dtype_bits(spec.dtype) / 8; }

namespace {

// What a file shows of the order: groups are scattered only where columns are solved one after the other, and only if
// there are groups.
ActOrder order_on_disk(const QuantizeSettings& settings) {
  if (settings.skip || settings.act_order != ActOrder::kDynamic) return settings.act_order;
  const bool scattered = settings.group_size != -1 && find_quantizer(settings.algorithm).needs_hessian();
  return scattered ? ActOrder::kDynamic : ActOrder::kStatic;
}

}  // namespace
std::optional<LinearSpec> head_to_quantize(const RunOptions& options, const ModelSpec& spec) {
  const LinearSpec head = spec.head_linear();
  if (!options.quantize.lm_head && options.quantize.untie)
    fail(ExitCode::kUsage,
         "quantize.untie=true without quantize.lm_head=true: a head in float stays as it is");
  if (!options.quantize.lm_head || options.settings_for(head.module).skip) return std::nullopt;
  if (spec.tied && !options.quantize.untie)
    fail(ExitCode::kUsage,
         "quantize.lm_head=true, but the head of this model is its embedding ({}, "
         "tie_word_embeddings=true): "
         "quantize.untie=true gives it a quantized weight of its own",
         spec.head.name);
  return head;
}

BlockSpec head_block(const ModelSpec& spec) {
  BlockSpec block;
  block.index = static_cast<int64_t>(spec.blocks.size());
  block.linears = {spec.head_linear()};
  block.cuts = {{"head", {0}, spec.hidden}};
  return block;
}

std::vector<ModuleChoice> choose_modules(const RunOptions& options, const ModelSpec& spec,
                                         const OutputFormat& format) {
  std::vector<ModuleChoice> choices;
  const auto choose = [&](const LinearSpec& linear) {
    const QuantizeSettings settings = options.settings_for(linear.module);
    if (!settings.skip) {
      const Quantizer& quantizer = find_quantizer(settings.algorithm);
      quantizer.check(settings);
      if (quantizer.compares_with_float() && options.propagation.mode == "full")
        fail(ExitCode::kUsage,
             "quantize.algorithm={} with propagation.mode=full: all inputs are the float model's, there is nothing to "
             "correct; use propagation.mode=quantized",
             settings.algorithm);
      if (quantizer.compares_with_float() && !options.quantize.true_sequential)
        fail(ExitCode::kUsage,
             "quantize.true_sequential=false with quantize.algorithm={}: it compares inputs with the "
             "float model's segment by segment and needs true",
             settings.algorithm);
      format.check(linear, settings);
    }
    ModuleChoice choice{linear.module, !settings.skip, settings.bits, settings.group_size,
                        settings.symmetric};
    choice.act_order = order_on_disk(settings);
    choices.push_back(std::move(choice));
  };
  for (const BlockSpec& block : spec.blocks)
    for (const LinearSpec& linear : block.linears) choose(linear);
  if (const auto head = head_to_quantize(options, spec)) choose(*head);
  if (std::none_of(choices.begin(), choices.end(), [](const ModuleChoice& c) { return c.quantized; }))
    fail(ExitCode::kUsage, "quantize.rule: every module is skipped, nothing is left to quantize");
  format.check_model(choices);
  return choices;
}

std::vector<std::pair<size_t, size_t>> cut_shards(const std::vector<PackedSpec>& tensors, int64_t limit) {
  std::vector<std::pair<size_t, size_t>> cuts;
  int64_t bytes = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t size = packed_bytes(tensors[i]);
    if (cuts.empty() || (bytes > 0 && bytes + size > limit)) {
      cuts.push_back({i, i});
      bytes = 0;
    }
    bytes += size;
    cuts.back().second = i + 1;
  }
  return cuts;
}

namespace {

using Dtypes = std::function<DType(const std::string&)>;

// Work of a block in FLOP for this job; reading a byte is charged like 100 FLOP, about what a node's memory-to-arithmetic
// ratio makes of it. Only the proportions matter.
double block_cost(const BlockSpec& block, const PlanJob& job) {
  const double tokens = static_cast<double>(job.samples * job.length);
  double flop = 0, bytes = 0;
  for (const CutSpec& cut : block.cuts) {
    const double n = static_cast<double>(cut.in);
    if (job.calibrated) flop += n * n * tokens + n * n * n / 3;
    for (int linear : cut.linears) {
      const double rows = static_cast<double>(block.linears[linear].out);
      bytes += rows * n * 2;
      if (job.calibrated) flop += 2 * rows * n * tokens + rows * n * n;
    }
  }
  return flop + 100 * bytes;
}

// `rank`: the first of the stage that holds the tensors.
void add_shards(Plan& plan, const std::string& key, int rank, std::vector<PackedSpec> tensors, int64_t limit) {
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  const auto cuts = cut_shards(tensors, limit);
  for (size_t part = 0; part < cuts.size(); ++part) {
    ShardPlan shard{cuts.size() == 1 ? key : fmt::format("{}.part-{}", key, part + 1), rank, {}, 0};
    shard.tensors.assign(tensors.begin() + static_cast<int64_t>(cuts[part].first),
                         tensors.begin() + static_cast<int64_t>(cuts[part].second));
    for (const PackedSpec& tensor : shard.tensors) shard.tensor_bytes += packed_bytes(tensor);
    plan.output_bytes += shard.tensor_bytes;
    plan.shards.push_back(std::move(shard));
  }
}

std::vector<PackedSpec> block_tensors(const BlockSpec& block, const RunOptions& options, const ModelSpec& spec,
                                      const OutputFormat& format, const Dtypes& dtypes, Plan& plan,
                                      int64_t& quantized_bytes) {
  std::vector<PackedSpec> tensors;
  for (const TensorSpec& norm : block.norms) tensors.push_back({norm.name, dtypes(norm.name), norm.shape});
  for (const LinearSpec& linear : block.linears) {
    const QuantizeSettings settings = options.settings_for(linear.module);
    if (settings.skip) {
      tensors.push_back(
          {linear.weight_name(), dtypes(linear.weight_name()), linear.stored_shape()});
      if (linear.bias) tensors.push_back({linear.bias_name(), dtypes(linear.bias_name()), {linear.out}});
      continue;
    }
    plan.quantized_weights += linear.out * linear.in;
    for (const PackedSpec& packed : format.packed_specs(linear, settings, spec.dtype)) {
      if (packed.name != linear.bias_name()) quantized_bytes += packed_bytes(packed);
      tensors.push_back(packed);
    }
  }
  return tensors;
}

void plan_shards(Plan& plan, const RunOptions& options, const ModelSpec& spec, const OutputFormat& format,
                 const Dtypes& dtypes) {
  const int64_t limit = options.output.shard_size;
  int64_t quantized_bytes = 0;
  const int last = (plan.stages - 1) * plan.width;
  const auto whole = [&](const TensorSpec& t) { return std::vector<PackedSpec>{{t.name, dtypes(t.name), t.shape}}; };
  add_shards(plan, "embedding", 0, whole(spec.embedding), limit);
  for (int stage = 0; stage < plan.stages; ++stage) {
    const RankPlan& rank = plan.ranks[stage * plan.width];
    for (int64_t b = rank.blocks.first; b < rank.blocks.end; ++b)
      add_shards(plan, fmt::format("block-{:05}", b), rank.rank,
                 block_tensors(spec.blocks[b], options, spec, format, dtypes, plan, quantized_bytes), limit);
  }
  add_shards(plan, "norm", last, whole(spec.final_norm), limit);
  if (head_to_quantize(options, spec))
    add_shards(
        plan, "head", last,
        block_tensors(head_block(spec), options, spec, format, dtypes, plan, quantized_bytes),
        limit);
  else if (!spec.tied)
    add_shards(plan, "head", last, whole(spec.head), limit);
  if (!plan.job.other.empty()) add_shards(plan, "other", last, plan.job.other, limit);
  // The ranks of a stage write its shards in turn, several at once.
  std::vector<int> turns(static_cast<size_t>(plan.stages));
  for (ShardPlan& shard : plan.shards) shard.rank += turns[shard.rank / plan.width]++ % plan.width;
  if (plan.quantized_weights > 0)
    plan.bits_per_weight = 8.0 * static_cast<double>(quantized_bytes) / static_cast<double>(plan.quantized_weights);
  plan.joined = plan.output_bytes < limit;
  const size_t count = plan.shards.size();
  for (size_t i = 0; i < (plan.joined ? 1 : count); ++i)
    plan.files.push_back(plan.joined ? "model.safetensors"
                                     : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, count));
}

// run.stage_width on this machine. Error(kUsage) for more than there are ranks.
int stage_width(const RunOptions& options, const PlanMachine& machine) {
  if (options.run.stage_width == "auto") return 1;
  const int width = std::stoi(options.run.stage_width);
  if (width > machine.ranks)
    fail(ExitCode::kUsage, "run.stage_width={}: expected at most the {} rank{} of this job", width,
         machine.ranks, machine.ranks == 1 ? "" : "s");
  return width;
}

void note_idle_ranks(Plan& plan, const ModelSpec& spec) {
  const int idle = plan.machine.ranks - plan.active_ranks();
  if (idle == 0) return;
  const bool few_blocks = plan.machine.ranks / plan.width > plan.stages;
  plan.notes.push_back(fmt::format(
      "{} of {} ranks stay idle (ranks {}-{}): {}", idle, plan.machine.ranks, plan.active_ranks(),
      plan.machine.ranks - 1,
      few_blocks ? fmt::format("the model has {} blocks", spec.blocks.size())
                 : fmt::format("{} is no multiple of run.stage_width={}", plan.machine.ranks,
                               plan.width)));
}

void assign_blocks(Plan& plan, const RunOptions& options, const ModelSpec& spec) {
  std::vector<double> costs;
  for (const BlockSpec& block : spec.blocks) costs.push_back(block_cost(block, plan.job));
  const double embedding = 200.0 * static_cast<double>(spec.embedding.shape.elements());
  const double copied = spec.tied ? 0 : 200.0 * static_cast<double>(spec.head.shape.elements());
  const double head =
      head_to_quantize(options, spec) ? block_cost(head_block(spec), plan.job) : copied;
  plan.width = stage_width(options, plan.machine);
  const auto ranges = partition_blocks(costs, plan.machine.ranks / plan.width, embedding, head);
  plan.stages = static_cast<int>(ranges.size());
  const double all = std::accumulate(costs.begin(), costs.end(), embedding + head);
  for (int rank = 0; rank < plan.machine.ranks; ++rank) {
    RankPlan r;
    r.rank = rank;
    r.node = rank / std::max(1, plan.machine.ranks_per_node);
    r.stage = rank / plan.width;
    r.member = rank % plan.width;
    if (r.stage < plan.stages) {
      r.blocks = ranges[r.stage];
      r.embeds = r.stage == 0;
      r.last = r.stage + 1 == plan.stages;
      r.cost = std::accumulate(costs.begin() + r.blocks.first, costs.begin() + r.blocks.end,
                               (r.embeds ? embedding : 0) + (r.last ? head : 0)) /
               all / plan.width;
    }
    plan.ranks.push_back(r);
  }
  note_idle_ranks(plan, spec);
}

void refuse_if_too_large(const Plan& plan) {
  const int64_t limit = plan.machine.memory_per_rank;
  for (const RankPlan& rank : plan.ranks) {
    if (limit == 0 || total(rank.peak) <= limit) continue;
    const size_t largest =
        static_cast<size_t>(std::max_element(rank.peak.begin(), rank.peak.end()) - rank.peak.begin());
    static constexpr std::array<std::string_view, kMemoryKinds> kHelp{
        "lower calibration.samples or calibration.sequence_length", "lower run.microbatch_tokens",
        "use ranks with more memory",  "lower run.reduction_lanes or use ranks with more memory",
        "use ranks with more memory",  "use ranks with more memory", "use ranks with more memory"};
    fail(ExitCode::kDoesNotFit, "rank {} needs {} at {} but has {} of {}; the largest part is {} ({}): {}", rank.rank,
         human_bytes(total(rank.peak)), rank.peak_at, human_bytes(limit), plan.machine.memory_name,
         memory_kind_name(static_cast<MemoryKind>(largest)), human_bytes(rank.peak[largest]), kHelp[largest]);
  }
}

}  // namespace

Plan make_plan(const RunOptions& options, const ModelSpec& spec, const OutputFormat& format, const PlanMachine& machine,
               const PlanJob& job, const Dtypes& dtypes) {
  const std::vector<ModuleChoice> modules = choose_modules(options, spec, format);
  Plan plan;
  plan.machine = machine;
  plan.job = job;
  assign_blocks(plan, options, spec);
  for (RankPlan& rank : plan.ranks)
    if (rank.blocks.count() > 0) plan_memory(options, spec, job, format, dtypes, rank);
  plan_shards(plan, options, spec, format, dtypes);
  const auto source = [&](const TensorSpec& t) { return t.shape.elements() * dtype_bits(dtypes(t.name)) / 8; };
  plan.source_bytes = source(spec.embedding) + source(spec.final_norm) + (spec.tied ? 0 : source(spec.head));
  for (const BlockSpec& block : spec.blocks) {
    for (const TensorSpec& norm : block.norms) plan.source_bytes += source(norm);
    for (const LinearSpec& linear : block.linears) {
      plan.source_bytes += source({linear.weight_name(), {linear.out, linear.in}});
      if (linear.bias) plan.source_bytes += source({linear.bias_name(), {linear.out}});
    }
  }
  plan.micro_batches =
      count_batches(job.samples, job.length, options.run.reduction_lanes, options.run.microbatch_tokens);
  plan.load_warnings = check_load(spec, format, modules);
  refuse_if_too_large(plan);
  return plan;
}

}  // namespace bitmill
