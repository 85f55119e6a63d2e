// bitmill_golden CASES_DIR OUT_DIR [--precision fp64|fp32]: runs every case of CASES_DIR/cases.json
// that this version can and writes OUT_DIR/NAME.safetensors, or OUT_DIR/NAME.rejected with the
// refusal's sentence. OUT_DIR/cases.json gets the cases a checker may insist on (options and
// formats of this version). Exit 0 when every case ran or was skipped.
//
//   cmake -S . -B build && cmake --build build --target bitmill_golden     makes
//   build/bin/bitmill_golden
#include <fmt/core.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "core/error.h"
#include "golden/golden_runner.h"
#include "io/safetensors.h"
#include "io/json.h"

namespace bitmill::golden {
namespace {

void write_outcome(const std::string& path, const Json& golden_case, const Outcome& outcome) {
  std::filesystem::remove(path + ".safetensors");
  std::filesystem::remove(path + ".rejected");
  if (!outcome.rejected.empty()) {
    std::ofstream(path + ".rejected") << outcome.rejected << '\n';
    return;
  }
  std::vector<NamedView> views;
  for (const auto& [name, tensor] : outcome.tensors) views.push_back({name, tensor.view()});
  write_safetensors(path + ".safetensors", views);
  std::string missing;
  for (const std::string& format : golden_case.value("formats", std::vector<std::string>())) {
    if (!format_name(format)) missing += " " + format;
  }
  const std::string name = golden_case.at("name");
  if (!missing.empty()) fmt::print("{}: ran without the stored words of{}\n", name, missing);
}

void run_all(const std::string& directory, const std::string& out, DType dtype) {
  const std::unique_ptr<Backend> backend = make_backend({"cpu", DType::kF32, 1});
  std::filesystem::create_directories(out);
  int ran = 0, skipped = 0;
  const Json suite = read_json(directory + "/cases.json");
  for (const Json& golden_case : suite.at("cases")) {
    const Outcome outcome = run_case(golden_case, directory, dtype, *backend);
    const std::string name = golden_case.at("name");
    if (!outcome.skipped.empty()) {
      fmt::print("skipped {}: {}\n", name, outcome.skipped);
      ++skipped;
      continue;
    }
    write_outcome(out + "/" + name, golden_case, outcome);
    ++ran;
  }
  std::ofstream(out + "/cases.json") << supported_cases(directory).dump(1) << '\n';
  fmt::print("{} cases ran, {} skipped\n", ran, skipped);
}

}  // namespace
}  // namespace bitmill::golden

int main(int argc, char** argv) {
  const bool precision = argc == 5 && std::strcmp(argv[3], "--precision") == 0;
  const std::string value = precision ? argv[4] : "fp64";
  if ((argc != 3 && !precision) || (value != "fp64" && value != "fp32")) {
    fmt::print(stderr, "usage: bitmill_golden CASES_DIR OUT_DIR [--precision fp64|fp32]\n");
    return 2;
  }
  try {
    bitmill::golden::run_all(argv[1], argv[2],
                             value == "fp64" ? bitmill::DType::kF64 : bitmill::DType::kF32);
    return 0;
  } catch (const bitmill::Error& error) {
    fmt::print(stderr, "bitmill_golden: {}\n", error.what());
    return static_cast<int>(error.code());
  }
}
