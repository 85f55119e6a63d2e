#include "pipeline/work.h"

#include <algorithm>

#include "algorithms/quantizer.h"
#include "pipeline/plan.h"

namespace bitmill {
namespace {

constexpr int64_t kRowTile = 256;

// Grids tried for each weight: its own, and those of the searches (core/grid.h).
double grids_tried(const QuantizeSettings& settings, const Quantizer& quantizer) {
  if (settings.mse) return 81;
  return settings.range_search && quantizer.needs_hessian() ? 31 : 1;
}

void add_linear(const RunOptions& options, const ModelSpec& spec, const LinearSpec& linear,
                const OutputFormat& format, const std::function<DType(const std::string&)>& dtypes,
                CutWork& cut) {
  const int64_t weights = linear.out * linear.in;
  cut.rows += linear.out;
  cut.widest = std::max(cut.widest, linear.out);
  cut.tiles += (linear.out + kRowTile - 1) / kRowTile;
  // A tied head is stored as the embedding.
  const bool head = linear.module == spec.head_linear().module;
  const int64_t stored = dtype_bits(dtypes(head ? spec.head.name : linear.weight_name()));
  cut.source_bytes += weights * stored / 8;
  const int64_t bias = linear.bias ? linear.out * dtype_bits(dtypes(linear.bias_name())) / 8 : 0;
  cut.source_bytes += bias;
  const QuantizeSettings settings = options.settings_for(linear.module);
  if (settings.skip) {
    cut.packed_bytes += weights * stored / 8 + bias;
    return;
  }
  const Quantizer& quantizer = find_quantizer(settings.algorithm);
  cut.hessian |= quantizer.needs_hessian();
  cut.mismatch |= quantizer.compares_with_float();
  cut.scaled |= quantizer.scales_weights();
  cut.quantized += weights;
  if (quantizer.needs_hessian()) cut.solved += weights;
  cut.groups += linear.out * group_count(linear.in, settings.group_size);
  cut.grid_weights += static_cast<double>(weights) * grids_tried(settings, quantizer);
  for (const PackedSpec& packed : format.packed_specs(linear, settings, spec.dtype)) {
    cut.packed_bytes += packed_bytes(packed);
    if (packed.name != linear.bias_name()) cut.quantized_bytes += packed_bytes(packed);
  }
}

bool alike(const CutWork& a, const CutWork& b) {
  return a.expert && b.expert && a.name == b.name && a.in == b.in && a.rows == b.rows &&
         a.token_share == b.token_share && a.hessian == b.hessian && a.mismatch == b.mismatch &&
         a.scaled == b.scaled && a.grid_weights == b.grid_weights &&
         a.packed_bytes == b.packed_bytes && a.source_bytes == b.source_bytes;
}

}  // namespace

int64_t BlockWork::source_bytes() const {
  int64_t bytes = float_bytes;
  for (const CutWork& cut : cuts) bytes += cut.count * cut.source_bytes;
  return bytes;
}

int64_t BlockWork::packed_bytes() const {
  int64_t bytes = float_bytes;
  for (const CutWork& cut : cuts) bytes += cut.count * cut.packed_bytes;
  return bytes;
}

BlockWork block_work(const RunOptions& options, const ModelSpec& spec, const BlockSpec& block,
                     const OutputFormat& format,
                     const std::function<DType(const std::string&)>& dtypes) {
  BlockWork work;
  for (const TensorSpec& norm : block.norms)
    work.float_bytes += norm.shape.elements() * dtype_bits(dtypes(norm.name)) / 8;
  const int64_t values = spec.value_dim > 0 ? spec.value_dim : spec.head_dim;
  // The head, a block of one cut, attends to nothing.
  if (block.cuts.size() > 1)
    work.attention = static_cast<double>(spec.heads * (spec.head_dim + values));
  for (const CutSpec& spec_cut : block.cuts) {
    CutWork cut;
    cut.name = spec_cut.name;
    cut.expert = spec_cut.expert >= 0;
    cut.token_share = spec_cut.token_share;
    cut.in = spec_cut.in;
    cut.adds_to_hidden = spec_cut.adds_to_hidden;
    cut.residual = spec_cut.adds_to_hidden ? spec.hidden : 0;
    for (int linear : spec_cut.linears)
      add_linear(options, spec, block.linears[linear], format, dtypes, cut);
    cut.products = cut.rows;
    // Gate and up are multiplied in tiles (Backend::gated_linear): their outputs are never whole.
    if (cut.name == "gate_up") cut.products = 0;
    const auto same = std::find_if(work.cuts.begin(), work.cuts.end(),
                                   [&](const CutWork& other) { return alike(cut, other); });
    if (same != work.cuts.end())
      ++same->count;
    else
      work.cuts.push_back(std::move(cut));
  }
  return work;
}

}  // namespace bitmill
