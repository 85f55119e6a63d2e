#include "formats/format.h"

#include "formats/awq.h"
#include "formats/compressed_tensors.h"
#include "formats/gptq.h"

namespace bitmill {

void OutputFormat::check_model(const std::vector<ModuleChoice>&) const {}

// The table: a new format is one line here.
const std::vector<const OutputFormat*>& output_formats() {
  static const GptqFormat gptq(1), gptq_v2(2);
  static const CompressedTensorsFormat compressed_tensors;
  static const AwqFormat awq;
  static const std::vector<const OutputFormat*> formats = {&gptq, &gptq_v2, &compressed_tensors,
                                                           &awq};
  return formats;
}

namespace {
std::string format_names() {
  std::string names;
  for (const OutputFormat* format : output_formats())
    names += (names.empty() ? "" : ", ") + format->name();
  return names;
}
}  // namespace

const OutputFormat& find_format(const std::string& name) {
  for (const OutputFormat* format : output_formats())
    if (format->name() == name) return *format;
  fail(ExitCode::kUsage, "output.format={} is unknown, expected one of {}", name, format_names());
}

const OutputFormat* format_of(const Json& model_config) {
  const auto config = model_config.find("quantization_config");
  if (config == model_config.end() || config->is_null()) return nullptr;
  if (!config->is_object())
    fail(ExitCode::kInput, "config.json: quantization_config is {}, expected an object",
         config->type_name());
  for (const OutputFormat* format : output_formats())
    if (format->matches(*config)) return format;
  const auto text = [&](const char* key) {
    return config->contains(key) ? (*config)[key].dump() : "missing";
  };
  fail(ExitCode::kInput,
       "config.json: the checkpoint is quantized in a format that bitmill does not read "
       "(quant_method {}, format {}, checkpoint_format {}, version {}), expected one of {}",
       text("quant_method"), text("format"), text("checkpoint_format"), text("version"),
       format_names());
}

}  // namespace bitmill
