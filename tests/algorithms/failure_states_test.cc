// Bad numbers are states with a record, in the product's own type (fp32, scales in fp16): what was
// done, with which damping, after how many retries, and never a NaN in a result.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "algorithms/problem_data.h"

namespace bitmill {
namespace {

using namespace testing;  // NOLINT: the data helpers

constexpr int64_t kRows = 24, kCols = 96, kTokens = 200;

class FailureStates : public ::testing::Test {
 protected:
  FailureStates() {
    settings_.group_size = 32;
    settings_.damp = 0.01;
  }

  std::unique_ptr<Backend> backend_ = make_backend({"cpu", DType::kF32, 2});
  Tensor weight_ = to_type(random_matrix(kRows, kCols, 31), DType::kF32);
  Tensor x_ = to_type(random_inputs(kTokens, kCols, 32), DType::kF32);
  QuantizeSettings settings_;

  float& w(int64_t row, int64_t col) { return weight_.as<float>()[row * kCols + col]; }
  float& x(int64_t token, int64_t col) { return x_.as<float>()[token * kCols + col]; }

  QuantizeResult run(const Hessian& hessian) {
    QuantizeResult result =
        quantize_one(problem_of(weight_, settings_, DType::kF16), hessian, *backend_);
    expect_sound(result);
    return result;
  }
  QuantizeResult run() { return run(testing::hessian_of(x_, *backend_)); }

