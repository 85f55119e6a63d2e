#include "pipeline/evaluate.h"

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

// Scores logits against the next token of the same window; sums in double, window by window.
class Scorer {
 public:
  Scorer(const Tensor& ids, Backend& backend) : ids_(ids), backend_(backend) {}

  void add(int64_t first_token, TensorView logits) {
    const int64_t rows = logits.rows(), length = ids_.cols();
    Tensor targets(DType::kI32, {rows}), nll(DType::kF64, {rows});
    const int32_t* id = ids_.as<int32_t>();
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = first_token + i;
      targets.as<int32_t>()[i] = (token + 1) % length == 0 ? -1 : id[token + 1];
    }
    backend_.token_nll(logits, targets, nll);
    for (int64_t i = 0; i < rows; ++i) {
      window_ += nll.as<double>()[i];
      if ((first_token + i + 1) % length == 0) {
        sum_ += window_;
        window_ = 0;
      }
    }
  }
  double sum() const { return sum_; }

 private:
  const Tensor& ids_;
  Backend& backend_;
  double sum_ = 0, window_ = 0;
};

double score(const ModelSource& source, const Tensor& ids, Activations& activations, Backend& backend,
             const std::string& dump_logits) {
  std::optional<SafetensorsStream> dump;
  if (!dump_logits.empty())
    dump.emplace(dump_logits,
                 std::vector<NamedView>{{"logits", {nullptr, DType::kF32, {ids.rows(), ids.cols(), source.spec().vocab}}}});
  Scorer scorer(ids, backend);
  run_head(source, activations, backend, [&](int64_t first_token, TensorView logits) {
    scorer.add(first_token, logits);
    if (dump) dump->append(logits.data, logits.bytes());
  });
  if (dump) dump->commit();
  return scorer.sum();
}

}  // namespace

EvalResult evaluate(const ModelSource& source, const Tensor& given_ids, const RunOptions& options, Communicator& comm,
                    Transport& transport, Backend& backend, const std::string& dump_logits) {
  const Stopwatch watch;
  const Tensor ids = share_ids(given_ids, comm);
  const ModelSpec& spec = source.spec();
  const auto ranges = split_blocks(spec, comm.size());
  const int last = static_cast<int>(ranges.size()) - 1;
  double sum = 0;
  if (comm.rank() <= last) {
    const BlockRange mine = ranges[comm.rank()];
    Activations activations =
        make_activations(plan_batches(ids.rows(), ids.cols(), 1, options.run.microbatch_tokens), ids.cols());
    if (comm.rank() == 0) embed_tokens(source, ids, activations, backend);
    else receive_activations(activations, spec.hidden, comm.rank() - 1, transport, backend);
    const Tensor rope = backend.upload(rope_table(spec.rope, ids.cols()));
    for (int64_t b = mine.first; b < mine.end; ++b) {
      const BlockWeights weights = source.read_block(spec.blocks[b], backend);
      const auto graph = source.family().graph(spec, b, rope);
      Tensor scratch;
      for (MicroBatch& batch : activations.batches)
        for (size_t cut = 0; cut < spec.blocks[b].cuts.size(); ++cut) {
          const TensorView x = graph->input(static_cast<int>(cut), weights, batch, backend, scratch);
          graph->advance(static_cast<int>(cut), weights, x, batch, backend);
        }
    }
    if (comm.rank() < last) send_activations(activations, comm.rank() + 1, transport, backend);
    else sum = score(source, ids, activations, backend, dump_logits);
  }
  EvalResult result;
  result.windows = ids.rows();
  result.tokens = ids.rows() * (ids.cols() - 1);
  sum = std::stod(comm.broadcast(fmt::format("{:.17g}", sum), last));
  result.nll = result.tokens > 0 ? sum / static_cast<double>(result.tokens) : 0;
  result.perplexity = std::exp(result.nll);
  result.seconds = comm.max(watch.seconds());
  return result;
}

}  // namespace bitmill
