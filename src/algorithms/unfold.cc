#include "algorithms/unfold.h"

#include <cstring>

#include "core/error.h"

namespace bitmill {
namespace {

int64_t positions(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

}  // namespace

int64_t Conv2dShape::out_h(int64_t size) const {
  return positions(size, kernel_h, stride_h, padding_h, dilation_h);
}

int64_t Conv2dShape::out_w(int64_t size) const {
  return positions(size, kernel_w, stride_w, padding_w, dilation_w);
}

Tensor unfold(TensorView images, const Conv2dShape& s) {
  BITMILL_CHECK(images.shape.rank() == 4 && s.kernel_h > 0 && s.kernel_w > 0 && s.stride_h > 0 &&
                s.stride_w > 0 && s.padding_h >= 0 && s.padding_w >= 0 && s.dilation_h > 0 &&
                s.dilation_w > 0);
  const int64_t batch = images.shape[0], channels = images.shape[1], h = images.shape[2],
                w = images.shape[3], rows = s.out_h(h), cols = s.out_w(w);
  const int64_t patch = channels * s.kernel_h * s.kernel_w;
  const size_t element = static_cast<size_t>(dtype_bits(images.dtype) / 8);
  Tensor out = Tensor::zeros(images.dtype, {batch * rows * cols, patch});
  const char* source = images.as<char>();
  // One call per kernel element of one output position; `token` counts output positions.
  const auto copy = [&](int64_t token, int64_t image, int64_t channel, int64_t y, int64_t x,
                        int64_t column) {
    if (y < 0 || y >= h || x < 0 || x >= w) return;  // padding
    const int64_t from = ((image * channels + channel) * h + y) * w + x;
    std::memcpy(out.as<char>() + static_cast<size_t>(token * patch + column) * element,
                source + static_cast<size_t>(from) * element, element);
  };
  for (int64_t token = 0; token < out.rows(); ++token) {
    const int64_t image = token / (rows * cols), oy = token / cols % rows, ox = token % cols;
    for (int64_t column = 0; column < patch; ++column) {
      const int64_t kx = column % s.kernel_w, ky = column / s.kernel_w % s.kernel_h;
      copy(token, image, column / (s.kernel_h * s.kernel_w),
           oy * s.stride_h - s.padding_h + ky * s.dilation_h,
           ox * s.stride_w - s.padding_w + kx * s.dilation_w, column);
    }
  }
  return out;
}

}  // namespace bitmill
