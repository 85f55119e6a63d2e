#include "commands/session.h"

#include <sched.h>

#include <algorithm>
#include <charconv>
#include <filesystem>

#include "core/log.h"
#include "core/thread_pool.h"
#include "io/durable.h"
#include "pipeline/pipeline.h"

namespace bitmill {
namespace {

// Host and affinity mask: ranks with equal text share their CPUs.
std::string cpu_home() {
  cpu_set_t mask;
  std::string text = host_name() + ":";
  if (sched_getaffinity(0, sizeof mask, &mask) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) text += CPU_ISSET(cpu, &mask) ? '1' : '0';
  return text;
}

std::string joined(const std::vector<std::string>& lines) {
  return fmt::format("{}", fmt::join(lines, "\n"));
}

int count_lines(const std::string& text, const std::string& line) {
  int count = 0;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    count += text.compare(at, end - at, line) == 0;
    at = end + 1;
  }
  return count;
}

// Ranks that were started with different options would wait for each other for ever.
void check_same_configuration(const RunOptions& options, Communicator& comm) {
  const std::string mine = effective_config(options, false);
  const std::string theirs = comm.broadcast(mine);
  together(comm, [&] {
    if (mine != theirs) fail(ExitCode::kUsage, "rank {} was started with other options than rank 0", comm.rank());
  });
}

// A family whose forward pass is not in this version refuses to give its graph: asked before anything
// else is looked at. A directory without a usable config.json is left to those who read it.
void require_forward(const std::string& directory) {
  if (!std::filesystem::exists(directory + "/config.json")) return;
  const Json config = read_model_config(directory);
  const ModelFamily& family = find_family(config);
  family.graph(family.describe(config), 0, TensorView());
}

}  // namespace

int resolve_threads(const std::string& threads, Communicator& comm) {
  if (threads != "auto") {
    int count = 0;
    std::from_chars(threads.data(), threads.data() + threads.size(), count);
    return std::max(1, count);
  }
  const std::string mine = cpu_home();
  const std::string all = comm.broadcast(joined(comm.gather(mine)));
  return std::max(1, available_cpus() / std::max(1, count_lines(all, mine)));
}

void require(const std::string& value, const std::string& key, const std::string& what) {
  if (value.empty()) fail(ExitCode::kUsage, "{} is missing: {}", key, what);
}

Session open_session(const RunOptions& options, Communicator& comm) {
  check_same_configuration(options, comm);
  on_rank_zero(comm, [&] { require_forward(options.model.path); });
  ModelSource source = ModelSource::open(options.model.path, comm);
  const DType compute = resolve_compute(options.run.compute, source.spec(), comm);
  const int threads = resolve_threads(options.run.threads, comm);
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Transport> transport;
  together(comm, [&] {
    backend = make_backend({options.run.backend, compute, threads});
    transport = make_transport(options.run.transport, comm);
  });
  const std::string description = comm.broadcast(backend->description());
  if (description != backend->description())
    warn("this rank computes with {}, rank 0 with {}: equal bytes are promised for equal machines only",
         backend->description(), description);
  return {std::move(source), compute, threads, std::move(backend), std::move(transport)};
}

void check_writable_target(const std::string& file, Communicator& comm) {
  if (file.empty()) return;
  on_rank_zero(comm, [&] {
    const std::string parent = std::filesystem::path(file).parent_path().string();
    probe_writable(parent.empty() ? "." : parent);
  });
}

void write_json_result(const RunOptions& options, Communicator& comm, const std::string& text) {
  if (options.extra.json.empty()) return;
  on_rank_zero(comm, [&] { write_file_durably(options.extra.json, text + "\n"); });
}

}  // namespace bitmill
