// The output directory: shards while a run goes on, and the final gather that commits the whole.
//
//   OUT/bitmill/shards/KEY.safetensors   finished shards, written by their ranks, each durable before its block counts
//   OUT/model*.safetensors, index        only after all shards are done (rank 0: rename, or join into one file)
//   OUT/config.json                      last of all: its presence says that the checkpoint is whole
#pragma once

#include <string>
#include <vector>

#include "io/write_behind.h"
#include "pipeline/plan.h"
#include "pipeline/run_state.h"

namespace bitmill {

// The shard or shards of one plan key while their tensors are made: handed over one by one, in any order, and written behind.
class KeyWriter {
 public:
  // Does one of these shards hold the tensor?
  bool holds(const std::string& name) const;
  // As ShardWriter's, whichever of the shards holds `name`.
  void write(NamedTensor tensor) { shard_of(tensor.name).write(tensor.name, std::move(tensor.data)); }
  void write(std::vector<NamedTensor> tensors);
  void write_part(const std::string& name, int64_t offset, Tensor data) {
    shard_of(name).write_part(name, offset, std::move(data));
  }
  // After the last tensor: the files, on their way to the disk. Block b counts as done when all are durable; b+1 may start.
  std::vector<PendingFile> finish();
  // Of all shards of the key, headers included.
  int64_t file_bytes() const;

 private:
  friend class OutputDirectory;
  ShardWriter& shard_of(const std::string& name);
  std::vector<ShardWriter> shards_;
};

class OutputDirectory {
 public:
  explicit OutputDirectory(std::string path) : path_(std::move(path)) {}
  const std::string& path() const { return path_; }
  std::string record_path(const std::string& name) const { return path_ + "/bitmill/" + name; }

  // Rank 0, before any compute: creates the directory, proves that it is writable, removes what an earlier run left (only
  // files its manifest names) and writes the "running" manifest. Error(kOutput).
  void prepare(const Plan& plan, const Fingerprint& fingerprint, const std::vector<std::string>& text_files) const;

  // Opens those shards of one plan key ("block-00003", "embedding") that `rank` writes, for tensors that `queue` will write.
  // Error(kOutput).
  KeyWriter start_shards(const Plan& plan, const std::string& key, int rank, WriteBehind& queue) const;

  // Writes the tensors of one plan key ("block-00003", "embedding") into its shard or shards, durably. The tensors must be
  // exactly those the plan lists. Returns bytes written.
  int64_t write_shards(const Plan& plan, const std::string& key, const std::vector<NamedTensor>& tensors) const;

  // One shard of the plan; `tensors` may hold more than it lists.
  int64_t write_shard(const ShardPlan& shard, const std::vector<NamedTensor>& tensors) const;

  // Rank 0, when all ranks' shards are durable: final names or one joined file, index, copied text files, config.json,
  // then the "complete" manifest. Shards are removed at the end.
  struct Finish {
    std::string source_directory;
    std::vector<std::string> copied_files;                        // byte for byte from the source
    std::vector<std::pair<std::string, std::string>> text_files;  // name, content
    std::string config_json;
    Manifest manifest;
  };
  void commit(const Plan& plan, const Finish& finish) const;

 private:
  std::string shard_path(const std::string& key) const { return path_ + "/bitmill/shards/" + key + ".safetensors"; }
  void join(const Plan& plan) const;
  void rename(const Plan& plan) const;
  void write_index(const Plan& plan) const;

  std::string path_;
};

// The plan key a shard belongs to: its own, or that of a block cut into parts.
std::string shard_key(const ShardPlan& shard);

// Tokenizer, generation and licence files of a model directory that an output takes along byte for byte.
std::vector<std::string> companion_files(const std::string& model_directory);

}  // namespace bitmill
