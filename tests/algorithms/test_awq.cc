// AWQ's parts: candidate scales, losses, folding with stored types, Hessians of scaled inputs, and
// what the quantizers say of themselves.
#include "algorithms/awq.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "algorithms/problem_data.h"
#include "support/naive.h"

namespace bitmill {
namespace {

using namespace testing;  // NOLINT: the data helpers

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

Tensor vector_of(const Values& values, DType dtype = DType::kF64) {
  return to_tensor(dtype, {static_cast<int64_t>(values.size())}, values);
}

TEST(AwqScales, ByHand) {
  // mean^(1/2) = 4, 1, 1/4; largest times smallest is 1
  EXPECT_EQ(to_values(awq_scales(vector_of({16, 1, 0.0625}), 0.5)), (Values{4, 1, 0.25}));
  // mean^1 = 8, 2; their middle is 4
  EXPECT_EQ(to_values(awq_scales(vector_of({8, 2}), 1)), (Values{2, 0.5}));
}

TEST(AwqScales, SmallWeightsAreRaised) {
  // rows' groups {2, -1}, {0, 4} | {0, 0}, {5, 5}: |w| / largest = 1, 1/2 and 0, 1 | 0, 0 and 1, 1
  Tensor w = to_tensor(DType::kF32, {2, 4}, {2, -1, 0, 0, 0, 4, 5, 5});
  QuantizeSettings settings;
  settings.group_size = 2;
  const LinearProblem problem = problem_of(w, settings);
  const Tensor weight = relative_weights({&problem, 1});
  EXPECT_EQ(to_values(weight), (Values{0.5, 0.75, 0.5, 0.5}));
  // mean^(1/2) / weight^(1/2): 4 / 0.5 and 1 / 0.25, centered by the root of 32
  const Values s = to_values(awq_scales(vector_of({16, 1}), vector_of({0.25, 0.0625}), 0.5));
  EXPECT_NEAR(s[0], 8 / std::sqrt(32), 2e-3);
  EXPECT_NEAR(s[1], 4 / std::sqrt(32), 2e-3);
}

TEST(AwqScales, RatioZeroIsNoScalingAlsoForDeadColumns) {
  EXPECT_EQ(to_values(awq_scales(vector_of({5, 0, 0.3}), 0)), (Values{1, 1, 1}));
}

TEST(AwqScales, DeadColumnsAreHeldAboveZero) {
  // 1e-4 against 1: the middle is 1e-2
  const Values s = to_values(awq_scales(vector_of({1, 0}), 0.5));
  EXPECT_NEAR(s[0], 100, 1e-9);
  EXPECT_NEAR(s[1], 0.01, 1e-13);
}

TEST(AwqSearch, KeepsTheFirstSmallestAndPassesOverNaN) {
  const auto losses = [](TensorView candidates) {
    EXPECT_EQ(candidates.rows(), 5);
    return std::vector<double>{4, kNaN, 2, 3, 2};
  };
  const Tensor mean = vector_of({16, 1});
  const ScaleSearch found = search_scales(mean, TensorView(), 5, losses, "group");
  EXPECT_EQ(found.best, 2);
  EXPECT_EQ(found.gain, 0.5);
  EXPECT_EQ(to_values(found.scales), to_values(awq_scales(mean, 2.0 / 5)));
}

TEST(AwqSearch, WeightedCandidatesComeSecond) {
  const auto losses = [](TensorView candidates) {
    EXPECT_EQ(candidates.rows(), 4);
    return std::vector<double>{4, 3, 3, 1};
  };
  const Tensor mean = vector_of({16, 1}), weight = vector_of({0.5, 0.1});
  const ScaleSearch found = search_scales(mean, weight, 2, losses, "group");
  EXPECT_EQ(found.best, 1);
  EXPECT_TRUE(found.weighted);
  EXPECT_EQ(found.gain, 0.25);
  EXPECT_EQ(to_values(found.scales), to_values(awq_scales(mean, weight, 0.5)));
}

TEST(AwqSearch, RefusesAGroupWithoutAnyFiniteLoss) {
  const auto losses = [](TensorView) { return std::vector<double>(4, kNaN); };
  try {
    search_scales(vector_of({1, 2}), TensorView(), 4, losses, "model.layers.3.mlp.up_proj");
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kInput);
    EXPECT_NE(std::string(error.what()).find("model.layers.3.mlp.up_proj"), std::string::npos);
  }
}

// The quadratic form is the mean squared difference of the outputs.
TEST(AwqSearch, GroupLossIsTheOutputError) {
  const auto backend = make_backend({"cpu", DType::kF32, 2});
  const int64_t in = 160, tokens = 90;
  const Tensor x = random_inputs(tokens, in, 5), a = random_matrix(20, in, 6),
               b = random_matrix(7, in, 7);
  QuantizeSettings settings;
  settings.group_size = 32;
  settings.bits = 3;
  const LinearProblem problems[] = {problem_of(a, settings), problem_of(b, settings)};
  InputStatistics statistics;
  statistics.magnitudes = Tensor::zeros(DType::kF64, {in});
  backend->add_magnitudes(x, statistics.magnitudes);
  statistics.hessian = testing::hessian_of(x, *backend);
  const Tensor s = awq_scales(mean_magnitudes(statistics), 0.35);
  const double loss = group_loss(problems, statistics, *backend)(s.view().reshaped({1, in}))[0];

  double sum = 0;
  for (const LinearProblem& problem : problems) {
    Tensor trial = clone(problem.weight);
    multiply_columns(trial, s, *backend);
    LinearProblem scaled = problem;
    scaled.weight = trial;
    scaled.settings.algorithm = "rtn";
    const QuantizeResult result =
        std::move(find_quantizer("rtn").quantize({&scaled, 1}, nullptr, *backend)[0]);
    Tensor w_hat(DType::kF64, trial.shape());
    backend->dequantize(result.linear, w_hat);
    Values e = to_values(w_hat);
    for (size_t i = 0; i < e.size(); ++i)
      e[i] = to_values(problem.weight)[i] - e[i] / s.as<double>()[static_cast<int64_t>(i) % in];
    for (double y : naive_matmul_bt(to_values(x), e, tokens, problem.weight.rows(), in))
      sum += y * y;
  }
  EXPECT_NEAR(loss, sum / (tokens * 27), 1e-9 * loss);
}

TEST(AwqFold, StoredValueTimesEffectiveScaleIsTheValue) {
  Values given = {0.3, -1.7, 0, 2.5e-3, 117};
  const Tensor norm = vector_of(given, DType::kBF16), s = vector_of({3, 0.7, 5, 1.1, 13});
  const Tensor folded = fold_into(norm, 0, false, s);
  EXPECT_EQ(folded.dtype(), DType::kBF16);
  given = to_values(norm);
  const Values after = to_values(folded), effective = to_values(s);
  for (size_t i = 0; i < given.size(); ++i)
    EXPECT_NEAR(after[i] * effective[i], given[i], 1e-15 * std::abs(given[i]));
  EXPECT_EQ(effective[2], 1) << "a zero weight keeps s = 1";
  EXPECT_NEAR(effective[0], 3, 3 * 0x1p-8);
  EXPECT_NE(effective[0], 3) << "0.1 is no bf16 number";
}

TEST(AwqFold, OffsetOneFoldsOnePlusWeight) {
  // 1 + 0.5 = 1.5; / 2 = 0.75, stored as -0.25. 1 - 1 = 0 keeps its weight and s = 1.
  const Tensor norm = vector_of({0.5, -1, 1}, DType::kBF16), s = vector_of({2, 4, 0.5});
  EXPECT_EQ(to_values(fold_into(norm, 1, false, s)), (Values{-0.25, -1, 3}));
  EXPECT_EQ(to_values(s), (Values{2, 1, 0.5}));
}

TEST(AwqFold, AValueThatWouldVanishStays) {
  const Tensor norm = vector_of({0x1p-14}, DType::kF16), s = vector_of({0x1p20});
  EXPECT_EQ(to_values(fold_into(norm, 0, false, s)), (Values{0x1p-14}));
  EXPECT_EQ(to_values(s), (Values{1}));
}

TEST(AwqFold, AZeroBiasTakesAnyScale) {
  const Tensor bias = vector_of({0, 3}, DType::kF32), s = vector_of({7, 1.5});
  EXPECT_EQ(to_values(fold_into(bias, 0, true, s)), (Values{0, 2}));
  EXPECT_EQ(to_values(s), (Values{7, 1.5}));
}

// A router sees the folded norm's output: logits before and after are equal.
TEST(AwqFold, RouterIsCompensated) {
  const auto backend = make_backend({"cpu", DType::kF32, 1});
  const Values normed = random_values(6 * 8, 1);  // before the norm's weight
  for (const double offset : {0.0, 1.0}) {
    const Tensor norm = to_tensor(DType::kBF16, {8}, random_values(8, 2)),
                 s = vector_of({1, 2, 3, 4, 5, 0.5, 0.25, 0.1});
    const Tensor router = to_tensor(DType::kF32, {5, 8}, random_values(5 * 8, 3));
    const auto logits = [&](const Tensor& weight, const Tensor& consumer) {
      Values x = normed;
      for (size_t i = 0; i < x.size(); ++i) x[i] *= offset + to_values(weight)[i % 8];
      return naive_matmul_bt(x, to_values(consumer), 6, 5, 8);
    };
    const Values before = logits(norm, router);
    const Tensor folded = fold_into(norm, offset, false, s);
    const Tensor compensated = scaled_consumer(router, s, *backend);
    EXPECT_LT(max_difference(before, logits(folded, compensated)), 1e-6 * max_magnitude(before));
    EXPECT_GT(max_difference(before, logits(folded, router)), 1e-2);
  }
}

TEST(AwqFold, HessianOfTheScaledInput) {
  const auto backend = make_backend({"cpu", DType::kF32, 1});
  const int64_t n = 200;  // two tiles, the second a short one
  const Tensor x = random_inputs(50, n, 8), scaled = clone(x);
  Values s = random_values(n, 9);
  for (double& value : s) value = std::exp(value);
  for (int64_t i = 0; i < x.elements(); ++i) scaled.as<double>()[i] /= s[i % n];
  const Hessian hessian = testing::hessian_of(x, *backend),
                want = testing::hessian_of(scaled, *backend);
  unscale_hessian(hessian.sum, vector_of(s));
  EXPECT_LT(max_difference(to_values(hessian.sum), to_values(want.sum)),
            1e-12 * max_magnitude(to_values(want.sum)));
}

TEST(AwqQuantizer, SaysWhatItDid) {
  const auto backend = make_backend({"cpu", DType::kF32, 1});
  const Tensor w = random_matrix(12, 64, 3);
  const Hessian hessian = testing::hessian_of(random_inputs(100, 64, 4), *backend);
  QuantizeSettings settings;
  settings.group_size = 32;
  for (const char* name : {"awq", "awq+gptq"}) {
    settings.algorithm = name;
    const QuantizeResult result = quantize_one(problem_of(w, settings), hessian, *backend);
    EXPECT_EQ(result.record.method, name);
    settings.algorithm =
        name == std::string("awq") ? "rtn" : "gptq";  // on scaled weights it is just that
    EXPECT_EQ(bytes_of(result.linear.codes),
              bytes_of(quantize_one(problem_of(w, settings), hessian, *backend).linear.codes));
  }
  settings.algorithm = "awq+gptq";
  const Hessian nothing{64, 0, 0, Tensor()};
  const QuantizeResult fallen = quantize_one(problem_of(w, settings), nothing, *backend);
  EXPECT_EQ(fallen.record.method, "awq");
  EXPECT_EQ(fallen.record.note, "no tokens");
}

TEST(AwqQuantizer, RefusesAShorterLastGroup) {
  const auto backend = make_backend({"cpu", DType::kF32, 1});
  const Tensor w = random_matrix(4, 40, 3);
  QuantizeSettings settings;
  settings.algorithm = "awq";
  settings.group_size = 32;
  const LinearProblem problem = problem_of(w, settings);
  EXPECT_THROW(find_quantizer("awq").quantize({&problem, 1}, nullptr, *backend), Error);
}

}  // namespace
}  // namespace bitmill
