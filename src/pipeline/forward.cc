#include "pipeline/forward.h"

#include <algorithm>

namespace bitmill {

Activations make_activations(std::vector<BatchRange> ranges, int64_t length) {
  Activations activations;
  for (const BatchRange& range : ranges) {
    MicroBatch batch;
    batch.sequences = range.samples;
    batch.length = length;
    activations.batches.push_back(std::move(batch));
  }
  activations.ranges = std::move(ranges);
  return activations;
}

void embed_tokens(const ModelSource& source, TensorView ids, Activations& activations, Backend& backend) {
  const ModelSpec& spec = source.spec();
  const Tensor table = backend.upload(source.read_float(spec.embedding.name, backend));
  for (size_t i = 0; i < activations.batches.size(); ++i) {
    MicroBatch& batch = activations.batches[i];
    const BatchRange& range = activations.ranges[i];
    batch.hidden = backend.allocate(backend.compute(), {batch.tokens(), spec.hidden});
    const TensorView rows = ids.slice(range.first_sample, range.first_sample + range.samples);
    backend.embed(rows.reshaped({batch.tokens()}), table, batch.hidden);
  }
}

void send_activations(Activations& activations, int to, Transport& transport, Backend& backend) {
  for (MicroBatch& batch : activations.batches) {
    const Tensor host = backend.download(std::move(batch.hidden));
    transport.send(host, to);
  }
}

void receive_activations(Activations& activations, int64_t hidden, int from, Transport& transport, Backend& backend) {
  for (MicroBatch& batch : activations.batches) {
    Tensor host(backend.compute(), {batch.tokens(), hidden});
    transport.receive(host, from);
    batch.hidden = backend.upload(std::move(host));
  }
}

Head::Head(const ModelSource& source, Backend& backend) : spec_(source.spec()), backend_(backend) {
  Tensor norm(DType::kF32, {spec_.hidden});
  convert(source.read_float(spec_.final_norm.name, backend), norm);
  norm_ = backend.upload(std::move(norm));
  normed_ = backend.allocate(backend.compute(), {chunk_rows(), spec_.hidden});
  Tensor weight = source.read_float(spec_.head.name, backend);
  if (weight.dtype() != backend.compute() && weight.dtype() != DType::kF32) {
    Tensor converted = backend.allocate(backend.compute(), spec_.head.shape);
    backend.convert(weight, converted);
    weight = std::move(converted);
  }
  weight_ = backend.prepare_linear(weight);
}

int64_t Head::chunk_rows() const { return std::clamp<int64_t>((int64_t{64} << 20) / (4 * spec_.vocab), 16, 2048); }

void Head::logits(TensorView hidden, TensorView out) {
  const TensorView x = normed_.view().slice(0, hidden.rows());
  backend_.rms_norm(hidden, norm_, spec_.norm_eps, x);
  backend_.linear(x, *weight_, {}, {}, out);
}

}  // namespace bitmill
