#include "commands/verify_checks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "formats/stored_tensors.h"

namespace bitmill {
namespace fs = std::filesystem;
namespace {

std::vector<std::string> safetensors_in(const std::string& directory) {
  std::vector<std::string> names;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory))
    if (entry.path().extension() == ".safetensors")
      names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

void check_header(const std::string& path, int64_t& total, VerifyReport& report) {
  const std::string name = fs::path(path).filename().string();
  try {
    std::map<std::string, std::string> metadata;
    for (const TensorEntry& entry : read_safetensors_header(path, &metadata)) {
      total += entry.bytes;
      const int64_t alignment = std::clamp<int64_t>(dtype_bits(entry.dtype) / 8, 1, 8);
      if (entry.offset % alignment != 0)
        report.violation("{}: tensor {} begins at byte {}, not aligned to its dtype {}", name,
                         entry.name, entry.offset, dtype_name(entry.dtype));
    }
    if (metadata["format"] != "pt")
      report.violation("{}: __metadata__ has no \"format\": \"pt\", loaders expect it", name);
  } catch (const Error& error) {
    report.violations.push_back(error.what());
  }
}

// The shards that the index names, in order.
std::vector<std::string> check_index(const std::string& path, const Json& index,
                                     VerifyReport& report) {
  if (!index.contains("metadata"))
    report.violation("{}: the key metadata is missing, transformers needs it", path);
  std::set<std::string> files;
  if (const auto map = index.find("weight_map"); map != index.end() && map->is_object())
    for (const Json& file : *map)
      if (file.is_string()) files.insert(file.get<std::string>());
  int64_t number = 0;
  for (const std::string& file : files) {
    const std::string expected =
        fmt::format("model-{:05d}-of-{:05d}.safetensors", ++number, files.size());
    if (file != expected)
      report.violation("{}: a shard is named {}, expected {}", path, file, expected);
  }
  return {files.begin(), files.end()};
}

Tensor to_f32(TensorView values) {
  Tensor out(DType::kF32, values.shape);
  convert(values, out);
  return out;
}

bool packed(const VerifyInput& input, const LinearSpec& linear) {
  return input.format != nullptr && input.format->holds(input.checkpoint, linear);
}

// sum (scale * (code - zero) - w)^2 over a linear.
double squared_error(const float* w, const uint8_t* codes, const float* scales, const float* zeros,
                     const int32_t* g_idx, const Shape& shape, int64_t groups) {
  double sum = 0;
  for (int64_t o = 0; o < shape[0]; ++o)
    for (int64_t i = 0; i < shape[1]; ++i) {
      const int64_t group = o * groups + g_idx[i], at = o * shape[1] + i;
      const double e = scales[group] * (static_cast<float>(codes[at]) - zeros[group]) - w[at];
      sum += e * e;
    }
  return sum;
}

double squared_norm(const Tensor& w) {
  double sum = 0;
  for (int64_t i = 0; i < w.elements(); ++i) sum += double{w.as<float>()[i]} * w.as<float>()[i];
  return sum;
}

// Squared error of rounding `w` to nearest on the kind of grid that `q` has.
double nearest_error(const Tensor& w, const QuantizedLinear& q, Backend& backend) {
  const int64_t groups = group_count(w.cols(), q.group_size);
  Tensor scales(DType::kF32, {w.rows(), groups}), zeros(DType::kF32, {w.rows(), groups});
  Tensor columns(DType::kI32, {w.cols()}), codes(DType::kU8, w.shape());
  for (int64_t i = 0; i < w.cols(); ++i)
    columns.as<int32_t>()[i] = q.group_size == -1 ? 0 : static_cast<int32_t>(i / q.group_size);
  if (!backend.fit_grids(w, {q.bits, q.symmetric, false, DType::kF32}, q.group_size, {}, scales, zeros))
    return 0;
  backend.round_to_grid(w, scales, zeros, columns, q.bits, codes);
  backend.synchronize();
  return squared_error(w.as<float>(), codes.as<uint8_t>(), scales.as<float>(), zeros.as<float>(),
                       columns.as<int32_t>(), w.shape(), groups);
}

// The source's float weight of a linear, [out, in]; a source without a head of its own is tied.
// Empty when there is none.
Tensor source_weight(const VerifyInput& input, const LinearSpec& linear) {
  std::string name = linear.weight_name();
  if (linear.module == input.spec.head_linear().module && input.source->find(name) == nullptr)
    name = input.spec.embedding.name;
  const TensorEntry* entry = input.source->find(name);
  if (entry == nullptr || !(entry->shape == linear.stored_shape()) ||
      !is_source_float(entry->dtype))
    return {};
  Tensor w = to_f32(input.source->read(name));
  return linear.transposed ? transposed(w) : std::move(w);
}

// The bound is 3 times rounding to nearest: a calibrated solver moves single weights further than
// rounding does, but a wrong word order, zero point or group moves them by far more.
void compare_linear(const VerifyInput& input, const LinearSpec& linear, const QuantizedLinear& q,
                    VerifyReport& report) {
  if (input.folded.contains(linear.weight_name()))
    return;  // scaled by awq: another matrix, the same function
  const Tensor w = source_weight(input, linear);
  if (w.empty())
    return report.violation("{}: the source has no float tensor {} {}", linear.module,
                            linear.weight_name(), linear.stored_shape().text());
  const Tensor scales = to_f32(q.scales);
  Tensor zeros(DType::kF32, q.zeros.shape());
  for (int64_t i = 0; i < zeros.elements(); ++i) zeros.as<float>()[i] = q.zeros.as<uint8_t>()[i];
  const double norm = std::max(squared_norm(w), 1e-60);
  const double error =
      std::sqrt(squared_error(w.as<float>(), q.codes.as<uint8_t>(), scales.as<float>(),
                              zeros.as<float>(), q.g_idx.as<int32_t>(), w.shape(), q.groups()) /
                norm);
  const double nearest = std::sqrt(nearest_error(w, q, input.backend) / norm);
  const double limit =
      std::max(3 * nearest, 1e-6);  // weights that lie on the grid leave rounding no error at all
  ++report.compared;
  report.error_sum += error;
  if (const double ratio = error / std::max(nearest, 1e-12); ratio > report.worst_ratio) {
    report.worst_ratio = ratio;
    report.worst_module = linear.module;
  }
  if (!(error <= limit))
    report.violation(
        "{}: relative weight error {:.5f} is over {:.5f} (rounding to nearest gives {:.5f})",
        linear.module, error, limit, nearest);
}

// Scattered groups still hold group_size columns each, the last one the rest.
void check_group_sizes(const LinearSpec& linear, const QuantizedLinear& q, VerifyReport& report) {
  std::vector<int64_t> held(static_cast<size_t>(q.groups()));
  for (int64_t i = 0; i < q.in(); ++i) ++held[static_cast<size_t>(q.g_idx.as<int32_t>()[i])];
  const int64_t group_size = q.group_size == -1 ? q.in() : q.group_size;
  for (int64_t g = 0; g < q.groups(); ++g)
    if (const int64_t expected = std::min(group_size, q.in() - g * group_size);
        held[static_cast<size_t>(g)] != expected)
      return report.violation("{}: group {} of g_idx holds {} columns, expected {}", linear.module,
                              g, held[static_cast<size_t>(g)], expected);
}

void check_values(const LinearSpec& linear, const QuantizedLinear& q, bool scattered_allowed,
                  VerifyReport& report) {
  const Tensor scales = to_f32(q.scales);
  const int middle = 1 << (q.bits - 1);
  int64_t bad_scales = 0, bad_zeros = 0, bad_groups = 0;
  for (int64_t i = 0; i < scales.elements(); ++i) {
    const float scale = scales.as<float>()[i];
    bad_scales += !(std::isfinite(scale) && scale > 0);
    bad_zeros += q.symmetric && q.zeros.as<uint8_t>()[i] != middle;
  }
  const int64_t group_size = q.group_size == -1 ? q.in() : q.group_size;
  for (int64_t i = 0; i < q.in(); ++i) bad_groups += q.g_idx.as<int32_t>()[i] != i / group_size;
  if (bad_scales > 0)
    report.violation("{}: {} of {} scales are not finite and positive", linear.module, bad_scales,
                     scales.elements());
  if (bad_zeros > 0)
    report.violation(
        "{}: {} of {} zero points are not {} although the config says symmetric (kernels then "
        "ignore them)",
        linear.module, bad_zeros, scales.elements(), middle);
  if (bad_groups > 0 && !scattered_allowed)
    report.violation(
        "{}: g_idx differs from column / group_size in {} columns although desc_act is false",
        linear.module, bad_groups);
  if (scattered_allowed) check_group_sizes(linear, q, report);
}

// Names, dtypes and shapes of a packed linear; true when they all fit.
bool check_packed_specs(const VerifyInput& input, const LinearSpec& linear,
                        const ModuleChoice& choice, DType model_dtype, std::set<std::string>& known,
                        VerifyReport& report) {
  QuantizeSettings settings;
  settings.bits = choice.bits;
  settings.group_size = choice.group_size;
  settings.symmetric = choice.symmetric;
  const size_t before = report.violations.size();
  for (const PackedSpec& spec : input.format->packed_specs(linear, settings, model_dtype)) {
    known.insert(spec.name);
    const TensorEntry* entry = input.checkpoint.find(spec.name);
    if (entry == nullptr)
      report.violation("tensor {} is missing, expected {} {}", spec.name, dtype_name(spec.dtype),
                       spec.shape.text());
    else if (entry->dtype != spec.dtype || !(entry->shape == spec.shape))
      report.violation("tensor {} is {} {}, expected {} {}", spec.name, dtype_name(entry->dtype),
                       entry->shape.text(), dtype_name(spec.dtype), spec.shape.text());
  }
  if (input.checkpoint.find(linear.weight_name()) != nullptr) {
    known.insert(linear.weight_name());
    report.violation("tensor {} is still there beside the packed one", linear.weight_name());
  }
  return report.violations.size() == before;
}

// A folded tensor has other values than the source's; they must still be numbers.
void check_finite(const VerifyInput& input, const TensorEntry& stored, VerifyReport& report) {
  const int64_t bad = input.backend.first_non_finite(input.checkpoint.read(stored.name));
  if (bad >= 0) report.violation("tensor {} is not finite at element {}", stored.name, bad);
}

// A bias may be stored in another float type than the source's: then it is the source's value
// rounded once.
void check_bias(const VerifyInput& input, const LinearSpec& linear, VerifyReport& report) {
  if (!linear.bias || input.source == nullptr || input.source->find(linear.bias_name()) == nullptr)
    return;
  if (input.folded.contains(linear.bias_name()))
    return check_finite(input, *input.checkpoint.find(linear.bias_name()), report);
  const Tensor stored = input.checkpoint.read(linear.bias_name());
  const Tensor source = input.source->read(linear.bias_name());
  Tensor expected(stored.dtype(), stored.shape());
  if (source.elements() == expected.elements()) convert(source, expected);
  if (source.elements() != expected.elements() ||
      std::memcmp(stored.data(), expected.data(), static_cast<size_t>(stored.bytes())) != 0)
    report.violation("tensor {} differs from the source", linear.bias_name());
}

ModuleChoice check_packed(const VerifyInput& input, const LinearSpec& linear, DType model_dtype,
                          std::set<std::string>& known, VerifyReport& report) {
  const Json& config = input.config["quantization_config"];
  ModuleChoice choice = input.format->configured(config, linear.module);
  ++report.linears;
  if (!choice.quantized) {
    report.violation("{} is packed, but quantization_config leaves it in float", linear.module);
    return choice;
  }
  if (!check_packed_specs(input, linear, choice, model_dtype, known, report)) return choice;
  const QuantizedLinear q = input.format->unpack(input.checkpoint, linear, config);
  check_values(linear, q, choice.act_order == ActOrder::kDynamic, report);
  check_bias(input, linear, report);
  if (input.source != nullptr) compare_linear(input, linear, q, report);
  return choice;
}

// Is `stored` what `source` holds, bit for bit?
void compare_float(const VerifyInput& input, const TensorEntry& stored, VerifyReport& report) {
  const TensorEntry* source = input.source->find(stored.name);
  if (source == nullptr)
    return report.violation("tensor {} is in neither the source nor the format", stored.name);
  if (source->dtype != stored.dtype || !(source->shape == stored.shape))
    return report.violation("tensor {} is {} {}, in the source {} {}", stored.name,
                            dtype_name(stored.dtype), stored.shape.text(),
                            dtype_name(source->dtype), source->shape.text());
  constexpr int64_t kChunkBytes = int64_t{64} << 20;
  const int64_t rows = stored.shape.rank() > 0 ? stored.shape[0] : 0;
  const int64_t step =
      std::max<int64_t>(1, rows > 0 ? kChunkBytes / std::max<int64_t>(1, stored.bytes / rows) : 1);
  const auto differs = [&](const Tensor& a, const Tensor& b) {
    return std::memcmp(a.data(), b.data(), static_cast<size_t>(a.bytes())) != 0;
  };
  if (input.folded.contains(stored.name)) return check_finite(input, stored, report);
  bool different = rows == 0 && stored.bytes > 0 &&
                   differs(input.checkpoint.read(stored.name), input.source->read(stored.name));
  for (int64_t row = 0; row < rows && !different; row += step) {
    const int64_t end = std::min(rows, row + step);
    different = differs(input.checkpoint.read_rows(stored.name, row, end),
                        input.source->read_rows(stored.name, row, end));
  }
  if (different) report.violation("tensor {} differs from the source", stored.name);
}

void need_float(const VerifyInput& input, const TensorSpec& spec, std::set<std::string>& known,
                VerifyReport& report) {
  if (!known.insert(spec.name).second) return;
  const TensorEntry* entry = input.checkpoint.find(spec.name);
  if (entry == nullptr)
    return report.violation("tensor {} {} is missing", spec.name, spec.shape.text());
  if (!is_source_float(entry->dtype) || !(entry->shape == spec.shape))
    return report.violation("tensor {} is {} {}, expected a float {}", spec.name,
                            dtype_name(entry->dtype), entry->shape.text(), spec.shape.text());
  if (input.source != nullptr) compare_float(input, *entry, report);
}

std::string file_text(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), {});
}

