// What is known about an output directory: whose it is, with which settings, and whether it is finished.
// The manifest (OUT/bitmill/manifest.json) is the marker that a directory is ours; only files it names are ever deleted.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/options.h"
#include "io/json.h"

namespace bitmill {

// Everything that changes the numbers or the files of the result, by key: the numeric settings (output.shard_size among
// them), the resolved compute type, the version and digests of the inputs. Paths, ranks, threads, dates and hosts are not in it.
using Fingerprint = std::map<std::string, std::string>;

// 16 hex digits of XXH3-64.
std::string digest(const void* data, size_t bytes);
// Digest of all entries.
std::string fingerprint_digest(const Fingerprint& fingerprint);

struct Manifest {
  std::string state;  // "running" | "complete"
  Fingerprint fingerprint;
  std::vector<std::string> files;  // everything the finished output holds outside bitmill/, relative names
  Json layers = Json::array();     // one record per linear
  std::vector<std::string> folded = {};  // source tensors that awq changed: norms, biases, weights of its linears
};

enum class OutputState {
  kFresh,       // does not exist or is empty
  kComplete,    // finished with this fingerprint: nothing to do
  kUnfinished,  // a run with this fingerprint did not finish
};

// Looks at `directory` without changing it. Error(kUsage): not empty and not ours; or ours with other settings, naming the
// differing keys (unless `overwrite`, which then reports kUnfinished).
OutputState inspect_output(const std::string& directory, const Fingerprint& fingerprint, bool overwrite);

std::string manifest_path(const std::string& directory);
Manifest read_manifest(const std::string& directory);
void write_manifest(const std::string& directory, const Manifest& manifest);  // durable

}  // namespace bitmill
