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

namespace {

// Rows of logits per chunk: about 64 MiB of fp32, a function of the vocabulary alone.
int64_t head_rows(int64_t vocab) { return std::clamp<int64_t>((int64_t{64} << 20) / (4 * vocab), 16, 2048); }

}  // namespace

void run_head(const ModelSource& source, Activations& activations, Backend& backend, const LogitsSink& sink) {
  const ModelSpec& spec = source.spec();
  Tensor norm(DType::kF32, {spec.hidden});
  convert(source.read_float(spec.final_norm.name, backend), norm);
  norm = backend.upload(std::move(norm));
  std::unique_ptr<PreparedWeight> head;
  {
    Tensor stored = source.read_float(spec.head.name, backend);
    Tensor weight = stored.dtype() == backend.compute() ? std::move(stored)
                                                         : backend.allocate(backend.compute(), spec.head.shape);
    if (!stored.empty()) backend.convert(stored, weight);
    head = backend.prepare_linear(weight);
  }
  const int64_t rows = head_rows(spec.vocab);
  Tensor logits = backend.allocate(DType::kF32, {rows, spec.vocab});
  int64_t first = 0;
  for (MicroBatch& batch : activations.batches) {
    Tensor x = backend.allocate(backend.compute(), batch.hidden.shape());
    backend.rms_norm(batch.hidden, norm, spec.norm_eps, x);
    batch.hidden.reset();
    for (int64_t at = 0; at < batch.tokens(); at += rows) {
      const int64_t end = std::min(batch.tokens(), at + rows);
      const TensorView out = logits.view().slice(0, end - at);
      backend.linear(x.view().slice(at, end), *head, {}, {}, out);
      sink(first + at, out);
    }
    first += batch.tokens();
  }
}

}  // namespace bitmill
