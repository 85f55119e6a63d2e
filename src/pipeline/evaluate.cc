#include "pipeline/evaluate.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "core/log.h"
#include "io/safetensors.h"
#include "pipeline/forward.h"
#include "pipeline/partition.h"

namespace bitmill {
namespace {

// Blocks weigh by their bytes: evaluation is one forward.
std::vector<BlockRange> split_blocks(const ModelSpec& spec, int ranks) {
  std::vector<double> costs;
  for (const BlockSpec& block : spec.blocks) {
    double elements = 1;
    for (const LinearSpec& linear : block.linears) elements += static_cast<double>(linear.out * linear.in);
    costs.push_back(elements);
  }
  return partition_blocks(costs, ranks, 0, static_cast<double>(spec.vocab * spec.hidden));
}

// The token ids of the whole job on every rank that needs them (the last one scores against them).
Tensor share_ids(const Tensor& ids, Communicator& comm) {
  std::string text;
  if (comm.rank() == 0) {
    const int64_t shape[2] = {ids.rows(), ids.cols()};
    text.assign(reinterpret_cast<const char*>(shape), sizeof shape);
    text.append(static_cast<const char*>(ids.data()), static_cast<size_t>(ids.bytes()));
  }
  text = comm.broadcast(text);
  int64_t shape[2];
  std::memcpy(shape, text.data(), sizeof shape);
  Tensor shared(DType::kI32, {shape[0], shape[1]});
  std::memcpy(shared.data(), text.data() + sizeof shape, static_cast<size_t>(shared.bytes()));
  return shared;
}

// Sums over the predictions of all windows, in double, window by window.
struct Sums {
  double nll = 0, kl = 0, agree = 0;
};

// Scores logits chunk by chunk against the next token of the same window, and against a reference's logits.
class Scorer {
 public:
  Scorer(const Tensor& ids, Backend& backend) : ids_(ids), backend_(backend) {}

  // `reference` has no data where there is none.
  void add(int64_t first_token, TensorView logits, TensorView reference) {
    const int64_t rows = logits.rows(), length = ids_.cols();
    Tensor targets(DType::kI32, {rows}), nll(DType::kF64, {rows}), kl = Tensor::zeros(DType::kF64, {rows}),
        agree = Tensor::zeros(DType::kI32, {rows});
    const int32_t* id = ids_.as<int32_t>();
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = first_token + i;
      targets.as<int32_t>()[i] = (token + 1) % length == 0 ? -1 : id[token + 1];
    }
    backend_.token_nll(logits, targets, nll);
    if (reference.data != nullptr) backend_.token_kl(reference, logits, kl, agree);
    for (int64_t i = 0; i < rows; ++i) {
      const bool last = (first_token + i + 1) % length == 0;
      window_.nll += nll.as<double>()[i];
      if (!last) {  // the last position predicts a token that is not there
        window_.kl += kl.as<double>()[i];
        window_.agree += agree.as<int32_t>()[i];
        continue;
      }
      sums_ = {sums_.nll + window_.nll, sums_.kl + window_.kl, sums_.agree + window_.agree};
      window_ = {};
    }
  }
  const Sums& sums() const { return sums_; }

