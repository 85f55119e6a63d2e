#include "pipeline/cut_memory.h"

#include <algorithm>
#include <cmath>

#include "pipeline/row_pieces.h"

namespace bitmill {
namespace {

constexpr int64_t kTileRows = 256;  // rows that a thread sweeps at a time

int64_t rounded(double bytes) {
  return static_cast<int64_t>(std::ceil(bytes));
}

}  // namespace

CutMemoryModel::CutMemoryModel(const PlanInput& input, const Member& member)
    : input_(input),
      member_(member),
      compute_(dtype_bits(input.job.compute) / 8),
      hidden_(input.spec.hidden),
      tokens_(member.share.samples * input.job.length),
      all_live_(lane_share(input.job.samples, input.job.length, static_cast<int>(input.lanes),
                           input.microbatch_tokens, 1, 0)
                    .live) {}

double CutMemoryModel::split(const CutWork& cut) const {
  const double tiles = static_cast<double>(std::max<int64_t>(1, cut.tiles));
  return cut.expert ? 1 : std::ceil(tiles / member_.width) / tiles;
}

CutMemory CutMemoryModel::of(const CutWork& cut) const {
  CutMemory m;
  m.elements = cut.in * cut.rows;
  m.own = rounded(static_cast<double>(m.elements) * split(cut));
  m.largest = cut.in * cut.widest;
  m.prepared = m.elements * compute_;
  m.preparing = m.largest * compute_;
  m.grids = cut.groups * 8;
  if (!input_.job.calibrated || !cut.hessian) return m;
  m.hessian = hessian_elements(cut.in) * 4;
  if (cut.mismatch && input_.float_stream) m.mismatch = cut.in * (cut.in + cut.residual) * 4;
  m.live = cut.expert ? all_live_ : member_.share.live;
  m.partials = cut.expert ? 1 : member_.share.partials;
  return m;
}

// Weights as F32, codes as bytes; a weight corrected by gptaq is one more.
int64_t CutMemoryModel::solving(const CutWork& cut) const {
  const double copies = cut.mismatch && input_.float_stream ? 4 + 1 + 4 : 4 + 1;
  const double own = split(cut);
  return rounded(own *
                 (copies * static_cast<double>(cut.solved) + static_cast<double>(of(cut).grids)));
}

int64_t CutMemoryModel::factoring(const CutWork& cut) const {
  return cut.in * cut.in * 4 + sweep_tiles(cut);
}

// Each thread holds a tile's weights in F32 and codes, its grids, and sums of a block.
int64_t CutMemoryModel::sweep_tiles(const CutWork& cut) const {
  const QuantizeSettings& settings = input_.options.quantize;
  const int64_t rows = std::min(kTileRows, cut.widest);
  const int64_t group = settings.group_size == -1 ? cut.in : settings.group_size;
  const bool refits = settings.act_order != ActOrder::kStatic && settings.group_size != -1;
  const int64_t reach = settings.block_size + (refits ? std::min(group, cut.in) : 0);
  const int64_t columns =
      cut.in * 5 + 4 * reach * (refits ? 3 : 1) + 8 * ((cut.in + group - 1) / group);
  const int64_t tiles = rounded(static_cast<double>(cut.tiles) * split(cut));
  return std::min<int64_t>(tiles, input_.machine.threads) * rows * columns;
}

// A piece of the weight, what its codes stand for, and its codes beside those of all rows.
int64_t CutMemoryModel::rounding(const CutWork& cut) const {
  if (cut.quantized == cut.solved) return 0;
  const int64_t all = rounded(static_cast<double>(of(cut).largest) * split(cut));
  const int64_t piece = std::min(all, rows_per_piece(cut.in) * cut.in);
  const int64_t ahead = piece < all ? std::min(FixedBuffers::kReadAhead, all * compute_) : 0;
  return all + piece * (4 + 4 + (piece < all ? 1 : 0)) + ahead + packing(cut) - of(cut).largest;
}

int64_t CutMemoryModel::packing(const CutWork& cut) const {
  const CutMemory m = of(cut);
  const double part = static_cast<double>(cut.widest) / static_cast<double>(cut.rows);
  return m.largest + rounded(static_cast<double>(m.grids) * part);
}

// Columns that a cut consumes and that are no function of the residual stream.
int64_t CutMemoryModel::carry(const BlockWork& block, size_t i) const {
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

// After the first addition the stream is F32, until the end of the block.
int64_t CutMemoryModel::activations(const BlockWork& block, size_t cut, int64_t tokens) const {
  const bool added = std::any_of(block.cuts.begin(), block.cuts.begin() + static_cast<int64_t>(cut),
                                 [](const CutWork& before) { return before.adds_to_hidden; });
  const int64_t bytes = tokens * (hidden_ * (added ? 4 : compute_) + carry(block, cut) * compute_);
  return bytes * (input_.float_stream ? 2 : 1);
}

// Outputs in F32 and what makes the next cut's input of them, or the sum with the residual stream;
// an expert takes its tokens of all samples at once.
int64_t CutMemoryModel::running(const BlockWork& block, size_t i) const {
  const CutWork& cut = block.cuts[i];
  const int64_t input = cut.adds_to_hidden ? 0 : hidden_ * compute_;
  if (cut.expert) {
    const double all = static_cast<double>(input_.job.samples * input_.job.length);
    return rounded(all * cut.token_share) * (cut.in * compute_ + cut.rows * 4 + hidden_ * 4);
  }
  const int64_t outputs = cut.adds_to_hidden ? hidden_ * 4 : cut.products * (4 + compute_);
  return batch_tokens() * (input + outputs) + (input_.float_stream ? batch_tokens() * input : 0);
}

// The input is packed twice, for both sides of x x^T, beside the normed stream it came from;
// gptaq's differences are packed too.
int64_t CutMemoryModel::summing(const CutWork& cut) const {
  if (cut.expert) return 0;
  const bool compares = cut.mismatch && input_.float_stream;
  const int64_t columns = std::max(2 * cut.in, compares ? 3 * std::max(cut.in, hidden_) : 0);
  return batch_tokens() * compute_ * (columns + hidden_ * (input_.float_stream ? 2 : 1));
}

}  // namespace bitmill
