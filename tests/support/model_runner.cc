#include "support/model_runner.h"
#include "io/json.h"

namespace bitmill::testing {

namespace {

Tensor as_f32(TensorView value) {
  Tensor out(DType::kF32, value.shape);
  convert(value, out);
  return out;
}

}  // namespace

ModelRunner::ModelRunner(const std::string& directory, Backend& backend) : backend_(backend) {
  const Json config = read_model_config(directory);
  const Checkpoint checkpoint = Checkpoint::open(directory);
  spec_ = find_family(config).describe(config);
  check_tensors(spec_, checkpoint);
  embedding_ = backend.upload(checkpoint.read(spec_.embedding.name));
  final_norm_ = backend.upload(as_f32(checkpoint.read(spec_.final_norm.name)));
  head_ = backend.prepare_linear(backend.upload(as_f32(checkpoint.read(spec_.head.name))));
  for (const BlockSpec& block : spec_.blocks) load_block(checkpoint, block);
}

void ModelRunner::load_block(const Checkpoint& checkpoint, const BlockSpec& block) {
  BlockWeights& weights = blocks_.emplace_back(block);
  for (size_t i = 0; i < block.linears.size(); ++i) {
    const LinearSpec& linear = block.linears[i];
    const Tensor value = backend_.upload(as_f32(checkpoint.read(linear.weight_name())));
    weights.set_linear(static_cast<int>(i), value, backend_);
    if (linear.bias)
      weights.set_float(linear.bias_name(), checkpoint.read(linear.bias_name()), backend_);
  }
  for (const TensorSpec& norm : block.norms)
    weights.set_float(norm.name, checkpoint.read(norm.name), backend_);
}

std::vector<Tensor> ModelRunner::hidden_states(TensorView ids, const CutObserver& observer) {
  MicroBatch batch;
  batch.sequences = ids.rows();
  batch.length = ids.cols();
  batch.hidden = backend_.allocate(backend_.compute(), {batch.tokens(), spec_.hidden});
  const Tensor device_ids = backend_.upload(clone(ids.reshaped({batch.tokens()})));
  backend_.embed(device_ids, embedding_, batch.hidden);
  const Tensor rope = backend_.upload(rope_table(spec_.rope, batch.length));
  std::vector<Tensor> states;
  const auto keep = [&] {
    Tensor copy = backend_.allocate(DType::kF32, batch.hidden.shape());
    backend_.convert(batch.hidden, copy);
    states.push_back(backend_.download(std::move(copy)));
  };
  keep();
  for (const BlockSpec& block : spec_.blocks) {
    const auto graph =
        find_family({{"model_type", spec_.model_type}}).graph(spec_, block.index, rope);
    for (size_t cut = 0; cut < block.cuts.size(); ++cut) {
      Tensor scratch;
      const BlockWeights& weights = blocks_[block.index];
      const TensorView input =
          graph->input(static_cast<int>(cut), weights, batch, backend_, scratch);
      if (observer) observer(block.index, block.cuts[cut], input);
      graph->advance(static_cast<int>(cut), weights, input, batch, backend_);
    }
    keep();
  }
  return states;
}

Tensor ModelRunner::logits(TensorView hidden) {
  const Tensor device_hidden = backend_.upload(clone(hidden));
  const Tensor normed = backend_.allocate(backend_.compute(), hidden.shape);
  backend_.rms_norm(device_hidden, final_norm_, spec_.norm_eps, normed);
  Tensor out = backend_.allocate(DType::kF32, {hidden.rows(), spec_.vocab});
  backend_.linear(normed, *head_, {}, {}, out);
  backend_.synchronize();
  return backend_.download(std::move(out));
}

}  // namespace bitmill::testing
