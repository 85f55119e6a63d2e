// AWQ as a change of a float block before it is quantized: scales are folded into norms and
// linears, so that the block computes what it did, and clipping limits are set. Everything after
// this reads the changed block.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "algorithms/awq.h"
#include "models/family.h"
#include "pipeline/batch_flow.h"
#include "pipeline/block_context.h"

namespace bitmill {

// What the pass decided for one block. Default: nothing changes.
class BlockChange {
 public:
  // In place on rows of a linear as the source has it, `weight` F32 [rows, in] from row `first_row`
  // on: columns times the scales of its input, its group clamped (with `clip`; without it the
  // block's float function stays), rows divided by the scales of what it feeds.
  void apply(int linear, TensorView weight, int64_t first_row, bool clip, Backend& backend) const;
  bool changes(int linear) const { return linears_.contains(linear); }
  // Folded norms, biases and float consumers in their stored dtype, by tensor name.
  const std::map<std::string, Tensor>& floats() const { return floats_; }
  // Adds ratio, gain and, where scales were left out, the reason to a record.
  void describe(int linear, QuantizeRecord& record) const;

 private:
  friend class AwqPass;
  struct Linear {
    Tensor columns, rows, limits;  // F64 [in], [out], [out, groups]; empty: none
    int64_t group_size = -1;
    double ratio = -1, gain = 1;
    bool weighted = false;
    std::string note;
  };
  std::map<int, Linear> linears_;
  std::map<std::string, Tensor> floats_;
};

// Does a linear of the block use AWQ with these options?
bool uses_awq(const RunOptions& options, const BlockSpec& block);

// Why the input of a cut is not scaled; empty: it is. A fold changes all consumers of the input and
// what makes it, so all linears among them must be quantized with an awq algorithm: one that stays
// in float keeps its stored values.
std::string fold_obstacle(const RunOptions& options, const BlockSpec& block, const CutSpec& cut);

// Source tensors whose values an output changes on purpose: folded norms, biases and float
// consumers, and the weights of all linears of awq algorithms. Sorted. Depends on options and
// shapes alone.
std::vector<std::string> folded_tensors(const RunOptions& options, const ModelSpec& spec);

// Runs the float block over the first micro-batches of `activations` (awq.tokens of them or a few
// more) and searches cut by cut. The activations stay as they are. Holds one cut's weights (F32 and
// prepared), one Hessian and a copy of the subset at a time.
// Collective: members of a stage sum over their own micro-batches, then all decide the same.
BlockChange find_block_change(const BlockContext& context, const BlockSpec& block,
                              const BlockGraph& graph, Activations& activations);

}  // namespace bitmill
