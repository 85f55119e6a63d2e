// Token files: HDF5 (.h5, .hdf5) or safetensors (.safetensors) with `input_ids`, integer [samples, tokens].
#pragma once

#include <string>

#include "core/tensor.h"

namespace bitmill {

// Reads the first `samples` rows (0: all) cut to `length` tokens (0: as stored) as I32 [samples, length].
// Errors (kInput), naming the file: missing file or dataset, rank other than 2, dtype other than a 32- or 64-bit integer,
// fewer samples or tokens than asked, an id outside [0, vocab) (which id, where). `key` is the option that named the file.
Tensor read_token_file(const std::string& path, int64_t samples, int64_t length, int64_t vocab, const std::string& key);

}  // namespace bitmill
