#include "algorithms/quantizer.h"

namespace bitmill {

// A new algorithm is one file, one declaration and one line here.
const Quantizer& awq_gptaq_quantizer();
const Quantizer& awq_gptq_quantizer();
const Quantizer& awq_quantizer();
const Quantizer& gptaq_quantizer();
const Quantizer& gptq_quantizer();
const Quantizer& rtn_quantizer();

const std::vector<const Quantizer*>& quantizers() {
  static const std::vector<const Quantizer*> table = {
      &gptq_quantizer(), &rtn_quantizer(),      &awq_quantizer(),
      &gptaq_quantizer(), &awq_gptq_quantizer(), &awq_gptaq_quantizer()};
  return table;
}

const Quantizer& find_quantizer(const std::string& name) {
  std::string known;
  for (const Quantizer* quantizer : quantizers()) {
    if (quantizer->name() == name) return *quantizer;
    known += (known.empty() ? "" : ", ") + quantizer->name();
  }
  fail(ExitCode::kUsage, "quantize.algorithm={}: unknown algorithm, known are {}", name, known);
}

}  // namespace bitmill
