// GPTQ: properties that hold whatever the numbers, and every recorded state.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "algorithms/problem_data.h"

namespace bitmill {
namespace {

using namespace testing;  // NOLINT: the data helpers

QuantizeSettings settings(ActOrder order, int64_t group_size, int bits = 4,
                          bool symmetric = false) {
  QuantizeSettings s;
  s.act_order = order;
  s.group_size = group_size;
  s.bits = bits;
  s.damp = 0.01;  // the ladder's tests count its steps
  s.symmetric = symmetric;
  s.range_search = false;  // has its own tests
  return s;
}

class GptqTest : public ::testing::Test {
 protected:
  std::unique_ptr<Backend> backend_ = make_backend({"cpu", DType::kF32, 1});
  Tensor weight_ = random_matrix(37, 96, 11);
  Tensor x_ = random_inputs(300, 96, 12);
  Hessian hessian_ = testing::hessian_of(x_, *backend_);

  QuantizeResult run(const QuantizeSettings& s) {
    return quantize_one(problem_of(weight_, s), hessian_, *backend_);
  }
};

// One row, two columns, 2 bits, no damping, by hand. H = 2 [[2, 1], [1, 2]], grid -2..1 with scale
// 1: column 0 first: t0 = 0.4 -> 0, e0 = 0.4; column 1: t1 = 0.4 + e0 * U, U = 1/2 -> 0.6 -> 1.
// Plain rounding gives 0 and 0.
TEST_F(GptqTest, TwoColumnsByHand) {
  const double half_root = std::sqrt(0.5), three_half_root = std::sqrt(1.5);
  Tensor x(DType::kF64, {2, 2});
  const double inputs[] = {half_root, -half_root, three_half_root, three_half_root};
  std::copy(inputs, inputs + 4, x.as<double>());
  HessianAccumulator accumulator(2, DType::kF64, *backend_);
  accumulator.add(x, 1, 0);
  const Hessian hessian = accumulator.finish();
  Tensor factor(DType::kF64, {2, 2}), order(DType::kI32, {2}), diagonal(DType::kF64, {2});
  order.as<int32_t>()[0] = 1;  // position 0 is solved last
  order.as<int32_t>()[1] = 0;
  diagonal.as<double>()[0] = diagonal.as<double>()[1] = 4;
  backend_->hessian_gather(hessian.sum, order, hessian.factor(), diagonal, factor);
  ASSERT_TRUE(backend_->factorize(factor).ok);
  Tensor w(DType::kF64, {1, 2}), scale(DType::kF64, {1, 1}), zero(DType::kF64, {1, 1}),
      loss(DType::kF64, {1});
  Tensor error(DType::kF64, {1}), group = Tensor::zeros(DType::kI32, {2}),
                                  codes(DType::kU8, {1, 2});
  w.as<double>()[0] = w.as<double>()[1] = 0.4;
  *scale.as<double>() = 1;
  *zero.as<double>() = 2;
  SweepItem item;
  item.weight = w, item.scales = scale, item.zeros = zero, item.column_group = group,
  item.codes = codes;
  item.row_loss = loss, item.row_error = error, item.bits = 2;
  backend_->sweep(factor, order, 128, {&item, 1});
  EXPECT_EQ(codes.as<uint8_t>()[0], 2);
  EXPECT_EQ(codes.as<uint8_t>()[1], 3);
  // L = [[2, 0], [1, sqrt(3)]]: D = 3 for column 0, 4 for column 1, whose rounding error is 0.6
  // - 1.
  EXPECT_NEAR(*loss.as<double>(), (3 * 0.16 + 4 * 0.16) / 2, 1e-12);
  EXPECT_NEAR(*error.as<double>(), 0.16 + 0.36, 1e-12);
  const double e0 = 0.4, e1 = -0.6;
  EXPECT_NEAR(2 * *loss.as<double>(), 4 * e0 * e0 + 4 * e0 * e1 + 4 * e1 * e1, 1e-12);
}

TEST_F(GptqTest, RecordedErrorIsTheLayerErrorOfTheStoredWeights) {
  for (ActOrder order : {ActOrder::kNone, ActOrder::kStatic, ActOrder::kDynamic}) {
    const QuantizeResult result = run(settings(order, 32));
    Tensor w_hat(DType::kF64, weight_.shape());
    backend_->dequantize(result.linear, w_hat);
    const double error = testing::layer_error(weight_, w_hat, hessian_, *backend_);
    EXPECT_NEAR(result.record.error / error, 1, 1e-9);
    EXPECT_GT(result.record.loss * 2, error);
    EXPECT_GT(result.record.relative_error, 0);
    EXPECT_LT(result.record.relative_error, 0.05);
  }
}

TEST_F(GptqTest, BeatsPlainRoundingOnTheSameGrid) {
  QuantizeSettings s = settings(ActOrder::kStatic, 32, 3);
  const double gptq = run(s).record.error;
  s.algorithm = "rtn";
  EXPECT_LT(gptq, 0.8 * run(s).record.error);
}

TEST_F(GptqTest, BlockSizeDoesNotChangeStaticGrids) {
  QuantizeSettings s = settings(ActOrder::kStatic, 32);
  const std::vector<uint8_t> codes = bytes_of(run(s).linear.codes);
  for (int64_t block : {1, 2, 3, 7, 8, 9, 31, 64, 95, 96, 500}) {
    s.block_size = block;
    EXPECT_EQ(bytes_of(run(s).linear.codes), codes) << "block_size " << block;
  }
}

TEST_F(GptqTest, PermutedColumnsGivePermutedCodes) {
  const int64_t n = weight_.cols(), rows = weight_.rows();
  std::vector<int64_t> permutation(n);
  for (int64_t c = 0; c < n; ++c) permutation[c] = (c * 35 + 17) % n;  // 35 and 96 share no factor
  Tensor w(DType::kF64, weight_.shape()), x(DType::kF64, x_.shape());
  for (int64_t c = 0; c < n; ++c) {
    for (int64_t r = 0; r < rows; ++r)
      w.as<double>()[r * n + c] = weight_.as<double>()[r * n + permutation[c]];
    for (int64_t t = 0; t < x_.rows(); ++t)
      x.as<double>()[t * n + c] = x_.as<double>()[t * n + permutation[c]];
  }
  const QuantizeSettings s = settings(ActOrder::kStatic, -1);
  const QuantizeResult plain = run(s);
  const QuantizeResult moved =
      quantize_one(problem_of(w, s), testing::hessian_of(x, *backend_), *backend_);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < n; ++c) {
      ASSERT_EQ(moved.linear.codes.as<uint8_t>()[r * n + c],
                plain.linear.codes.as<uint8_t>()[r * n + permutation[c]]);
    }
  }
}

