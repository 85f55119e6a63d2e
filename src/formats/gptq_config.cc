// GPTQ config text: quantization_config of config.json and the equal quantize_config.json
// (docs/formats/gptq.md).
#include <algorithm>
#include <regex>
#include <set>

#include "formats/gptq.h"
#include "formats/module_names.h"
#include "formats/stored_tensors.h"

namespace bitmill {
namespace {

// What one inner name ("mlp.down_proj") is in the blocks that have it.
struct InnerName {
  std::string inner;
  std::vector<const ModuleChoice*> modules;
};

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

// Pattern of one module, or of one inner name in every block, under its own and, if it has one, its
// fused spelling: engines match `dynamic` against the names that they load, and some load q, k and
// v as qkv_proj.
std::vector<std::string> patterns(const ModuleChoice& module, bool every_block) {
  const ModuleName name = parse_module(module.module);
  const std::string block = every_block ? R"(\d+)" : std::to_string(name.block);
  std::vector<std::string> texts;
  for (const std::string& inner : {name.inner, fused_name(name.inner)}) {
    const std::string text =
        fmt::format("^{}{}\\.{}$", regex_escape(name.prefix), block, regex_escape(inner));
    if (texts.empty() || texts.front() != text) texts.push_back(text);
  }
  return texts;
}

// Rules for what differs from the base scheme: "-:REGEX" leaves modules in float, "+:REGEX" gives
// them another scheme.
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

bool starts_match(const std::string& pattern, const std::string& module) {
  try {
    return std::regex_search(module, std::regex(pattern), std::regex_constants::match_continuous);
  } catch (const std::regex_error&) {
    fail(ExitCode::kInput,
         "config.json: quantization_config.dynamic has a regex that cannot be read: {}", pattern);
  }
}

// The names of modules_in_block_to_quantize, flat; empty when absent.
std::vector<std::string> listed_names(const Json& config) {
  std::vector<std::string> names;
  const auto list = config.find("modules_in_block_to_quantize");
  if (list == config.end() || !list->is_array()) return names;
  for (const Json& item : *list) {
    if (item.is_string()) names.push_back(item.get<std::string>());
    if (!item.is_array()) continue;
    for (const Json& inner : item)
      if (inner.is_string()) names.push_back(inner.get<std::string>());
  }
  return names;
}

bool ends_with_name(const std::string& module, const std::string& name) {
  return module == name || (module.size() > name.size() && module.ends_with(name) &&
                            module[module.size() - name.size() - 1] == '.');
}

// Applies the first matching rule of `dynamic`.
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

void expect_text(const Json& config, const char* key, const std::string& expected,
                 std::vector<std::string>& found) {
  const auto at = config.find(key);
  if (at == config.end() || *at != expected)
    found.push_back(fmt::format("quantization_config.{} is {}, expected \"{}\"", key,
                                at == config.end() ? "missing" : at->dump(), expected));
}

}  // namespace

bool GptqFormat::matches(const Json& config) const {
  if (config.value("quant_method", Json()) != "gptq") return false;
  for (const char* key : {"checkpoint_format", "format"})
    if (const auto at = config.find(key); at != config.end() && at->is_string())
      return *at == name();
  return version_ == 1;
}

void GptqFormat::check_model(const std::vector<ModuleChoice>& modules) const {
  check_one_symmetry(name(), modules);
  check_fused(modules, name());
  for (const InnerName& inner : by_inner_name(modules))
    for (const ModuleChoice* module : inner.modules)
      if (module->quantized != inner.modules.front()->quantized)
        fail(ExitCode::kUsage,
             "output.format={} lists the quantized linears once for all blocks, so {} must be "
             "float in every block or in "
             "none: found {} for {} and {} for {}",
             name(), inner.inner, scheme_text(*inner.modules.front()),
             inner.modules.front()->module, scheme_text(*module), module->module);
}

FormatConfig GptqFormat::config(const RunOptions::Quantize& settings,
                                const std::vector<ModuleChoice>& modules) const {
  const ModuleChoice base = most_common_scheme(modules);
  const bool dynamic_order =
      std::any_of(modules.begin(), modules.end(), [](const ModuleChoice& module) {
        return module.quantized && module.act_order == ActOrder::kDynamic;
      });
  const bool head = std::any_of(modules.begin(), modules.end(), [](const ModuleChoice& module) {
    return module.quantized && parse_module(module.module).block < 0;
  });
  // Loaders accept a fraction strictly between 0 and 1 only; other values are left to `meta`.
  const bool usual_damp = settings.damp > 0 && settings.damp < 1;

  OrderedJson json;
  json["quant_method"] = "gptq";
  json["bits"] = base.bits;
  json["group_size"] = base.group_size;
  json["desc_act"] = dynamic_order || settings.act_order == ActOrder::kDynamic;
  json["sym"] = base.symmetric;
  json["lm_head"] = head;
  json["checkpoint_format"] = name();
  json["format"] = name();
  json["pack_dtype"] = "int32";
  if (usual_damp) json["damp_percent"] = settings.damp;
  json["static_groups"] = settings.act_order == ActOrder::kStatic;
  json["true_sequential"] = settings.true_sequential;
  json["modules_in_block_to_quantize"] = quantized_inner_names(modules);
  if (OrderedJson rules = dynamic_rules(modules, base); !rules.empty())
    json["dynamic"] = std::move(rules);
  json["meta"] = {{"quantizer", OrderedJson::array({"bitmill:" BITMILL_VERSION})},
                  {"algorithm", settings.algorithm},
                  {"act_order", act_order_name(settings.act_order)},
                  {"damp_percent", settings.damp},
                  {"static_groups", settings.act_order == ActOrder::kStatic},
                  {"true_sequential", settings.true_sequential}};
  FormatConfig result;
  result.files.emplace_back(config_file(), json.dump(2) + "\n");
  result.quantization_config = std::move(json);
  return result;
}

ModuleChoice GptqFormat::configured(const Json& config, const std::string& module) const {
  ModuleChoice choice;
  choice.module = module;
  choice.bits = static_cast<int>(config_integer(config, "bits"));
  choice.group_size = config_integer(config, "group_size");
  choice.symmetric = config_bool(config, "sym", true);
  if (config_bool(config, "desc_act", false)) choice.act_order = ActOrder::kDynamic;
  const std::vector<std::string> listed = listed_names(config);
  if (parse_module(module).block < 0)
    choice.quantized = config_bool(config, "lm_head", false);
  else if (!listed.empty())
    choice.quantized = std::any_of(listed.begin(), listed.end(), [&](const std::string& name) {
      return ends_with_name(module, name);
    });
  apply_dynamic(config, choice);
  if (choice.quantized && choice.bits != 2 && choice.bits != 3 && choice.bits != 4 &&
      choice.bits != 8)
    fail(ExitCode::kInput,
         "config.json: quantization_config.bits is {} for {}, expected 2, 3, 4 or 8", choice.bits,
         module);
  if (choice.group_size != -1 && choice.group_size < 1)
    fail(ExitCode::kInput,
         "config.json: quantization_config.group_size is {} for {}, expected -1 or a positive "
         "number",
         choice.group_size, module);
  return choice;
}

std::vector<std::string> GptqFormat::config_violations(
    const Json& config, const std::vector<ModuleChoice>& modules) const {
  std::vector<std::string> found;
  expect_text(config, "quant_method", "gptq", found);
  expect_text(config, "checkpoint_format", name(), found);
  if (config.contains("format")) expect_text(config, "format", name(), found);
  for (const char* key : {"bits", "group_size"})
    if (!config.contains(key) || !config[key].is_number_integer())
      found.push_back(
          fmt::format("quantization_config.{} is missing or no integer, engines need it", key));
  for (const char* key : {"desc_act", "sym"})
    if (!config.contains(key) || !config[key].is_boolean())
      found.push_back(fmt::format(
          "quantization_config.{} is missing or neither true nor false, engines need it", key));
  if (config.contains("is_marlin_format"))
    found.push_back("quantization_config.is_marlin_format is refused by GPTQModel");
  if (!found.empty()) return found;
  if (version_ == 1 && !config["sym"].get<bool>())
    found.push_back(
        "quantization_config: format gptq with sym=false is refused by GPTQModel, expected "
        "gptq_v2");
  for (const ModuleChoice& module : modules) {
    const bool in_block = parse_module(module.module).block >= 0;
    if (!module.quantized && in_block)
      for (const char* key : {"dynamic", "modules_in_block_to_quantize"})
        if (!config.contains(key) || config[key].empty())
          found.push_back(
              fmt::format("{} is float, but quantization_config has no {}, by which loaders know",
                          module.module, key));
    if (const ModuleChoice says = configured(config, module.module); !same_scheme(says, module))
      found.push_back(fmt::format("{} is {} on disk, quantization_config says {}", module.module,
                                  scheme_text(module), scheme_text(says)));
  }
  return found;
}

}  // namespace bitmill
