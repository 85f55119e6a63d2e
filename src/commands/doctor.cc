// bitmill doctor: what this build and this machine can do, and what stands in the way.
#include <sched.h>
#include <unistd.h>

#include <filesystem>
#include <iostream>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "commands/benchmark.h"
#include "commands/command.h"
#include "commands/session.h"
#include "core/log.h"
#include "core/thread_pool.h"
#include "formats/format.h"
#include "io/durable.h"
#include "pipeline/memory.h"
#include "pipeline/pipeline.h"

namespace bitmill {
namespace {

struct Finding {
  std::string what;    // "output filesystem"
  std::string state;   // "ok" | "warning" | "problem"
  std::string detail;  // what was found, and what to do about it
};

// The CPUs this process may run on, as [first, last] of each run of neighbours.
Json cpu_ranges() {
  Json ranges = Json::array();
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) != 0) return ranges;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &mask)) continue;
    if (cpu > 0 && CPU_ISSET(cpu - 1, &mask))
      ranges.back()[1] = cpu;
    else
      ranges.push_back({cpu, cpu});
  }
  return ranges;
}

Json rank_facts(Communicator& comm, int threads) {
  return {{"rank", comm.rank()}, {"host", host_name()}, {"local_rank", comm.local_rank()},
          {"local_size", comm.local_size()}, {"cpus", available_cpus()},
          {"cpu_ranges", cpu_ranges()}, {"threads", threads},
          {"memory_bytes", host_memory_per_rank(comm.local_size())}, {"bf16", cpu_has_bf16()},
          {"backend", make_backend({"cpu", cpu_has_bf16() ? DType::kBF16 : DType::kF32, 1})->description()}};
}

// The nearest existing directory at or above `wanted`; Error when one on the way cannot be looked at,
// or when a name is longer than the file system takes.
std::string existing_part(const std::string& wanted) {
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::path path = fs::absolute(wanted, error);
  if (error) fail(ExitCode::kOutput, "{}: the working directory cannot be found: {}", wanted, error.message());
  fs::path at = path;
  while (!fs::exists(at, error) && !error && at != at.parent_path()) at = at.parent_path();
  if (error) fail(ExitCode::kOutput, "{}: cannot be looked at: {}", at.string(), error.message());
  const long longest = pathconf(at.c_str(), _PC_NAME_MAX);
  for (const fs::path& part : path)
    if (longest > 0 && part.native().size() > static_cast<size_t>(longest))
      fail(ExitCode::kOutput, "{}: a name of {} characters, expected at most {}", path.string(), part.native().size(),
           longest);
  return at.string();
}

Finding check_output(const std::string& path) {
  if (path.empty()) return {"output filesystem", "ok", "not checked; give --output.path=DIR"};
  try {
    const std::string at = existing_part(path);
    const Stopwatch watch;
    probe_writable(at);
    const double seconds = watch.seconds();
    std::error_code error;
    const auto space = std::filesystem::space(at, error);
    const std::string free = error ? "unknown space" : human_bytes(static_cast<int64_t>(space.available));
    return {"output filesystem", seconds < 0.5 ? "ok" : "warning",
            fmt::format("{} is writable, {} free, write + fsync + rename took {:.1f} ms", at, free, 1e3 * seconds)};
  } catch (const Error& error) {
    return {"output filesystem", "problem", error.what()};
  }
}

// The ranks of each host together: their threads, and the CPUs that at least one of them may use.
std::vector<Finding> check_threads(const Json& ranks) {
  struct Host {
    int threads = 0;
    std::set<int> cpus;
  };
  std::map<std::string, Host> hosts;
  for (const Json& rank : ranks) {
    Host& host = hosts[rank.at("host")];
    host.threads += rank.at("threads").get<int>();
    for (const Json& range : rank.at("cpu_ranges"))
      for (int cpu = range.at(0); cpu <= range.at(1).get<int>(); ++cpu) host.cpus.insert(cpu);
  }
  std::vector<Finding> findings;
  for (const auto& [name, host] : hosts) {
    const bool fits = host.cpus.empty() || host.threads <= static_cast<int>(host.cpus.size());
    const std::string found = fmt::format("{}: {} threads on {} CPUs", name, host.threads, host.cpus.size());
    findings.push_back({"threads", fits ? "ok" : "warning",
                        fits ? found : found + "; pass --bind-to none, fewer ranks or fewer run.threads"});
  }
  return findings;
}