TEST_F(GptqTest, PowersOfTwoScaleRowsExactly) {
  Tensor scaled = clone(weight_);
  for (int64_t i = 0; i < scaled.elements(); ++i)
    scaled.as<double>()[i] *= i / scaled.cols() % 2 ? 0.125 : 4;
  const QuantizeSettings s = settings(ActOrder::kNone, 32);
  const QuantizeResult result = quantize_one(problem_of(scaled, s), hessian_, *backend_);
  EXPECT_EQ(bytes_of(result.linear.codes), bytes_of(run(s).linear.codes));
}

TEST_F(GptqTest, RowsAreIndependent) {
  const QuantizeSettings s = settings(ActOrder::kDynamic, 24);
  const std::vector<uint8_t> whole = bytes_of(run(s).linear.codes);
  std::vector<uint8_t> parts;
  for (auto [first, last] : {std::pair<int64_t, int64_t>{0, 1}, {1, 20}, {20, 37}}) {
    const LinearProblem part = problem_of(weight_.view().slice(first, last), s);
    const std::vector<uint8_t> codes =
        bytes_of(quantize_one(part, hessian_, *backend_).linear.codes);
    parts.insert(parts.end(), codes.begin(), codes.end());
  }
  EXPECT_EQ(parts, whole);
}

