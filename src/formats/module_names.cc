#include "formats/module_names.h"

#include <algorithm>
#include <array>
#include <string_view>

namespace bitmill {
namespace {

struct FusedGroup {
  std::string_view fused;
  std::array<std::string_view, 3> members;  // empty: unused
};
constexpr FusedGroup kFusedGroups[] = {
    {"qkv_proj", {"q_proj", "k_proj", "v_proj"}},
    {"gate_up_proj", {"gate_proj", "up_proj", ""}},
};

bool all_digits(std::string_view text) {
  return !text.empty() && text.size() < 10 &&
         std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

}  // namespace

ModuleName parse_module(const std::string& module) {
  for (size_t begin = 0; begin < module.size();) {
    const size_t end = std::min(module.find('.', begin), module.size());
    const std::string part = module.substr(begin, end - begin);
    if (all_digits(part) && end < module.size())
      return {module.substr(0, begin), std::stoll(part), module.substr(end + 1)};
    begin = end + 1;
  }
  return {"", -1, module};
}

std::string fused_name(const std::string& name) {
  const size_t dot = name.rfind('.');
  const size_t last = dot == std::string::npos ? 0 : dot + 1;
  const std::string_view leaf = std::string_view(name).substr(last);
  for (const FusedGroup& group : kFusedGroups)
    for (std::string_view member : group.members)
      if (!member.empty() && member == leaf) return name.substr(0, last) + std::string(group.fused);
  return name;
}

std::vector<std::string> spellings(const std::string& name) {
  const std::string fused = fused_name(name);
  return fused == name ? std::vector{name} : std::vector{name, fused};
}

std::vector<InnerName> by_inner_name(const std::vector<ModuleChoice>& modules) {
  std::vector<InnerName> names;
  for (const ModuleChoice& module : modules) {
    const ModuleName name = parse_module(module.module);
    if (name.block < 0) continue;
    auto at = std::find_if(names.begin(), names.end(),
                           [&](const InnerName& n) { return n.inner == name.inner; });
    if (at == names.end()) at = names.insert(at, {name.inner, {}});
    at->modules.push_back(&module);
  }
  return names;
}

std::string regex_escape(const std::string& text) {
  std::string out;
  for (char c : text) {
    if (std::string_view(R"(\^$.|?*+()[]{})").find(c) != std::string_view::npos) out += '\\';
    out += c;
  }
  return out;
}

std::string scheme_text(const ModuleChoice& choice) {
  if (!choice.quantized) return "float";
  return fmt::format("{} bits, group_size={}, symmetric={}", choice.bits, choice.group_size,
                     choice.symmetric);
}

bool same_scheme(const ModuleChoice& a, const ModuleChoice& b) {
  if (!a.quantized || !b.quantized) return a.quantized == b.quantized;
  return a.bits == b.bits && a.group_size == b.group_size && a.symmetric == b.symmetric;
}

void check_fused(const std::vector<ModuleChoice>& modules, const std::string& format) {
  std::map<std::string, const ModuleChoice*> first;
  for (const ModuleChoice& module : modules) {
    const auto [at, added] = first.emplace(fused_name(module.module), &module);
    if (!added && !same_scheme(*at->second, module))
      fail(ExitCode::kUsage,
           "output.format={}: engines load {} and {} as one matrix, so both need one scheme: found "
           "{} and {}; write a "
           "quantize.rule that covers both",
           format, at->second->module, module.module, scheme_text(*at->second),
           scheme_text(module));
  }
}

void check_one_scheme(const std::vector<ModuleChoice>& modules, const std::string& format) {
  const ModuleChoice* first = nullptr;
  for (const ModuleChoice& module : modules) {
    if (!module.quantized) continue;
    if (first == nullptr) first = &module;
    if (!same_scheme(*first, module))
      fail(ExitCode::kUsage,
           "output.format={} writes one scheme for all linears, but {} has {} and {} has {}; use "
           "output.format=gptq or gptq_v2 for mixed settings",
           format, first->module, scheme_text(*first), module.module, scheme_text(module));
  }
}

std::vector<std::vector<std::string>> quantized_inner_names(
    const std::vector<ModuleChoice>& modules) {
  std::vector<std::string> groups;
  std::vector<std::vector<std::string>> names;
  for (const ModuleChoice& module : modules) {
    const ModuleName name = parse_module(module.module);
    if (!module.quantized || name.block < 0) continue;
    const std::string group = fused_name(name.inner);
    const size_t at =
        static_cast<size_t>(std::find(groups.begin(), groups.end(), group) - groups.begin());
    if (at == groups.size()) {
      groups.push_back(group);
      names.emplace_back();
    }
    if (std::find(names[at].begin(), names[at].end(), name.inner) == names[at].end())
      names[at].push_back(name.inner);
  }
  return names;
}

ModuleChoice most_common_scheme(const std::vector<ModuleChoice>& modules) {
  std::vector<std::pair<const ModuleChoice*, int64_t>> counts;
  for (const ModuleChoice& module : modules) {
    if (!module.quantized) continue;
    auto at = std::find_if(counts.begin(), counts.end(),
                           [&](auto& c) { return same_scheme(*c.first, module); });
    if (at == counts.end()) at = counts.insert(at, {&module, 0});
    ++at->second;
  }
  if (counts.empty()) return {};
  return *std::max_element(counts.begin(), counts.end(), [](auto& a, auto& b) {
            return a.second < b.second;
          })->first;
}

}  // namespace bitmill
