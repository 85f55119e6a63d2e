// The table of families, and the check of a checkpoint's tensors against a spec.
#include "models/family.h"

#include <algorithm>
#include <optional>
#include <set>

#include "core/options.h"
#include "models/layers.h"
#include "io/json.h"

namespace bitmill {

const std::vector<const ModelFamily*>& model_families() {
  static const std::vector<const ModelFamily*> families = {
      &llama_family(),
      &mistral_family(),
      &qwen2_family(),
      &qwen3_family(),
      &qwen3_moe_family(),
      &deepseek_v3_family(),
  };
  return families;
}

const ModelFamily& find_family(const Json& config) {
  const ConfigKeys keys(config);
  std::string architecture;
  if (keys.has("architectures")) {
    const std::vector<std::string> all = keys.texts("architectures");
    if (!all.empty()) architecture = all.front();
  }
  const std::string model_type = keys.text_or("model_type", "");
  if (architecture.empty() && model_type.empty())
    fail(ExitCode::kInput, "config.json has neither architectures nor model_type");
  std::vector<std::string> known;
  for (const ModelFamily* family : model_families()) {
    if (family->matches(architecture, model_type)) return *family;
    known.push_back(family->name());
  }
  fail(ExitCode::kInput, "unknown model family: architecture {}, model_type {}; known families: {}",
       quote_name(architecture), quote_name(model_type), fmt::join(known, ", "));
}

// ---- tensors
// ------------------------------------------------------------------------------------------------

namespace {

// Collects every finding, so that one run names all (up to ten) of them.
class TensorCheck {
 public:
  explicit TensorCheck(const Checkpoint& checkpoint) : checkpoint_(checkpoint) {}

  void need(const TensorSpec& spec, bool is_linear) {
    seen_.insert(spec.name);
    const TensorEntry* entry = checkpoint_.find(spec.name);
    if (entry == nullptr) return missing(spec);
    if (!is_source_float(entry->dtype))
      return add(fmt::format("unsupported dtype {} for {}; supported: F16, BF16, F32",
                             dtype_name(entry->dtype), spec.name));
    if (!(entry->shape == spec.shape))
      return add(fmt::format("{} has shape {}, config.json implies {}", spec.name,
                             entry->shape.text(), spec.shape.text()));
    if (is_linear) same_dtype(*entry);
  }
  // A tensor that may be there without being of use.
  void tolerate(const std::string& name) { seen_.insert(name); }
  // A linear stored in a quantized format: its tensors are the format's business.
  void accept_module(const std::string& module) { modules_.insert(module); }

  // The tensors the spec does not know, or the error.
  std::vector<std::string> finish() {
    std::vector<std::string> unknown;
    for (const auto& [name, entry] : checkpoint_.tensors())
      if (!seen_.contains(name) && !modules_.contains(name.substr(0, name.rfind('.'))))
        unknown.push_back(name);
    for (const auto& [message, name] : missing_)  // a misnamed tensor is among the unknown
      if (!unknown.empty())
        messages_[message] += fmt::format(" (nearest: {})", nearest_name(name, unknown));
    if (found_ > static_cast<int64_t>(messages_.size()))
      messages_.push_back(
          fmt::format("and {} more", found_ - static_cast<int64_t>(messages_.size())));
    if (found_ > 0)
      fail(ExitCode::kInput, "{}: {}", checkpoint_.directory(), fmt::join(messages_, "; "));
    return unknown;
  }

 private:
  void missing(const TensorSpec& spec) {
    if (!full()) missing_.emplace_back(messages_.size(), spec.name);
    add(fmt::format("tensor {} {} is missing", spec.name, spec.shape.text()));
  }
  void same_dtype(const TensorEntry& entry) {
    if (!dtype_) {
      dtype_ = entry.dtype;
      first_ = entry.name;
    } else if (*dtype_ != entry.dtype) {
      add(fmt::format("{} is {}, but {} is {}: all linears must have one dtype", entry.name,
                      dtype_name(entry.dtype), first_, dtype_name(*dtype_)));
    }
  }
  bool full() const { return messages_.size() >= 10; }
  void add(std::string message) {
    ++found_;
    if (!full()) messages_.push_back(std::move(message));
  }

  const Checkpoint& checkpoint_;
  std::set<std::string> seen_, modules_;
  std::vector<std::string> messages_;
  std::vector<std::pair<size_t, std::string>> missing_;  // index of the message, tensor
  int64_t found_ = 0;
  std::optional<DType> dtype_;
  std::string first_;
};

}  // namespace

std::vector<std::string> check_tensors(const ModelSpec& spec, const Checkpoint& checkpoint,
                                       const PackedPredicate& packed) {
  TensorCheck check(checkpoint);
  check.need(spec.embedding, false);
  for (const BlockSpec& block : spec.blocks) {
    for (const LinearSpec& linear : block.linears) {
      if (packed && packed(linear.module))
        check.accept_module(linear.module);
      else
        check.need({linear.weight_name(), linear.stored_shape()}, true);
      if (linear.bias) check.need({linear.bias_name(), {linear.out}}, false);
    }
    for (const TensorSpec& norm : block.norms) check.need(norm, false);
  }
  check.need(spec.final_norm, false);
  const std::string head_module = spec.head_linear().module;
  if (packed && packed(head_module))
    check.accept_module(head_module);
  else if (spec.tied)
    check.tolerate(head_module + ".weight");
  else
    check.need(spec.head, false);
  return check.finish();
}

std::vector<std::string> check_tensors(const ModelSpec& spec, const Checkpoint& checkpoint) {
  return check_tensors(spec, checkpoint, nullptr);
}

}  // namespace bitmill