bool is_recomputed_buffer(const std::string& name) {
  return name.ends_with("rotary_emb.inv_freq");
}

}  // namespace

void check_directory(const std::string& directory, bool is_output, VerifyReport& report) {
  const std::vector<std::string> present = safetensors_in(directory);
  const std::string index_path = directory + "/model.safetensors.index.json";
  std::vector<std::string> expected = {"model.safetensors"};
  Json index;
  if (fs::exists(index_path)) {
    index = read_json(index_path);
    expected = check_index("model.safetensors.index.json", index, report);
  }
  int64_t total = 0;
  for (const std::string& file : present) {
    if (std::find(expected.begin(), expected.end(), file) != expected.end()) {
      check_header(directory + "/" + file, total, report);
      continue;
    }
    const std::string text = fmt::format("{} lies in the directory but {}", file,
                                         index.is_null() ? "there is no index" : "the index does not name it");
    (is_output ? report.violations : report.warnings).push_back(text);
  }
  if (index.is_object() && index.contains("metadata") && index["metadata"].contains("total_size") &&
      index["metadata"]["total_size"] != total)
    report.violation("model.safetensors.index.json: total_size is {}, the tensors hold {} bytes",
                     index["metadata"]["total_size"].dump(), total);
}

std::vector<ModuleChoice> check_linears(const VerifyInput& input, std::set<std::string>& known,
                                        VerifyReport& report) {
  std::vector<ModuleChoice> modules;
  const TensorEntry* embedding = input.checkpoint.find(input.spec.embedding.name);
  const DType model_dtype =
      input.spec.dtype_given || embedding == nullptr ? input.spec.dtype : embedding->dtype;
  const auto check = [&](const LinearSpec& linear) {
    ModuleChoice choice;
    choice.module = linear.module;
    choice.quantized = false;
    try {
      if (packed(input, linear)) {
        choice = check_packed(input, linear, model_dtype, known, report);
      } else {
        need_float(input, {linear.weight_name(), linear.stored_shape()}, known, report);
        if (linear.bias) need_float(input, {linear.bias_name(), {linear.out}}, known, report);
      }
    } catch (const Error& error) {
      report.violations.push_back(error.what());
    }
    modules.push_back(std::move(choice));
  };
  for (const BlockSpec& block : input.spec.blocks)
    for (const LinearSpec& linear : block.linears) check(linear);
  if (const LinearSpec head = input.spec.head_linear(); packed(input, head)) {
    check(head);
    if (input.spec.tied)
      report.violation(
          "{} is packed, but tie_word_embeddings is true: loaders would use the embedding in its "
          "place",
          head.module);
  }
  return modules;
}

