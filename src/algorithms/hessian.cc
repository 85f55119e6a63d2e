#include "algorithms/hessian.h"

#include <bit>

namespace bitmill {
namespace {

// Level at which two lanes meet in the binary tree over lane numbers.
int meeting_level(int a, int b) {
  return std::bit_width(static_cast<unsigned>(a) ^ static_cast<unsigned>(b));
}

}  // namespace

HessianAccumulator::HessianAccumulator(int64_t columns, DType dtype, Backend& backend)
    : columns_(columns), dtype_(dtype), backend_(backend) {
  BITMILL_CHECK(columns > 0 && (dtype == DType::kF32 || dtype == DType::kF64));
}

void HessianAccumulator::add(TensorView x, int64_t samples, int lane) {
  BITMILL_CHECK(lane >= lane_ && lane >= 0 && x.cols() == columns_ && samples >= 0);
  samples_ += samples;
  if (x.rows() == 0) return;
  tokens_ += x.rows();
  if (lane != lane_) close_lane();
  lane_ = lane;
  if (open_.empty()) {
    // Two neighbours are complete once the new lane meets them higher up than they meet each other:
    // fold them before the new lane takes memory, so that at most log2(lanes) + 1 sums live.
    fold_below(lane);
    open_ = backend_.upload(Tensor::zeros(dtype_, {hessian_elements(columns_)}));
  }
  backend_.hessian_update(x, open_);
}

void HessianAccumulator::close_lane() {
  if (!open_.empty()) counter_.emplace_back(lane_, std::move(open_));
}

void HessianAccumulator::fold_top() {
  Tensor right = std::move(counter_.back().second);
  counter_.pop_back();
  backend_.add(counter_.back().second, right);  // the left lane's number stands for both
}

void HessianAccumulator::fold_below(int lane) {
  while (counter_.size() >= 2) {
    const int right = counter_.back().first, left = counter_[counter_.size() - 2].first;
    if (meeting_level(left, right) >= meeting_level(right, lane)) return;
    fold_top();
  }
}

Hessian HessianAccumulator::finish() {
  close_lane();
  while (counter_.size() >= 2) fold_top();
  Hessian result{columns_, samples_, tokens_, Tensor()};
  if (!counter_.empty()) result.sum = std::move(counter_.back().second);
  counter_.clear();
  samples_ = tokens_ = 0;
  lane_ = -1;
  return result;
}

}  // namespace bitmill