 private:
  const Tensor& ids_;
  Backend& backend_;
  Sums sums_, window_;
};

void run_block(const ModelSource& source, int64_t index, TensorView rope, Activations& activations, Backend& backend) {
  const BlockSpec& block = source.spec().blocks[index];
  const BlockWeights weights = source.read_block(block, backend);
  const auto graph = source.family().graph(source.spec(), index, rope);
  Tensor scratch;
  for (size_t i = 0; i < activations.batches.size(); ++i) {
    activations.await(i);
    MicroBatch& batch = activations.batches[i];
    for (size_t cut = 0; cut < block.cuts.size(); ++cut) {
      const TensorView x = graph->input(static_cast<int>(cut), weights, batch, backend, scratch);
      graph->advance(static_cast<int>(cut), weights, x, batch, backend);
    }
    if (activations.leave) activations.leave(i);
  }
}

// A model's activations behind its last block: on the last working rank, empty elsewhere.
Activations run_model(const ModelSource& source, const Tensor& ids, const RunOptions& options, Communicator& comm,
                      Transport& transport, Backend& backend) {
  const ModelSpec& spec = source.spec();
  const auto ranges = split_blocks(spec, comm.size());
  const int last = static_cast<int>(ranges.size()) - 1;
  if (comm.rank() > last) return {};
  const BlockRange mine = ranges[static_cast<size_t>(comm.rank())];
  Activations activations =
      make_activations(plan_batches(ids.rows(), ids.cols(), 1, options.run.microbatch_tokens), ids.cols());
  RankClock phases;
  std::shared_ptr<BatchSender> sender;
  if (comm.rank() == 0) embed_tokens(source, ids, activations, backend);
  else receive_from(activations, spec.hidden, comm.rank() - 1, transport, backend, phases);
  const Tensor rope = backend.upload(rope_table(spec.rope, ids.cols()));
  for (int64_t b = mine.first; b < mine.end; ++b) {
    if (b + 1 == mine.end && comm.rank() != last)
      sender = send_to(activations, comm.rank() + 1, transport, backend, phases);
    run_block(source, b, rope, activations, backend);
  }
  activations.arrive = nullptr;  // it refers to this function's variables
  if (!sender) return activations;
  sender->finish();
  return {};
}

// Heads of both models side by side, in chunks of rows.
Sums score(const ModelSource& source, const ModelSource* reference, const Tensor& ids, const Activations& activations,
           const Activations& others, Backend& backend, const std::string& dump_logits) {
  std::optional<SafetensorsStream> dump;
  const int64_t vocab = source.spec().vocab;
  if (!dump_logits.empty())
    dump.emplace(dump_logits, std::vector<NamedView>{{"logits", {nullptr, DType::kF32, {ids.rows(), ids.cols(), vocab}}}});
  Head head(source, backend);
  std::optional<Head> other_head;
  if (reference != nullptr) other_head.emplace(*reference, backend);
  const int64_t rows = head.chunk_rows();
  Tensor logits = backend.allocate(DType::kF32, {rows, vocab}), other;
  if (reference != nullptr) other = backend.allocate(DType::kF32, {rows, vocab});
  Scorer scorer(ids, backend);
  int64_t first = 0;
  for (size_t i = 0; i < activations.batches.size(); ++i) {
    const TensorView hidden = activations.batches[i].hidden;
    for (int64_t at = 0; at < hidden.rows(); at += rows) {
      const int64_t end = std::min(hidden.rows(), at + rows);
      const TensorView out = logits.view().slice(0, end - at);
      TensorView other_out;
      head.logits(hidden.slice(at, end), out);
      if (other_head) {
        other_out = other.view().slice(0, end - at);
        other_head->logits(others.batches[i].hidden.view().slice(at, end), other_out);
      }
      scorer.add(first + at, out, other_out);
      if (dump) dump->append(out.data, out.bytes());
    }
    first += hidden.rows();
  }
  if (dump) dump->commit();
  return scorer.sums();
}

}  // namespace

EvalResult evaluate(const ModelSource& source, const ModelSource* reference, const Tensor& given_ids,
                    const RunOptions& options, Communicator& comm, Transport& transport, Backend& backend,
                    const std::string& dump_logits) {
  const Stopwatch watch;
  const Tensor ids = share_ids(given_ids, comm);
  if (reference != nullptr && (reference->spec().vocab != source.spec().vocab ||
                               reference->spec().blocks.size() != source.spec().blocks.size()))
    throw AgreedError(Error(ExitCode::kInput,
                            fmt::format("evaluate.reference={} has {} blocks and a vocabulary of {}, the model has {} and {}",
                                        reference->directory(), reference->spec().blocks.size(), reference->spec().vocab,
                                        source.spec().blocks.size(), source.spec().vocab)));
  const Activations activations = run_model(source, ids, options, comm, transport, backend);
  const Activations others =
      reference != nullptr ? run_model(*reference, ids, options, comm, transport, backend) : Activations();
  const int last = std::min(comm.size(), static_cast<int>(source.spec().blocks.size())) - 1;
  Sums sums;
  if (comm.rank() == last) sums = score(source, reference, ids, activations, others, backend, dump_logits);

  // As text with every digit, because a NaN must arrive too.
  const std::string text = comm.broadcast(fmt::format("{:.17g} {:.17g} {:.17g}", sums.nll, sums.kl, sums.agree), last);
  const size_t one = text.find(' '), two = text.find(' ', one + 1);
  sums = {std::stod(text), std::stod(text.substr(one)), std::stod(text.substr(two))};
  if (!std::isfinite(sums.nll) || !std::isfinite(sums.kl))
    throw AgreedError(Error(ExitCode::kInput,
                            fmt::format("{}: the logits hold a NaN or infinity: some weights are far out of range",
                                        source.directory())));
  EvalResult result;
  result.windows = ids.rows();
  result.tokens = ids.rows() * (ids.cols() - 1);
  const double count = static_cast<double>(std::max<int64_t>(1, result.tokens));
  result.nll = sums.nll / count;
  result.perplexity = std::exp(result.nll);
  result.compared = reference != nullptr;
  result.kl = sums.kl / count;
  result.top1 = sums.agree / count;
  result.seconds = comm.max(watch.seconds());
  return result;
}

}  // namespace bitmill
