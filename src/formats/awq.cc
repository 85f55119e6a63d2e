// AWQ "gemm": tensors and config text (docs/formats/awq.md).
#include "formats/awq.h"

#include <algorithm>
#include <cstring>

#include "formats/bitstream.h"
#include "formats/config_text.h"
#include "formats/module_names.h"
#include "formats/stored_tensors.h"

namespace bitmill {
namespace {

constexpr int kBits = 4;
constexpr int64_t kPerWord = 8;
// Nibble n of word c holds output row 8 c + kOrder[n].
constexpr int64_t kOrder[kPerWord] = {0, 2, 4, 6, 1, 3, 5, 7};

void copy_row(Tensor& to, int64_t to_row, const Tensor& from, int64_t from_row) {
  const size_t cols = static_cast<size_t>(from.cols());
  std::memcpy(to.as<uint8_t>() + to_row * to.cols(), from.as<uint8_t>() + from_row * from.cols(),
              cols);
}

// U8 [out, n] -> words I32 [n, out / 8].
Tensor interleaved_words(const Tensor& values) {
  const int64_t out = values.rows(), n = values.cols();
  Tensor shuffled(DType::kU8, values.shape());
  for (int64_t r = 0; r < out; ++r)
    copy_row(shuffled, r, values, r / kPerWord * kPerWord + kOrder[r % kPerWord]);
  Tensor words(DType::kI32, {n, out / kPerWord});
  pack_rows(transposed(shuffled).as<uint8_t>(), n, out, kBits, words.as<int32_t>());
  return words;
}

// The inverse: words I32 [n, out / 8] -> U8 [out, n].
Tensor separated_values(const Tensor& words) {
  const int64_t n = words.rows(), out = words.cols() * kPerWord;
  Tensor by_column(DType::kU8, {n, out});
  unpack_rows(words.as<int32_t>(), n, out, kBits, by_column.as<uint8_t>());
  const Tensor shuffled = transposed(by_column);
  Tensor values(DType::kU8, {out, n});
  for (int64_t r = 0; r < out; ++r)
    copy_row(values, r / kPerWord * kPerWord + kOrder[r % kPerWord], shuffled, r);
  return values;
}

void check_words(const LinearSpec& linear, int bits) {
  check_bits("awq", linear, bits, {kBits}, "; output.format=gptq or gptq_v2 stores other widths");
  if (linear.out % kPerWord != 0)
    fail(ExitCode::kUsage,
         "output.format=awq packs {} output rows into a word, but {} has {}; leave it in float "
         "with quantize.rule=... skip=true, or use output.format=compressed-tensors",
         kPerWord, linear.module, linear.out);
}

// Modules left in float, in their own and their fused spelling: engines compare with the names that
// they load, and some load q, k and v as qkv_proj.
OrderedJson float_modules(const std::vector<ModuleChoice>& modules) {
  OrderedJson names = OrderedJson::array();
  for (const ModuleChoice& module : modules)
    if (!module.quantized)
      for (const std::string& spelling : spellings(module.module))
        if (std::find(names.begin(), names.end(), spelling) == names.end())
          names.push_back(spelling);
  return names;
}

// modules_to_not_convert is a list of parts of names: "mlp.gate" is in "model.layers.0.mlp.gate".
// A part ends at a dot or at the end of the name, so that it is not also in "mlp.gate_proj".
bool names_part(const std::string& part, const std::string& module) {
  for (size_t at = module.find(part); at != std::string::npos; at = module.find(part, at + 1)) {
    const size_t end = at + part.size();
    if (end == module.size() || module[end] == '.') return true;
  }
  return false;
}

bool left_in_float(const Json& config, const std::string& module) {
  const auto list = config.find("modules_to_not_convert");
  if (list == config.end() || !list->is_array()) return false;
  return std::any_of(list->begin(), list->end(), [&](const Json& item) {
    return item.is_string() && names_part(item.get<std::string>(), module);
  });
}

// AutoAWQ's older spellings of a key.
const char* spelled(const Json& config, const char* key, const char* older) {
  return !config.contains(key) && config.contains(older) ? older : key;
}

}  // namespace

void AwqFormat::check(const LinearSpec& linear, const QuantizeSettings& settings) const {
  if (settings.skip) return;
  if (parse_module(linear.module).block < 0)
    fail(ExitCode::kUsage,
         "output.format=awq: loaders keep {} in float; leave quantize.lm_head=false, or use "
         "output.format=gptq, gptq_v2 or compressed-tensors",
         linear.module);
  check_words(linear, settings.bits);
  check_group_size(name(), linear, settings.group_size);
  check_no_scatter(name(), linear, settings);
}

void AwqFormat::check_model(const std::vector<ModuleChoice>& modules) const {
  check_fused(modules, name());
  check_one_scheme(modules, name());
}

std::vector<NamedTensor> AwqFormat::pack(const LinearSpec& linear, const QuantizedLinear& quantized,
                                         TensorView bias) const {
  check_words(linear, quantized.bits);
  check_quantized(linear, quantized);
  check_sequential(name(), linear, quantized);
  std::vector<NamedTensor> tensors;
  tensors.push_back({linear.module + ".qweight", interleaved_words(quantized.codes)});
  tensors.push_back({linear.module + ".qzeros", interleaved_words(quantized.zeros)});
  tensors.push_back({linear.module + ".scales",
                     transposed(as_f16(quantized.scales, linear.module + " scales", true))});
  if (bias.data != nullptr)
    tensors.push_back({linear.bias_name(), as_f16(bias, linear.bias_name(), false)});
  return tensors;
}

std::vector<PackedSpec> AwqFormat::packed_specs(const LinearSpec& linear,
                                                const QuantizeSettings& settings, DType) const {
  const int64_t groups = group_count(linear.in, settings.group_size);
  std::vector<PackedSpec> specs = {
      {linear.module + ".qweight", DType::kI32, {linear.in, linear.out / kPerWord}},
      {linear.module + ".qzeros", DType::kI32, {groups, linear.out / kPerWord}},
      {linear.module + ".scales", DType::kF16, {groups, linear.out}}};
  if (linear.bias) specs.push_back({linear.bias_name(), DType::kF16, {linear.out}});
  return specs;
}

bool AwqFormat::holds(const Checkpoint& checkpoint, const LinearSpec& linear) const {
  return checkpoint.find(linear.module + ".qweight") != nullptr;
}

QuantizedLinear AwqFormat::unpack(const Checkpoint& checkpoint, const LinearSpec& linear,
                                  const Json& config) const {
  QuantizedLinear quantized = described(*this, checkpoint, linear, config);
  const std::string& module = linear.module;
  if (linear.out % kPerWord != 0)
    fail(ExitCode::kInput, "{}: {} has {} output rows, format awq holds multiples of {}",
         checkpoint.directory(), module, linear.out, kPerWord);
  const int64_t groups = group_count(linear.in, quantized.group_size);
  const Shape words({linear.in, linear.out / kPerWord});
  quantized.codes =
      separated_values(read_stored(checkpoint, module + ".qweight", {DType::kI32}, words));
  quantized.zeros = separated_values(
      read_stored(checkpoint, module + ".qzeros", {DType::kI32}, {groups, words[1]}));
  quantized.scales =
      transposed(read_stored(checkpoint, module + ".scales",
                             {DType::kF16, DType::kBF16, DType::kF32}, {groups, linear.out}));
  quantized.g_idx = make_group_index(linear.in, quantized.group_size);
  return quantized;
}

bool AwqFormat::matches(const Json& config) const {
  if (config.value("quant_method", Json()) != "awq") return false;
  const char* key = spelled(config, "version", "format");
  const Json version = config.value(key, Json("gemm"));
  return version == "gemm" || version == "GEMM";
}

FormatConfig AwqFormat::config(const RunOptions::Quantize& settings,
                               const std::vector<ModuleChoice>& modules) const {
  const ModuleChoice base = most_common_scheme(modules);
  FormatConfig result;
  OrderedJson& json = result.quantization_config;
  json["quant_method"] = "awq";
  json["version"] = "gemm";
  json["bits"] = kBits;
  json["group_size"] = base.group_size;
  // Zero points are always stored, 8 when symmetric. "false" would cost the fast kernel: engines
  // have none for AWQ words without zero points.
  json["zero_point"] = true;
  OrderedJson names = float_modules(modules);
  json["modules_to_not_convert"] = names.empty() ? OrderedJson() : std::move(names);
  if (OrderedJson rules = dynamic_rules(modules, base); !rules.empty())
    json["dynamic"] = std::move(rules);
  json["meta"] = meta_object(settings);
  json["meta"]["symmetric"] = base.symmetric;
  return result;
}

ModuleChoice AwqFormat::configured(const Json& config, const std::string& module) const {
  ModuleChoice choice;
  choice.module = module;
  choice.bits = static_cast<int>(config_integer(config, spelled(config, "bits", "w_bit")));
  choice.group_size = config_integer(config, spelled(config, "group_size", "q_group_size"));
  choice.symmetric = !config_bool(config, "zero_point", true);
  if (const auto meta = config.find("meta"); meta != config.end() && meta->is_object())
    choice.symmetric = config_bool(*meta, "symmetric", choice.symmetric);
  choice.quantized = parse_module(module).block >= 0 && !left_in_float(config, module);
  check_configured(choice, "bits", {kBits});
  return choice;
}

std::vector<std::string> AwqFormat::config_violations(
    const Json& config, const std::vector<ModuleChoice>& modules) const {
  std::vector<std::string> found;
  expect_text(config, "quant_method", "awq", found);
  expect_text(config, "version", "gemm", found);
  expect_integer(config, "bits", found);
  expect_integer(config, "group_size", found);
  expect_bool(config, "zero_point", found);
  if (!found.empty()) return found;
  for (const ModuleChoice& module : modules)
    if (!module.quantized && parse_module(module.module).block >= 0 &&
        !left_in_float(config, module.module))
      found.push_back(
          fmt::format("{} is float, but modules_to_not_convert does not name it, by which loaders "
                      "know",
                      module.module));
  compare_with_disk(*this, config, modules, found);
  return found;
}

}  // namespace bitmill