TEST_F(GptqTest, LinearsThatShareAnInputGiveWhatTheyGiveAlone) {
  const Tensor other = random_matrix(20, 96, 13);
  const LinearProblem problems[] = {problem_of(weight_, settings(ActOrder::kStatic, 32)),
                                    problem_of(other, settings(ActOrder::kNone, 48, 3)),
                                    problem_of(other, settings(ActOrder::kStatic, -1, 2, true))};
  const std::vector<QuantizeResult> together =
      find_quantizer("gptq").quantize(problems, &hessian_, *backend_);
  for (int i = 0; i < 3; ++i) {
    const QuantizeResult alone = quantize_one(problems[i], hessian_, *backend_);
    EXPECT_EQ(bytes_of(together[i].linear.codes), bytes_of(alone.linear.codes));
    EXPECT_EQ(bytes_of(together[i].linear.scales), bytes_of(alone.linear.scales));
    EXPECT_EQ(together[i].record.error, alone.record.error);
  }
}

TEST_F(GptqTest, ThreadsDoNotChangeABit) {
  const Tensor w = to_type(random_matrix(600, 320, 21), DType::kF32);
  const Tensor x = to_type(random_inputs(200, 320, 22), DType::kF32);
  std::vector<uint8_t> codes, scales;
  double error = 0;
  for (int threads : {1, 2, 3}) {
    const std::unique_ptr<Backend> backend = make_backend({"cpu", DType::kF32, threads});
    const LinearProblem problem = problem_of(w, settings(ActOrder::kStatic, 64), DType::kF16);
    const QuantizeResult result = quantize_one(problem, testing::hessian_of(x, *backend), *backend);
    if (threads == 1) {
      codes = bytes_of(result.linear.codes);
      scales = bytes_of(result.linear.scales);
      error = result.record.error;
    }
    EXPECT_EQ(bytes_of(result.linear.codes), codes);
    EXPECT_EQ(bytes_of(result.linear.scales), scales);
    EXPECT_EQ(result.record.error, error);
  }
}

TEST_F(GptqTest, FloatErrorIsCloseToDouble) {
  const Tensor w = to_type(weight_, DType::kF32), x = to_type(x_, DType::kF32);
  const Hessian hessian = testing::hessian_of(x, *backend_);
  const QuantizeSettings s = settings(ActOrder::kStatic, 32);
  const QuantizeResult result = quantize_one(problem_of(w, s, DType::kF16), hessian, *backend_);
  const double wanted =
      quantize_one(problem_of(weight_, s, DType::kF16), hessian_, *backend_).record.error;
  EXPECT_NEAR(result.record.error / wanted, 1, 0.02);
  EXPECT_EQ(result.linear.scales.dtype(), DType::kF16);
}

TEST_F(GptqTest, DeadColumnsAreCountedAndZeroed) {
  for (int64_t t = 0; t < x_.rows(); ++t)
    x_.as<double>()[t * 96 + 5] = x_.as<double>()[t * 96 + 90] = 0;
  hessian_ = testing::hessian_of(x_, *backend_);
  const QuantizeResult result = run(settings(ActOrder::kStatic, 32));
  EXPECT_EQ(result.record.dead_columns, 2);
  Tensor w_hat(DType::kF64, weight_.shape());
  backend_->dequantize(result.linear, w_hat);
  for (int64_t r = 0; r < weight_.rows(); ++r) {
    EXPECT_EQ(w_hat.as<double>()[r * 96 + 5], 0);
    EXPECT_EQ(w_hat.as<double>()[r * 96 + 90], 0);
  }
  const double error = testing::layer_error(weight_, w_hat, hessian_, *backend_);
  EXPECT_NEAR(result.record.error / error, 1, 1e-9);
}

