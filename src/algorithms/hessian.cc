#include "algorithms/hessian.h"

#include <bit>

namespace bitmill {
namespace {

// Level at which two lanes meet in the binary tree over lane numbers.
int meeting_level(int a, int b) {
  return std::bit_width(static_cast<unsigned>(a) ^ static_cast<unsigned>(b));
}

}  // namespace

LaneSum::LaneSum(Shape shape, DType dtype, Backend& backend)
    : shape_(shape), dtype_(dtype), backend_(backend) {
  BITMILL_CHECK(dtype == DType::kF32 || dtype == DType::kF64);
}

Tensor& LaneSum::open(int lane) {
  BITMILL_CHECK(lane >= lane_ && lane >= 0);
  if (lane != lane_) close_lane();
  lane_ = lane;
  if (open_.empty()) {
    // Two neighbours are complete once the new lane meets them higher up than they meet each other:
    // fold them before the new lane takes memory, so that at most log2(lanes) + 1 sums live.
    fold_below(lane);
    open_ = backend_.upload(Tensor::zeros(dtype_, shape_));
  }
  return open_;
}

void LaneSum::close_lane() {
  if (!open_.empty()) counter_.emplace_back(lane_, std::move(open_));
}

void LaneSum::fold_top() {
  Tensor right = std::move(counter_.back().second);
  counter_.pop_back();
  backend_.add(counter_.back().second, right);  // the left lane's number stands for both
}

void LaneSum::fold_below(int lane) {
  while (counter_.size() >= 2) {
    const int right = counter_.back().first, left = counter_[counter_.size() - 2].first;
    if (meeting_level(left, right) >= meeting_level(right, lane)) return;
    fold_top();
  }
}

Tensor LaneSum::finish() {
  close_lane();
  while (counter_.size() >= 2) fold_top();
  Tensor sum;
  if (!counter_.empty()) sum = std::move(counter_.back().second);
  counter_.clear();
  lane_ = -1;
  return sum;
}

HessianAccumulator::HessianAccumulator(int64_t columns, DType dtype, Backend& backend)
    : columns_(columns), backend_(backend), sum_({hessian_elements(columns)}, dtype, backend) {
  BITMILL_CHECK(columns > 0);
}

void HessianAccumulator::add(TensorView x, int64_t samples, int lane) {
  BITMILL_CHECK(x.cols() == columns_ && samples >= 0);
  samples_ += samples;
  if (x.rows() == 0) return;
  tokens_ += x.rows();
  backend_.hessian_update(x, sum_.open(lane));
  lane_ = lane;
}

bool HessianAccumulator::finite() {
  if (lane_ < 0) return true;
  const Tensor& sum = sum_.open(lane_);
  const Tensor diagonal(sum.dtype(), {columns_});
  backend_.hessian_diagonal(sum, columns_, diagonal);
  return backend_.first_non_finite(diagonal) < 0;
}

Hessian HessianAccumulator::finish() {
  Hessian result{columns_, samples_, tokens_, sum_.finish()};
  samples_ = tokens_ = 0;
  lane_ = -1;
  return result;
}

MismatchAccumulator::MismatchAccumulator(int64_t columns, int64_t hidden, DType dtype,
                                         Backend& backend)
    : backend_(backend),
      inputs_({columns, columns}, dtype, backend),
      residual_({hidden, columns}, dtype, backend) {}

void MismatchAccumulator::add(TensorView x, TensorView x_float, TensorView h, TensorView h_float,
                              int lane) {
  if (x.rows() == 0) return;
  add_product(x, x_float, x, inputs_.open(lane));
  if (h.data != nullptr) add_product(h, h_float, x, residual_.open(lane));
}

void MismatchAccumulator::add_product(TensorView value, TensorView value_float, TensorView x,
                                      Tensor& sum) {
  Tensor lost = backend_.allocate(x.dtype, value.shape);
  backend_.difference(value_float, value, lost);
  backend_.cross_update(lost, x, sum);
}

InputMismatch MismatchAccumulator::finish() {
  return {inputs_.finish(), residual_.finish()};
}

}  // namespace bitmill
