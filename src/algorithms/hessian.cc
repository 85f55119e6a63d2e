#include "algorithms/hessian.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace bitmill {
namespace {

// Level at which two lanes meet in the binary tree over lane numbers.
int meeting_level(int a, int b) {
  return std::bit_width(static_cast<unsigned>(a) ^ static_cast<unsigned>(b));
}

template <typename T>
bool all_finite(TensorView x) {  // host memory
  return std::all_of(x.as<T>(), x.as<T>() + x.elements(), [](T v) { return std::isfinite(v); });
}

}  // namespace

void LaneTree::fold_top() {
  const Tensor right = std::move(parts_.back().sum);
  parts_.pop_back();
  backend_.add(parts_.back().sum, right);  // the left lane's number stands for both
}

// Two neighbours are complete once the new lane meets them higher up than they meet each other.
void LaneTree::fold_below(int lane) {
  while (parts_.size() >= 2) {
    const int right = parts_.back().lane, left = parts_[parts_.size() - 2].lane;
    const int level = meeting_level(left, right);
    if (level >= meeting_level(right, lane)) return;
    // The subtree of both may begin with lanes of another holder, which fold first.
    if ((left >> level) << level < lanes_.first) return;
    fold_top();
  }
}

Tensor LaneTree::finish() {
  while (parts_.size() >= 2) fold_top();
  Tensor sum;
  if (!parts_.empty()) sum = std::move(parts_.back().sum);
  parts_.clear();
  return sum;
}

std::vector<LanePart> LaneTree::take() {
  fold_below(lanes_.end);
  return std::exchange(parts_, {});
}

Tensor fold_parts(std::vector<LanePart> parts, Backend& backend) {
  LaneTree tree(backend);
  for (LanePart& part : parts) {
    tree.fold_below(part.lane);
    tree.push(std::move(part));
  }
  return tree.finish();
}

LaneSum::LaneSum(Shape shape, DType dtype, Backend& backend, LaneRange lanes)
    : shape_(shape),
      dtype_(dtype),
      backend_(backend),
      lanes_(lanes),
      tree_(backend, lanes) {
  BITMILL_CHECK(dtype == DType::kF32 || dtype == DType::kF64);
}

Tensor& LaneSum::open(int lane) {
  BITMILL_CHECK(lane >= lane_ && lane >= lanes_.first && lane < lanes_.end);
  if (lane != lane_) close_lane();
  lane_ = lane;
  if (open_.empty()) {
    tree_.fold_below(lane);  // before the new lane takes memory: at most log2(lanes) + 1 sums live
    open_ = backend_.upload(Tensor::zeros(dtype_, shape_));
  }
  return open_;
}

void LaneSum::close_lane() {
  if (!open_.empty()) tree_.push({lane_, std::move(open_)});
}

Tensor LaneSum::finish() {
  close_lane();
  lane_ = -1;
  return tree_.finish();
}

std::vector<LanePart> LaneSum::take_parts() {
  close_lane();
  lane_ = -1;
  return tree_.take();
}

HessianAccumulator::HessianAccumulator(int64_t columns, DType dtype, Backend& backend,
                                       LaneRange lanes)
    : columns_(columns),
      backend_(backend),
      sum_({hessian_elements(columns)}, dtype, backend, lanes) {
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
  return sum.dtype() == DType::kF64 ? all_finite<double>(diagonal) : all_finite<float>(diagonal);
}

Hessian HessianAccumulator::finish() {
  Hessian result{columns_, samples_, tokens_, sum_.finish()};
  samples_ = tokens_ = 0;
  lane_ = -1;
  return result;
}

MismatchAccumulator::MismatchAccumulator(int64_t columns, int64_t hidden, DType dtype,
                                         Backend& backend, LaneRange lanes)
    : backend_(backend),
      inputs_({columns, columns}, dtype, backend, lanes),
      residual_({hidden, columns}, dtype, backend, lanes) {}

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
