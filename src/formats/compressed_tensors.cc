// compressed-tensors "pack-quantized": tensors and config text
// (docs/formats/compressed_tensors.md).
#include "formats/compressed_tensors.h"

#include <algorithm>
#include <cstring>

#include "formats/bitstream.h"
#include "formats/config_text.h"
#include "formats/module_names.h"
#include "formats/stored_tensors.h"

namespace bitmill {
namespace {

constexpr const char* kThreeBits =
    ": its 3-bit packing differs between versions of the library, so a file would load wrongly in "
    "some; use "
    "output.format=gptq or gptq_v2";

void check_width(const LinearSpec& linear, int bits) {
  check_bits("compressed-tensors", linear, bits, {2, 4, 8}, bits == 3 ? kThreeBits : "");
}

// "re:REGEX" matches from the start of the name, anything else is the whole name.
bool matches_name(const std::string& pattern, const std::string& module) {
  return pattern.starts_with("re:") ? starts_match(pattern.substr(3), module) : pattern == module;
}

bool any_matches(const Json& config, const char* key, const std::string& module) {
  const auto list = config.find(key);
  if (list == config.end() || !list->is_array()) return false;
  return std::any_of(list->begin(), list->end(), [&](const Json& item) {
    return item.is_string() && matches_name(item.get<std::string>(), module);
  });
}

bool targets_linears(const Json& group) {
  const auto targets = group.find("targets");
  return targets != group.end() && targets->is_array() &&
         std::find(targets->begin(), targets->end(), "Linear") != targets->end();
}

// The `weights` object that applies to a module: a group that names it comes before one for the
// class Linear.
const Json* weights_of(const Json& config, const std::string& module) {
  const auto groups = config.find("config_groups");
  if (groups == config.end() || !groups->is_object() || any_matches(config, "ignore", module))
    return nullptr;
  const Json* chosen = nullptr;
  for (const Json& group : *groups) {
    if (!group.contains("weights") || !group["weights"].is_object()) continue;
    if (any_matches(group, "targets", module)) return &group["weights"];
    if (targets_linears(group) && chosen == nullptr) chosen = &group["weights"];
  }
  return chosen;
}

// A source's bias may have another type than config.json says of the model; loaders read all floats
// of a model as one type.
Tensor stored_bias(const LinearSpec& linear, TensorView bias, DType dtype) {
  if (dtype == DType::kF16) return as_f16(bias, linear.bias_name(), false);
  Tensor stored(dtype, bias.shape);
  convert(bias, stored);
  return stored;
}

// The keys that a group's weights object may have: the library refuses others.
constexpr const char* kWeightKeys[] = {
    "num_bits", "type",     "symmetric", "strategy",        "group_size",  "block_structure",
    "dynamic",  "actorder", "observer",  "observer_kwargs", "scale_dtype", "zp_dtype"};

void check_group(const Json& group, std::vector<std::string>& found) {
  if (!group.is_object() || !group.contains("weights") || !group["weights"].is_object()) {
    found.push_back("a group of config_groups has no weights object");
    return;
  }
  const Json& weights = group["weights"];
  for (const auto& [key, value] : weights.items())
    if (std::find(std::begin(kWeightKeys), std::end(kWeightKeys), key) == std::end(kWeightKeys))
      found.push_back(
          fmt::format("config_groups weights has the key {}, which loaders refuse", key));
  if (group.contains("input_activations") && !group["input_activations"].is_null())
    found.push_back(
        "config_groups input_activations is not null, expected weight-only quantization");
  const Json strategy = weights.value("strategy", Json());
  if (strategy != "group" && strategy != "channel")
    found.push_back(fmt::format("config_groups strategy is {}, expected \"group\" or \"channel\"",
                                strategy.dump()));
  const Json order = weights.value("actorder", Json());
  if (!order.is_null() && order != "static" && order != "weight")
    found.push_back(
        fmt::format("config_groups actorder is {}, which current loaders refuse", order.dump()));
}

}  // namespace

void CompressedTensorsFormat::check(const LinearSpec& linear,
                                    const QuantizeSettings& settings) const {
  if (settings.skip) return;
  check_width(linear, settings.bits);
  check_group_size(name(), linear, settings.group_size);
  check_no_scatter(name(), linear, settings);
}

void CompressedTensorsFormat::check_model(const std::vector<ModuleChoice>& modules) const {
  check_fused(modules, name());
  check_one_scheme(modules, name());
}

std::vector<NamedTensor> CompressedTensorsFormat::pack(const LinearSpec& linear,
                                                       const QuantizedLinear& quantized,
                                                       TensorView bias) const {
  const int bits = quantized.bits;
  check_width(linear, bits);
  check_group_size(name(), linear, quantized.group_size);
  check_quantized(linear, quantized);
  check_sequential(name(), linear, quantized);
  const int64_t out = linear.out, in = linear.in, groups = quantized.groups();

  // Codes are stored as signed code + 2^(bits-1), which is our unsigned code; zero points alike.
  Tensor packed(DType::kI32, {out, packed_words(in, bits)});
  pack_rows(quantized.codes.as<uint8_t>(), out, in, bits, packed.as<int32_t>());
  Tensor shape(DType::kI64, {2});
  shape.as<int64_t>()[0] = out;
  shape.as<int64_t>()[1] = in;

  std::vector<NamedTensor> tensors;
  tensors.push_back({linear.module + ".weight_packed", std::move(packed)});
  tensors.push_back({linear.module + ".weight_scale", clone(quantized.scales)});
  tensors.push_back({linear.module + ".weight_shape", std::move(shape)});
  if (quantized.symmetric) {
    const uint8_t* zeros = quantized.zeros.as<uint8_t>();
    for (int64_t i = 0; i < quantized.zeros.elements(); ++i)
      if (zeros[i] != 1 << (bits - 1))
        fail(ExitCode::kInput, "{}: row {}, group {} is symmetric with zero point {}, expected {}",
             linear.module, i / groups, i % groups, zeros[i], 1 << (bits - 1));
  } else {
    const Tensor by_group = transposed(quantized.zeros);
    Tensor zero_point(DType::kI32, {packed_words(out, bits), groups});
    pack_rows_transposed(by_group.as<uint8_t>(), groups, out, bits, zero_point.as<int32_t>());
    tensors.push_back({linear.module + ".weight_zero_point", std::move(zero_point)});
  }
  if (bias.data != nullptr)
    tensors.push_back({linear.bias_name(), stored_bias(linear, bias, quantized.scales.dtype())});
  return tensors;
}

std::vector<PackedSpec> CompressedTensorsFormat::packed_specs(const LinearSpec& linear,
                                                              const QuantizeSettings& settings,
                                                              DType model_dtype) const {
  const int64_t groups = group_count(linear.in, settings.group_size);
  std::vector<PackedSpec> specs = {
      {linear.module + ".weight_packed",
       DType::kI32,
       {linear.out, packed_words(linear.in, settings.bits)}},
      {linear.module + ".weight_scale", scale_dtype(model_dtype), {linear.out, groups}},
      {linear.module + ".weight_shape", DType::kI64, {2}}};
  if (!settings.symmetric)
    specs.push_back({linear.module + ".weight_zero_point",
                     DType::kI32,
                     {packed_words(linear.out, settings.bits), groups}});
  if (linear.bias) specs.push_back({linear.bias_name(), model_dtype, {linear.out}});
  return specs;
}

bool CompressedTensorsFormat::holds(const Checkpoint& checkpoint, const LinearSpec& linear) const {
  return checkpoint.find(linear.module + ".weight_packed") != nullptr;
}

QuantizedLinear CompressedTensorsFormat::unpack(const Checkpoint& checkpoint,
                                                const LinearSpec& linear,
                                                const Json& config) const {
  QuantizedLinear quantized = described(*this, checkpoint, linear, config);
  const int bits = quantized.bits;
  const std::string& module = linear.module;
  const int64_t out = linear.out, in = linear.in, groups = group_count(in, quantized.group_size);
  const Tensor shape = read_stored(checkpoint, module + ".weight_shape", {DType::kI64}, {2});
  if (shape.as<int64_t>()[0] != out || shape.as<int64_t>()[1] != in)
    fail(ExitCode::kInput, "tensor {}.weight_shape holds [{}, {}], expected [{}, {}]", module,
         shape.as<int64_t>()[0], shape.as<int64_t>()[1], out, in);
  const Tensor packed = read_stored(checkpoint, module + ".weight_packed", {DType::kI32},
                                    {out, packed_words(in, bits)});

  quantized.codes = Tensor(DType::kU8, {out, in});
  unpack_rows(packed.as<int32_t>(), out, in, bits, quantized.codes.as<uint8_t>());
  quantized.scales = read_stored(checkpoint, module + ".weight_scale",
                                 {DType::kF16, DType::kBF16, DType::kF32}, {out, groups});
  if (quantized.symmetric) {
    quantized.zeros = Tensor(DType::kU8, {out, groups});
    std::memset(quantized.zeros.data(), 1 << (bits - 1),
                static_cast<size_t>(quantized.zeros.bytes()));
  } else {
    const Tensor zero_point = read_stored(checkpoint, module + ".weight_zero_point", {DType::kI32},
                                          {packed_words(out, bits), groups});
    Tensor by_group(DType::kU8, {groups, out});
    unpack_rows_transposed(zero_point.as<int32_t>(), groups, out, bits, by_group.as<uint8_t>());
    quantized.zeros = transposed(by_group);
  }
  quantized.g_idx = make_group_index(in, quantized.group_size);
  if (checkpoint.find(module + ".weight_g_idx") != nullptr) {  // older files with act-order groups
    quantized.g_idx = read_stored(checkpoint, module + ".weight_g_idx", {DType::kI32}, {in});
    check_group_index(quantized.g_idx, groups, module + ".weight_g_idx");
  }
  return quantized;
}

bool CompressedTensorsFormat::matches(const Json& config) const {
  return config.value("quant_method", Json()) == "compressed-tensors" &&
         config.value("format", Json("pack-quantized")) == "pack-quantized";
}

FormatConfig CompressedTensorsFormat::config(const RunOptions::Quantize&,
                                             const std::vector<ModuleChoice>& modules) const {
  const ModuleChoice base = most_common_scheme(modules);
  OrderedJson weights;
  weights["num_bits"] = base.bits;
  weights["type"] = "int";
  weights["symmetric"] = base.symmetric;
  weights["strategy"] = base.group_size == -1 ? "channel" : "group";
  weights["group_size"] = base.group_size == -1 ? OrderedJson() : OrderedJson(base.group_size);
  weights["block_structure"] = nullptr;
  weights["dynamic"] = false;
  // Static act order leaves no trace in the groups; every version of the library reads null, not
  // every one "static".
  weights["actorder"] = nullptr;
  weights["observer"] = "minmax";
  weights["observer_kwargs"] = OrderedJson::object();

  OrderedJson ignore = OrderedJson::array();
  bool head_listed = false;
  for (const ModuleChoice& module : modules) {
    if (module.module == "lm_head") head_listed = true;
    if (!module.quantized) ignore.push_back(module.module);
  }
  if (!head_listed) ignore.insert(ignore.begin(), "lm_head");

  FormatConfig result;
  OrderedJson& json = result.quantization_config;
  json["quant_method"] = "compressed-tensors";
  json["format"] = "pack-quantized";
  json["quantization_status"] = "compressed";
  json["config_groups"]["group_0"] = {{"targets", OrderedJson::array({"Linear"})},
                                      {"input_activations", nullptr},
                                      {"output_activations", nullptr},
                                      {"weights", weights}};
  json["ignore"] = std::move(ignore);
  json["kv_cache_scheme"] = nullptr;
  json["global_compression_ratio"] = nullptr;
  return result;
}

ModuleChoice CompressedTensorsFormat::configured(const Json& config,
                                                 const std::string& module) const {
  ModuleChoice choice;
  choice.module = module;
  const Json* weights = weights_of(config, module);
  if (weights == nullptr) {
    choice.quantized = false;
    return choice;
  }
  if (weights->value("type", Json("int")) != "int")
    fail(ExitCode::kInput, "config.json: quantization_config type is {} for {}, expected \"int\"",
         (*weights)["type"].dump(), module);
  choice.bits = static_cast<int>(config_integer(*weights, "num_bits"));
  choice.symmetric = config_bool(*weights, "symmetric", true);
  const bool grouped = weights->contains("group_size") && !(*weights)["group_size"].is_null();
  choice.group_size = grouped ? config_integer(*weights, "group_size") : -1;
  check_configured(choice, "num_bits", {2, 4, 8});
  return choice;
}

std::vector<std::string> CompressedTensorsFormat::config_violations(
    const Json& config, const std::vector<ModuleChoice>& modules) const {
  std::vector<std::string> found;
  expect_text(config, "quant_method", "compressed-tensors", found);
  expect_text(config, "format", "pack-quantized", found);
  expect_text(config, "quantization_status", "compressed", found);
  const Json groups = config.value("config_groups", Json::object());
  if (!groups.is_object() || groups.empty()) {
    found.push_back("quantization_config.config_groups is missing or empty");
    return found;
  }
  for (const Json& group : groups) check_group(group, found);
  compare_with_disk(*this, config, modules, found);
  const bool head_quantized = std::any_of(modules.begin(), modules.end(), [](const auto& module) {
    return module.module == "lm_head" && module.quantized;
  });
  if (!head_quantized && configured(config, "lm_head").quantized)
    found.push_back("lm_head is float but not on the ignore list, and the target Linear claims it");
  return found;
}

}  // namespace bitmill
