// The parts of a block with routed experts: a router that picks top_k of `count` gated MLPs for
// each token. Described for the plan; their forward pass is not in this version.
#pragma once

#include <string>

#include "models/family.h"

namespace bitmill {

struct ExpertTraits {
  int64_t count = 0;  // routed experts of a block
  int64_t top_k = 0;  // experts of a token
  int64_t width = 0;  // columns of an expert's down
};

// Error(kInput) when the numbers contradict each other, or when blocks * count is beyond a million.
// The names are those of config.json.
void check_experts(const ExpertTraits& traits, int64_t blocks, const std::string& count_key);

// Appends gate, up and down of a gated MLP `prefix` + "gate_proj" ... and their cuts, which are
// named `name` + "gate_up" and `name` + "down". Returns the index of the first new cut.
size_t add_mlp(BlockSpec& block, const std::string& prefix, const std::string& name, int64_t hidden,
               int64_t width);
// Appends the router `prefix` + "gate.weight", which stays float, and all experts `prefix` +
// "experts.E.", each with two cuts that see top_k / count of the tokens.
void add_experts(BlockSpec& block, const std::string& prefix, int64_t hidden,
                 const ExpertTraits& traits);

// What `graph` of a family says whose forward pass is not in this version: Error(kInput).
[[noreturn]] void refuse_forward(const std::string& family);

}  // namespace bitmill
