#include "pipeline/plan.h"

#include <algorithm>
#include <numeric>

#include "algorithms/quantizer.h"
#include "core/log.h"
#include "pipeline/layout.h"
#include "pipeline/stage.h"

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

// run.stage_width, 0: auto. Error(kUsage) for more than there are ranks.
int given_width(const RunOptions& options, const PlanMachine& machine) {
  if (options.run.stage_width == "auto") return 0;
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

// A stage's ranks talk all the time; across nodes they share the slower network.
void note_nodes(Plan& plan) {
  const int node = std::max(1, plan.machine.ranks_per_node);
  if (plan.width == 1 || node >= plan.active_ranks() || node % plan.width == 0) return;
  plan.notes.push_back(fmt::format("stages of {} ranks span nodes of {}", plan.width, node));
}

int64_t stored_bytes(const TensorSpec& tensor, const Dtypes& dtypes) {
  return tensor.shape.elements() * dtype_bits(dtypes(tensor.name)) / 8;
}

PlanInput plan_input(const RunOptions& options, const ModelSpec& spec, const OutputFormat& format,
                     const PlanMachine& machine, const PlanJob& job, const Dtypes& dtypes) {
  PlanInput input{options, spec, machine, job,
                  rates_of(options.machine, machine.device, job.compute)};
  set_mode(input, options.propagation.mode == "full");
  for (const BlockSpec& block : spec.blocks)
    input.blocks.push_back(block_work(options, spec, block, format, dtypes));
  if (head_to_quantize(options, spec))
    input.head = block_work(options, spec, head_block(spec), format, dtypes);
  input.embedding_bytes = stored_bytes(spec.embedding, dtypes);
  if (!spec.tied && !input.head) input.head_bytes = stored_bytes(spec.head, dtypes);
  input.lanes = options.run.reduction_lanes;
  input.microbatch_tokens = options.run.microbatch_tokens;
  return input;
}

void assign_ranks(Plan& plan, const PlanInput& input, const Layout& layout) {
  plan.width = layout.width;
  plan.stages = static_cast<int>(layout.stages.size());
  plan.seconds = layout.seconds;
  plan.phases = layout.phases;
  const double wait = plan.phases[static_cast<size_t>(CostPhase::kWait)];
  const double work = (plan.seconds - wait) * plan.stages;  // of all stages
  Member before;  // members with equal shares need equal memory
  Peak peak;
  for (int r = 0; r < plan.machine.ranks; ++r) {
    RankPlan rank;
    rank.rank = r;
    rank.node = r / std::max(1, plan.machine.ranks_per_node);
    rank.stage = r / plan.width;
    rank.member = r % plan.width;
    if (rank.stage < plan.stages) {
      const StageLayout& stage = layout.stages[static_cast<size_t>(rank.stage)];
      const Member member = member_of(input, layout, rank.stage, rank.member);
      rank.blocks = stage.blocks;
      rank.waves = stage.waves;
      rank.embeds = member.embeds;
      rank.last = member.last;
      rank.seconds = stage.seconds;
      const double busy =
          total(stage.seconds) - stage.seconds[static_cast<size_t>(CostPhase::kWait)];
      rank.cost = work > 0 ? busy / work / plan.width : 0;
      if (r == 0 || !same_memory(member, before)) peak = peak_memory(input, member);
      before = member;
      rank.peak = peak.limited;
      rank.host_peak = peak.host;
      rank.peak_at = peak.at;
      const int64_t limit = plan.machine.memory_per_rank;
      if (limit > 0 && total(rank.peak) > limit) refuse_too_large(input, layout, r, peak);
    }
    plan.ranks.push_back(std::move(rank));
  }
}

// Another width or mode that the estimate finds at least 5% and a second faster.
void add_hints(Plan& plan, const PlanInput& input, int given) {
  const auto faster = [&](const PlanInput& other, const std::string& what) {
    const Layout best = choose_layout(other);
    if (best.seconds > std::min(0.95 * plan.seconds, plan.seconds - 1) || missing_memory(other, best) > 0) return;
    plan.hints.push_back(fmt::format("{}run.stage_width={}: an estimated {} instead of {}", what,
                                     best.width, duration_text(best.seconds),
                                     duration_text(plan.seconds)));
  };
  if (given > 0) faster(input, "");
  if (!plan.job.calibrated || input.float_stream) return;
  PlanInput other = input;
  set_mode(other, !input.full);
  faster(other, input.full ? "propagation.mode=quantized with " : "propagation.mode=full with ");
}

}  // namespace

Plan make_plan(const RunOptions& options, const ModelSpec& spec, const OutputFormat& format, const PlanMachine& machine,
               const PlanJob& job, const Dtypes& dtypes) {
  const std::vector<ModuleChoice> modules = choose_modules(options, spec, format);
  Plan plan;
  plan.machine = machine;
  plan.job = job;
  const PlanInput input = plan_input(options, spec, format, machine, job, dtypes);
  plan.full = input.full;
  plan.rates = input.rates;
  const int width = given_width(options, machine);
  assign_ranks(plan, input, width > 0 ? lay_out(input, width) : choose_layout(input));
  note_idle_ranks(plan, spec);
  note_nodes(plan);
  add_hints(plan, input, width);
  plan_shards(plan, options, spec, format, dtypes);
  plan.source_bytes = stored_bytes(spec.embedding, dtypes) + stored_bytes(spec.final_norm, dtypes) +
                      (spec.tied ? 0 : stored_bytes(spec.head, dtypes));
  for (const BlockWork& block : input.blocks) plan.source_bytes += block.source_bytes();
  plan.micro_batches =
      count_batches(job.samples, job.length, options.run.reduction_lanes, options.run.microbatch_tokens);
  plan.load_warnings = check_load(spec, format, modules);
  return plan;
}

}  // namespace bitmill
