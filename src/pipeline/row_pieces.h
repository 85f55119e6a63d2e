// Quantizing a linear a few rows at a time, so that its weight is never whole in memory.
#pragma once

#include <functional>

#include "algorithms/quantizer.h"
#include "pipeline/stage_group.h"

namespace bitmill {

// Rows [first, end) of a problem's weight, F32.
using ReadRows = std::function<Tensor(int64_t first, int64_t end)>;

// What `quantizer`, which must need no Hessian, makes of the rows [rows.first, rows.end) of a
// weight [out, in]: the same codes, scales and record as from all of them at once, because rows do
// not depend on each other. `problem.weight` and `problem.first_row` are not used. `hessian` may be
// null, as in Quantizer::quantize. Memory: codes, scales and zeros of all rows, and the quantizer's
// own of one piece of about 32 MiB.
QuantizeResult quantize_in_pieces(LinearProblem problem, int64_t in, const RowRange& rows,
                                  const ReadRows& read, const Hessian* hessian,
                                  const Quantizer& quantizer, Backend& backend);

// Rows of a piece of a weight with `in` columns: whole tiles of 256 rows.
int64_t rows_per_piece(int64_t in);

}  // namespace bitmill
