#include "support/outlier_model.h"

#include <filesystem>
#include <vector>

#include "io/checkpoint.h"

namespace bitmill::testing {
namespace {

bool ends_with_any(const std::string& name, const std::vector<std::string>& ends) {
  for (const std::string& end : ends)
    if (name.ends_with(end)) return true;
  return false;
}

void scale_columns(Tensor& tensor, int stride, float factor) {
  const int64_t columns = tensor.shape()[tensor.shape().rank() - 1];
  Tensor exact(DType::kF32, tensor.shape());
  convert(tensor, exact);
  for (int64_t i = 0; i < exact.elements(); ++i)
    if (i % columns % stride == 0) exact.as<float>()[i] *= factor;
  convert(exact, tensor);
}

}  // namespace

void write_outlier_model(const std::string& source, const std::string& target, int stride,
                         float factor) {
  namespace fs = std::filesystem;
  fs::create_directories(target);
  for (const fs::directory_entry& entry : fs::directory_iterator(source))
    if (entry.path().filename().string().find(".safetensors") == std::string::npos)
      fs::copy(entry.path(), fs::path(target) / entry.path().filename());
  const Checkpoint checkpoint = Checkpoint::open(source);
  std::vector<Tensor> tensors;
  std::vector<NamedView> views;
  for (const auto& [name, entry] : checkpoint.tensors()) {
    Tensor tensor = checkpoint.read(name);
    if (ends_with_any(name, {"input_layernorm.weight", "post_attention_layernorm.weight"}))
      scale_columns(tensor, stride, factor);
    if (ends_with_any(name, {"q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight",
                             "up_proj.weight"}))
      scale_columns(tensor, stride, 1 / factor);
    tensors.push_back(std::move(tensor));
    views.push_back({name, tensors.back()});
  }
  write_safetensors(target + "/model.safetensors", std::move(views));
}

}  // namespace bitmill::testing
