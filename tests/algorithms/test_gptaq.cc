// GPTAQ against GPTQ where inputs differ from the float model's, as they do behind quantized
// blocks.
#include <gtest/gtest.h>

#include <cmath>

#include "algorithms/problem_data.h"

namespace bitmill {
namespace {

using namespace testing;  // NOLINT: the data helpers

constexpr int64_t kTokens = 900, kIn = 96, kOut = 40;

// x: the float inputs times a matrix near the identity, plus noise: what is left of them behind a
// quantized block. h - h_float: an error that x explains in part.
class GptaqTest : public ::testing::Test {
 protected:
  GptaqTest() {
    const Tensor mix = random_matrix(kIn, kIn, 5), noise = random_matrix(kTokens, kIn, 6);
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t c = 0; c < kIn; ++c) {
        double value = x_float_.as<double>()[t * kIn + c];
        for (int64_t k = 0; k < kIn; ++k)
          value += 0.02 * mix.as<double>()[k * kIn + c] * x_float_.as<double>()[t * kIn + k];
        x_.as<double>()[t * kIn + c] = value + 0.1 * noise.as<double>()[t * kIn + c];
      }
      for (int64_t o = 0; o < kOut; ++o)
        h_.as<double>()[t * kOut + o] += 0.2 * x_.as<double>()[t * kIn + o];
    }
    MismatchAccumulator plain(kIn, 0, DType::kF64, *backend_),
        full(kIn, kOut, DType::kF64, *backend_);
    plain.add(x_, x_float_, TensorView(), TensorView(), 0);
    full.add(x_, x_float_, h_, h_float_, 0);
    inputs_only_ = plain.finish();
    mismatch_ = full.finish();
    hessian_ = testing::hessian_of(x_, *backend_);
  }

  QuantizeResult run(const std::string& algorithm, int bits, const InputMismatch* mismatch) {
    QuantizeSettings s;
    s.algorithm = algorithm;
    s.bits = bits;
    s.group_size = 32;
    s.symmetric = false;
    LinearProblem problem = problem_of(weight_, s);
    problem.mismatch = mismatch;
    return quantize_one(problem, hessian_, *backend_);
  }

  // ||(h_float) + W x_float - (h) - Q x||^2 over all tokens.
  double output_error(const QuantizeResult& result, bool residual) {
    Tensor q(DType::kF64, {kOut, kIn});
    backend_->dequantize(result.linear, q);
    double sum = 0;
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t o = 0; o < kOut; ++o) {
        double e =
            residual ? h_float_.as<double>()[t * kOut + o] - h_.as<double>()[t * kOut + o] : 0;
        for (int64_t c = 0; c < kIn; ++c) {
          e += weight_.as<double>()[o * kIn + c] * x_float_.as<double>()[t * kIn + c] -
               q.as<double>()[o * kIn + c] * x_.as<double>()[t * kIn + c];
        }
        sum += e * e;
      }
    }
    return sum;
  }

  std::unique_ptr<Backend> backend_ = make_backend({"cpu", DType::kF32, 1});
  Tensor weight_ = random_matrix(kOut, kIn, 11), x_float_ = random_inputs(kTokens, kIn, 12);
  Tensor x_{DType::kF64, {kTokens, kIn}};
  Tensor h_float_ = random_matrix(kTokens, kOut, 13), h_ = clone(h_float_);
  Hessian hessian_;
  InputMismatch inputs_only_, mismatch_;
};

TEST_F(GptaqTest, BeatsGptqInOutputErrorAgainstTheFloatModel) {
  for (int bits : {2, 3, 4}) {
    const double plain = output_error(run("gptq", bits, nullptr), false);
    EXPECT_LT(output_error(run("gptaq", bits, &inputs_only_), false), 0.9 * plain)
        << bits << " bits";
  }
}

TEST_F(GptaqTest, MakesUpForTheResidualStream) {
  for (int bits : {2, 3, 4}) {
    const double inputs_only = output_error(run("gptaq", bits, &inputs_only_), true);
    EXPECT_LT(output_error(run("gptaq", bits, &mismatch_), true),
              (bits == 4 ? 0.9 : 1) * inputs_only)
        << bits << " bits";
  }
}

TEST_F(GptaqTest, IsGptqWhereNothingWasLost) {
  const InputMismatch none{Tensor::zeros(DType::kF64, {kIn, kIn}), Tensor()};
  const QuantizeResult gptq = run("gptq", 3, nullptr), gptaq = run("gptaq", 3, &none);
  EXPECT_EQ(bytes_of(gptaq.linear.codes), bytes_of(gptq.linear.codes));
  EXPECT_EQ(bytes_of(gptaq.linear.scales), bytes_of(gptq.linear.scales));
  EXPECT_EQ(gptaq.record.method, "gptaq");
  EXPECT_EQ(run("gptaq", 3, nullptr).record.method, "gptq")
      << "nothing is known of the float model";
}

TEST_F(GptaqTest, CorrectionThatOverflowsIsLeftOutAndSaid) {
  InputMismatch huge{Tensor::zeros(DType::kF64, {kIn, kIn}), Tensor()};
  for (int64_t i = 0; i < huge.inputs.elements(); ++i) huge.inputs.as<double>()[i] = 1e308;
  const QuantizeResult gptq = run("gptq", 3, nullptr), gptaq = run("gptaq", 3, &huge);
  EXPECT_EQ(bytes_of(gptaq.linear.codes), bytes_of(gptq.linear.codes));
  EXPECT_EQ(gptaq.record.method, "gptq");
  EXPECT_EQ(gptaq.record.note, "the correction overflowed");
}

// Sums over lanes fold as those of the Hessian do.
TEST_F(GptaqTest, LanesOfMismatchFoldAlike) {
  MismatchAccumulator lanes(kIn, kOut, DType::kF64, *backend_);
  for (int lane = 0; lane < 3; ++lane) {
    const auto part = [&](const Tensor& all) {
      return all.view().slice(lane * 300, lane * 300 + 300);
    };
    lanes.add(part(x_), part(x_float_), part(h_), part(h_float_), lane);
  }
  const InputMismatch sum = lanes.finish();
  for (int64_t i = 0; i < sum.inputs.elements(); ++i)
    ASSERT_NEAR(sum.inputs.as<double>()[i], mismatch_.inputs.as<double>()[i], 1e-9);
  for (int64_t i = 0; i < sum.residual.elements(); ++i)
    ASSERT_NEAR(sum.residual.as<double>()[i], mismatch_.residual.as<double>()[i], 1e-9);
}

}  // namespace
}  // namespace bitmill
