// bitmill eval: perplexity of a float or quantized checkpoint.
#include <iostream>
#include <optional>

#include "commands/command.h"
#include "commands/job.h"
#include "commands/session.h"
#include "core/log.h"
#include "pipeline/evaluate.h"

namespace bitmill {

int run_eval(const CommandLine& line, Communicator& comm) {
  const RunOptions& options = line.options;
  together(comm, [&] {
    require(options.model.path, "model.path", "the checkpoint directory to evaluate");
    require(options.evaluate.tokens, "evaluate.tokens", "a token file (.h5 or .safetensors) with input_ids");
  });
  check_writable_target(options.extra.json, comm);
  check_writable_target(options.extra.dump_logits, comm);
  Session session = open_session(options, comm);
  Tensor ids;
  on_rank_zero(comm, [&] {
    ids = read_evaluation_tokens(options, session.source.spec());
  });
  info("{}: {} blocks, compute {}, {} rank{} x {} thread{}; {}", options.model.path, session.source.spec().blocks.size(),
       session.compute == DType::kBF16 ? "bfloat16" : "float32", comm.size(), comm.size() == 1 ? "" : "s",
       session.threads, session.threads == 1 ? "" : "s", session.backend->description());
  std::optional<ModelSource> reference;
  if (!options.evaluate.reference.empty()) reference.emplace(ModelSource::open(options.evaluate.reference, comm));
  const EvalResult result = evaluate(session.source, reference ? &*reference : nullptr, ids, options, comm,
                                     *session.transport, *session.backend, options.extra.dump_logits);
  if (comm.rank() == 0) {
    std::cout << fmt::format("perplexity {:.4f}  nll {:.6f}  tokens {}  seconds {:.2f}", result.perplexity, result.nll,
                             result.tokens, result.seconds);
    if (result.compared) std::cout << fmt::format("  kl {:.6f}  top1 {:.4f}", result.kl, result.top1);
    std::cout << "\n";
  }
  Json json{{"perplexity", result.perplexity}, {"nll", result.nll}, {"tokens", result.tokens},
                  {"windows", result.windows}, {"seconds", result.seconds}, {"model", options.model.path},
                  {"compute", session.compute == DType::kBF16 ? "bfloat16" : "float32"}};
  if (result.compared) {
    json["kl"] = result.kl;
    json["top1"] = result.top1;
  }
  write_json_result(options, comm, json.dump(1));
  return 0;
}

}  // namespace bitmill
