// What config texts need to know about module names: which block a module is in, which modules an
// engine fuses, regexes.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "formats/format.h"

namespace bitmill {

// "model.layers.3.self_attn.q_proj" -> {"model.layers.", 3, "self_attn.q_proj"}; a module outside
// the blocks
// ("lm_head") has block -1 and its whole name in `inner`.
struct ModuleName {
  std::string prefix;
  int64_t block = -1;
  std::string inner;
};
ModuleName parse_module(const std::string& module);

// The name under which engines load a linear: q/k/v become "self_attn.qkv_proj", gate/up
// "mlp.gate_up_proj"; other names stay as they are. Linears of one fused name need one scheme.
// Works on whole and on inner names.
std::string fused_name(const std::string& name);

// `name`, and its fused name where that is another.
std::vector<std::string> spellings(const std::string& name);

// What one inner name ("mlp.down_proj") is in the blocks that have it, in order of first
// appearance; pointers into `modules`. Modules outside the blocks are left out.
struct InnerName {
  std::string inner;
  std::vector<const ModuleChoice*> modules;
};
std::vector<InnerName> by_inner_name(const std::vector<ModuleChoice>& modules);

// ECMAScript, PCRE and Python agree on this escaping: a backslash before every character that means
// something.
std::string regex_escape(const std::string& text);

// "4 bits, group_size=128, symmetric=true" or "float": for messages.
std::string scheme_text(const ModuleChoice& choice);

// Throws Error(kUsage), naming both modules, when linears that engines fuse have different schemes.
void check_fused(const std::vector<ModuleChoice>& modules, const std::string& format);
// Throws Error(kUsage), naming two modules, when quantized linears have different schemes.
void check_one_scheme(const std::vector<ModuleChoice>& modules, const std::string& format);

// The inner names of quantized block linears, in order of first appearance, one list per fused
// group.
std::vector<std::vector<std::string>> quantized_inner_names(
    const std::vector<ModuleChoice>& modules);

// The scheme that most quantized modules have (the first of equals); a default choice when none is
// quantized.
ModuleChoice most_common_scheme(const std::vector<ModuleChoice>& modules);

bool same_scheme(const ModuleChoice& a, const ModuleChoice& b);

}  // namespace bitmill
