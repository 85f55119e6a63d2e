// Perplexity of a checkpoint, float or quantized, over the ranks of the job: the same blocks, the same forward as the
// quantizer's, so that evaluating an output proves its bytes.
#pragma once

#include <string>

#include "comm/transport.h"
#include "core/options.h"
#include "pipeline/loader.h"

namespace bitmill {

struct EvalResult {
  double nll = 0;  // mean over predictions, nats
  double perplexity = 0;
  int64_t tokens = 0;  // predictions: (length - 1) per window
  int64_t windows = 0;
  // Against a reference model, over the same predictions: mean KL(reference || model) in nats, and the share of positions
  // where both have the same most likely token. Only with options.evaluate.reference.
  bool compared = false;
  double kl = 0, top1 = 0;
  double seconds = 0;
};

// perplexity = exp(mean NLL over the length-1 predictions of each window); NLL is summed in double in window order.
// ids I32 [windows, length], on rank 0. dump_logits: a file for F32 `logits` [windows, length, vocab]; empty: none.
// reference: a float model to compare with, or nullptr. Collective; every rank returns the same result.
EvalResult evaluate(const ModelSource& source, const ModelSource* reference, const Tensor& ids, const RunOptions& options, Communicator& comm,
                    Transport& transport, Backend& backend, const std::string& dump_logits);

}  // namespace bitmill
