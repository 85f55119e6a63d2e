#include "commands/job.h"

#include <algorithm>
#include <map>

#include "commands/session.h"
#include "core/log.h"
#include "io/tokens.h"
#include "pipeline/memory.h"

namespace bitmill {

PlanMachine machine_of(const RunOptions& options, Communicator& comm) {
  PlanMachine machine;
  machine.ranks = comm.size();
  machine.ranks_per_node = comm.local_size();
  machine.memory_name = "host memory";
  machine.threads = resolve_threads(options.run.threads, comm);
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

Tensor read_evaluation_tokens(const RunOptions& options, const ModelSpec& spec) {
  Tensor ids = read_token_file(options.evaluate.tokens, options.evaluate.samples, 0, spec.vocab, "evaluate.tokens");
  if (ids.cols() < 2)
    fail(ExitCode::kInput, "evaluate.tokens={}: windows of {} token predict nothing, at least 2 are needed",
         options.evaluate.tokens, ids.cols());
  return ids;
}

namespace {

// Checkpoints up to this size are digested whole (under a second); of larger ones every file gives evenly spaced pieces.
constexpr int64_t kWholeBytes = int64_t{1} << 30;
constexpr int64_t kPieces = 256, kPieceBytes = 64 << 10;

// Digest of config, tensor directory and content: a source that changed must not pass for the one a result came from.
std::string model_digest(const ModelSource& source) {
  std::string text = source.config().dump();
  std::map<int, std::pair<int64_t, int64_t>> extents;  // file -> first and last byte of its tensors
  for (const auto& [name, entry] : source.checkpoint().tensors()) {
    text += fmt::format("\n{} {} {} {}", name, dtype_name(entry.dtype), entry.shape.text(), entry.offset);
    auto& [first, end] = extents.try_emplace(entry.file, entry.offset, 0).first->second;
    first = std::min(first, entry.offset);
    end = std::max(end, entry.offset + entry.bytes);
  }
  const bool whole = source.checkpoint().total_bytes() <= kWholeBytes;
  std::string piece(static_cast<size_t>(whole ? 8 << 20 : kPieceBytes), '\0');
  for (const auto& [file, extent] : extents) {
    const RangeReader reader(source.directory() + "/" + source.checkpoint().files()[static_cast<size_t>(file)]);
    const int64_t bytes = extent.second - extent.first, size = static_cast<int64_t>(piece.size());
    const int64_t step = whole ? size : std::max(size, bytes / kPieces);
    for (int64_t at = 0; at < bytes; at += step) {
      const int64_t count = std::min(size, bytes - at);
      reader.read(extent.first + at, count, piece.data());
      text += digest(piece.data(), static_cast<size_t>(count));
    }
  }
  return digest(text.data(), text.size());
}

}  // namespace

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
  fingerprint["input.model"] = model_digest(source);
  fingerprint["input.tokens"] =
      ids.data == nullptr ? "none" : ids.shape.text() + " " + digest(ids.data, static_cast<size_t>(ids.bytes()));
  fingerprint["run.compute"] = compute == DType::kBF16 ? "bfloat16" : "float32";
  fingerprint["version"] = BITMILL_VERSION;
  return fingerprint;
}

}  // namespace bitmill