void check_floats(const VerifyInput& input, std::set<std::string>& known, VerifyReport& report) {
  const ModelSpec& spec = input.spec;
  try {
    need_float(input, spec.embedding, known, report);
    for (const BlockSpec& block : spec.blocks)
      for (const TensorSpec& norm : block.norms) need_float(input, norm, known, report);
    need_float(input, spec.final_norm, known, report);
    if (!spec.tied && !packed(input, spec.head_linear()))
      need_float(input, spec.head, known, report);
    for (const auto& [name, entry] : input.checkpoint.tensors()) {
      if (known.contains(name)) continue;
      if (input.source != nullptr)
        compare_float(input, entry, report);
      else
        report.warnings.push_back(
            fmt::format("tensor {} belongs neither to the family nor to the format", name));
    }
    if (input.source == nullptr) return;
    for (const auto& [name, entry] : input.source->tensors()) {
      if (input.checkpoint.find(name) != nullptr || is_recomputed_buffer(name)) continue;
      const bool packed =
          name.ends_with(".weight") && input.format != nullptr &&
          input.format->holds(input.checkpoint, {name.substr(0, name.size() - 7), 0, 0, false});
      if (!packed && !(spec.tied && name == "lm_head.weight"))
        report.violation("tensor {} of the source is missing", name);
    }
  } catch (const Error& error) {
    report.violations.push_back(error.what());
  }
}

