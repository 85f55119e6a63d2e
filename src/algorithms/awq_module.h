// The loss of a whole module around the scaled linears: a gated MLP behind gate and up, or causal
// attention behind q, k and v. Other AWQ programs measure their scales there; the group's own
// output (awq.h) needs no forward passes.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "algorithms/awq.h"

namespace bitmill {

enum class ModuleKind {
  kMlp,        // (silu(x gate^T) * (x up^T)) down^T
  kAttention,  // softmax(q k^T / sqrt(d)) v o^T, causal, grouped kv heads, rotary halves with theta
               // 10000
};

// A module in plain matrices. Everything F32, or everything F64.
struct AwqModule {
  ModuleKind kind = ModuleKind::kMlp;
  std::map<std::string, TensorView> weights;  // "gate" "up" "down", or "q" "k" "v" "o"; [out, in]
  TensorView x;                               // [sequences, length, in]
  int64_t heads = 0, kv_heads = 0;            // attention
};

// Mean squared error of the module's output when the weights named by `scaled` (one problem each)
// are rounded after scaling. Sequences are the unit of parallel work. All arguments must outlive
// the function.
ScaleLoss module_loss(const AwqModule& module, const std::vector<std::string>& scaled,
                      std::span<const LinearProblem> problems, Backend& backend);

}  // namespace bitmill
