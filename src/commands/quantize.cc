// bitmill quantize: the main job.
#include <iostream>

#include "commands/command.h"
#include "commands/job.h"
#include "commands/session.h"
#include "core/log.h"
#include "io/tokens.h"
#include "pipeline/awq_pass.h"
#include "pipeline/stage.h"
#include "report/report.h"

namespace bitmill {
namespace {

// All that is decided before any compute; the same on every rank but for `ids` (rank 0).
struct Prepared {
  const OutputFormat* format = nullptr;
  Plan plan;
  Tensor ids;
  Fingerprint fingerprint;
  FormatConfig config;
  std::vector<std::string> companions;
  std::vector<ModuleChoice> modules;
  std::vector<std::string> folded;  // source tensors whose values the output changes (awq)
  bool nothing_to_do = false;
};

void check_required(const RunOptions& options) {
  require(options.model.path, "model.path", "the float checkpoint directory to quantize");
  require(options.output.path, "output.path", "the directory to write");
  if ((options.evaluate.before || options.evaluate.after) && options.evaluate.tokens.empty())
    fail(ExitCode::kUsage, "evaluate.tokens is missing: evaluate.before and evaluate.after need a token file");
}

// Reads the calibration ids on rank 0 and tells everybody their shape.
void read_calibration(const RunOptions& options, const ModelSpec& spec, PlanJob& job, Tensor& ids, Communicator& comm) {
  on_rank_zero(comm, [&] {
    require(options.calibration.tokens, "calibration.tokens",
            "a token file (.h5 or .safetensors) with input_ids; launch/tokenize.py makes one");
    ids = read_token_file(options.calibration.tokens, options.calibration.samples, options.calibration.sequence_length,
                          spec.vocab, "calibration.tokens");
    if (ids.cols() > spec.max_positions && spec.max_positions > 0)
      warn("calibration sequences of {} tokens are longer than the model's max_position_embeddings {}", ids.cols(),
           spec.max_positions);
  });
  const std::string shape = comm.broadcast(comm.rank() == 0 ? fmt::format("{} {}", ids.rows(), ids.cols()) : "");
  size_t blank = 0;
  job.samples = std::stoll(shape, &blank);
  job.length = std::stoll(shape.substr(blank));
  job.samples = samples_needed(options, spec, job.samples, job.length);
}

std::vector<std::string> text_file_names(const Prepared& p) {
  std::vector<std::string> names = p.companions;
  for (const auto& [name, content] : p.config.files) names.push_back(name);
  if (!p.plan.joined) names.push_back("model.safetensors.index.json");
  names.push_back("config.json");
  return names;
}

Prepared prepare(const RunOptions& options, const Session& session, Communicator& comm) {
  Prepared p;
  const ModelSpec& spec = session.source.spec();
  PlanJob job;
  job.compute = session.compute;
  together(comm, [&] {
    refuse_quantized(session.source);
    p.format = &find_format(options.output.format);
    p.modules = choose_modules(options, spec, *p.format);
    p.folded = folded_tensors(options, spec);
    job.calibrated = needs_calibration(options, spec);
    job.other = other_tensors(session.source);
  });
  if (job.calibrated) read_calibration(options, spec, job, p.ids, comm);
  else job.samples = job.length = 1;
  const PlanMachine machine = machine_of(options, comm);
  together(comm, [&] {
    p.plan = make_plan(options, spec, *p.format, machine, job,
                       [&](const std::string& name) { return session.source.checkpoint().at(name).dtype; });
    p.config = p.format->config(options.quantize, p.modules);
  });
  std::string state;
  on_rank_zero(comm, [&] {
    p.companions = companion_files(options.model.path);
    if (options.evaluate.before || options.evaluate.after) read_evaluation_tokens(options, spec);
    p.fingerprint = fingerprint_of(options, session.source, session.compute, p.ids);
    const OutputState found = inspect_output(options.output.path, p.fingerprint, options.output.overwrite);
    state = found == OutputState::kComplete ? "complete" : "";
  });
  p.nothing_to_do = comm.broadcast(state) == "complete";
  return p;
}

void print_start(const RunOptions& options, const Session& session, const Prepared& p, Communicator& comm) {
  info("bitmill {} on {} rank{} x {} thread{}; {}", BITMILL_VERSION, comm.size(), comm.size() == 1 ? "" : "s",
       session.threads, session.threads == 1 ? "" : "s", session.backend->description());
  info("{}", effective_config(options, false));
  info("{}", plan_text(p.plan, session.source.spec()));
  const std::vector<PackedSpec>& others = p.plan.job.other;
  if (comm.rank() == 0 && !others.empty())
    warn("{} tensor{} of the source (first: {}) {} no part of family {}; copied as they are", others.size(),
         others.size() == 1 ? "" : "s", others.front().name, others.size() == 1 ? "is" : "are",
         session.source.spec().family);
}

// Every tensor this rank will read, scanned before anything is computed (run.verify_input=full).
void scan_inputs(const Session& session, const RankPlan& mine) {
  const ModelSpec& spec = session.source.spec();
  const auto scan = [&](const std::string& name) {
    session.source.read_pieces(name, true, *session.backend, [](int64_t, Tensor) {});
  };
  if (mine.embeds) scan(spec.embedding.name);
  for (int64_t b = mine.blocks.first; b < mine.blocks.end; ++b) {
    for (const TensorSpec& norm : spec.blocks[b].norms) scan(norm.name);
    for (const LinearSpec& linear : spec.blocks[b].linears) {
      scan(linear.weight_name());
      if (linear.bias) scan(linear.bias_name());
    }
  }
  if (mine.last) {
    scan(spec.final_norm.name);
    scan(spec.head.name);
  }
}

EvalResult evaluate_model(const std::string& directory, const RunOptions& options, Session& session, Communicator& comm) {
  const ModelSource source = ModelSource::open(directory, comm);
  Tensor ids;
  on_rank_zero(comm, [&] { ids = read_evaluation_tokens(options, source.spec()); });
  std::optional<ModelSource> reference;
  if (!options.evaluate.reference.empty()) reference.emplace(ModelSource::open(options.evaluate.reference, comm));
  return evaluate(source, reference ? &*reference : nullptr, ids, options, comm, *session.transport, *session.backend, "");
}

// The source's config.json with the quantization_config; a tied head that was quantized has its own
// weight now.
std::string config_text(const RunOptions& options, const ModelSpec& spec,
                        const FormatConfig& config) {
  const std::string path = options.model.path + "/config.json";
  OrderedJson model = OrderedJson::parse(read_text_file(path));
  model.erase("quantization_config");
  model["quantization_config"] = config.quantization_config;
  if (spec.tied && head_to_quantize(options, spec)) model["tie_word_embeddings"] = false;
  return model.dump(2) + "\n";
}

void commit(const RunOptions& options, const ModelSpec& spec, const Prepared& p,
            const QuantizeOutcome& outcome, const OutputDirectory& output) {
  OutputDirectory::Finish finish{options.model.path,
                                 p.companions,
                                 p.config.files,
                                 config_text(options, spec, p.config),
                                 {"complete", p.fingerprint, p.plan.files, Json::array(),
                                  p.folded}};
  for (const std::string& name : text_file_names(p)) finish.manifest.files.push_back(name);
  for (const LinearEvent& event : outcome.linears) finish.manifest.layers.push_back(record_json(event.record));
  output.commit(p.plan, finish);
}

std::string result_json(const RunOptions& options, const Plan& plan, const RunFacts& facts) {
  const auto eval = [](const std::optional<EvalResult>& r) -> Json {
    return r ? Json{{"perplexity", r->perplexity}, {"nll", r->nll}, {"tokens", r->tokens}} : Json();
  };
  return Json{{"state", "complete"}, {"output", options.output.path}, {"seconds", facts.seconds},
              {"quantize_seconds", facts.quantize_seconds}, {"bits_per_weight", plan.bits_per_weight},
              {"source_bytes", facts.source_bytes}, {"output_bytes", facts.output_bytes}, {"files", plan.files},
              {"report", options.output.path + "/bitmill/report.json"}, {"before", eval(facts.before)},
              {"after", eval(facts.after)}}
      .dump(1);
}

// The part that computes. Throws; the caller records the failure in status.json.
RunFacts work(const RunOptions& options, Session& session, Prepared& p, RunReport& report, const Stopwatch& watch,
              const OutputDirectory& output, Communicator& comm) {
  RunFacts facts;
  facts.output = options.output.path;
  facts.effective_config = effective_config(options, false);
  facts.backend = session.backend->description();
  facts.source_bytes = p.plan.source_bytes;
  facts.output_bytes = p.plan.output_bytes;
  if (options.run.verify_input == "full") together(comm, [&] { scan_inputs(session, p.plan.ranks[comm.rank()]); });
  if (options.evaluate.before) facts.before = evaluate_model(options.model.path, options, session, comm);
  if (comm.rank() == 0) report.on_phase("quantize");
  const Stopwatch quantizing;
  QuantizeJob job{options, session.source, *p.format, p.plan, output, std::move(p.ids)};
  const QuantizeOutcome outcome = run_quantize(job, comm, *session.transport, *session.backend, report);
  facts.quantize_seconds = quantizing.seconds();
  on_rank_zero(comm, [&] {
    facts.seconds = watch.seconds();
    report.write_records(outcome, facts);  // also of a run that on_failed=fail refuses
    refuse_failures(outcome);
    report.on_phase("gather");
    commit(options, session.source.spec(), p, outcome, output);
    facts.seconds = watch.seconds();
    report.write_records(outcome, facts);
  });
  if (options.evaluate.after) facts.after = evaluate_model(options.output.path, options, session, comm);
  facts.seconds = watch.seconds();
  on_rank_zero(comm, [&] { report.finish(outcome, facts); });
  return facts;
}

}  // namespace

int run_quantize(const CommandLine& line, Communicator& comm) {
  const Stopwatch watch;
  const RunOptions& options = line.options;
  together(comm, [&] { check_required(options); });
  check_writable_target(options.extra.json, comm);
  Session session = open_session(options, comm);
  Prepared p = prepare(options, session, comm);
  if (p.nothing_to_do) {
    info("nothing to do: {} is complete with these settings", options.output.path);
    write_json_result(options, comm, Json{{"state", "nothing to do"}, {"output", options.output.path}}.dump(1));
    return 0;
  }
  print_start(options, session, p, comm);
  const OutputDirectory output(options.output.path);
  OutputLock lock;
  on_rank_zero(comm, [&] {
    lock.take(output.path());
    output.prepare(p.plan, p.fingerprint, text_file_names(p));
  });
  int64_t linears = 0;
  for (const ModuleChoice& module : p.modules) linears += module.quantized;
  RunReport report(output.path() + "/bitmill", p.plan, linears);
  RunFacts facts;
  try {
    facts = work(options, session, p, report, watch, output, comm);
  } catch (const AgreedError& error) {
    if (comm.rank() == 0) report.failed(error, comm.rank());
    throw;
  } catch (const Error& error) {
    report.failed(error, comm.rank());
    throw;
  } catch (const std::exception& error) {
    report.failed(Error(ExitCode::kInternal, error.what()), comm.rank());
    throw;
  }
  write_json_result(options, comm, result_json(options, p.plan, facts));
  return 0;
}

}  // namespace bitmill
