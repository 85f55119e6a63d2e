// GPTQ config text: quantization_config of config.json and the equal quantize_config.json
// (docs/formats/gptq.md).
#include <algorithm>

#include "formats/config_text.h"
#include "formats/gptq.h"
#include "formats/module_names.h"
#include "formats/stored_tensors.h"

namespace bitmill {
namespace {

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
  json["desc_act"] = dynamic_order;
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
  json["meta"] = meta_object(settings);
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
  check_configured(choice, "bits", {2, 3, 4, 8});
  return choice;
}

std::vector<std::string> GptqFormat::config_violations(
    const Json& config, const std::vector<ModuleChoice>& modules) const {
  std::vector<std::string> found;
  expect_text(config, "quant_method", "gptq", found);
  expect_text(config, "checkpoint_format", name(), found);
  if (config.contains("format")) expect_text(config, "format", name(), found);
  for (const char* key : {"bits", "group_size"}) expect_integer(config, key, found);
  for (const char* key : {"desc_act", "sym"}) expect_bool(config, key, found);
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
  }
  compare_with_disk(*this, config, modules, found);
  return found;
}

}  // namespace bitmill
