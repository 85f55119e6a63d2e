// How long a run should take: formulas over shapes and rates, no more. What is measured afterwards
// stands in the report beside it.
//
// One block, T tokens, a stage of D ranks of which the busiest holds the share s of the samples
// (1/D where D divides the lanes), cuts with n input columns and R rows of all their linears:
//
//   forward    2 n R T s per cut, T s L w for attention (L tokens a sample, w columns of q k^T and
//              p v); twice where a float forward collects and a quantized one propagates, and
//              again where the float model runs in step (gptaq)
//   hessian    2 e T s, e elements of the packed triangle, about n^2/2 (gptaq: and 2 n^2 T s,
//              2 n hidden T s where the cut's output is added to the residual)
//   exchange   sums: each rank sends its p partial sums, cut in D, and gets the folded triangle:
//              4 e (1 - 1/D) (p + 1) bytes; results: R n (1 - 1/D) bytes of codes,
//              and of float weights where the block runs in float first (a member reads R/D rows)
//   factor     n^3/3 + 512 n^2 on every rank: this does not split
//   sweep      R n (n + 128) for the columns and R n^2 for w H w^T of the record, in tiles of 256
//              rows split over D (gptaq: 4 R n^2 more)
//   grid       weights times the grids tried, split like the sweep
//   search     AWQ: a forward and Hessians of awq.tokens tokens, 2 ratios R n^2, split like them
//   read       bytes over the rank's rate, or over its part of the file system's; only what is not
//   write      hidden behind the arithmetic of the block counts: both go on beside it
//
// Routed experts (T times the cut's token share each) belong to one rank of the stage: ceil(E/D) of
// them, factorizations too; their tokens are sent there and their outputs back.
//
// A block then has a capture k (what can begin with the first micro-batch that arrives), a solve S,
// and a propagate g (whose micro-batches can leave one by one); P stages of N blocks in all and M
// micro-batches take, where all blocks are alike,
//
//   quantized  N (k + S + g) - g - (P-1) (1 - 1/M) min(g, k)   stages work one after the other
//   full       N/P (k (M + P - 1) / M + S)                     all stages work at the same time
//
// and `run_quantized_stage` and `run_full_stage` are the same for blocks that differ.
// With true_sequential k is the first cut's Hessian and g the last cut's forward; else k is the
// float forward with all Hessians and g a quantized forward. Start-up, the final renames and
// waiting for anything else are not in it.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "pipeline/rates.h"
#include "pipeline/work.h"

namespace bitmill {

enum class CostPhase {
  kRead,
  kForward,
  kHessian,
  kExchange,
  kFactor,
  kSweep,
  kGrid,
  kSearch,
  kWrite,
  kTransfer,
  kWait
};
constexpr int kCostPhases = 11;
std::string_view cost_phase_name(CostPhase phase);  // "read", "forward", ...
using CostSeconds = std::array<double, kCostPhases>;
double total(const CostSeconds& seconds);
std::string duration_text(double seconds);  // "0.52 s", "84 s", "12 min", "3.4 h"

// The samples of one member of a stage: lanes [member * lanes / width, (member + 1) * lanes /
// width).
struct LaneShare {
  // While a lane with samples is summed: samples of it and of those behind it, and sums that exist.
  struct Lane {
    int64_t samples_left = 0;
    int live = 0;
  };
  int64_t samples = 0, batches = 0;
  int partials = 0;  // sums it holds when its lanes are done: complete subtrees of the lane tree
  int live = 0;      // most sums that exist at a time while it works: those and the open lane
  int64_t first_sample = 0, batch_samples = 0;  // batch_samples: of the largest micro-batch
  std::vector<Lane> lanes = {};
};
LaneShare lane_share(int64_t samples, int64_t length, int lanes, int64_t microbatch_tokens,
                     int width, int member);

// The shape of a job and of its stages.
struct CostShape {
  int64_t tokens = 0, length = 0;
  bool calibrated = true;
  bool full = false;         // propagation.mode=full
  bool whole_block = false;  // full, or true_sequential=false: one float forward collects all
  bool float_stream = false;
  int64_t awq_tokens = 0;
  int awq_ratios = 0;
  int64_t element_bytes = 2;  // of the compute type
  int stages = 1, width = 1;
  double share = 1;     // s: samples of the busiest member
  int64_t batches = 1;  // M: micro-batches of the busiest member
  int partials = 1;     // p of the busiest member
};

// Seconds of the busiest member for one block.
struct BlockSeconds {
  CostSeconds phases{};
  double capture = 0, solve = 0, propagate = 0;  // sum: total(phases)
};
BlockSeconds block_seconds(const BlockWork& work, const CostShape& shape, const Rates& rates);
// Bytes that a member sends to others of its stage for one block.
double exchange_bytes(const BlockWork& work, const CostShape& shape);

// When the first and the last micro-batch are there; between them they come evenly.
struct Stream {
  double first = 0, last = 0;
};
// Through a step that takes `seconds` for all `batches` micro-batches, one after the other.
Stream pass(Stream in, double seconds, int64_t batches);

// When a stage's results are done, and its activations can be had.
struct StageEnd {
  double done = 0;
  Stream out;
};
// `ready`: what the stage does before its first block. The blocks of the stage, in order.
StageEnd run_quantized_stage(Stream in, double ready, const std::vector<BlockSeconds>& blocks,
                             int64_t batches);
// `waves`: the blocks of the stage, wave by wave. A wave streams all micro-batches, then solves.
StageEnd run_full_stage(Stream in, double ready,
                        const std::vector<std::vector<BlockSeconds>>& waves, int64_t batches);

}  // namespace bitmill
