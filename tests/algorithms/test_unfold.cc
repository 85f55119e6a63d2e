// Convolutions through the same quantizers: unfold against the definition of a convolution, and a
// Conv2d layer quantized as the linear it is.
#include "algorithms/unfold.h"

#include <gtest/gtest.h>

#include "algorithms/problem_data.h"

namespace bitmill {
namespace {

using namespace testing;  // NOLINT: the data helpers

// Neighbouring pixels are alike, as in images: else the Hessian would be a multiple of 1.
Tensor random_images(int64_t batch, int64_t channels, int64_t h, int64_t w, uint64_t seed) {
  Tensor images = random_matrix(batch * channels, h * w, seed);
  for (int64_t i = 1; i < images.elements(); ++i)
    images.as<double>()[i] =
        static_cast<float>(0.9 * images.as<double>()[i - 1] + images.as<double>()[i]);
  images.reshape({batch, channels, h, w});
  return images;
}

// y[b, o, i, j] = sum over c, u, v of weight[o, c, u, v] * x[b, c, i*stride - padding + u*dilation,
// ...], zero outside.
double convolved(const Tensor& x, const double* weight, const Conv2dShape& s, int64_t b, int64_t i,
                 int64_t j) {
  const int64_t channels = x.shape()[1], h = x.shape()[2], w = x.shape()[3];
  double sum = 0;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t u = 0; u < s.kernel_h; ++u)
      for (int64_t v = 0; v < s.kernel_w; ++v) {
        const int64_t y = i * s.stride_h - s.padding_h + u * s.dilation_h;
        const int64_t z = j * s.stride_w - s.padding_w + v * s.dilation_w;
        if (y < 0 || y >= h || z < 0 || z >= w) continue;
        sum += weight[(c * s.kernel_h + u) * s.kernel_w + v] *
               x.as<double>()[((b * channels + c) * h + y) * w + z];
      }
  return sum;
}

const Conv2dShape kShapes[] = {
    {},
    {.kernel_h = 3, .kernel_w = 3, .padding_h = 1, .padding_w = 1},
    {.kernel_h = 2, .kernel_w = 3, .stride_h = 2, .stride_w = 3},
    {.kernel_h = 3,
     .kernel_w = 2,
     .stride_h = 1,
     .stride_w = 2,
     .padding_h = 2,
     .padding_w = 0,
     .dilation_h = 2,
     .dilation_w = 3},
    {.kernel_h = 7, .kernel_w = 5, .padding_h = 3, .padding_w = 4},
};

TEST(Unfold, PatchesTimesWeightIsTheConvolution) {
  const Tensor x = random_images(2, 3, 7, 6, 5);
  for (const Conv2dShape& s : kShapes) {
    const int64_t rows = s.out_h(7), cols = s.out_w(6), patch = 3 * s.kernel_h * s.kernel_w;
    const Tensor weight = random_matrix(4, patch, 6), tokens = unfold(x, s);
    ASSERT_EQ(tokens.shape(), Shape({2 * rows * cols, patch}));
    for (int64_t t = 0; t < tokens.rows(); ++t)
      for (int64_t o = 0; o < 4; ++o) {
        double sum = 0;
        for (int64_t k = 0; k < patch; ++k)
          sum += weight.as<double>()[o * patch + k] * tokens.as<double>()[t * patch + k];
        const double wanted = convolved(x, weight.as<double>() + o * patch, s, t / (rows * cols),
                                        t / cols % rows, t % cols);
        ASSERT_NEAR(sum, wanted, 1e-12);
      }
  }
}

// 1 2 3    kernel 2x2, stride 1, padding 1 on the sides only: the first patch is 0 1 / 0 4, the
// last 3 0 / 6 0. 4 5 6
TEST(Unfold, ByHandInEveryType) {
  Tensor x(DType::kF32, {1, 1, 2, 3});
  for (int i = 0; i < 6; ++i) x.as<float>()[i] = static_cast<float>(i + 1);
  const Conv2dShape s{.kernel_h = 2, .kernel_w = 2, .padding_w = 1};
  const std::vector<float> wanted{0, 1, 0, 4, 1, 2, 4, 5, 2, 3, 5, 6, 3, 0, 6, 0};
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
    const Tensor got = to_type(unfold(to_type(x, dtype), s), DType::kF32);
    ASSERT_EQ(got.shape(), Shape({4, 4}));
    EXPECT_EQ(std::vector<float>(got.as<float>(), got.as<float>() + 16), wanted);
  }
  EXPECT_EQ(unfold(x, {.kernel_h = 3, .kernel_w = 1}).rows(), 0);  // the kernel does not fit
}

// A Conv2d [out, channels, kh, kw] quantized from its unfolded inputs: less output error than plain
// rounding, measured on the convolution's own outputs.
TEST(Unfold, ConvolutionThroughTheQuantizers) {
  const std::unique_ptr<Backend> backend = make_backend({"cpu", DType::kF32, 1});
  const Conv2dShape s{.kernel_h = 3, .kernel_w = 3, .stride_h = 2, .padding_h = 1, .padding_w = 1};
  const int64_t out = 12, patch = 5 * 9;
  const Tensor x = random_images(6, 5, 12, 10, 9), weight = random_matrix(out, patch, 10);
  const Tensor tokens = unfold(x, s);
  const int64_t per_image = s.out_h(12) * s.out_w(10);
  HessianAccumulator sum(patch, DType::kF64, *backend);
  for (int64_t b = 0; b < 6; ++b)  // an image is a sample
    sum.add(tokens.view().slice(b * per_image, (b + 1) * per_image), 1, static_cast<int>(b));
  const Hessian hessian = sum.finish();
  EXPECT_EQ(hessian.samples, 6);
  EXPECT_EQ(hessian.tokens, tokens.rows());
  double errors[2];
  for (const char* algorithm : {"gptq", "rtn"}) {
    QuantizeSettings settings;
    settings.algorithm = algorithm;
    settings.bits = 3;
    settings.group_size = -1;
    const QuantizeResult result =
        quantize_one(problem_of(weight, settings, DType::kF16), hessian, *backend);
    EXPECT_EQ(result.record.method, algorithm);
    Tensor w_hat(DType::kF64, weight.shape());
    backend->dequantize(result.linear, w_hat);
    double error = 0;
    for (int64_t t = 0; t < tokens.rows(); ++t)
      for (int64_t o = 0; o < out; ++o) {
        const int64_t b = t / per_image, i = t % per_image / s.out_w(10), j = t % s.out_w(10);
        const double difference = convolved(x, weight.as<double>() + o * patch, s, b, i, j) -
                                  convolved(x, w_hat.as<double>() + o * patch, s, b, i, j);
        error += difference * difference;
      }
    EXPECT_NEAR(2.0 / 6 * error / result.record.error, 1,
                1e-9);  // the record speaks of these outputs
    errors[algorithm == std::string("rtn")] = error;
  }
  EXPECT_LT(errors[0], 0.9 * errors[1]);
}

}  // namespace
}  // namespace bitmill
