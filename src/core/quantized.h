// What a quantizer makes of one linear, independent of any file format.
#pragma once

#include "core/grid.h"
#include "core/tensor.h"

namespace bitmill {

// W_hat[o, i] = scale[o, g_idx[i]] * (code[o, i] - zero[o, g_idx[i]]), host memory; core/grid.h has
// the other kinds of grid. Columns are always in the order of the source weight, whatever order
// they were solved in.
struct QuantizedLinear {
  int bits = 0;            // 2..8
  int64_t group_size = 0;  // columns per group; -1: one group per row
  bool symmetric = true;   // every zero is 2^(bits-1)
  GridKind kind = GridKind::kUniform;  // formats store uniform grids only
  Tensor codes;            // U8  [out, in], 0..2^bits-1
  Tensor scales;           // F16, BF16 or F32 [out, groups]: exactly the stored type and values
  Tensor zeros;  // U8  [out, groups], 0..2^bits-1; ternary: the scales' type, the value of code 0
  Tensor g_idx;            // I32 [in], group of each column; i / group_size unless act_order=dynamic

  int64_t out() const { return codes.rows(); }
  int64_t in() const { return codes.cols(); }
  int64_t groups() const { return scales.cols(); }
};

// Number of groups of a row of `in` columns: ceil(in / group_size), 1 for group_size -1.
inline int64_t group_count(int64_t in, int64_t group_size) {
  return group_size == -1 ? 1 : (in + group_size - 1) / group_size;
}

}  // namespace bitmill
