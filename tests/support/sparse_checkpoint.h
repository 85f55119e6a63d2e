// Safetensors files of any size that take no space: the header and a few values are written, the
// rest are holes, which read as zeros.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace bitmill::testing {

// Some bytes of a tensor, from `offset` on.
struct SparseBytes {
  int64_t offset = 0;
  std::string bytes;
};

struct SparseTensor {
  std::string name;
  std::string dtype;  // "BF16", ...
  std::vector<int64_t> shape;
  std::vector<SparseBytes> values = {};
};

// Tensors lie in the order given.
void write_sparse_safetensors(const std::string& path, const std::vector<SparseTensor>& tensors);

// A bf16 llama of `blocks` blocks in one such file in `directory`, all zeros but `values` of the
// named tensors. One head per 64 hidden channels; embedding and head are not tied.
struct SparseModel {
  int64_t blocks = 1, hidden = 64, intermediate = 128, vocab = 256;
};
void write_sparse_model(const std::string& directory, const SparseModel& model,
                        const std::vector<SparseTensor>& values = {});

}  // namespace bitmill::testing
