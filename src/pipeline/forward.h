// The float side of a pipeline rank: embedding, moving activations between ranks, and the head.
#pragma once

#include <functional>
#include <string>

#include "comm/transport.h"
#include "pipeline/loader.h"
#include "pipeline/stage.h"

namespace bitmill {

// Empty micro-batches (no data yet) for I32 ids [samples, length] cut as plan_batches says.
Activations make_activations(std::vector<BatchRange> ranges, int64_t length);

// Fills every batch with embedded tokens in the compute type. Reads the embedding table and frees it again.
void embed_tokens(const ModelSource& source, TensorView ids, Activations& activations, Backend& backend);

// Sends all micro-batches to rank `to`, freeing each; receives them from rank `from`.
void send_activations(Activations& activations, int to, Transport& transport, Backend& backend);
void receive_activations(Activations& activations, int64_t hidden, int from, Transport& transport, Backend& backend);

// Final norm and head over all micro-batches in chunks of rows; `sink` gets F32 logits [rows, vocab] of consecutive tokens
// (`first_token` counts from the first token of the first sample). Never holds a whole logits tensor.
using LogitsSink = std::function<void(int64_t first_token, TensorView logits)>;
void run_head(const ModelSource& source, Activations& activations, Backend& backend, const LogitsSink& sink);

}  // namespace bitmill
