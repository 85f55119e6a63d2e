// The factory: which backends this build has. A further backend is one more row of kBackends.
#include "backends/backend.h"

#include <array>

#include "backends/cpu/cpu_backend.h"

namespace bitmill {

namespace {
struct BackendEntry {
  const char* name;
  std::unique_ptr<Backend> (*make)(const BackendOptions& options);
};

std::unique_ptr<Backend> make_cpu(const BackendOptions& options) {
  return std::make_unique<CpuBackend>(options.compute, options.threads);
}

// In order of preference: `auto` takes the first.
constexpr std::array kBackends = {BackendEntry{"cpu", make_cpu}};
}  // namespace

std::vector<std::string> backend_names() {
  std::vector<std::string> names;
  for (const BackendEntry& entry : kBackends) names.emplace_back(entry.name);
  return names;
}

std::unique_ptr<Backend> make_backend(const BackendOptions& options) {
  for (const BackendEntry& entry : kBackends)
    if (options.kind == "auto" || options.kind == entry.name) return entry.make(options);
  if (options.kind == "cuda")
    fail(ExitCode::kDoesNotFit, "run.backend=cuda: this build has no CUDA backend; use cpu");
  fail(ExitCode::kUsage, "run.backend={}: unknown backend; expected auto, cpu or cuda",
       options.kind);
}

}  // namespace bitmill
