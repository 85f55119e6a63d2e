// bitmill inspect: what a checkpoint holds, from its headers; with --tensor a few codes of one
// linear.
#include <iostream>
#include <map>

#include "commands/command.h"
#include "commands/session.h"
#include "core/log.h"
#include "formats/format.h"

namespace bitmill {
namespace {

constexpr int64_t kShownRows = 4, kShownColumns = 16, kShownGroups = 4;

struct Inspected {
  std::string directory;
  Json config;
  ModelSpec spec;
  Checkpoint checkpoint;
  const OutputFormat* format;
};

Inspected open(const std::string& directory) {
  Json config = read_model_config(directory);
  ModelSpec spec = find_family(config).describe(config);
  const OutputFormat* format = format_of(config);
  return {directory, std::move(config), std::move(spec), Checkpoint::open(directory), format};
}

bool packed(const Inspected& model, const LinearSpec& linear) {
  return model.format != nullptr && model.format->holds(model.checkpoint, linear);
}

// Bytes of all tensors "MODULE.*" (a linear's own, packed or not, bias included).
int64_t module_bytes(const Checkpoint& checkpoint, const std::string& module) {
  int64_t bytes = 0;
  const std::string prefix = module + ".";
  for (auto at = checkpoint.tensors().lower_bound(prefix);
       at != checkpoint.tensors().end() && at->first.starts_with(prefix); ++at)
    bytes += at->second.bytes;
  return bytes;
}

// Linears of one block as the table shows them.
Json linear_json(const Inspected& model, const LinearSpec& linear) {
  Json json{{"module", linear.module},
            {"out", linear.out},
            {"in", linear.in},
            {"bias", linear.bias},
            {"bytes", module_bytes(model.checkpoint, linear.module)},
            {"quantized", packed(model, linear)}};
  if (json["quantized"]) {
    const ModuleChoice choice =
        model.format->configured(model.config["quantization_config"], linear.module);
    json["bits"] = choice.bits;
    json["group_size"] = choice.group_size;
    json["symmetric"] = choice.symmetric;
  } else if (const TensorEntry* entry = model.checkpoint.find(linear.weight_name())) {
    json["dtype"] = dtype_name(entry->dtype);
  }
  return json;
}

// Sizes by kind, parameter counts, and the tensors that are neither linears nor known floats.
Json sizes_json(const Inspected& model) {
  std::map<std::string, int64_t> bytes;
  int64_t linear_parameters = 0, parameters = 0, quantized = 0, total = 0, known = 0;
  const auto add_linear = [&](const LinearSpec& linear) {
    const bool is_packed = packed(model, linear);
    const int64_t size = module_bytes(model.checkpoint, linear.module);
    bytes[is_packed ? "quantized_linears" : "float_linears"] += size;
    known += size;
    quantized += is_packed;
    linear_parameters += linear.out * linear.in;
    parameters += linear.out * linear.in + (linear.bias ? linear.out : 0);
  };
  const auto add_float = [&](const char* kind, const TensorSpec& tensor) {
    const TensorEntry* entry = model.checkpoint.find(tensor.name);
    if (entry == nullptr) return;
    bytes[kind] += entry->bytes;
    known += entry->bytes;
    parameters += tensor.shape.elements();
  };
  for (const BlockSpec& block : model.spec.blocks) {
    for (const LinearSpec& linear : block.linears) add_linear(linear);
    for (const TensorSpec& norm : block.norms) add_float("norms", norm);
  }
  add_float("norms", model.spec.final_norm);
  add_float("embedding", model.spec.embedding);
  if (packed(model, model.spec.head_linear()))
    add_linear(model.spec.head_linear());
  else if (!model.spec.tied)
    add_float("head", model.spec.head);
  for (const auto& [name, entry] : model.checkpoint.tensors()) total += entry.bytes;
  bytes["other"] = total - known;
  Json json{{"bytes", bytes},
            {"total_bytes", total},
            {"parameters", parameters},
            {"quantized_linears", quantized}};
  json["bits_per_weight"] =
      linear_parameters == 0
          ? 0.0
          : 8.0 * static_cast<double>(bytes["quantized_linears"] + bytes["float_linears"]) /
                static_cast<double>(linear_parameters);
  json["bits_per_parameter"] =
      parameters == 0 ? 0.0 : 8.0 * static_cast<double>(total) / static_cast<double>(parameters);
  return json;
}

Json model_json(const Inspected& model) {
  const ModelSpec& spec = model.spec;
  Json json{{"directory", model.directory},
            {"family", spec.family},
            {"model_type", spec.model_type},
            {"dtype", dtype_name(spec.dtype)},
            {"blocks", spec.blocks.size()},
            {"hidden", spec.hidden},
            {"intermediate", spec.intermediate},
            {"heads", spec.heads},
            {"kv_heads", spec.kv_heads},
            {"head_dim", spec.head_dim},
            {"vocab", spec.vocab},
            {"tied", spec.tied},
            {"files", model.checkpoint.files().size()},
            {"tensors", model.checkpoint.tensors().size()},
            {"format", model.format == nullptr ? "float" : model.format->name()}};
  if (model.format != nullptr) json["quantization_config"] = model.config["quantization_config"];
  json["sizes"] = sizes_json(model);
  json["block_0"] = Json::array();
  if (!spec.blocks.empty())
    for (const LinearSpec& linear : spec.blocks.front().linears)
      json["block_0"].push_back(linear_json(model, linear));
  if (packed(model, spec.head_linear())) json["head"] = linear_json(model, spec.head_linear());
  return json;
}

void print_model(const Json& json) {
  const auto number = [&](const char* key) { return json[key].get<int64_t>(); };
  const Json& sizes = json["sizes"];
  std::cout << fmt::format(
      "{}\n  family {} ({}), {} weights, {} blocks, hidden {}, intermediate {}, heads {}/{} of {}, "
      "vocabulary {}{}\n",
      json["directory"].get<std::string>(), json["family"].get<std::string>(),
      json["model_type"].get<std::string>(), json["dtype"].get<std::string>(), number("blocks"),
      number("hidden"), number("intermediate"), number("heads"), number("kv_heads"),
      number("head_dim"), number("vocab"), json["tied"].get<bool>() ? ", tied head" : "");
  std::cout << fmt::format(
      "  {} parameters in {} tensors, {} files, {}: {:.3f} bits per linear weight, {:.3f} per "
      "parameter\n",
      sizes["parameters"].get<int64_t>(), number("tensors"), number("files"),
      human_bytes(sizes["total_bytes"].get<int64_t>()), sizes["bits_per_weight"].get<double>(),
      sizes["bits_per_parameter"].get<double>());
  std::cout << fmt::format("  format {}, {} quantized linears\n", json["format"].get<std::string>(),
                           sizes["quantized_linears"].get<int64_t>());
  for (const auto& [kind, bytes] : sizes["bytes"].items())
    if (bytes.get<int64_t>() > 0)
      std::cout << fmt::format("    {:<18} {:>10}\n", kind, human_bytes(bytes.get<int64_t>()));
  std::cout << fmt::format(
      "  linears of block 0 (of {}){}\n    {:<44} {:>14} {:>6} {:>6} {:>5} {:>10}\n",
      number("blocks"), json.contains("head") ? ", and the head" : "", "module", "out x in", "bits",
      "group", "sym", "bytes");
  Json linears = json["block_0"];
  if (json.contains("head")) linears.push_back(json["head"]);
  for (const Json& linear : linears) {
    const bool quantized = linear["quantized"];
    std::cout << fmt::format(
        "    {:<44} {:>14} {:>6} {:>6} {:>5} {:>10}\n", linear["module"].get<std::string>(),
        fmt::format("{} x {}", linear["out"].get<int64_t>(), linear["in"].get<int64_t>()),
        quantized ? linear["bits"].dump() : linear.value("dtype", std::string("?")),
        quantized ? linear["group_size"].dump() : "-", quantized ? linear["symmetric"].dump() : "-",
        human_bytes(linear["bytes"].get<int64_t>()));
  }
}

LinearSpec linear_named(const Inspected& model, const std::string& name) {
  for (const BlockSpec& block : model.spec.blocks)
    for (const LinearSpec& linear : block.linears)
      if (linear.module == name || linear.weight_name() == name) return linear;
  if (const LinearSpec head = model.spec.head_linear(); packed(model, head) && head.module == name)
    return head;
  fail(ExitCode::kUsage, "--tensor {}: {} has no such linear, expected a module like {}", name,
       model.directory,
       model.spec.blocks.empty() ? "model.layers.0.self_attn.q_proj"
                                 : model.spec.blocks[0].linears[0].module);
}

// The first rows and columns as nested arrays of numbers.
Json corner(TensorView tensor, int64_t columns) {
  Json rows = Json::array();
  Tensor wide(DType::kF32, tensor.shape);
  if (tensor.dtype != DType::kU8) convert(tensor, wide);
  for (int64_t r = 0; r < std::min(tensor.rows(), kShownRows); ++r) {
    Json row = Json::array();
    for (int64_t c = 0; c < std::min(tensor.cols(), columns); ++c) {
      const int64_t at = r * tensor.cols() + c;
      if (tensor.dtype == DType::kU8)
        row.push_back(tensor.as<uint8_t>()[at]);
      else
        row.push_back(wide.as<float>()[at]);
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

Json tensor_json(const Inspected& model, const std::string& name) {
  const LinearSpec linear = linear_named(model, name);
  Json json = linear_json(model, linear);
  if (!packed(model, linear)) {
    json["values"] =
        corner(model.checkpoint.read_rows(linear.weight_name(), 0,
                                          std::min(linear.stored_shape()[0], kShownRows)),
               kShownColumns);
    return json;
  }
  const QuantizedLinear q =
      model.format->unpack(model.checkpoint, linear, model.config["quantization_config"]);
  json["codes"] = corner(q.codes, kShownColumns);
  json["scales"] = corner(q.scales, kShownGroups);
  json["zeros"] = corner(q.zeros, kShownGroups);
  json["scale_dtype"] = dtype_name(q.scales.dtype());
  return json;
}

void print_rows(const Json& json, const char* key) {
  if (!json.contains(key)) return;
  std::cout << "  " << key << " (first rows and columns)\n";
  for (const Json& row : json[key]) {
    std::cout << "   ";
    for (const Json& value : row)
      std::cout << (value.is_number_integer() ? fmt::format(" {:>3}", value.get<int>())
                                              : fmt::format(" {:>10.6g}", value.get<float>()));
    std::cout << "\n";
  }
}

void print_tensor(const Json& json) {
  std::cout << fmt::format("{} [{}, {}]", json["module"].get<std::string>(),
                           json["out"].get<int64_t>(), json["in"].get<int64_t>());
  if (json["quantized"])
    std::cout << fmt::format(", {} bits, group_size {}, symmetric {}, scales {}",
                             json["bits"].get<int>(), json["group_size"].get<int64_t>(),
                             json["symmetric"].get<bool>(), json["scale_dtype"].get<std::string>());
  std::cout << "\n";
  for (const char* key : {"values", "codes", "scales", "zeros"}) print_rows(json, key);
}

}  // namespace

int run_inspect(const CommandLine& line, Communicator& comm) {
  std::string result;
  on_rank_zero(comm, [&] {
    require(line.directory, "DIR", "the checkpoint directory to look at: bitmill inspect DIR");
    const Inspected model = open(line.directory);
    Json json = model_json(model);
    const std::string& tensor = line.options.extra.tensor;
    if (tensor.empty()) {
      print_model(json);
    } else {
      json["tensor"] = tensor_json(model, tensor);
      print_tensor(json["tensor"]);
    }
    result = json.dump(1);
  });
  write_json_result(line.options, comm, result);
  return static_cast<int>(ExitCode::kDone);
}

}  // namespace bitmill
