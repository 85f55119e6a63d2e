// bitmill plan: what would run where. Needs only a config.json; reads no weights, computes nothing.
#include <filesystem>
#include <iostream>
#include <optional>
#include <set>

#include "commands/command.h"
#include "commands/job.h"
#include "commands/session.h"
#include "core/log.h"
#include "io/tokens.h"
#include "pipeline/memory.h"
#include "pipeline/stage.h"

namespace bitmill {
namespace {

// The machine of this job, or the one that --ranks asks about: GPUs with 80 GB unless told otherwise.
PlanMachine plan_machine(const RunOptions& options, Communicator& comm) {
  if (options.extra.ranks == 0) return machine_of(options, comm);
  PlanMachine machine;
  machine.ranks = options.extra.ranks;
  machine.ranks_per_node = options.extra.ranks_per_node > 0 ? options.extra.ranks_per_node : options.extra.ranks;
  machine.threads = resolve_threads(options.run.threads, comm);
  machine.device = options.run.backend != "cpu";
  machine.memory_name = machine.device ? "device memory" : "host memory";
  machine.memory_per_rank = options.run.device_memory != "auto"
                                ? parse_size(options.run.device_memory, "run.device_memory")
                                : int64_t{80'000'000'000};
  return machine;
}

// The sizes of a plan are products with this number; beyond the limit they would not fit an integer.
void check_tokens(const PlanJob& job) {
  constexpr int64_t kMostTokens = 1'000'000'000'000;
  if (job.samples * job.length > kMostTokens)
    fail(ExitCode::kUsage,
         "calibration.samples x calibration.sequence_length: found {} x {}, expected at most {} tokens",
         job.samples, job.length, kMostTokens);
}

// Types of stored tensors by config.json alone. FP8 checkpoints store the linears of blocks in one byte
// (and a scale per block of 128 x 128, which is not counted).
std::function<DType(const std::string&)> stored_dtypes(const Json& config, const ModelSpec& spec) {
  std::set<std::string> fp8;
  const auto quantization = config.find("quantization_config");
  if (quantization != config.end() && quantization->is_object() &&
      quantization->value("quant_method", "") == "fp8")
    for (const BlockSpec& block : spec.blocks)
      for (const LinearSpec& linear : block.linears) fp8.insert(linear.weight_name());
  return [fp8 = std::move(fp8), dtype = spec.dtype](const std::string& name) {
    return fp8.contains(name) ? DType::kF8E4M3 : dtype;
  };
}

bool has_weights(const std::string& directory) {
  namespace fs = std::filesystem;
  return fs::exists(directory + "/model.safetensors") || fs::exists(directory + "/model.safetensors.index.json");
}

}  // namespace

int run_plan(const CommandLine& line, Communicator& comm) {
  const RunOptions& options = line.options;
  std::string text, json;
  on_rank_zero(comm, [&] {
    require(options.model.path, "model.path", "a model directory, or a folder that holds only its config.json");
    const Json config = read_model_config(options.model.path);
    const ModelSpec spec = find_family(config).describe(config);
    const OutputFormat& format = find_format(options.output.format);
    PlanJob job;
    job.samples = options.calibration.samples > 0 ? options.calibration.samples : 128;
    job.length = options.calibration.sequence_length > 0 ? options.calibration.sequence_length : 2048;
    if (!options.calibration.tokens.empty()) {
      const Tensor ids = read_token_file(options.calibration.tokens, options.calibration.samples,
                                         options.calibration.sequence_length, spec.vocab, "calibration.tokens");
      job.samples = ids.rows();
      job.length = ids.cols();
    }
    check_tokens(job);
    job.compute = options.run.compute == Compute::kFloat32 ? DType::kF32
                  : options.run.compute == Compute::kBFloat16 || spec.dtype == DType::kBF16 ? DType::kBF16
                                                                                             : DType::kF32;
    job.calibrated = needs_calibration(options, spec);
    if (job.calibrated) job.samples = samples_needed(options, spec, job.samples, job.length);
    std::function<DType(const std::string&)> dtypes = stored_dtypes(config, spec);
    std::optional<ModelSource> source;
    if (has_weights(options.model.path)) {
      source.emplace(ModelSource::open(options.model.path));
      refuse_quantized(*source);
      job.other = other_tensors(*source);
      dtypes = [&](const std::string& name) { return source->checkpoint().at(name).dtype; };
    }
    const Plan plan = make_plan(options, spec, format, plan_machine(options, comm), job, dtypes);
    text = plan_text(plan, spec);
    if (!options.extra.json.empty()) json = plan_json(plan).dump(1);
  });
  if (comm.rank() == 0) std::cout << text;
  write_json_result(options, comm, json);
  return 0;
}

}  // namespace bitmill
