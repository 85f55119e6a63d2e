#include "pipeline/loader.h"

#include "formats/stored_tensors.h"

#include <set>

namespace bitmill {

ModelSource::ModelSource(Json config, Checkpoint checkpoint)
    : config_(std::move(config)),
      checkpoint_(std::move(checkpoint)),
      family_(&find_family(config_)),
      spec_(family_->describe(config_)),
      format_(format_of(config_)) {
  // A config without a dtype leaves it to the tensors; the embedding is the one that no format packs.
  const TensorEntry* embedding = checkpoint_.find(spec_.embedding.name);
  if (!spec_.dtype_given && embedding != nullptr) spec_.dtype = embedding->dtype;
}

ModelSource ModelSource::open(const std::string& directory) {
  ModelSource source(read_model_config(directory), Checkpoint::open(directory));
  std::set<std::string> packed;  // modules whose weight exists only in packed form
  if (source.format_ != nullptr) {
    for (const BlockSpec& block : source.spec_.blocks)
      for (const LinearSpec& linear : block.linears)
        if (source.format_->holds(source.checkpoint_, linear)) packed.insert(linear.module);
    if (source.head_packed()) packed.insert(source.spec_.head_linear().module);
  }
  source.unknown_ = check_tensors(source.spec_, source.checkpoint_,
                                  [&](const std::string& module) { return packed.contains(module); });
  return source;
}

ModelSource ModelSource::open(const std::string& directory, Communicator& comm) {
  if (comm.size() == 1) return open(directory);
  std::string facts, headers;
  on_rank_zero(comm, [&] {
    const ModelSource checked = open(directory);
    facts = Json{{"config", checked.config_}, {"unknown", checked.unknown_}}.dump();
    headers = checked.checkpoint_.directory_text();
  });
  const Json shared = parse_json(comm.broadcast(facts), directory + "/config.json");
  ModelSource source(shared.at("config"), Checkpoint::from_text(comm.broadcast(headers)));
  shared.at("unknown").get_to(source.unknown_);
  return source;
}

Tensor ModelSource::read_float(const std::string& name, Backend& backend) const {
  Tensor tensor = checkpoint_.read(name);
  const int64_t bad = backend.first_non_finite(tensor);
  if (bad >= 0)
    fail(ExitCode::kInput, "{}/{}: tensor {} holds a NaN or infinity at element {} of {}", directory(),
         checkpoint_.files()[checkpoint_.at(name).file], name, bad, tensor.shape().text());
  return tensor;
}

bool ModelSource::head_packed() const {
  return format_ != nullptr && !spec_.tied && format_->holds(checkpoint_, spec_.head_linear());
}

Tensor ModelSource::read_weight(const LinearSpec& linear, DType dtype, Backend& backend) const {
  const bool head = linear.module == spec_.head_linear().module;
  if (head ? head_packed() : format_ != nullptr && format_->holds(checkpoint_, linear)) {
    const QuantizedLinear packed = format_->unpack(checkpoint_, linear, config_.at("quantization_config"));
    Tensor dense = backend.allocate(dtype, {linear.out, linear.in});
    backend.dequantize(packed, dense);
    return dense;
  }
  Tensor stored = read_float(head ? spec_.head.name : linear.weight_name(), backend);
  if (linear.transposed) stored = transposed(stored);
  if (stored.dtype() == dtype) return stored;
  Tensor dense = backend.allocate(dtype, stored.shape());
  backend.convert(stored, dense);
  return dense;
}

Tensor ModelSource::read_weight_rows(const LinearSpec& linear, int64_t first, int64_t end, DType dtype,
                                     Backend& backend) const {
  Tensor whole = read_weight(linear, dtype, backend);
  if (first == 0 && end == linear.out) return whole;
  return clone(whole.view().slice(first, end));
}

Tensor ModelSource::read_bias(const LinearSpec& linear, Backend& backend) const {
  return linear.bias ? read_float(linear.bias_name(), backend) : Tensor();
}

BlockWeights ModelSource::read_block_floats(const BlockSpec& block, Backend& backend) const {
  BlockWeights weights(block);
  for (const TensorSpec& norm : block.norms) weights.set_float(norm.name, read_float(norm.name, backend), backend);
  for (const LinearSpec& linear : block.linears)
    if (linear.bias) weights.set_float(linear.bias_name(), read_bias(linear, backend), backend);
  return weights;
}

BlockWeights ModelSource::read_block(const BlockSpec& block, Backend& backend) const {
  BlockWeights weights = read_block_floats(block, backend);
  for (size_t i = 0; i < block.linears.size(); ++i)
    weights.set_linear(static_cast<int>(i), read_weight(block.linears[i], backend.compute(), backend), backend);
  return weights;
}

DType resolve_compute(Compute wanted, const ModelSpec& spec, Communicator& comm) {
  if (wanted == Compute::kFloat32) return DType::kF32;
  if (wanted == Compute::kBFloat16) return DType::kBF16;
  const bool everywhere = comm.max(cpu_has_bf16() ? 0.0 : 1.0) == 0.0;
  return everywhere && spec.dtype == DType::kBF16 ? DType::kBF16 : DType::kF32;
}

}  // namespace bitmill
