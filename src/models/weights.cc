#include <algorithm>

#include "models/family.h"

namespace bitmill {

BlockWeights::BlockWeights(const BlockSpec& spec) : linears_(spec.linears.size()) {
  for (const TensorSpec& norm : spec.norms) floats_.emplace_back(norm.name, Tensor());
  for (const LinearSpec& linear : spec.linears)
    if (linear.bias) floats_.emplace_back(linear.bias_name(), Tensor());
}

void BlockWeights::set_float(const std::string& name, TensorView value, Backend& backend) {
  const auto found = std::find_if(floats_.begin(), floats_.end(),
                                  [&](const auto& entry) { return entry.first == name; });
  BITMILL_CHECK(found != floats_.end());
  Tensor host(DType::kF32, value.shape);
  convert(value, host);
  found->second = backend.upload(std::move(host));
}

void BlockWeights::set_linear(int linear, TensorView weight, Backend& backend) {
  drop_linear(linear);  // before the new one is made: two copies of a large linear need not fit
  linears_.at(linear) = backend.prepare_linear(weight);
}

void BlockWeights::drop_linear(int linear) {
  linears_.at(linear).reset();
}

const PreparedWeight& BlockWeights::linear(int linear) const {
  const auto& weight = linears_.at(linear);
  BITMILL_CHECK(weight != nullptr);
  return *weight;
}

TensorView BlockWeights::floats(const std::string& name) const {
  for (const auto& [key, value] : floats_)
    if (key == name) return value.view();
  return {};
}

}  // namespace bitmill
