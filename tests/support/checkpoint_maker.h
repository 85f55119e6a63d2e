// Writes safetensors files and small checkpoints byte by byte, without the code under test: tests
// can make any damage.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace bitmill::testing {

// A tensor as raw little-endian bytes; nothing is checked against anything.
struct RawTensor {
  std::string name;
  std::string dtype;  // "F32", "BF16", ...
  std::vector<int64_t> shape;
  std::string bytes;
};

// F32, F16 or BF16 tensor of `values` (row-major).
RawTensor float_tensor(std::string name, const std::string& dtype, std::vector<int64_t> shape,
                       const std::vector<float>& values);
// The same with uniform values in [-1, 1) that depend only on name and seed.
RawTensor random_tensor(std::string name, const std::string& dtype, std::vector<int64_t> shape,
                        uint64_t seed = 1);

// {"a":{"dtype":...,"shape":[...],"data_offsets":[...]},...} for tensors laid out in the order
// given.
std::string safetensors_header(const std::vector<RawTensor>& tensors);
// Length prefix, header text as it is, buffer.
std::string safetensors_bytes(const std::string& header, const std::string& buffer);
std::string safetensors_bytes(const std::vector<RawTensor>& tensors);

void write_bytes(const std::string& path, const std::string& bytes);
std::string read_bytes(const std::string& path);

// A checkpoint directory: add tensors to shards, then write. Several shards, or with_index(), give
// an index.
//   CheckpointMaker(dir).config(R"({"model_type":"llama"})").add(float_tensor("w", "F32", {1},
//   {2})).write();
class CheckpointMaker {
 public:
  explicit CheckpointMaker(std::string directory);  // created by write() if need be
  CheckpointMaker& config(std::string json);        // config.json
  CheckpointMaker& add(RawTensor tensor, const std::string& file = "model.safetensors");
  CheckpointMaker& with_index();
  // Changes the index only: what it says about `tensor` (file empty: leaves it out).
  CheckpointMaker& index_says(const std::string& tensor, const std::string& file);
  void write() const;

 private:
  std::string directory_, config_;
  bool index_ = false;
  std::map<std::string, std::vector<RawTensor>> shards_;
  std::map<std::string, std::string> overrides_;
};

}  // namespace bitmill::testing