// In the caller's weight or in a copy of it: codes, grids and record are the same, and the weight
// is left alone where the caller has not given it away.
TEST_F(GptqTest, DeadColumnsNeedNoCopyOfTheWeight) {
  for (int64_t t = 0; t < x_.rows(); ++t) x_.as<double>()[t * 96 + 5] = 0;
  hessian_ = testing::hessian_of(x_, *backend_);
  for (const ActOrder order : {ActOrder::kStatic, ActOrder::kDynamic})
    for (const int64_t group_size : {int64_t{32}, int64_t{-1}}) {
      const Tensor given = clone(weight_), given_away = clone(weight_);
      LinearProblem problem = problem_of(given, settings(order, group_size));
      const QuantizeResult copied = quantize_one(problem, hessian_, *backend_);
      EXPECT_EQ(bytes_of(given), bytes_of(weight_));
      problem.weight = given_away;
      problem.may_zero_columns = true;
      const QuantizeResult in_place = quantize_one(problem, hessian_, *backend_);
      EXPECT_EQ(given_away.as<double>()[5], 0);
      EXPECT_EQ(bytes_of(in_place.linear.codes), bytes_of(copied.linear.codes));
      EXPECT_EQ(bytes_of(in_place.linear.scales), bytes_of(copied.linear.scales));
      EXPECT_EQ(in_place.record.error, copied.record.error);
      EXPECT_EQ(in_place.record.relative_error, copied.record.relative_error);
    }
}

TEST_F(GptqTest, NoTokensAndNoSignalRoundToNearest) {
  QuantizeSettings s = settings(ActOrder::kStatic, 32);
  const Hessian nothing = HessianAccumulator(96, DType::kF64, *backend_).finish();
  const QuantizeResult empty = quantize_one(problem_of(weight_, s), nothing, *backend_);
  const Hessian zero = testing::hessian_of(Tensor::zeros(DType::kF64, {4, 96}), *backend_);
  const QuantizeResult silent = quantize_one(problem_of(weight_, s), zero, *backend_);
  s.algorithm = "rtn";
  const QuantizeResult rounded = run(s);
  EXPECT_EQ(empty.record.method, "rtn");
  EXPECT_EQ(empty.record.note, "no tokens");
  EXPECT_EQ(silent.record.note, "no signal");
  EXPECT_FALSE(empty.record.failed || silent.record.failed);
  EXPECT_EQ(bytes_of(empty.linear.codes), bytes_of(rounded.linear.codes));
  EXPECT_EQ(bytes_of(silent.linear.codes), bytes_of(rounded.linear.codes));
}

// H = I + c (11^T - I) with c = 1.05 has the eigenvalue 1 - c = -0.05: damping 0.01 fails, 0.1
// does. c = 5 never does.
class IndefiniteTest : public GptqTest {
 protected:
  void make_hessian(double off_diagonal) {
    for (int64_t i = 0; i < 96; ++i) {
      for (int64_t j = 0; j < 96; ++j) at(i, j) = i == j ? 1 : off_diagonal;
    }
    hessian_.samples = 2;
  }
  double& at(int64_t i, int64_t j) {
    EXPECT_GE(hessian_tile(96), 96);
    return hessian_.sum.as<double>()[i * 96 + j];
  }
};

TEST_F(IndefiniteTest, DampingClimbsTheLadder) {
  make_hessian(1.05);
  const QuantizeResult result = run(settings(ActOrder::kStatic, 32));
  EXPECT_EQ(result.record.method, "gptq");
  EXPECT_NEAR(result.record.damp, 0.1, 1e-15);
  EXPECT_EQ(result.record.retries, 1);
  EXPECT_GT(result.record.smallest_pivot, 0);
}

TEST_F(IndefiniteTest, ZeroDampingStartsTheLadderAtOneTenThousandth) {
  make_hessian(1.05);
  QuantizeSettings s = settings(ActOrder::kStatic, 32);
  s.damp = 0;
  const QuantizeResult result = run(s);  // 0, 1e-4, 1e-3, 1e-2, 0.1
  EXPECT_NEAR(result.record.damp, 0.1, 1e-12);
  EXPECT_EQ(result.record.retries, 4);
}

