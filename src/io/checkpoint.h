// A Hugging Face checkpoint directory, many shards seen as one. Reads only what is asked, caches nothing but headers.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "io/json_fwd.h"
#include "io/read_ahead.h"
#include "io/safetensors.h"

namespace bitmill {

class Checkpoint {
 public:
  // Opens DIR: model.safetensors.index.json if there is one, else model.safetensors. Checks every header; index file names
  // must be plain names ([A-Za-z0-9._-]+\.safetensors) of regular files inside DIR (symlinks only within the same Hugging
  // Face cache entry, ../../blobs/HEX); every indexed tensor must be in the named shard, no tensor in two shards.
  // Errors: kInput, naming the file or tensor.
  static Checkpoint open(const std::string& directory);
  // The same directory of tensors from the text that `directory_text` made on another rank: no file is touched until a
  // tensor is read, so that one rank reads the headers of a large model for all.
  static Checkpoint from_text(const std::string& text);
  std::string directory_text() const;
  // Are the files here those that `text` (of another rank) tells of? Error(kInput) naming the first that is missing or has
  // another size; with `headers` every header is read and compared too. Ranks of one job may see different file systems.
  static void check_same(const std::string& text, bool headers);

  const std::string& directory() const { return directory_; }
  const std::vector<std::string>& files() const { return files_; }  // names inside the directory
  const std::map<std::string, TensorEntry>& tensors() const { return tensors_; }
  const TensorEntry* find(const std::string& name) const;  // nullptr: not there
  // Error(kInput) with the nearest present name when missing.
  const TensorEntry& at(const std::string& name) const;

  // Whole tensor in its stored dtype. Thread-safe.
  Tensor read(const std::string& name) const;
  // Rows [begin, end) of a tensor of rank >= 1.
  Tensor read_rows(const std::string& name, int64_t begin, int64_t end) const;
  // Bytes [begin, end) of a tensor's data, into host memory. Thread-safe.
  void read_bytes(const TensorEntry& entry, int64_t begin, int64_t end, void* out) const;

  // Reads rows ahead on a thread (io/read_ahead.h); all reads above use what is there. Thread-safe. What cannot be read is
  // skipped: the read that wants it throws.
  struct Rows {
    std::string name;
    int64_t begin = 0, end = 0;
  };
  void prefetch(const std::vector<Rows>& rows, int64_t limit_bytes) const;
  void forget_prefetched() const;
  // Bytes that reads took from what was read ahead; and waits until all that was asked for and fits is there.
  int64_t prefetched_bytes() const;
  void wait_prefetched() const;
  // Sum of the bytes of all tensors.
  int64_t total_bytes() const;

 private:
  const RangeReader& reader(int file) const;
  int64_t row_bytes(const TensorEntry& entry) const;  // of a tensor of rank >= 1

  std::string directory_;
  std::vector<std::string> files_;
  std::map<std::string, TensorEntry> tensors_;
  struct Readers {
    std::mutex mutex;
    std::map<int, RangeReader> open;
    ReadAhead ahead;  // last: its thread reads the files above
  };
  std::unique_ptr<Readers> readers_ = std::make_unique<Readers>();
};

// The tensor -> file map of an index ({"weight_map": {...}}), names checked as Checkpoint::open says; `where` names the index
// in messages. Error(kInput).
std::map<std::string, std::string> read_weight_map(const Json& index, const std::string& where);

// Does DIR/NAME exist as a file that may be read? Links are followed only within one Hugging Face cache entry
// (../../blobs/HEX), so that a downloaded model cannot make us read other files of the machine. Error(kInput) for other
// links, dangling ones, and what is no regular file.
bool has_member(const std::string& directory, const std::string& name);

// DIR/config.json, parsed strictly. Error(kInput) when the directory or the file is missing or unreadable.
Json read_model_config(const std::string& directory);

}  // namespace bitmill
