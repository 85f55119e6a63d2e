#include "pipeline/forward.h"

#include <algorithm>

namespace bitmill {

Activations make_activations(std::vector<BatchRange> ranges, int64_t length) {
  Activations activations;
  activations.length = length;
  for (const BatchRange& range : ranges) {
    MicroBatch batch;
    batch.sequences = range.samples;
    batch.length = length;
    activations.batches.push_back(std::move(batch));
  }
  activations.ranges = std::move(ranges);
  return activations;
}

namespace {

// Rows of the embedding for some tokens, and each token's row in it.
struct TokenRows {
  Tensor table;  // as stored [distinct, hidden], in order of the token ids
  Tensor rows;   // I32 [tokens]
};

// Reads the rows of the distinct ids, ascending: one read per run of neighbours.
TokenRows read_token_rows(const ModelSource& source, TensorView ids, Backend& backend) {
  const int32_t* id = ids.as<int32_t>();
  std::vector<int32_t> distinct(id, id + ids.elements());
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  const auto count = static_cast<int64_t>(distinct.size());
  const std::string& name = source.spec().embedding.name;
  const TensorEntry& entry = source.checkpoint().at(name);
  TokenRows out{Tensor(entry.dtype, {count, source.spec().hidden}), Tensor(DType::kI32, ids.shape)};
  for (int64_t first = 0, end = 0; first < count; first = end) {
    end = first + 1;
    while (end < count && distinct[end] == distinct[end - 1] + 1) ++end;
    source.read_float_rows(name, distinct[first], out.table.view().slice(first, end), backend);
  }
  for (int64_t t = 0; t < ids.elements(); ++t)
    out.rows.as<int32_t>()[t] = static_cast<int32_t>(
        std::lower_bound(distinct.begin(), distinct.end(), id[t]) - distinct.begin());
  return out;
}

}  // namespace

void embed_tokens(const ModelSource& source, TensorView ids, Activations& activations,
                  Backend& backend) {
  for (size_t i = 0; i < activations.batches.size(); ++i) {
    MicroBatch& batch = activations.batches[i];
    const BatchRange& range = activations.ranges[i];
    const TensorView tokens = ids.slice(range.first_sample, range.first_sample + range.samples);
    TokenRows read = read_token_rows(source, tokens.reshaped({batch.tokens()}), backend);
    const Tensor table = backend.upload(std::move(read.table));
    batch.hidden = backend.allocate(backend.compute(), {batch.tokens(), source.spec().hidden});
    backend.embed(read.rows, table, batch.hidden);
  }
}

void start_float_stream(Activations& activations) {
  activations.float_batches.clear();
  for (const MicroBatch& batch : activations.batches)
    activations.float_batches.push_back({batch.sequences, batch.length, clone(batch.hidden), Tensor()});
}

void expect_float_stream(Activations& activations) {
  for (const MicroBatch& batch : activations.batches)
    activations.float_batches.push_back({batch.sequences, batch.length, Tensor(), Tensor()});
}

void receive_from(Activations& activations, int64_t hidden, int from, Transport& transport, Backend& backend,
                  RankClock& phases) {
  const bool compares = !activations.float_batches.empty();
  const auto receiver = std::make_shared<BatchReceiver>(transport, from, backend, activations.ranges, activations.length,
                                                        hidden, compares ? 2 : 1);
  activations.arrive = [&activations, &phases, receiver, compares, next = size_t{0}](size_t i) mutable {
    PhaseTimer timer(phases, Phase::kWait);
    for (; next <= i; ++next) {
      activations.batches[next] = receiver->receive();
      if (compares) activations.float_batches[next] = receiver->receive();
    }
  };
}

std::shared_ptr<BatchSender> send_to(Activations& activations, int to, Transport& transport, Backend& backend,
                                     RankClock& phases) {
  auto sender = std::make_shared<BatchSender>(transport, to, backend);
  activations.leave = [&activations, &phases, sender](size_t i) {
    PhaseTimer timer(phases, Phase::kTransfer);
    sender->send(std::move(activations.batches[i].hidden));
    if (!activations.float_batches.empty()) sender->send(std::move(activations.float_batches[i].hidden));
  };
  return sender;
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