TEST_F(IndefiniteTest, HopelessFollowsThePolicy) {
  make_hessian(5);
  QuantizeSettings s = settings(ActOrder::kStatic, 32);
  const QuantizeResult rounded = run(s);
  EXPECT_EQ(rounded.record.method, "rtn");
  EXPECT_FALSE(rounded.record.failed);
  EXPECT_EQ(rounded.record.retries, 2);
  EXPECT_NE(rounded.record.note.find("not positive definite"), std::string::npos);
  s.on_failed = OnFailed::kFail;
  const QuantizeResult failed = run(s);
  EXPECT_TRUE(failed.record.failed);
  EXPECT_EQ(bytes_of(failed.linear.codes), bytes_of(rounded.linear.codes));
}

std::string refusal(const LinearProblem& problem, const Hessian& hessian, Backend& backend) {
  try {
    quantize_one(problem, hessian, backend);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kInput);
    return error.what();
  }
  return "accepted";
}

TEST_F(GptqTest, NonFiniteInputIsRefusedByName) {
  QuantizeSettings s = settings(ActOrder::kStatic, 32);
  Tensor bad = clone(weight_);
  bad.as<double>()[2 * 96 + 7] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(refusal(problem_of(bad, s), hessian_, *backend_),
            "layer.weight: element 199 (row 2, column 7) is not a finite number");
  s.algorithm = "rtn";
  EXPECT_NE(refusal(problem_of(bad, s), hessian_, *backend_).find("element 199"),
            std::string::npos);
  hessian_.sum.as<double>()[3] = std::numeric_limits<double>::infinity();
  EXPECT_NE(refusal(problem_of(weight_, settings(ActOrder::kStatic, 32)), hessian_, *backend_)
                .find("layer: the Hessian"),
            std::string::npos);
}

TEST_F(GptqTest, ScaleBeyondItsStoredTypeIsRefused) {
  Tensor huge = clone(weight_);
  huge.as<double>()[0] = 3e6;
  for (ActOrder order : {ActOrder::kNone, ActOrder::kStatic}) {
    const LinearProblem problem = problem_of(huge, settings(order, 32), DType::kF16);
    EXPECT_NE(refusal(problem, hessian_, *backend_).find("beyond F16"), std::string::npos);
  }
}

TEST_F(GptqTest, ImpossibleSettingsAreUsageErrors) {
  const Quantizer& gptq = find_quantizer("gptq");
  QuantizeSettings s;
  EXPECT_NO_THROW(gptq.check(s));
  s.bits = 9;
  EXPECT_THROW(gptq.check(s), Error);
  s = {}, s.group_size = 0;
  EXPECT_THROW(gptq.check(s), Error);
  s = {}, s.block_size = 0;
  EXPECT_THROW(gptq.check(s), Error);
  s = {}, s.damp_step = 1;
  EXPECT_THROW(gptq.check(s), Error);
  s = {}, s.damp = 2;
  EXPECT_THROW(gptq.check(s), Error);
  EXPECT_THROW(find_quantizer("gtpq"), Error);
}

TEST_F(GptqTest, SymmetricZerosAreTheMiddle) {
  const QuantizeResult result = run(settings(ActOrder::kNone, 32, 3, true));
  for (int64_t i = 0; i < result.linear.zeros.elements(); ++i)
    EXPECT_EQ(result.linear.zeros.as<uint8_t>()[i], 4);
}

// Uneven inputs make some columns count far more than others.
class RangeSearch : public GptqTest, public ::testing::WithParamInterface<ActOrder> {};

TEST_P(RangeSearch, LowersTheLayerError) {
  for (int bits : {2, 3, 4}) {
    QuantizeSettings s = settings(GetParam(), 32, bits);
    const double plain = run(s).record.error;
    s.range_search = true;
    EXPECT_LT(run(s).record.error, plain) << bits << " bits";
  }
}

TEST_P(RangeSearch, IsOffWithMse) {
  QuantizeSettings s = settings(GetParam(), 32, 3);
  s.mse = true;
  const QuantizeResult plain = run(s);
  s.range_search = true;
  EXPECT_EQ(bytes_of(run(s).linear.codes), bytes_of(plain.linear.codes));
}

INSTANTIATE_TEST_SUITE_P(Orders, RangeSearch,
                         ::testing::Values(ActOrder::kNone, ActOrder::kStatic, ActOrder::kDynamic));

}  // namespace
}  // namespace bitmill