void check_config(const VerifyInput& input, const std::vector<ModuleChoice>& modules,
                  VerifyReport& report) {
  if (input.format == nullptr) return;
  const Json& config = input.config["quantization_config"];
  try {
    for (std::string& text : input.format->config_violations(config, modules))
      report.violations.push_back("config.json: " + std::move(text));
    if (const std::string name = input.format->config_file(); !name.empty()) {
      if (!fs::exists(input.directory + "/" + name))
        report.violation("{} is missing, loaders of {} look for it", name, input.format->name());
      else if (read_json(input.directory + "/" + name) != config)
        report.violation("{} differs from quantization_config in config.json", name);
    }
  } catch (const Error& error) {
    report.violations.push_back(error.what());
  }
  for (const LoadWarning& warning : check_load(input.spec, *input.format, modules))
    report.warnings.push_back(fmt::format("tensor parallel {}: {}: {}", warning.tensor_parallel,
                                          warning.module, warning.reason));
}

void check_copied_files(const std::string& directory, const std::string& source,
                        VerifyReport& report) {
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "tokenizer.model",
                           "special_tokens_map.json", "added_tokens.json", "vocab.json",
                           "merges.txt", "chat_template.jinja", "generation_config.json"}) {
    const std::string from = source + "/" + name, to = directory + "/" + name;
    if (!fs::exists(from)) continue;
    if (!fs::exists(to))
      report.violation("{} of the source was not copied", name);
    else if (file_text(from) != file_text(to))
      report.violation("{} differs from the source's", name);
  }
}

}  // namespace bitmill
