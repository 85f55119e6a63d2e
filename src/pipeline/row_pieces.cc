#include "pipeline/row_pieces.h"

#include <algorithm>
#include <cstring>

namespace bitmill {
namespace {

constexpr int64_t kTileRows = 256;         // of the backends
constexpr int64_t kPieceBytes = 32 << 20;  // of the weight in F32

// Copies `piece` to the rows of `whole` from `first` on; the first piece decides what `whole` is.
void place_rows(const Tensor& piece, int64_t first, int64_t rows, Tensor& whole) {
  if (piece.empty()) return;
  if (whole.empty()) {
    std::vector<int64_t> dims = piece.shape().dims();
    dims[0] = rows;
    whole = Tensor(piece.dtype(), Shape(dims));
  }
  const TensorView to = whole.view().slice(first, first + piece.rows());
  std::memcpy(to.data, piece.data(), static_cast<size_t>(piece.bytes()));
}

}  // namespace

int64_t rows_per_piece(int64_t in) {
  return std::max<int64_t>(1, kPieceBytes / (in * 4 * kTileRows)) * kTileRows;
}

QuantizeResult quantize_in_pieces(LinearProblem problem, int64_t in, const RowRange& rows,
                                  const ReadRows& read, const Hessian* hessian,
                                  const Quantizer& quantizer, Backend& backend) {
  BITMILL_CHECK(!quantizer.needs_hessian());
  const int64_t step = rows_per_piece(in);
  const RowPeers alone;
  QuantizeResult whole;
  int64_t first = rows.first;
  do {  // a holder of no rows, too, has a result of the right kind
    const int64_t end = std::min(rows.end, first + step);
    const Tensor weight = read(first, end);
    problem.weight = weight;
    problem.first_row = first;
    QuantizeResult piece = std::move(quantizer.quantize({&problem, 1}, hessian, backend, alone)[0]);
    if (first == rows.first && end == rows.end) return piece;
    const auto place = [&](const Tensor& from, Tensor& to) {
      place_rows(from, first - rows.first, rows.count(), to);
    };
    QuantizedLinear linear = std::move(whole.linear);
    place(piece.linear.codes, linear.codes);
    place(piece.linear.scales, linear.scales);
    place(piece.linear.zeros, linear.zeros);
    place(piece.rows.loss, whole.rows.loss);
    place(piece.rows.error, whole.rows.error);
    place(piece.rows.signal, whole.rows.signal);
    whole.linear = std::move(piece.linear);  // bits and the like, and g_idx
    whole.linear.codes = std::move(linear.codes);
    whole.linear.scales = std::move(linear.scales);
    whole.linear.zeros = std::move(linear.zeros);
    piece.record.seconds += whole.record.seconds;
    whole.record = std::move(piece.record);
    first = end;
  } while (first < rows.end);
  whole.record.out = rows.count();
  sum_rows(whole);
  return whole;
}

}  // namespace bitmill
