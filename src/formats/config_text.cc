#include "formats/config_text.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <regex>

#include "formats/module_names.h"

namespace bitmill {
namespace {

// Patterns of one module, or of one inner name in every block, under its own and, if it has one,
// its fused spelling: engines match `dynamic` against the names that they load, and some load q, k
// and v as qkv_proj.
std::vector<std::string> patterns(const ModuleChoice& module, bool every_block) {
  const ModuleName name = parse_module(module.module);
  const std::string block = every_block ? R"(\d+)" : std::to_string(name.block);
  std::vector<std::string> texts;
  for (const std::string& inner : spellings(name.inner))
    texts.push_back(
        fmt::format("^{}{}\\.{}$", regex_escape(name.prefix), block, regex_escape(inner)));
  return texts;
}

}  // namespace

OrderedJson dynamic_rules(const std::vector<ModuleChoice>& modules, const ModuleChoice& base) {
  OrderedJson rules = OrderedJson::object();
  for (const InnerName& name : by_inner_name(modules)) {
    const bool alike = std::all_of(
        name.modules.begin(), name.modules.end(),
        [&](const ModuleChoice* module) { return same_scheme(*module, *name.modules.front()); });
    for (const ModuleChoice* module : name.modules) {
      if (module->quantized && same_scheme(*module, base)) continue;
      for (const std::string& pattern : patterns(*module, alike)) {
        if (module->quantized)
          rules["+:" + pattern] = {{"bits", module->bits}, {"group_size", module->group_size}};
        else
          rules["-:" + pattern] = OrderedJson::object();
      }
      if (alike) break;
    }
  }
  for (const ModuleChoice& module : modules)  // the head: `lm_head` says whether, a rule says how
    if (parse_module(module.module).block < 0 && module.quantized && !same_scheme(module, base))
      rules["+:^" + regex_escape(module.module) + "$"] = {{"bits", module.bits},
                                                          {"group_size", module.group_size}};
  return rules;
}

OrderedJson meta_object(const RunOptions::Quantize& settings) {
  return {{"quantizer", OrderedJson::array({"bitmill:" BITMILL_VERSION})},
          {"algorithm", settings.algorithm},
          {"act_order", act_order_name(settings.act_order)},
          {"damp_percent", settings.damp},
          {"static_groups", settings.act_order == ActOrder::kStatic},
          {"true_sequential", settings.true_sequential}};
}

int64_t config_integer(const Json& config, const char* key) {
  const auto at = config.find(key);
  if (at == config.end() || !at->is_number_integer())
    fail(ExitCode::kInput, "config.json: quantization_config.{} is {}, expected an integer", key,
         at == config.end() ? "missing" : at->dump());
  return at->get<int64_t>();
}

bool config_bool(const Json& config, const char* key, bool absent) {
  const auto at = config.find(key);
  if (at == config.end() || at->is_null()) return absent;
  if (!at->is_boolean())
    fail(ExitCode::kInput, "config.json: quantization_config.{} is {}, expected true or false", key,
         at->dump());
  return at->get<bool>();
}

bool starts_match(const std::string& regex, const std::string& module) {
  try {
    return std::regex_search(module, std::regex(regex), std::regex_constants::match_continuous);
  } catch (const std::regex_error&) {
    fail(ExitCode::kInput, "config.json: quantization_config has a regex that cannot be read: {}",
         regex);
  }
}

bool ends_with_name(const std::string& module, const std::string& name) {
  return module == name || (module.size() > name.size() && module.ends_with(name) &&
                            module[module.size() - name.size() - 1] == '.');
}

void apply_dynamic(const Json& config, ModuleChoice& choice) {
  const auto rules = config.find("dynamic");
  if (rules == config.end() || !rules->is_object()) return;
  for (const auto& [key, value] : rules->items()) {
    const bool signed_key = key.starts_with("-:") || key.starts_with("+:");
    if (!starts_match(signed_key ? key.substr(2) : key, choice.module)) continue;
    if (key.starts_with("-:")) {
      choice.quantized = false;
    } else {
      if (value.contains("bits")) choice.bits = static_cast<int>(config_integer(value, "bits"));
      if (value.contains("group_size")) choice.group_size = config_integer(value, "group_size");
      choice.symmetric = config_bool(value, "sym", choice.symmetric);
    }
    return;
  }
}

void check_configured(const ModuleChoice& choice, const char* bits_key,
                      std::initializer_list<int> allowed) {
  if (!choice.quantized) return;
  if (std::find(allowed.begin(), allowed.end(), choice.bits) == allowed.end())
    fail(ExitCode::kInput, "config.json: quantization_config.{} is {} for {}, expected {}",
         bits_key, choice.bits, choice.module, fmt::join(allowed, " or "));
  if (choice.group_size != -1 && choice.group_size < 1)
    fail(ExitCode::kInput,
         "config.json: quantization_config.group_size is {} for {}, expected -1 or a positive "
         "number",
         choice.group_size, choice.module);
}

void expect_text(const Json& config, const char* key, const std::string& expected,
                 std::vector<std::string>& found) {
  const auto at = config.find(key);
  if (at == config.end() || *at != expected)
    found.push_back(fmt::format("quantization_config.{} is {}, expected \"{}\"", key,
                                at == config.end() ? "missing" : at->dump(), expected));
}

void expect_integer(const Json& config, const char* key, std::vector<std::string>& found) {
  if (!config.contains(key) || !config[key].is_number_integer())
    found.push_back(
        fmt::format("quantization_config.{} is missing or no integer, engines need it", key));
}

void expect_bool(const Json& config, const char* key, std::vector<std::string>& found) {
  if (!config.contains(key) || !config[key].is_boolean())
    found.push_back(fmt::format(
        "quantization_config.{} is missing or neither true nor false, engines need it", key));
}

void compare_with_disk(const OutputFormat& format, const Json& config,
                       const std::vector<ModuleChoice>& modules, std::vector<std::string>& found) {
  for (const ModuleChoice& module : modules)
    if (const ModuleChoice says = format.configured(config, module.module);
        !same_scheme(says, module))
      found.push_back(fmt::format("{} is {} on disk, quantization_config says {}", module.module,
                                  scheme_text(module), scheme_text(says)));
}

}  // namespace bitmill
