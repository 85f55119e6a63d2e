// AWQ "gemm": 4-bit codes and zero points in interleaved words along the output. The bytes and the
// config keys are drawn in docs/formats/awq.md. It is a layout, whatever algorithm chose the codes.
#pragma once

#include "formats/format.h"

namespace bitmill {

class AwqFormat final : public OutputFormat {
 public:
  std::string name() const override { return "awq"; }
  DType scale_dtype(DType) const override { return DType::kF16; }
  void check(const LinearSpec& linear, const QuantizeSettings& settings) const override;
  void check_model(const std::vector<ModuleChoice>& modules) const override;
  std::vector<NamedTensor> pack(const LinearSpec& linear, const QuantizedLinear& quantized,
                                TensorView bias) const override;
  std::vector<PackedSpec> packed_specs(const LinearSpec& linear, const QuantizeSettings& settings,
                                       DType model_dtype) const override;
  bool holds(const Checkpoint& checkpoint, const LinearSpec& linear) const override;
  QuantizedLinear unpack(const Checkpoint& checkpoint, const LinearSpec& linear,
                         const Json& config) const override;
  FormatConfig config(const RunOptions::Quantize& settings,
                      const std::vector<ModuleChoice>& modules) const override;
  ModuleChoice configured(const Json& config, const std::string& module) const override;
  std::vector<std::string> config_violations(
      const Json& config, const std::vector<ModuleChoice>& modules) const override;
  bool matches(const Json& config) const override;
};

}  // namespace bitmill
