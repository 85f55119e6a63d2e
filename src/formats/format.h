// Output formats: tensor names, packing and config text. Pure: tensors in, named tensors and JSON out; no files, no ranks.
// A new format is one file, one line in the table of format.cc, one CMake line. The bytes are drawn in docs/formats/.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core/options.h"
#include "core/quantized.h"
#include "io/json.h"
#include "models/family.h"

namespace bitmill {

struct NamedTensor {
  std::string name;
  Tensor data;
};

// Name, dtype and shape of a tensor that a format writes for one linear.
struct PackedSpec {
  std::string name;
  DType dtype;
  Shape shape;
};

// How every module of a finished model was quantized, for the config text.
struct ModuleChoice {
  std::string module;
  bool quantized = true;  // false: left in float (skip rule, or lm_head)
  int bits = 0;
  int64_t group_size = 0;
  bool symmetric = true;
  ActOrder act_order = ActOrder::kStatic;  // only "dynamic or not" reaches a file
};

// Text files of an output besides the tensors.
struct FormatConfig {
  OrderedJson quantization_config;  // goes into config.json
  // Further files of the directory (name, content), e.g. quantize_config.json.
  std::vector<std::pair<std::string, std::string>> files;
};

class OutputFormat {
 public:
  virtual ~OutputFormat() = default;
  virtual std::string name() const = 0;
  // Stored type of scales for a model of this dtype.
  virtual DType scale_dtype(DType model_dtype) const = 0;
  // Throws Error(kUsage), naming key, value and the format that could, when the settings cannot be stored: bits, sym, act
  // order, a group size that does not divide, shapes that do not pack. Called for every linear before any compute.
  virtual void check(const LinearSpec& linear, const QuantizeSettings& settings) const = 0;
  // Settings of the whole model that one file cannot mix (compared over all modules). Default: no rule.
  virtual void check_model(const std::vector<ModuleChoice>& modules) const;

  // Tensors of one linear, bias included (`bias` is an empty view if there is none; stored type is the format's rule).
  virtual std::vector<NamedTensor> pack(const LinearSpec& linear, const QuantizedLinear& quantized,
                                        TensorView bias) const = 0;
  // Names, dtypes and shapes that `pack` gives, without data (plan, verify).
  virtual std::vector<PackedSpec> packed_specs(const LinearSpec& linear, const QuantizeSettings& settings,
                                               DType model_dtype) const = 0;
  // Does the checkpoint hold this linear in packed form?
  virtual bool holds(const Checkpoint& checkpoint, const LinearSpec& linear) const = 0;
  // Inverse of `pack`, from disk. `config` is the checkpoint's quantization_config. Error(kInput) naming the tensor.
  virtual QuantizedLinear unpack(const Checkpoint& checkpoint, const LinearSpec& linear, const Json& config) const = 0;

  // Config text. `settings` are the [quantize] settings; `modules` say what every block linear became.
  virtual FormatConfig config(const RunOptions::Quantize& settings, const std::vector<ModuleChoice>& modules) const = 0;
  // What a quantization_config says about one module (`config()` in reverse): float, or its bits, group size, symmetry.
  // Error(kInput) naming the key that is missing or wrong.
  virtual ModuleChoice configured(const Json& quantization_config, const std::string& module) const = 0;
  // One sentence per key of quantization_config that loaders insist on and that is missing, wrong, or contradicts what the
  // tensors show (`modules`, as found on disk). Empty: all well.
  virtual std::vector<std::string> config_violations(const Json& quantization_config,
                                                     const std::vector<ModuleChoice>& modules) const = 0;
  // Further file of the directory that repeats quantization_config word for word; empty: none.
  virtual std::string config_file() const { return ""; }
  // Does this quantization_config describe this format (name and version)?
  virtual bool matches(const Json& quantization_config) const = 0;
};

const std::vector<const OutputFormat*>& output_formats();
// Error(kUsage) listing the known ones.
const OutputFormat& find_format(const std::string& name);
// The format of a checkpoint's config.json, nullptr for a float one. Error(kInput) for a quantized one we cannot read.
const OutputFormat* format_of(const Json& model_config);

// Tensor-parallel load rules: for TP 1, 2, 4, 8, what the usual engines would refuse. Empty: loads everywhere.
struct LoadWarning {
  int tensor_parallel;
  std::string module;
  std::string reason;  // one sentence with the numbers
};
std::vector<LoadWarning> check_load(const ModelSpec& spec, const OutputFormat& format,
                                    const std::vector<ModuleChoice>& modules);

}  // namespace bitmill
