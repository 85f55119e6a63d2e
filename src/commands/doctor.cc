// bitmill doctor: what this build and this machine can do, and what stands in the way.
#include <sys/statvfs.h>

#include <filesystem>
#include <iostream>

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

Json rank_facts(Communicator& comm, int threads) {
  return {{"rank", comm.rank()}, {"host", host_name()}, {"local_rank", comm.local_rank()},
          {"local_size", comm.local_size()}, {"cpus", available_cpus()}, {"threads", threads},
          {"memory_bytes", host_memory_per_rank(comm.local_size())}, {"bf16", cpu_has_bf16()},
          {"backend", make_backend({"cpu", cpu_has_bf16() ? DType::kBF16 : DType::kF32, 1})->description()}};
}

Finding check_output(const std::string& path) {
  namespace fs = std::filesystem;
  if (path.empty()) return {"output filesystem", "ok", "not checked; give --output.path=DIR"};
  fs::path at = fs::absolute(path);
  while (!fs::exists(at) && at.has_parent_path() && at != at.parent_path()) at = at.parent_path();
  try {
    const Stopwatch watch;
    probe_writable(at.string());
    const double seconds = watch.seconds();
    struct statvfs info {};
    statvfs(at.c_str(), &info);
    return {"output filesystem", seconds < 0.5 ? "ok" : "warning",
            fmt::format("{} is writable, {} free, write + fsync + rename took {:.1f} ms", at.string(),
                        human_bytes(static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize)),
                        1e3 * seconds)};
  } catch (const Error& error) {
    return {"output filesystem", "problem", error.what()};
  }
}

std::vector<Finding> check_ranks(const Json& ranks) {
  std::vector<Finding> findings;
  const auto& first = ranks.front();
  int threads = 0;
  for (const Json& rank : ranks) {
    if (rank.at("host") == first.at("host")) threads += rank.at("threads").get<int>();
    if (rank.at("backend") != first.at("backend"))
      findings.push_back({"instruction sets", "warning",
                          fmt::format("rank {} computes with {}, rank 0 with {}; equal bytes need equal machines",
                                      rank.at("rank").dump(), rank.at("backend").dump(), first.at("backend").dump())});
  }
  const int cpus = first.at("cpus");
  if (threads > cpus && ranks.size() > 1)
    findings.push_back({"threads", "warning",
                        fmt::format("{} threads of this node's ranks share {} CPUs; pass --bind-to none or fewer ranks",
                                    threads, cpus)});
  else
    findings.push_back({"threads", "ok", fmt::format("{} threads on {} CPUs of rank 0's node", threads, cpus)});
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

}  // namespace

int run_doctor(const CommandLine& line, Communicator& comm) {
  const int threads = resolve_threads(line.options.run.threads, comm);
  const std::vector<std::string> texts = comm.gather(rank_facts(comm, threads).dump());
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
    json = Json{{"build", build}, {"ranks", ranks}, {"findings", found}, {"ok", !problem}}.dump(1);
  }
  write_json_result(line.options, comm, json);
  return comm.max(problem ? 1 : 0) > 0 ? static_cast<int>(ExitCode::kOutput) : 0;
}

}  // namespace bitmill
