// A linear quantized in pieces of rows is the linear quantized at once.
#include "pipeline/row_pieces.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

namespace bitmill {
namespace {

constexpr int64_t kIn = 4096, kRows = 2500;  // pieces of 2048 rows

std::string bytes(const Tensor& tensor) {
  return {tensor.as<char>(), static_cast<size_t>(tensor.bytes())};
}

class RowPieces : public ::testing::Test {
 protected:
  RowPieces() {
    uint32_t state = 1;
    for (int64_t i = 0; i < weight_.elements(); ++i) {
      state = state * 1664525 + 1013904223;
      weight_.as<float>()[i] = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-34f;
    }
    problem_.module = "m";
    problem_.settings.group_size = 128;
  }
  QuantizeResult in_pieces(const RowRange& rows) {
    return quantize_in_pieces(
        problem_, kIn, rows,
        [&](int64_t first, int64_t end) {
          most_rows_ = std::max(most_rows_, end - first);
          return clone(weight_.view().slice(first, end));
        },
        nullptr, rtn_, *backend_);
  }
  QuantizeResult at_once(const RowRange& rows) {
    problem_.weight = weight_.view().slice(rows.first, rows.end);
    problem_.first_row = rows.first;
    return std::move(rtn_.quantize({&problem_, 1}, nullptr, *backend_)[0]);
  }
  std::unique_ptr<Backend> backend_ = make_backend({"cpu", DType::kF32, 2});
  const Quantizer& rtn_ = find_quantizer("rtn");
  Tensor weight_{DType::kF32, {kRows, kIn}};
  LinearProblem problem_;
  int64_t most_rows_ = 0;
};

TEST_F(RowPieces, EqualAllRowsAtOnce) {
  ASSERT_EQ(rows_per_piece(kIn), 2048);
  for (const bool symmetric : {true, false})
    for (const RowRange rows : {RowRange{0, kRows}, RowRange{10, 20}}) {
      problem_.settings.symmetric = symmetric;
      const QuantizeResult whole = at_once(rows), pieces = in_pieces(rows);
      EXPECT_EQ(bytes(pieces.linear.codes), bytes(whole.linear.codes));
      EXPECT_EQ(bytes(pieces.linear.scales), bytes(whole.linear.scales));
      EXPECT_EQ(bytes(pieces.linear.zeros), bytes(whole.linear.zeros));
      EXPECT_EQ(bytes(pieces.linear.g_idx), bytes(whole.linear.g_idx));
      EXPECT_EQ(pieces.linear.codes.shape(), whole.linear.codes.shape());
      EXPECT_EQ(pieces.linear.bits, whole.linear.bits);
      EXPECT_EQ(pieces.linear.symmetric, symmetric);
      EXPECT_EQ(pieces.record.out, rows.count());
      EXPECT_EQ(pieces.record.relative_error, whole.record.relative_error);
      EXPECT_GT(pieces.record.relative_error, 0);
      EXPECT_EQ(bytes(pieces.rows.error), bytes(whole.rows.error));
    }
  EXPECT_EQ(most_rows_, 2048);
}

TEST_F(RowPieces, AHolderOfNoRowsHasAnEmptyResult) {
  const QuantizeResult none = in_pieces({512, 512});
  EXPECT_EQ(none.linear.codes.shape(), Shape({0, kIn}));
  EXPECT_EQ(none.linear.g_idx.elements(), kIn);
}

TEST_F(RowPieces, MessagesNameTheElementOfTheWholeWeight) {
  weight_.as<float>()[2400 * kIn + 7] = INFINITY;
  try {
    in_pieces({0, kRows});
    FAIL() << "an infinite weight";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("row 2400, column 7"), std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace bitmill
