// Names of the GPTQ v1 and v2 layout shared by its packer (gptq.cc) and its config text
// (gptq_config.cc). Bytes and config keys are drawn in docs/formats/gptq.md.
#pragma once

#include "formats/format.h"

namespace bitmill {

// v1 and v2 differ in one place: v1 stores zero points minus one (and so cannot store 0), v2 as
// they are.
class GptqFormat final : public OutputFormat {
 public:
  explicit GptqFormat(int version) : version_(version) {}

  std::string name() const override { return version_ == 1 ? "gptq" : "gptq_v2"; }
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
  std::string config_file() const override { return "quantize_config.json"; }
  bool matches(const Json& config) const override;

 private:
  void check_shape(const LinearSpec& linear, int bits) const;
  Tensor unpack_zeros(const Tensor& qzeros, int64_t out, int bits, const std::string& name) const;

  int version_;
};

}  // namespace bitmill
