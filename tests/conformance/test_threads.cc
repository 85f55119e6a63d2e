// Every op gives the same bytes with 1, 2 and 3 threads: sizes are chosen so that each has several
// work items and short last ones.
#include <cstring>

#include "conformance/backend_test.h"

namespace bitmill::testing {
namespace {

class Threads : public BackendTest {
 protected:
  // Runs `op`, which returns its result, with 1, 2 and 3 threads and compares bytes.
  template <typename Op>
  void same_bytes(Op op) {
    std::vector<char> first;
    for (int threads : {1, 2, 3}) {
      open(threads);
      Tensor result = op();
      backend().synchronize();
      const Tensor host = backend().download(std::move(result));
      const std::vector<char> bytes(host.as<char>(), host.as<char>() + host.bytes());
      if (threads == 1) first = bytes;
      EXPECT_EQ(first, bytes) << threads << " threads";
    }
  }
};
BITMILL_EVERY_BACKEND(Threads);

TEST_P(Threads, Linear) {
  const Values x = random(900 * 200, 1), w = random(1500 * 200, 2),
               residual = random(900 * 1500, 3);
  same_bytes([&] {
    Tensor xs = up(compute(), {900, 200}, x), ws = up(compute(), {1500, 200}, w);
    Tensor out = up(DType::kF32, {900, 1500}, residual);
    backend().linear(xs, *backend().prepare_linear(ws), {}, out, out);
    return out;
  });
}

TEST_P(Threads, Hessian) {
  const Values x = random(500 * 450, 4);
  same_bytes([&] {
    Tensor xs = up(compute(), {500, 450}, x);
    Tensor h = backend().upload(Tensor::zeros(DType::kF32, {hessian_elements(450)}));
    backend().hessian_update(xs, h);
    backend().hessian_update(xs, h);
    return h;
  });
}

TEST_P(Threads, HessianInDouble) {
  const Values x = random_values(200 * 450, 5);
  same_bytes([&] {
    Tensor xs = up(DType::kF64, {200, 450}, x);
    Tensor h = backend().upload(Tensor::zeros(DType::kF64, {hessian_elements(450)}));
    backend().hessian_update(xs, h);
    return h;
  });
}

TEST_P(Threads, Attention) {
  const AttentionShape shape{
      .sequences = 3, .length = 150, .heads = 6, .kv_heads = 2, .head_dim = 40, .scale = 0.16f};
  const Values q = random(450 * 240, 6), k = random(450 * 80, 7), v = random(450 * 80, 8);
  same_bytes([&] {
    Tensor qs = up(DType::kF32, {450, 240}, q), ks = up(DType::kF32, {450, 80}, k);
    Tensor vs = up(DType::kF32, {450, 80}, v), out = backend().allocate(compute(), {450, 240});
    backend().attention(qs, ks, vs, shape, out);
    return out;
  });
}

TEST_P(Threads, GatedLinear) {
  const Values x = random(300 * 90, 11), w = random(1100 * 90, 12);
  same_bytes([&] {
    Tensor xs = up(compute(), {300, 90}, x), out = backend().allocate(compute(), {300, 1100});
    const auto weight = backend().prepare_linear(up(compute(), {1100, 90}, w));
    backend().gated_linear(xs, *weight, {}, *weight, {}, Activation::kSilu, out);
    return out;
  });
}

TEST_P(Threads, Rows) {
  const Values x = random(700 * 333, 9), weight = random(333, 10);
  same_bytes([&] {
    Tensor xs = up(DType::kF32, {700, 333}, x), w = up(DType::kF32, {333}, weight);
    Tensor out = backend().allocate(compute(), {700, 333});
    backend().rms_norm(xs, w, 1e-5f, out);
    return out;
  });
  same_bytes([&] {
    Tensor gate = up(DType::kF32, {700, 333}, x), out = backend().allocate(compute(), {700, 333});
    backend().gated_activation(gate, gate, Activation::kSilu, out);
    return out;
  });
  same_bytes([&] {
    Tensor logits = up(DType::kF32, {700, 333}, x),
           targets = up(DType::kI32, {700}, Values(700, 5));
    Tensor nll = backend().allocate(DType::kF64, {700});
    backend().token_nll(logits, targets, nll);
    return nll;
  });
}

}  // namespace
}  // namespace bitmill::testing
