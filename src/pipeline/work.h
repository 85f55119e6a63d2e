// What a block asks for, in numbers: the plan's estimates of memory and time are arithmetic over
// these.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core/options.h"
#include "formats/format.h"
#include "models/family.h"

namespace bitmill {

// One cut, or the same cut of `count` routed experts that are alike. Sizes are of one.
struct CutWork {
  std::string name;  // "gate_up"; of experts without their number
  int64_t count = 1;
  bool expert = false;
  double token_share = 1;  // part of the tokens that reaches one
  int64_t in = 0;          // columns n
  int64_t rows = 0;        // of all its linears together
  int64_t widest = 0;      // rows of the largest linear
  int64_t products = 0;    // F32 columns that the linears' outputs take at a time
  int64_t tiles = 0;       // tiles of 256 rows, what members of a stage share
  bool hessian = false;    // some linear needs the Hessian of the input
  bool mismatch = false;   // some linear compares the input with the float model's
  bool scaled = false;     // some linear uses AWQ
  bool adds_to_hidden = false;
  int64_t residual = 0;         // columns of the residual stream that a mismatch includes
  double grid_weights = 0;      // weights times the grids tried for them
  int64_t source_bytes = 0;     // as the checkpoint stores them, biases too
  int64_t packed_bytes = 0;     // as the output stores them
  int64_t quantized = 0;        // weights that get codes
  int64_t solved = 0;           // of them, those of linears that need the Hessian
  int64_t groups = 0;           // grids of all rows
  int64_t quantized_bytes = 0;  // of packed_bytes, without biases
};

struct BlockWork {
  std::vector<CutWork> cuts;  // in order of the forward pass
  int64_t float_bytes = 0;    // norms and the like: copied
  double attention = 0;       // columns of q k^T and p v together, per query-key pair

  int64_t source_bytes() const;
  int64_t packed_bytes() const;
};

// `dtypes` gives the stored dtype of float tensors.
BlockWork block_work(const RunOptions& options, const ModelSpec& spec, const BlockSpec& block,
                     const OutputFormat& format,
                     const std::function<DType(const std::string&)>& dtypes);

}  // namespace bitmill