  // Whatever happened: codes in range, scales and values finite, every number of the record finite.
  void expect_sound(const QuantizeResult& result) {
    const QuantizedLinear& q = result.linear;
    for (int64_t i = 0; i < q.codes.elements(); ++i)
      ASSERT_LT(q.codes.as<uint8_t>()[i], 1 << q.bits);
    Tensor values(DType::kF32, q.codes.shape());
    backend_->dequantize(q, values);
    EXPECT_EQ(backend_->first_non_finite(q.scales), -1);
    EXPECT_EQ(backend_->first_non_finite(values), -1);
    const QuantizeRecord& r = result.record;
    for (double value : {r.damp, r.smallest_pivot, r.loss})
      EXPECT_TRUE(std::isfinite(value) && value >= 0) << value;
    // tr(E H E^T) may be negative where H is not positive definite.
    EXPECT_TRUE(std::isfinite(r.error) && std::isfinite(r.relative_error))
        << r.error << " " << r.relative_error;
  }
};

TEST_F(FailureStates, HealthyLayerHasAnEmptyNote) {
  const QuantizeRecord record = run().record;
  EXPECT_EQ(record.method, "gptq");
  EXPECT_EQ(record.note, "");
  EXPECT_EQ(record.retries, 0);
  EXPECT_EQ(record.damp, 0.01);
  EXPECT_EQ(record.tokens, kTokens);
  EXPECT_GT(record.smallest_pivot, 0);
}

// 5 tokens for 96 columns: damping alone makes the Hessian definite.
TEST_F(FailureStates, RankDeficientHessianIsSolvedByDamping) {
  const QuantizeRecord record = run(testing::hessian_of(x_.view().slice(0, 5), *backend_)).record;
  EXPECT_EQ(record.method, "gptq");
  EXPECT_EQ(record.tokens, 5);
  EXPECT_EQ(record.retries, 0);
  EXPECT_GT(record.smallest_pivot, 0);
  EXPECT_LT(record.smallest_pivot, 1);
}

// The same with no damping: columns that repeat others leave pivots of 0 or below, so the ladder
// starts at 1e-4.
TEST_F(FailureStates, RankDeficientHessianWithoutDampingClimbs) {
  for (int64_t t = 0; t < kTokens; ++t)
    for (int64_t c = 2; c < kCols; ++c) x(t, c) = x(t, c % 2);
  settings_.damp = 0;
  const QuantizeRecord record = run().record;
  EXPECT_EQ(record.method, "gptq");
  EXPECT_GE(record.retries, 1);
  EXPECT_GE(record.damp, 1e-4);
  EXPECT_LE(record.damp, 1e-2);
  EXPECT_GT(record.smallest_pivot, 0);
}

// damp_max bounds the ladder: here its only step is quantize.damp itself.
TEST_F(FailureStates, DampMaxEndsTheLadder) {
  for (int64_t t = 0; t < kTokens; ++t)
    for (int64_t c = 2; c < kCols; ++c) x(t, c) = x(t, c % 2);
  settings_.damp = 0;
  settings_.damp_max = 0;
  const QuantizeRecord record = run().record;
  EXPECT_EQ(record.method, "rtn");
  EXPECT_EQ(record.note, "not positive definite at damping up to 0");
  EXPECT_EQ(record.damp, 0);
  EXPECT_EQ(record.retries, 0);
  EXPECT_FALSE(record.failed);
  EXPECT_EQ(record.smallest_pivot, 0);
  settings_.damp_max = 5e-5;  // the next step would be 1e-4
  EXPECT_EQ(run().record.method, "rtn");
  settings_.damp_max = 1;
  EXPECT_EQ(run().record.method, "gptq");
}

TEST_F(FailureStates, NotPositiveDefiniteFollowsThePolicy) {
  Hessian hessian = testing::hessian_of(x_, *backend_);
  ASSERT_GE(hessian_tile(kCols), kCols);  // one tile: element (i, j) lies at i * 96 + j
  for (int64_t i = 0; i < kCols; ++i)
    for (int64_t j = 0; j < kCols; ++j)
      hessian.sum.as<float>()[i * kCols + j] = i == j ? 1.0f : 5.0f;
  const QuantizeResult rounded = run(hessian);
  EXPECT_EQ(rounded.record.method, "rtn");
  EXPECT_EQ(rounded.record.note, "not positive definite at damping up to 1");
  EXPECT_EQ(rounded.record.damp, 1);
  EXPECT_EQ(rounded.record.retries, 2);
  EXPECT_EQ(rounded.record.smallest_pivot, 0);
  EXPECT_EQ(rounded.record.tokens, kTokens);
  EXPECT_FALSE(rounded.record.failed);
  settings_.on_failed = OnFailed::kFail;
  EXPECT_TRUE(run(hessian).record.failed);
}

TEST_F(FailureStates, ZeroTokensAndNoSignalAreNoFailures) {
  settings_.on_failed = OnFailed::kFail;
  const QuantizeRecord empty =
      run(HessianAccumulator(kCols, DType::kF32, *backend_).finish()).record;
  EXPECT_EQ(empty.method, "rtn");
  EXPECT_EQ(empty.note, "no tokens");
  EXPECT_EQ(empty.tokens, 0);
  EXPECT_FALSE(empty.failed);
  const QuantizeRecord silent =
      run(testing::hessian_of(Tensor::zeros(DType::kF32, {7, kCols}), *backend_)).record;
  EXPECT_EQ(silent.note, "no signal");
  EXPECT_EQ(silent.tokens, 7);
  EXPECT_FALSE(silent.failed);
}

TEST_F(FailureStates, ConstantRowsAndZeroGroups) {
  for (int64_t c = 0; c < kCols; ++c) {
    w(0, c) = 0.37f;
    w(1, c) = -0.02f;
    w(2, c) = 0;
    if (c >= 32 && c < 64) w(3, c) = 0;
  }
  for (bool symmetric : {true, false})
    for (ActOrder order : {ActOrder::kNone, ActOrder::kStatic, ActOrder::kDynamic}) {
      settings_.symmetric = symmetric;
      settings_.act_order = order;
      const QuantizeResult result = run();
      EXPECT_EQ(result.record.method, "gptq");
      Tensor values(DType::kF32, weight_.shape());
      backend_->dequantize(result.linear, values);
      for (int64_t c = 0; c < kCols; ++c) {
        EXPECT_EQ(values.as<float>()[2 * kCols + c], 0) << "a row of zeros stays zero";
        EXPECT_NEAR(values.as<float>()[c], 0.37f, 0.1f);
      }
    }
}

// One weight 10,000 times the others: its group loses them, nothing else happens.
TEST_F(FailureStates, HugeWeightStaysInItsGroup) {
  w(5, 40) = 1e4f;
  const QuantizeResult result = run();
  EXPECT_EQ(result.record.method, "gptq");
  Tensor values(DType::kF32, weight_.shape());
  backend_->dequantize(result.linear, values);
  EXPECT_NEAR(values.as<float>()[5 * kCols + 40] / 1e4f, 1, 0.1);
  w(5, 40) = 1e9f;  // beyond what fp16 scales can say
  EXPECT_THROW(run(), Error);
}

// Weights of 1e38 have bf16 scales, but their squares are beyond fp32: the sweep's sums overflow,
// plain rounding does not.
TEST_F(FailureStates, OverflowingSweepIsAState) {
  for (int64_t i = 0; i < weight_.elements(); ++i) weight_.as<float>()[i] *= 1e37f;
  const QuantizeResult result = quantize_one(problem_of(weight_, settings_, DType::kBF16),
                                             testing::hessian_of(x_, *backend_), *backend_);
  expect_sound(result);
  EXPECT_EQ(result.record.method, "rtn");
  EXPECT_EQ(result.record.note, "the sweep overflowed");
  EXPECT_EQ(result.record.damp, 0.01);
  EXPECT_GT(result.record.smallest_pivot, 0);
  EXPECT_GT(result.record.relative_error, 1e-4);
  EXPECT_LT(result.record.relative_error, 0.1);
  settings_.on_failed = OnFailed::kFail;
  EXPECT_TRUE(quantize_one(problem_of(weight_, settings_, DType::kBF16),
                           testing::hessian_of(x_, *backend_), *backend_)
                  .record.failed);
}

// A channel of 1e15, so that H spans 30 orders of magnitude: solved at some damping or rounded, but
// never broken.
TEST_F(FailureStates, HugeActivationIsAState) {
  for (float outlier : {1e3f, 1e8f, 1e15f, 3e17f}) {
    for (int64_t t = 0; t < kTokens; ++t) x(t, 10) = outlier * (t % 3 == 0 ? 1.0f : -0.5f);
    const QuantizeRecord record = run().record;
    EXPECT_TRUE(record.method == "gptq" || !record.note.empty()) << outlier;
    EXPECT_EQ(record.tokens, kTokens);
  }
}

// Finite activations whose squares are not: refused by the module's name, not passed on as
// infinity.
TEST_F(FailureStates, OverflowingHessianIsRefused) {
  x(3, 7) = 1e25f;
  try {
    run();
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kInput);
    EXPECT_NE(std::string(error.what()).find("layer: the Hessian of its input is not finite"),
              std::string::npos);
  }
}

}  // namespace
}  // namespace bitmill
