#include "models/experts.h"

#include "core/error.h"

namespace bitmill {

void check_experts(const ExpertTraits& traits, int64_t blocks, const std::string& count_key) {
  if (traits.top_k > traits.count)
    fail(ExitCode::kInput, "config.json: num_experts_per_tok is {}, expected at most {} {}",
         traits.top_k, count_key, traits.count);
  constexpr int64_t kMost = 1'000'000;  // a typing error should not allocate specs without end
  if (blocks * traits.count > kMost)
    fail(ExitCode::kInput, "config.json: {} {} in {} blocks, expected at most {} experts in all",
         count_key, traits.count, blocks, kMost);
}

size_t add_mlp(BlockSpec& block, const std::string& prefix, const std::string& name, int64_t hidden,
               int64_t width) {
  const int first = static_cast<int>(block.linears.size());
  block.linears.push_back({prefix + "gate_proj", width, hidden});
  block.linears.push_back({prefix + "up_proj", width, hidden});
  block.linears.push_back({prefix + "down_proj", hidden, width});
  const size_t cut = block.cuts.size();
  block.cuts.push_back({name + "gate_up", {first, first + 1}, hidden});
  block.cuts.push_back({name + "down", {first + 2}, width});
  block.cuts.back().fold.linear = first + 1;
  block.cuts.back().adds_to_hidden = true;
  return cut;
}

void add_experts(BlockSpec& block, const std::string& prefix, int64_t hidden,
                 const ExpertTraits& traits) {
  block.norms.push_back({prefix + "gate.weight", {traits.count, hidden}});
  const double share = static_cast<double>(traits.top_k) / static_cast<double>(traits.count);
  for (int64_t expert = 0; expert < traits.count; ++expert) {
    const size_t first = add_mlp(block, fmt::format("{}experts.{}.", prefix, expert), "expert_",
                                 hidden, traits.width);
    for (size_t cut = first; cut < block.cuts.size(); ++cut) {
      block.cuts[cut].expert = static_cast<int>(expert);
      block.cuts[cut].token_share = share;
    }
  }
}

void refuse_forward(const std::string& family) {
  fail(ExitCode::kInput,
       "models of family {} can be planned in this version, but not computed: the forward pass of "
       "their experts is not in it",
       family);
}

}  // namespace bitmill
