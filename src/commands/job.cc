#include "commands/job.h"

#include "core/log.h"
#include "pipeline/memory.h"

namespace bitmill {

PlanMachine machine_of(const RunOptions& options, Communicator& comm) {
  PlanMachine machine;
  machine.ranks = comm.size();
  machine.ranks_per_node = comm.local_size();
  machine.memory_name = "host memory";
  machine.memory_per_rank = options.run.device_memory != "auto"
                                ? parse_size(options.run.device_memory, "run.device_memory")
                                : host_memory_per_rank(comm.local_size());
  return machine;
}

std::vector<PackedSpec> other_tensors(const ModelSource& source) {
  std::vector<PackedSpec> others;
  for (const std::string& name : source.unknown_tensors()) {
    if (name.ends_with("rotary_emb.inv_freq")) continue;
    const TensorEntry& entry = source.checkpoint().at(name);
    others.push_back({name, entry.dtype, entry.shape});
  }
  return others;
}

void refuse_quantized(const ModelSource& source) {
  if (source.format() != nullptr)
    fail(ExitCode::kInput, "{} is quantized already ({}); quantize its float source", source.directory(),
         source.format()->name());
}

Fingerprint fingerprint_of(const RunOptions& options, const ModelSource& source, DType compute, TensorView ids) {
  Fingerprint fingerprint;
  const std::string settings = effective_config(options, true);
  for (size_t at = 0; at < settings.size();) {
    const size_t end = std::min(settings.find('\n', at), settings.size());
    const std::string line = settings.substr(at, end - at);
    if (const size_t equals = line.find(" = "); equals != std::string::npos) {
      std::string& value = fingerprint[line.substr(0, equals)];  // rules repeat their key
      value += (value.empty() ? "" : "; ") + line.substr(equals + 3);
    }
    at = end + 1;
  }
  std::string tensors = source.config().dump();
  for (const auto& [name, entry] : source.checkpoint().tensors())
    tensors += fmt::format("\n{} {} {} {}", name, dtype_name(entry.dtype), entry.shape.text(), entry.offset);
  fingerprint["input.model"] = digest(tensors.data(), tensors.size());
  fingerprint["input.tokens"] =
      ids.data == nullptr ? "none" : ids.shape.text() + " " + digest(ids.data, static_cast<size_t>(ids.bytes()));
  fingerprint["run.compute"] = compute == DType::kBF16 ? "bfloat16" : "float32";
  fingerprint["version"] = BITMILL_VERSION;
  return fingerprint;
}

}  // namespace bitmill
