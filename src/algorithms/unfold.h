// Convolutions as linears. A Conv2d y = W * x with W [out, channels, kh, kw] is the linear W' =
// [out, channels * kh * kw] (the same bytes) applied to every patch of x, so the quantizers serve
// it as they are: unfold the input, add the patches to a Hessian, quantize W'. A Conv1D of GPT-2 is
// a linear whose weight is stored [in, out]; LinearSpec::transposed says so. No model family of
// this version has a convolution; tests use this file.
#pragma once

#include "core/tensor.h"

namespace bitmill {

struct Conv2dShape {
  int64_t kernel_h = 1, kernel_w = 1;
  int64_t stride_h = 1, stride_w = 1;
  int64_t padding_h = 0, padding_w = 0;    // zeros added on each side
  int64_t dilation_h = 1, dilation_w = 1;  // distance of neighbouring kernel elements

  // Output positions along a side of `size` input elements: floor((size + 2 padding - dilation
  // (kernel - 1) - 1) / stride)
  // + 1; 0 where the kernel does not fit.
  int64_t out_h(int64_t size) const;
  int64_t out_w(int64_t size) const;
};

// Patches of `images` [batch, channels, h, w] (host, any float type) as rows: [batch * out_h *
// out_w, channels * kh * kw] of the same type. Rows run over batch, output row, output column;
// columns over channel, kernel row, kernel column, as in the weight. What lies in the padding is 0.
// Unfolded, an image is one sample of out_h * out_w tokens.
Tensor unfold(TensorView images, const Conv2dShape& shape);

}  // namespace bitmill
