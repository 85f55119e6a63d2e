// The float side of a pipeline rank: embedding, moving activations between ranks, and the head.
#pragma once

#include <memory>
#include <string>

#include "comm/transport.h"
#include "pipeline/loader.h"
#include "pipeline/batch_flow.h"
#include "pipeline/records.h"

namespace bitmill {

// Empty micro-batches (no data yet) for I32 ids [samples, length] cut as plan_batches says.
Activations make_activations(std::vector<BatchRange> ranges, int64_t length);

// Makes float_batches copies of the batches: before the first block both models have the same activations.
void start_float_stream(Activations& activations);
// Empty float batches to be received.
void expect_float_stream(Activations& activations);

// Fills every batch with embedded tokens in the compute type. Reads only the rows of a batch's tokens, so the memory is at most
// that of one stored row per token of a micro-batch; only these rows are checked for NaN and Inf.
void embed_tokens(const ModelSource& source, TensorView ids, Activations& activations, Backend& backend);

// From now on micro-batches (each followed by the float model's, where there is a float stream) arrive from rank `from`,
// one by one as they are awaited.
void receive_from(Activations& activations, int64_t hidden, int from, Transport& transport, Backend& backend,
                  RankClock& phases);
// From now on a micro-batch that leaves goes to rank `to` and is freed. Call `finish` of the result when all have left.
std::shared_ptr<BatchSender> send_to(Activations& activations, int to, Transport& transport, Backend& backend,
                                     RankClock& phases);

// The final norm as a graph of one cut: `input` is what the head multiplies. Nothing follows the
// head, so `advance` must not be called.
std::unique_ptr<BlockGraph> head_graph(const ModelSource& source, Backend& backend);

// Final norm and head of a model, applied to chunks of rows: a whole logits tensor is never held.
class Head {
 public:
  Head(const ModelSource& source, Backend& backend);
  // Rows per chunk that keep F32 logits near 64 MiB: a function of the vocabulary alone.
  int64_t chunk_rows() const;
  // out F32 [rows, vocab] = head(norm(hidden [rows, hidden])). hidden is a slice of a block-boundary activation.
  void logits(TensorView hidden, TensorView out);

 private:
  const ModelSpec& spec_;
  Backend& backend_;
  Tensor norm_, normed_;
  std::unique_ptr<PreparedWeight> weight_;
};

}  // namespace bitmill
