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

void start_float_stream(Activations& activations) {
  for (const MicroBatch& batch : activations.batches)
    activations.float_batches.push_back({batch.sequences, batch.length, clone(batch.hidden), Tensor()});
}

void expect_float_stream(Activations& activations) {
  for (const MicroBatch& batch : activations.batches)
    activations.float_batches.push_back({batch.sequences, batch.length, Tensor(), Tensor()});
}

void send_activations(Activations& activations, int to, Transport& transport, Backend& backend) {
  for (std::vector<MicroBatch>* stream : {&activations.batches, &activations.float_batches})
    for (MicroBatch& batch : *stream) {
      const Tensor host = backend.download(std::move(batch.hidden));
      transport.send(host, to);
    }
}

void receive_activations(Activations& activations, int64_t hidden, int from, Transport& transport, Backend& backend) {
  for (std::vector<MicroBatch>* stream : {&activations.batches, &activations.float_batches})
    for (MicroBatch& batch : *stream) {
      Tensor host(backend.compute(), {batch.tokens(), hidden});
      transport.receive(host, from);
      batch.hidden = backend.upload(std::move(host));
    }
}

namespace {

// F32 on the backend.
Tensor final_norm(const ModelSource& source, Backend& backend) {
  Tensor norm(DType::kF32, {source.spec().hidden});
  convert(source.read_float(source.spec().final_norm.name, backend), norm);
  return backend.upload(std::move(norm));
}

class HeadGraph final : public BlockGraph {
 public:
  HeadGraph(const ModelSource& source, Backend& backend)
      : eps_(source.spec().norm_eps), norm_(final_norm(source, backend)) {}

  TensorView input(int, const BlockWeights&, const MicroBatch& batch, Backend& backend,
                   Tensor& scratch) const override {
    scratch.reset();
    scratch = backend.allocate(backend.compute(), batch.hidden.shape());
    backend.rms_norm(batch.hidden, norm_, eps_, scratch);
    return scratch.view();
  }
  void advance(int, const BlockWeights&, TensorView, MicroBatch&, Backend&) const override {
    fail(ExitCode::kInternal, "nothing follows the head");
  }

 private:
  float eps_;
  Tensor norm_;
};

}  // namespace

std::unique_ptr<BlockGraph> head_graph(const ModelSource& source, Backend& backend) {
  return std::make_unique<HeadGraph>(source, backend);
}

Head::Head(const ModelSource& source, Backend& backend) : spec_(source.spec()), backend_(backend) {
  norm_ = final_norm(source, backend);
  normed_ = backend.allocate(backend.compute(), {chunk_rows(), spec_.hidden});
  weight_ =
      backend.prepare_linear(source.read_weight(spec_.head_linear(), backend.compute(), backend));
}

int64_t Head::chunk_rows() const { return std::clamp<int64_t>((int64_t{64} << 20) / (4 * spec_.vocab), 16, 2048); }

void Head::logits(TensorView hidden, TensorView out) {
  const TensorView x = normed_.view().slice(0, hidden.rows());
  backend_.rms_norm(hidden, norm_, spec_.norm_eps, x);
  backend_.linear(x, *weight_, {}, {}, out);
}

}  // namespace bitmill
