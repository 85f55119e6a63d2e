// ModelSource: a checkpoint as the pipeline sees it, float or quantized by any of our formats. Reads byte ranges on
// demand, refuses non-finite weights, and gives every linear as one dense weight.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "formats/format.h"
#include "models/family.h"

namespace bitmill {

class ModelSource {
 public:
  // Opens and checks `directory` on this rank alone.
  static ModelSource open(const std::string& directory);
  // Collective: rank 0 reads config and headers and checks them, the others get the result; all throw the same Error.
  static ModelSource open(const std::string& directory, Communicator& comm);

  const std::string& directory() const { return checkpoint_.directory(); }
  const Json& config() const { return config_; }
  const ModelSpec& spec() const { return spec_; }
  const ModelFamily& family() const { return *family_; }
  const Checkpoint& checkpoint() const { return checkpoint_; }
  const OutputFormat* format() const { return format_; }  // nullptr: a float checkpoint
  // Tensors of the checkpoint that the family does not know.
  const std::vector<std::string>& unknown_tensors() const { return unknown_; }

  // A float tensor as stored; Error(kInput) naming tensor and first index when it holds NaN or Inf.
  Tensor read_float(const std::string& name, Backend& backend) const;
  // Dense weight [out, in] of a linear in `dtype` (F32, or the compute type), dequantized if it is
  // packed, transposed if it is stored as [in, out]. `linear` may be the spec's head_linear(),
  // whose float weight is the embedding when tied.
  Tensor read_weight(const LinearSpec& linear, DType dtype, Backend& backend) const;
  // Rows [first, end) of that weight: [end - first, in]. Reads their bytes only, and converts in pieces, so that the memory is
  // that of the result and a few MiB. (All of a transposed or packed weight is read for any of its rows, and for a packed one
  // its codes are held.) Messages name an element by its index in the whole stored tensor.
  Tensor read_weight_rows(const LinearSpec& linear, int64_t first, int64_t end, DType dtype, Backend& backend) const;
  // Rows of a float tensor as stored, from row `first` on into `out` (host, the stored dtype, [rows, ...]); checked like
  // read_float.
  void read_float_rows(const std::string& name, int64_t first, TensorView out, Backend& backend) const;
  // The stored bytes of a tensor in order, in pieces of a few MiB: `take(offset, U8 piece)`. Memory is one piece. With `check`
  // a float tensor is refused as read_float does, when the piece with the bad element is met.
  using TakePiece = std::function<void(int64_t offset, Tensor piece)>;
  void read_pieces(const std::string& name, bool check, Backend& backend, const TakePiece& take) const;

  // ---- reading ahead: changes nothing but time -------------------------------------------------
  // Rows [first, end) of linears that read_weight_rows (or read_weight) will want next, in that order. A thread reads them
  // into host buffers of at most limit_bytes together (0: nothing is read ahead); whatever is not there yet when it is wanted
  // is read directly. The previous call's rows stay wanted, older ones go when space is needed. Thread-safe. Packed linears
  // are not read ahead.
  struct LinearRows {
    const LinearSpec& linear;
    int64_t first = 0, end = 0;
  };
  void prefetch(const std::vector<LinearRows>& rows, int64_t limit_bytes) const;
  // All linears of a cut of `block`, whole.
  void prefetch_cut(const BlockSpec& block, int cut, int64_t limit_bytes) const;
  // Frees what was read ahead and not taken.
  void forget() const { checkpoint_.forget_prefetched(); }

  // Does the head have a packed weight of its own?
  bool head_packed() const;
  // Bias as stored, empty when there is none.
  Tensor read_bias(const LinearSpec& linear, Backend& backend) const;
  // Norms and biases of a block; linears are left to the caller.
  BlockWeights read_block_floats(const BlockSpec& block, Backend& backend) const;
  // Everything of a block, ready to run.
  BlockWeights read_block(const BlockSpec& block, Backend& backend) const;

 private:
  bool is_packed(const LinearSpec& linear) const;
  std::string weight_tensor(const LinearSpec& linear) const;
  void refuse_non_finite(const std::string& name, TensorView piece, int64_t first_element, Backend& backend) const;
  void for_pieces(const std::string& name, int64_t first, int64_t end, Backend& backend,
                  const std::function<void(int64_t row, TensorView piece)>& take) const;
  Tensor read_packed_rows(const LinearSpec& linear, int64_t first, int64_t end, DType dtype, Backend& backend) const;
  Tensor read_turned_rows(const LinearSpec& linear, int64_t first, int64_t end, DType dtype, Backend& backend) const;
  ModelSource(Json config, Checkpoint checkpoint);

  Json config_;
  Checkpoint checkpoint_;
  const ModelFamily* family_;
  ModelSpec spec_;
  const OutputFormat* format_ = nullptr;
  std::vector<std::string> unknown_;
};

// float32 or bfloat16 for this model on these ranks: auto = bfloat16 where every rank's hardware has it and the model is
// bf16. Collective.
DType resolve_compute(Compute wanted, const ModelSpec& spec, Communicator& comm);

}  // namespace bitmill
