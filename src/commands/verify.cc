// bitmill verify: every byte of an output, and with --against every value of it.
#include <filesystem>
#include <iostream>

#include "commands/command.h"
#include "commands/session.h"
#include "commands/verify_checks.h"
#include "core/log.h"
#include "core/thread_pool.h"
#include "pipeline/run_state.h"

namespace bitmill {
namespace {

void check_all(const std::string& directory, const std::string& against, Backend& backend,
               std::string& format_name, VerifyReport& report) {
  const Json config = read_model_config(directory);
  const ModelSpec spec = find_family(config).describe(config);
  const OutputFormat* format = format_of(config);
  format_name = format == nullptr ? "float" : format->name();
  std::optional<Checkpoint> source;
  if (!against.empty()) source.emplace(Checkpoint::open(against));

  check_directory(directory, format != nullptr, report);
  std::optional<Checkpoint> checkpoint;
  try {
    checkpoint.emplace(Checkpoint::open(directory));
  } catch (const Error& error) {  // without readable headers there is nothing further to look at
    report.violations.push_back(error.what());
    return;
  }
  VerifyInput input{directory, config, spec, *checkpoint, format, source ? &*source : nullptr,
                    backend};
  if (std::filesystem::exists(manifest_path(directory))) {
    const std::vector<std::string> folded = read_manifest(directory).folded;
    input.folded.insert(folded.begin(), folded.end());
  }
  std::set<std::string> known;
  const std::vector<ModuleChoice> modules = check_linears(input, known, report);
  if (format != nullptr && report.linears == 0)
    report.violation("no linear is packed although the config says {}", format_name);
  check_floats(input, known, report);
  check_config(input, modules, report);
  if (!against.empty()) check_copied_files(directory, against, report);
}

Json json_of(const std::string& directory, const std::string& format, const VerifyReport& report,
             bool ok) {
  Json json{{"directory", directory},
            {"format", format},
            {"ok", ok},
            {"linears", report.linears},
            {"violations", report.violations},
            {"warnings", report.warnings}};
  if (report.compared > 0) {
    json["compared"] = report.compared;
    json["error_mean"] = report.error_sum / static_cast<double>(report.compared);
    json["error_over_nearest_max"] = report.worst_ratio;
    json["error_over_nearest_max_at"] = report.worst_module;
  }
  return json;
}

void print(const std::string& directory, const std::string& format, const VerifyReport& report,
           bool ok) {
  for (const std::string& text : report.violations) std::cout << "violation: " << text << "\n";
  for (const std::string& text : report.warnings) std::cout << "warning: " << text << "\n";
  std::cout << fmt::format("{}: {}, {} packed linears, {} violations, {} warnings: {}\n", directory,
                           format, report.linears, report.violations.size(), report.warnings.size(),
                           ok ? "ok" : "NOT OK");
  if (report.compared > 0)
    std::cout << fmt::format(
        "{} linears compared with the source: mean relative weight error {:.5f}, at most {:.2f} "
        "times "
        "rounding to nearest ({})\n",
        report.compared, report.error_sum / static_cast<double>(report.compared),
        report.worst_ratio, report.worst_module);
}

}  // namespace

int run_verify(const CommandLine& line, Communicator& comm) {
  const RunOptions& options = line.options;
  const int threads = resolve_threads(options.run.threads, comm);
  std::string result;
  bool ok = true;
  on_rank_zero(comm, [&] {
    require(line.directory, "DIR", "the output directory to verify: bitmill verify DIR");
    const auto backend = make_backend({"cpu", DType::kF32, threads});
    VerifyReport report;
    std::string format;
    check_all(line.directory, options.extra.against, *backend, format, report);
    ok = report.violations.empty() && (!options.extra.strict || report.warnings.empty());
    print(line.directory, format, report, ok);
    result = json_of(line.directory, format, report, ok).dump(1);
  });
  write_json_result(options, comm, result);
  ok = comm.broadcast(ok ? "ok" : "") == "ok";
  return static_cast<int>(ok ? ExitCode::kDone : ExitCode::kInput);
}

}  // namespace bitmill
