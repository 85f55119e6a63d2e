// One safetensors file: a strict header reader, byte-range reads (pread), a durable writer.
// Layout (docs/formats/safetensors.md): u64 LE header length N | N bytes of JSON | byte buffer to the end of the file.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "core/tensor.h"
#include "io/durable.h"

namespace bitmill {

// Where one tensor's bytes are.
struct TensorEntry {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;          // rank <= 4 (higher ranks are refused)
  int64_t offset = 0;   // absolute, from the start of the file
  int64_t bytes = 0;
  int file = 0;         // index into Checkpoint::files()
};

// Reads and checks the header; opens nothing else. Refuses (Error kInput, naming the file and, where there is one, the
// tensor): files under 8 bytes, header length over 100,000,000 or beyond the file, text that does not start with '{' or is
// not strict JSON (duplicate keys too), unknown dtypes, unknown fields, negative or non-integer numbers, sizes that
// overflow, byte counts that contradict dtype x shape, offsets that do not tile the buffer exactly (hole, overlap, past the
// end), trailing bytes. `metadata` (optional) receives __metadata__.
std::vector<TensorEntry> read_safetensors_header(const std::string& path,
                                                 std::map<std::string, std::string>* metadata = nullptr);

// The same checks on header text (the N bytes after the length) that a caller holds in memory; `path` is used in messages
// only and `file_bytes` is the size of the whole file.
std::vector<TensorEntry> parse_safetensors_header(std::string_view text, int64_t file_bytes, const std::string& path,
                                                  std::map<std::string, std::string>* metadata = nullptr);

// Byte-range reader of one regular file.
class RangeReader {
 public:
  explicit RangeReader(std::string path);  // Error(kInput) when it cannot be opened or is not a regular file
  ~RangeReader();
  RangeReader(RangeReader&&) noexcept;
  RangeReader(const RangeReader&) = delete;
  void read(int64_t offset, int64_t bytes, void* out) const;  // exactly; Error(kInput) on a short file
  const std::string& path() const { return path_; }
  int64_t file_bytes() const { return file_bytes_; }  // at the time of opening

 private:
  std::string path_;
  int fd_ = -1;
  int64_t file_bytes_ = 0;
};

// A tensor to be written: a name and host data that stays alive until the write is done.
struct NamedView {
  std::string name;
  TensorView data;
};

// The file that write_safetensors makes of some tensors, without their data.
struct SafetensorsLayout {
  std::string header;                // the file's first bytes: length and padded text
  std::vector<TensorEntry> tensors;  // in file order, offsets from the start of the file
  int64_t file_bytes = 0;
};
SafetensorsLayout safetensors_layout(std::vector<NamedView> specs);  // data pointers are not used

// Size in bytes of the file that write_safetensors makes of these specs (data pointers are not used).
int64_t safetensors_file_bytes(const std::vector<NamedView>& tensors);
// Writes one file durably: tensors by dtype descending, then by name; header padded with blanks to a multiple of 8;
// __metadata__ = {"format":"pt"}. Equal tensors give equal bytes.
void write_safetensors(const std::string& path, std::vector<NamedView> tensors);

// Streaming form of the same file, for tensors larger than memory (joining shards, dumping logits): the layout is fixed
// by the specs (data pointers unused), then data is written in that order.
class SafetensorsStream {
 public:
  SafetensorsStream(const std::string& path, std::vector<NamedView> specs);
  // Tensors in the order in which their bytes must be appended.
  const std::vector<NamedView>& order() const { return order_; }
  void append(const void* data, int64_t bytes);
  void commit();  // checks that exactly all bytes were appended

 private:
  DurableFile file_;
  std::vector<NamedView> order_;
  int64_t expected_ = 0, written_ = 0;
};

}  // namespace bitmill
