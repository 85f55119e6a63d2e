// A small model quantized by rounding to nearest, written as an output directory without the
// pipeline, so that tests of commands can break single bytes of it.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>

#include "commands/command.h"
#include "core/grid.h"
#include "formats/format.h"
#include "support/paths.h"
#include "io/json.h"

namespace bitmill::testing {

using TensorMap = std::map<std::string, Tensor>;

inline QuantizedLinear round_to_nearest(const Tensor& weight, const GridOptions& grid,
                                        int64_t group_size) {
  Tensor w(DType::kF32, weight.shape());
  convert(weight, w);
  const int64_t out = w.rows(), in = w.cols(), groups = group_count(in, group_size);
  const int64_t width = group_size == -1 ? in : group_size;
  QuantizedLinear q;
  q.bits = grid.bits;
  q.group_size = group_size;
  q.symmetric = grid.symmetric;
  q.codes = Tensor(DType::kU8, {out, in});
  q.zeros = Tensor(DType::kU8, {out, groups});
  Tensor scales(DType::kF32, {out, groups});
  const float maxq = static_cast<float>((1 << grid.bits) - 1);
  for (int64_t o = 0; o < out; ++o)
    for (int64_t g = 0; g < groups; ++g) {
      const float* row = w.as<float>() + o * in + g * width;
      const Grid<float> fitted = fit_grid(row, width, 1, grid);
      scales.as<float>()[o * groups + g] = fitted.scale;
      q.zeros.as<uint8_t>()[o * groups + g] = static_cast<uint8_t>(fitted.zero);
      for (int64_t i = 0; i < width; ++i)
        q.codes.as<uint8_t>()[o * in + g * width + i] =
            static_cast<uint8_t>(to_code(row[i], fitted, maxq));
    }
  q.scales = Tensor(grid.scale_dtype, {out, groups});
  convert(scales, q.scales);
  q.g_idx = Tensor(DType::kI32, {in});
  for (int64_t i = 0; i < in; ++i) q.g_idx.as<int32_t>()[i] = static_cast<int32_t>(i / width);
  return q;
}

// What a test may change before the directory is written.
struct Draft {
  TensorMap tensors;
  Json config;                   // config.json, quantization_config included
  std::optional<Json> repeated;  // quantize_config.json; empty: none
};

class QuantizedModel {
 public:
  // Quantizes `source` (a float checkpoint directory) with 4 bits in groups of 32 and writes it,
  // after `change`.
  QuantizedModel(const std::string& source, const std::string& format_name, bool symmetric = true,
                 const std::function<void(Draft&)>& change = {}) {
    const Checkpoint checkpoint = Checkpoint::open(source);
    Draft draft;
    draft.config = read_model_config(source);
    const ModelSpec spec = find_family(draft.config).describe(draft.config);
    const OutputFormat& format = find_format(format_name);
    for (const auto& [name, entry] : checkpoint.tensors())
      draft.tensors[name] = checkpoint.read(name);
    std::vector<ModuleChoice> modules;
    for (const BlockSpec& block : spec.blocks)
      for (const LinearSpec& linear : block.linears)
        modules.push_back(quantize(format, linear, symmetric, draft.tensors));
    const FormatConfig text = format.config({}, modules);
    draft.config["quantization_config"] = Json::parse(text.quantization_config.dump());
    if (!text.files.empty()) draft.repeated = Json::parse(text.files[0].second);
    if (change) change(draft);
    write(draft);
  }
  const std::string& path() const { return directory_.path(); }

 private:
  static ModuleChoice quantize(const OutputFormat& format, const LinearSpec& linear, bool symmetric,
                               TensorMap& tensors) {
    const Tensor weight = std::move(tensors.at(linear.weight_name()));
    tensors.erase(linear.weight_name());
    const GridOptions grid{4, symmetric, false, format.scale_dtype(weight.dtype())};
    Tensor bias;
    if (linear.bias) bias = std::move(tensors.at(linear.bias_name()));
    for (NamedTensor& tensor : format.pack(linear, round_to_nearest(weight, grid, 32), bias))
      tensors[tensor.name] = std::move(tensor.data);
    ModuleChoice choice;
    choice.module = linear.module;
    choice.bits = 4;
    choice.group_size = 32;
    choice.symmetric = symmetric;
    return choice;
  }
  void write(const Draft& draft) {
    std::vector<NamedView> views;
    for (const auto& [name, tensor] : draft.tensors) views.push_back({name, tensor.view()});
    write_safetensors(directory_.file("model.safetensors"), views);
    write_file_durably(directory_.file("config.json"), draft.config.dump(2));
    if (draft.repeated)
      write_file_durably(directory_.file("quantize_config.json"), draft.repeated->dump(2));
  }
  TemporaryDirectory directory_;
};

// Runs one command alone and reads its --json result (null when it wrote none).
inline std::pair<int, Json> run_alone(CommandFunction command, const std::string& directory,
                                      const std::function<void(RunOptions::Extra&)>& set = {}) {
  static Communicator comm = Communicator::start(nullptr, nullptr);
  TemporaryDirectory results;
  CommandLine line;
  line.directory = directory;
  line.options.extra.json = results.file("result.json");
  if (set) set(line.options.extra);
  const int code = command(line, comm);
  const bool wrote = std::filesystem::exists(line.options.extra.json);
  return {code, wrote ? read_json(line.options.extra.json) : Json()};
}

}  // namespace bitmill::testing
