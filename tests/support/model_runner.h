// A whole float model in memory on one backend: what tests compare forwards, captures and quantized
// outputs with.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "models/family.h"

namespace bitmill::testing {

class ModelRunner {
 public:
  // Loads every tensor of the checkpoint in `directory` (float weights of a known family).
  ModelRunner(const std::string& directory, Backend& backend);

  // Sees the input of each cut, C [tokens, in], before its linears run.
  using CutObserver = std::function<void(int64_t block, const CutSpec& cut, TensorView input)>;

  // Token ids I32 [sequences, length] through embedding and all blocks. Returns F32 [tokens,
  // hidden]: the embedding's output, then each block's.
  std::vector<Tensor> hidden_states(TensorView ids, const CutObserver& observer = {});
  // Final norm and head of a block output: F32 [tokens, vocab].
  Tensor logits(TensorView hidden);

  const ModelSpec& spec() const { return spec_; }
  BlockWeights& block(int64_t index) { return blocks_.at(index); }

 private:
  void load_block(const Checkpoint& checkpoint, const BlockSpec& block);

  Backend& backend_;
  ModelSpec spec_;
  Tensor embedding_, final_norm_;
  std::unique_ptr<PreparedWeight> head_;
  std::vector<BlockWeights> blocks_;
};

}  // namespace bitmill::testing
