// The linear layer of every backend against the triple loop.
#include "conformance/backend_test.h"

namespace bitmill::testing {
namespace {

class Linear : public BackendTest {
 protected:
  struct Extras {
    bool bias = false;
    bool residual = false;
    DType residual_type = DType::kF32;
    bool in_place = false;
  };

  void check(int64_t tokens, int64_t in, int64_t out, Extras extras) {
    const Values x = random(tokens * in, 1), w = random(out * in, 2);
    const Values bias = rounded(random_values(out, 3), DType::kF32);
    const Values residual = rounded(random_values(tokens * out, 4), extras.residual_type);
    Values expected = naive_matmul_bt(x, w, tokens, out, in);
    for (int64_t i = 0; i < tokens * out; ++i)
      expected[i] += (extras.bias ? bias[i % out] : 0) + (extras.residual ? residual[i] : 0);

    Tensor xs = up(compute(), {tokens, in}, x), ws = up(compute(), {out, in}, w);
    Tensor b = up(DType::kF32, {out}, bias), r = up(extras.residual_type, {tokens, out}, residual);
    auto prepared = backend().prepare_linear(ws);
    EXPECT_EQ(prepared->out(), out);
    EXPECT_EQ(prepared->in(), in);
    EXPECT_GE(prepared->bytes(), ws.bytes());
    ws.reset();  // the prepared weight stands alone
    Tensor fresh = extras.in_place ? Tensor() : backend().allocate(DType::kF32, {tokens, out});
    Tensor& target = extras.in_place ? r : fresh;
    backend().linear(xs, *prepared, extras.bias ? b.view() : TensorView{},
                     extras.residual ? r.view() : TensorView{}, target);
    EXPECT_LE(max_difference(down(std::move(target)), expected),
              tolerance(in, max_magnitude(x) * max_magnitude(w)))
        << tokens << " x " << in << " -> " << out;
  }
};
BITMILL_EVERY_BACKEND(Linear);

TEST_P(Linear, HandChecked) {
  // [1 2; 3 4] times [1 0; 1 1; 0 -1]^T, bias 10, residual 100
  Tensor x = up(compute(), {2, 2}, {1, 2, 3, 4}), w = up(compute(), {3, 2}, {1, 0, 1, 1, 0, -1});
  Tensor bias = up(DType::kF32, {3}, {10, 10, 10}),
         residual = up(DType::kF32, {2, 3}, Values(6, 100));
  Tensor out = backend().allocate(DType::kF32, {2, 3});
  backend().linear(x, *backend().prepare_linear(w), bias, residual, out);
  EXPECT_EQ(down(std::move(out)), (Values{111, 113, 108, 113, 117, 106}));
}

TEST_P(Linear, ShapesAroundTileEdges) {
  check(1, 1, 1, {});
  check(1, 3, 1, {});
  check(1, 300, 1500, {});    // one token, two column tiles
  check(257, 65, 33, {});     // one row beyond a tile
  check(300, 384, 1025, {});  // one output beyond a tile
  check(2, 1, 130, {});
}

// A backend may add up a long input slice by slice.
TEST_P(Linear, InputsWiderThanASlice) {
  check(33, 2048, 17, {});
  check(33, 2049, 17, {});  // the second slice is one column
  check(31, 2080, 48, {.bias = true});
  check(40, 4130, 80, {.residual = true});
  check(19, 6145, 33, {.bias = true, .residual = true, .in_place = true});
}

TEST_P(Linear, BiasAndResidual) {
  check(270, 70, 90, {.bias = true});
  check(270, 70, 90, {.residual = true});
  check(270, 70, 90, {.bias = true, .residual = true, .residual_type = DType::kBF16});
  check(270, 70, 1100, {.bias = true, .residual = true, .in_place = true});
  check(1, 5, 1, {.bias = true, .residual = true, .in_place = true});
}

// The two linears and the activation apart are the definition.
TEST_P(Linear, GatedPair) {
  const int64_t tokens = 131, in = 70;
  for (const int64_t n : {7, 1030})
    for (const bool biased : {false, true}) {
      const Values bias_values = rounded(random_values(n, 5), DType::kF32);
      const Tensor x = up(compute(), {tokens, in}, random(tokens * in, 6));
      const auto gate = backend().prepare_linear(up(compute(), {n, in}, random(n * in, 7)));
      const auto second = backend().prepare_linear(up(compute(), {n, in}, random(n * in, 8)));
      const Tensor bias = up(DType::kF32, {n}, bias_values);
      const TensorView given = biased ? bias.view() : TensorView{};
      Tensor g = backend().allocate(DType::kF32, {tokens, n}), u = backend().allocate(DType::kF32, {tokens, n});
      Tensor want = backend().allocate(compute(), {tokens, n}), found = backend().allocate(compute(), {tokens, n});
      backend().linear(x, *gate, given, {}, g);
      backend().linear(x, *second, {}, {}, u);
      backend().gated_activation(g, u, Activation::kGeluTanh, want);
      backend().gated_linear(x, *gate, given, *second, {}, Activation::kGeluTanh, found);
      const double size = max_magnitude(down(std::move(g))) * max_magnitude(down(std::move(u)));
      EXPECT_LE(max_difference(down(std::move(found)), down(std::move(want))), tolerance(in, size, compute()))
          << n << (biased ? " with bias" : "");
    }
}

TEST_P(Linear, WeightIsRoundedToCompute) {
  const double w = 1 + 0x1p-12;  // not a bf16
  Tensor x = up(compute(), {1, 1}, {1}), ws = up(DType::kF32, {1, 1}, {w});
  Tensor out = backend().allocate(DType::kF32, {1, 1});
  backend().linear(x, *backend().prepare_linear(ws), {}, {}, out);
  EXPECT_EQ(down(std::move(out))[0], compute() == DType::kBF16 ? 1.0 : w);
}

TEST_P(Linear, NoTokens) {
  Tensor x = backend().allocate(compute(), {0, 4}), w = up(compute(), {3, 4}, Values(12, 1.0));
  Tensor out = backend().allocate(DType::kF32, {0, 3});
  EXPECT_NO_THROW(backend().linear(x, *backend().prepare_linear(w), {}, {}, out));
}

}  // namespace
}  // namespace bitmill::testing