std::vector<Finding> check_ranks(const Json& ranks) {
  std::vector<Finding> findings;
  const auto& first = ranks.front();
  for (const Json& rank : ranks)
    if (rank.at("backend") != first.at("backend"))
      findings.push_back({"instruction sets", "warning",
                          fmt::format("rank {} computes with {}, rank 0 with {}; equal bytes need equal machines",
                                      rank.at("rank").dump(), rank.at("backend").dump(), first.at("backend").dump())});
  for (Finding& finding : check_threads(ranks)) findings.push_back(std::move(finding));
  return findings;
}

std::string list(const std::vector<std::string>& names) { return fmt::format("{}", fmt::join(names, ", ")); }

Json build_facts() {
  std::vector<std::string> families, algorithms, formats;
  for (const ModelFamily* family : model_families()) families.push_back(family->name());
  for (const Quantizer* quantizer : quantizers()) algorithms.push_back(quantizer->name());
  for (const OutputFormat* format : output_formats()) formats.push_back(format->name());
  return {{"version", BITMILL_VERSION}, {"compiler", __VERSION__}, {"backends", backend_names()},
          {"families", families}, {"algorithms", algorithms}, {"formats", formats}};
}

// Config lines to paste, and the same as JSON.
std::string rates_text(const MeasuredRates& rates) {
  std::string text = "measured, for a config file:\n[machine]\n";
  for (const auto& [name, value] : rates) text += fmt::format("{} = {:.3g}\n", name, value);
  return text;
}

Json rates_json(const MeasuredRates& rates) {
  Json json = Json::object();
  for (const auto& [name, value] : rates) json[name] = value;
  return json;
}

// With --benchmark. Files are measured where output.path is or would be.
MeasuredRates benchmark(const RunOptions& options, int threads, Communicator& comm) {
  if (!options.extra.benchmark) return {};
  const std::string& path = options.output.path;
  std::string directory;
  together(comm, [&] { directory = path.empty() ? "" : existing_part(path); });
  return measure_rates(options, directory, threads, comm);
}

}  // namespace

int run_doctor(const CommandLine& line, Communicator& comm) {
  const int threads = resolve_threads(line.options.run.threads, comm);
  const std::vector<std::string> texts = comm.gather(rank_facts(comm, threads).dump());
  const MeasuredRates rates = benchmark(line.options, threads, comm);
  std::string json;
  bool problem = false;
  if (comm.rank() == 0) {
    Json ranks = Json::array();
    for (const std::string& text : texts) ranks.push_back(Json::parse(text));
    const Json build = build_facts();
    std::cout << fmt::format("bitmill {} ({}), backends: {}\n", BITMILL_VERSION, __VERSION__, list(backend_names()));
    for (const char* key : {"families", "algorithms", "formats"})
      std::cout << fmt::format("{}: {}\n", key, list(build.at(key)));
    std::cout << fmt::format("MPI: {}, {} rank{}\n", comm.uses_mpi() ? "started by a launcher" : "no launcher, not used",
                             comm.size(), comm.size() == 1 ? "" : "s");
    for (const Json& rank : ranks)
      std::cout << fmt::format("  rank {} on {}: {} CPUs, {} threads, {} of memory; {}\n", rank.at("rank").get<int>(),
                               rank.at("host").get<std::string>(), rank.at("cpus").get<int>(),
                               rank.at("threads").get<int>(), human_bytes(rank.at("memory_bytes").get<int64_t>()),
                               rank.at("backend").get<std::string>());
    std::vector<Finding> findings = check_ranks(ranks);
    findings.push_back(check_output(line.options.output.path));
    Json found = Json::array();
    for (const Finding& finding : findings) {
      std::cout << fmt::format("[{}] {}: {}\n", finding.state, finding.what, finding.detail);
      found.push_back({{"what", finding.what}, {"state", finding.state}, {"detail", finding.detail}});
      problem |= finding.state == "problem";
    }
    if (!rates.empty()) std::cout << rates_text(rates);
    json = Json{{"build", build}, {"ranks", ranks}, {"findings", found}, {"ok", !problem},
                {"machine", rates_json(rates)}}
               .dump(1);
  }
  write_json_result(line.options, comm, json);
  return comm.max(problem ? 1 : 0) > 0 ? static_cast<int>(ExitCode::kOutput) : 0;
}

}  // namespace bitmill
