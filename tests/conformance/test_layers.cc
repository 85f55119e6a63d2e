// Elementwise and row-wise ops of every backend against their definitions.
#include <cmath>
#include <limits>

#include "conformance/backend_test.h"

namespace bitmill::testing {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

class Layers : public BackendTest {};
BITMILL_EVERY_BACKEND(Layers);

TEST_P(Layers, ConvertRoundsHalfToEven) {
  // bf16 has 8 significant bits: 1 + 2^-8 lies half way and goes down to even, 1 + 3 * 2^-8 goes
  // up.
  Tensor in = up(DType::kF32, {4}, {1 + 0x1p-8, 1 + 3 * 0x1p-8, -2.5, kNaN});
  Tensor out = backend().allocate(DType::kBF16, {4});
  backend().convert(in, out);
  const Values values = down(std::move(out));
  EXPECT_EQ(values[0], 1.0);
  EXPECT_EQ(values[1], 1 + 0x1p-6);
  EXPECT_EQ(values[2], -2.5);
  EXPECT_TRUE(std::isnan(values[3]));
}

TEST_P(Layers, ConvertBetweenAllFloatTypes) {
  const int64_t n = 100'003;
  const std::vector<DType> types = {DType::kF16, DType::kBF16, DType::kF32, DType::kF64};
  for (DType from : types)
    for (DType to : types) {
      const Values source = rounded(random_values(n, 1), from);
      Tensor in = up(from, {n}, source), out = backend().allocate(to, {n});
      backend().convert(in, out);
      EXPECT_EQ(max_difference(down(std::move(out)), rounded(source, to)), 0)
          << dtype_name(from) << " to " << dtype_name(to);
    }
}

TEST_P(Layers, EmbedCopiesRows) {
  for (DType type : {DType::kF16, DType::kBF16, DType::kF32}) {
    const Values table = rounded(random_values(5 * 67, 2), type);
    Tensor rows = up(type, {5, 67}, table), ids = up(DType::kI32, {4}, {4, 0, 4, 2});
    Tensor out = backend().allocate(compute(), {4, 67});
    backend().embed(ids, rows, out);
    Values expected;
    for (int id : {4, 0, 4, 2})
      expected.insert(expected.end(), table.begin() + id * 67, table.begin() + id * 67 + 67);
    EXPECT_EQ(max_difference(down(std::move(out)), rounded(expected, compute())), 0);
  }
}

TEST_P(Layers, NormOfAHandCheckedRow) {
  // mean of squares (9 + 16) / 2 = 12.5; with eps 3.5 the root is 4
  Tensor x = up(DType::kF32, {1, 2}, {3, 4}), weight = up(DType::kF32, {2}, {2, 1});
  Tensor out = backend().allocate(DType::kF32, {1, 2});
  backend().rms_norm(x, weight, 3.5f, out);
  const Values values = down(std::move(out));
  EXPECT_NEAR(values[0], 1.5, 4 * kSingle);
  EXPECT_NEAR(values[1], 1.0, 4 * kSingle);
}

TEST_P(Layers, NormMatchesDefinition) {
  const int64_t tokens = 301, n = 421;
  for (DType in : {DType::kF32, DType::kBF16})
    for (DType out_type : {DType::kF32, compute()}) {
      const Values x = rounded(random_values(tokens * n, 3), in),
                   weight = rounded(random_values(n, 4), DType::kF32);
      Tensor xs = up(in, {tokens, n}, x), w = up(DType::kF32, {n}, weight);
      Tensor out = backend().allocate(out_type, {tokens, n});
      backend().rms_norm(xs, w, 1e-5f, out);
      const Values expected = naive_rms_norm(x, weight, 1e-5f, tokens, n);
      EXPECT_LE(max_difference(down(std::move(out)), expected),
                tolerance(8, max_magnitude(expected), out_type));
    }
}

TEST_P(Layers, NormInPlace) {
  const Values x = rounded(random_values(3 * 50, 5), DType::kF32), weight(50, 1.0);
  Tensor xs = up(DType::kF32, {3, 50}, x), w = up(DType::kF32, {50}, weight);
  backend().rms_norm(xs, w, 1e-6f, xs);
  const Values expected = naive_rms_norm(x, weight, 1e-6f, 3, 50);
  EXPECT_LE(max_difference(down(std::move(xs)), expected), tolerance(8, max_magnitude(expected)));
}

TEST_P(Layers, RopeTurnsByTheTable) {
  // One head of 4, one pair turned by 90 degrees at position 1: (a, b) -> (-b, a); dims 2 and 3
  // pass.
  Tensor x = up(DType::kF32, {2, 4}, {1, 2, 3, 4, 5, 6, 7, 8});
  Tensor table = up(DType::kF32, {2, 2}, {1, 0, 0, 1});
  backend().rope(x, 1, 4, table);
  EXPECT_EQ(down(std::move(x)), (Values{1, 2, 3, 4, -6, 5, 7, 8}));
}

TEST_P(Layers, RopeMatchesDefinition) {
  const int64_t sequences = 3, length = 37, heads = 5, head_dim = 22;
  for (int64_t pairs : {11, 7}) {
    const Values x = rounded(random_values(sequences * length * heads * head_dim, 6), DType::kF32);
    const Values table = rounded(random_values(length * 2 * pairs, 7), DType::kF32);
    Tensor xs = up(DType::kF32, {sequences * length, heads * head_dim}, x);
    Tensor t = up(DType::kF32, {length, 2 * pairs}, table);
    backend().rope(xs, heads, head_dim, t);
    const Values expected =
        naive_rope(x, table, sequences * length, heads, head_dim, length, pairs);
    EXPECT_LE(max_difference(down(std::move(xs)), expected),
              tolerance(2, 2 * max_magnitude(expected)));
  }
}

TEST_P(Layers, GatedActivations) {
  const int64_t tokens = 301, n = 231;
  Values gate = rounded(random_values(tokens * n, 8, 6), DType::kF32);
  const Values up_values = rounded(random_values(tokens * n, 9), DType::kF32);
  gate[0] = 0, gate[1] = -200, gate[2] = 200, gate[3] = -1e30,
  gate[4] = 1e30;  // beyond the range of exp
  Tensor g = up(DType::kF32, {tokens, n}, gate), u = up(DType::kF32, {tokens, n}, up_values);
  const std::vector<std::pair<Activation, double (*)(double)>> activations = {
      {Activation::kSilu, naive_silu},
      {Activation::kGeluTanh, naive_gelu_tanh},
      {Activation::kRelu, naive_relu}};
  for (const auto& [activation, definition] : activations) {
    Tensor out = backend().allocate(compute(), {tokens, n});
    backend().gated_activation(g, u, activation, out);
    const Values found = down(std::move(out));
    double worst = 0;  // relative to the input: far left of zero the result is a tiny difference
    for (size_t i = 0; i < gate.size(); ++i) {
      const double expected = definition(gate[i]) * up_values[i];
      const double magnitude = std::abs(gate[i] * up_values[i]) + 1e-30;
      worst = std::max(worst, std::abs(found[i] - expected) / magnitude);
    }
    EXPECT_LE(worst, tolerance(2, 1.0, compute())) << static_cast<int>(activation);
  }
}

TEST_P(Layers, GatedActivationKeepsNaN) {
  Tensor g = up(DType::kF32, {1, 3}, {kNaN, 1, 1}), u = up(DType::kF32, {1, 3}, {1, kNaN, 1});
  Tensor out = backend().allocate(compute(), {1, 3});
  backend().gated_activation(g, u, Activation::kSilu, out);
  const Values found = down(std::move(out));
  EXPECT_TRUE(std::isnan(found[0]) && std::isnan(found[1]) && !std::isnan(found[2]));
}

TEST_P(Layers, TokenLoss) {
  const int64_t vocab = 1031;
  Values logits = rounded(random_values(4 * vocab, 10, 5), DType::kF32);
  std::fill(logits.begin() + 3 * vocab, logits.end(), 2.0);  // uniform: log(vocab)
  Tensor l = up(DType::kF32, {4, vocab}, logits),
         targets = up(DType::kI32, {4}, {0, -1, vocab - 1, 7});
  Tensor nll = backend().allocate(DType::kF64, {4});
  backend().token_nll(l, targets, nll);
  const Values found = down(std::move(nll)),
               expected = naive_token_nll(logits, {0, -1, vocab - 1, 7}, vocab);
  EXPECT_EQ(found[1], 0);
  EXPECT_NEAR(found[3], std::log(1031.0), 1e-6);
  EXPECT_LE(max_difference(found, expected), tolerance(2, max_magnitude(logits)));
}

TEST_P(Layers, FirstNonFinite) {
  const int64_t n = 200'001;
  for (DType type : {DType::kF16, DType::kBF16, DType::kF32, DType::kF64}) {
    Values values = random_values(n, 11);
    EXPECT_EQ(backend().first_non_finite(up(type, {n}, values)), -1);
    values[200'000] = -kInfinity;
    EXPECT_EQ(backend().first_non_finite(up(type, {n}, values)), 200'000);
    values[70'001] = kNaN;
    EXPECT_EQ(backend().first_non_finite(up(type, {n}, values)), 70'001);
    values[0] = kInfinity;
    EXPECT_EQ(backend().first_non_finite(up(type, {n}, values)), 0);
  }
}

}  // namespace
}  // namespace bitmill::testing
