#include "pipeline/run_state.h"

#include <xxhash.h>

#include <filesystem>

#include "io/durable.h"

namespace bitmill {
namespace fs = std::filesystem;

std::string digest(const void* data, size_t bytes) { return fmt::format("{:016x}", XXH3_64bits(data, bytes)); }

std::string fingerprint_digest(const Fingerprint& fingerprint) {
  std::string text;
  for (const auto& [key, value] : fingerprint) text += key + '\n' + value + '\n';
  return digest(text.data(), text.size());
}

std::string manifest_path(const std::string& directory) { return directory + "/bitmill/manifest.json"; }

Manifest read_manifest(const std::string& directory) {
  Manifest manifest;
  try {
    const Json json = read_json(manifest_path(directory));
    json.at("state").get_to(manifest.state);
    json.at("fingerprint").get_to(manifest.fingerprint);
    json.at("files").get_to(manifest.files);
    manifest.layers = json.value("layers", Json::array());
    manifest.folded = json.value("folded", std::vector<std::string>());
  } catch (const std::exception&) {  // our own file: whatever is wrong with it is an output error
    fail(ExitCode::kOutput, "{} is damaged: it must hold state, fingerprint and files; move the directory away",
         manifest_path(directory));
  }
  for (const std::string& file : manifest.files)
    if (file.empty() || file.find('/') != std::string::npos || file == "." || file == "..")
      fail(ExitCode::kOutput, "{} names \"{}\", which is not a plain file name", manifest_path(directory), file);
  return manifest;
}

void write_manifest(const std::string& directory, const Manifest& manifest) {
  const OrderedJson json{{"version", 1},
                         {"state", manifest.state},
                         {"digest", fingerprint_digest(manifest.fingerprint)},
                         {"fingerprint", manifest.fingerprint},
                         {"files", manifest.files},
                         {"folded", manifest.folded},
                         {"layers", manifest.layers}};
  write_file_durably(manifest_path(directory), json.dump(1) + "\n");
}

namespace {

std::string differing_keys(const Fingerprint& theirs, const Fingerprint& ours) {
  std::string text;
  const auto say = [&](const std::string& key, const std::string& was, const std::string& is) {
    text += fmt::format("{}{} was {}, is now {}", text.empty() ? "" : "; ", key, was, is);
  };
  for (const auto& [key, value] : ours) {
    const auto found = theirs.find(key);
    if (found == theirs.end()) say(key, "absent", value);
    else if (found->second != value) say(key, found->second, value);
  }
  for (const auto& [key, value] : theirs)
    if (!ours.contains(key)) say(key, value, "absent");
  return text;
}

// A run that died before its manifest: nothing but an empty bitmill/ and temporary files of ours.
bool only_scaffold(const std::string& directory) {
  std::error_code error;
  const auto temporary = [](const fs::path& path) {
    const std::string name = path.filename().string();
    return name.find(".tmp-") != std::string::npos || name.starts_with(".bitmill-");
  };
  for (const fs::directory_entry& entry : fs::directory_iterator(directory, error)) {
    if (entry.path().filename() != "bitmill" && !temporary(entry.path())) return false;
    if (entry.path().filename() != "bitmill") continue;
    for (const fs::directory_entry& inner : fs::directory_iterator(entry.path(), error))
      if (!temporary(inner.path())) return false;
  }
  return !error;
}

}  // namespace

OutputState inspect_output(const std::string& directory, const Fingerprint& fingerprint, bool overwrite) {
  std::error_code error;
  const fs::file_status status = fs::status(directory, error);
  if (!fs::exists(status)) return OutputState::kFresh;
  if (!fs::is_directory(status)) fail(ExitCode::kUsage, "output.path={} exists and is not a directory", directory);
  const bool empty = fs::is_empty(directory, error);
  if (error) fail(ExitCode::kOutput, "output.path={} cannot be read: {}", directory, error.message());
  if (empty) return OutputState::kFresh;
  if (only_scaffold(directory)) return OutputState::kFresh;
  if (!fs::exists(manifest_path(directory), error))
    fail(ExitCode::kUsage, "output.path={} is not empty and holds no bitmill/manifest.json: it is not an output of bitmill",
         directory);
  if (overwrite) return OutputState::kUnfinished;
  const Manifest manifest = read_manifest(directory);
  const std::string differences = differing_keys(manifest.fingerprint, fingerprint);
  if (!differences.empty())
    fail(ExitCode::kUsage, "output.path={} holds a run with other settings ({}); choose another path or output.overwrite=true",
         directory, differences);
  if (manifest.state != "complete") return OutputState::kUnfinished;
  for (const std::string& file : manifest.files)
    if (!fs::exists(directory + "/" + file, error)) return OutputState::kUnfinished;  // somebody removed a part of it
  return OutputState::kComplete;
}

}  // namespace bitmill
