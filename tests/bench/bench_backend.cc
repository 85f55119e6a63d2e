// The forward pass and the Hessian of the CPU backend at the sizes of a 60 M parameter model
// (hidden 384, 6 heads) and of a block of a larger one. A micro-batch is 2048 tokens.
#include "backends/backend.h"
#include "bench/machine.h"

namespace bitmill::bench {
namespace {

constexpr int64_t kTokens = 2048;

std::unique_ptr<Backend> open(DType type) {
  return make_backend({.kind = "cpu", .compute = type, .threads = threads()});
}

// Small varied values: products of denormals or of all zeros may run at another speed.
Tensor filled(DType type, Shape shape) {
  Tensor single(DType::kF32, shape), out(type, shape);
  for (int64_t i = 0; i < single.elements(); ++i)
    single.as<float>()[i] = static_cast<float>(i * 2654435761u % 2000) / 1000.0f - 1.0f;
  convert(single, out);
  return out;
}

void linear(benchmark::State& state, DType type, bool residual) {
  const int64_t in = state.range(0), out = state.range(1);
  const auto backend = open(type);
  const Tensor x = filled(type, {kTokens, in}), y = filled(DType::kF32, {kTokens, out});
  const auto weight = backend->prepare_linear(filled(type, {out, in}));
  race(state, 2.0 * kTokens * static_cast<double>(in * out), type,
       [&] { backend->linear(x, *weight, {}, residual ? y.view() : TensorView{}, y); });
}
#define LINEAR_SIZES \
  Args({384, 384})->Args({384, 1024})->Args({1024, 384})->Args({2048, 2048})->Args({4096, 4096})
BENCHMARK_CAPTURE(linear, bf16, DType::kBF16, false)->LINEAR_SIZES->UseRealTime();
BENCHMARK_CAPTURE(linear, bf16_residual, DType::kBF16, true)->LINEAR_SIZES->UseRealTime();
BENCHMARK_CAPTURE(linear, fp32, DType::kF32, false)->LINEAR_SIZES->UseRealTime();

// FLOP counted: n^2 tokens, the lower triangle.
void hessian_update(benchmark::State& state, DType type) {
  const int64_t n = state.range(0);
  const auto backend = open(type);
  const Tensor x = filled(type, {kTokens, n});
  const Tensor h = Tensor::zeros(type == DType::kF64 ? type : DType::kF32, {hessian_elements(n)});
  race(state, static_cast<double>(kTokens * n * n), type, [&] { backend->hessian_update(x, h); });
}
BENCHMARK_CAPTURE(hessian_update, bf16, DType::kBF16)
    ->Arg(384)
    ->Arg(1024)
    ->Arg(2048)
    ->Arg(4096)
    ->UseRealTime();
BENCHMARK_CAPTURE(hessian_update, fp32, DType::kF32)
    ->Arg(384)
    ->Arg(1024)
    ->Arg(2048)
    ->Arg(4096)
    ->UseRealTime();

// gptaq's products of activations and what they lost, the whole square.
void cross_update(benchmark::State& state, DType type) {
  const int64_t n = state.range(0);
  const auto backend = open(type);
  const Tensor a = filled(type, {kTokens, n}), b = filled(type, {kTokens, n});
  const Tensor m = Tensor::zeros(DType::kF32, {n, n});
  race(state, static_cast<double>(2 * kTokens * n * n), type,
       [&] { backend->cross_update(a, b, m); });
}
BENCHMARK_CAPTURE(cross_update, bf16, DType::kBF16)->Arg(384)->Arg(1024)->Arg(2048)->UseRealTime();
BENCHMARK_CAPTURE(cross_update, fp32, DType::kF32)->Arg(384)->Arg(1024)->Arg(2048)->UseRealTime();

void difference(benchmark::State& state) {
  const int64_t n = state.range(0);
  const auto backend = open(DType::kBF16);
  const Tensor a = filled(DType::kBF16, {kTokens, n}), out(DType::kBF16, {kTokens, n});
  for (auto _ : state) backend->difference(a, a, out);
  count_bytes(state, 3.0 * static_cast<double>(a.bytes()));
}
BENCHMARK(difference)->Arg(384)->Arg(1024)->UseRealTime();

void hessian_gather(benchmark::State& state) {
  const int64_t n = state.range(0);
  const auto backend = open(DType::kF32);
  const Tensor h = filled(DType::kF32, {hessian_elements(n)}), out(DType::kF32, {n, n});
  const Tensor diagonal = filled(DType::kF32, {n});
  Tensor order(DType::kI32, {n});
  for (int64_t i = 0; i < n; ++i) order.as<int32_t>()[i] = static_cast<int32_t>(i * 5 % n);
  for (auto _ : state) backend->hessian_gather(h, order, 0.5, diagonal, out);
  count_bytes(state, 4.0 * static_cast<double>(n * n));  // half a matrix read, half written
}
BENCHMARK(hessian_gather)->Arg(384)->Arg(1024)->Arg(4096)->UseRealTime();

// FLOP counted: both products below the diagonal.
void attention(benchmark::State& state, DType type) {
  const int64_t length = state.range(0), sequences = kTokens / length;
  const AttentionShape shape{.sequences = sequences,
                             .length = length,
                             .heads = 6,
                             .kv_heads = 2,
                             .head_dim = 64,
                             .scale = 0.125f};
  const auto backend = open(type);
  const Tensor q = filled(DType::kF32, {kTokens, 384}), k = filled(DType::kF32, {kTokens, 128});
  const Tensor v = filled(DType::kF32, {kTokens, 128}), out(type, {kTokens, 384});
  race(state, 2.0 * static_cast<double>(kTokens * length * 384), type,
       [&] { backend->attention(q, k, v, shape, out); });
}
BENCHMARK_CAPTURE(attention, bf16, DType::kBF16)->Arg(512)->Arg(2048)->UseRealTime();
BENCHMARK_CAPTURE(attention, fp32, DType::kF32)->Arg(512)->Arg(2048)->UseRealTime();

void rms_norm(benchmark::State& state) {
  const int64_t n = state.range(0);
  const auto backend = open(DType::kBF16);
  const Tensor x = filled(DType::kF32, {kTokens, n}), weight = filled(DType::kF32, {n});
  const Tensor out(DType::kBF16, {kTokens, n});
  for (auto _ : state) backend->rms_norm(x, weight, 1e-5f, out);
  count_bytes(state, static_cast<double>(x.bytes() + out.bytes()));
}
BENCHMARK(rms_norm)->Arg(384)->Arg(4096)->UseRealTime();

void rope(benchmark::State& state) {
  const int64_t heads = state.range(0);
  const auto backend = open(DType::kBF16);
  const Tensor x = Tensor::zeros(DType::kF32, {kTokens, heads * 64}),
               table = filled(DType::kF32, {512, 64});
  for (auto _ : state) backend->rope(x, heads, 64, table);
  count_bytes(state, 2.0 * static_cast<double>(x.bytes()));
}
BENCHMARK(rope)->Arg(6)->Arg(64)->UseRealTime();

void gated_silu(benchmark::State& state) {
  const int64_t n = state.range(0);
  const auto backend = open(DType::kBF16);
  const Tensor gate = filled(DType::kF32, {kTokens, n}), up = filled(DType::kF32, {kTokens, n});
  const Tensor out(DType::kBF16, {kTokens, n});
  for (auto _ : state) backend->gated_activation(gate, up, Activation::kSilu, out);
  count_bytes(state, static_cast<double>(gate.bytes() + up.bytes() + out.bytes()));
}
BENCHMARK(gated_silu)->Arg(1024)->Arg(11008)->UseRealTime();

void token_nll(benchmark::State& state) {
  const int64_t vocab = state.range(0);
  const auto backend = open(DType::kBF16);
  const Tensor logits = filled(DType::kF32, {256, vocab}),
               targets = Tensor::zeros(DType::kI32, {256});
  const Tensor nll(DType::kF64, {256});
  for (auto _ : state) backend->token_nll(logits, targets, nll);
  count_bytes(state, static_cast<double>(logits.bytes()));
}
BENCHMARK(token_nll)->Arg(4096)->Arg(151936)->UseRealTime();

void first_non_finite(benchmark::State& state, DType type) {
  const auto backend = open(DType::kBF16);
  const Tensor x = filled(type, {1 << 24});
  for (auto _ : state) benchmark::DoNotOptimize(backend->first_non_finite(x));
  count_bytes(state, static_cast<double>(x.bytes()));
}
BENCHMARK_CAPTURE(first_non_finite, bf16, DType::kBF16)->UseRealTime();
BENCHMARK_CAPTURE(first_non_finite, fp32, DType::kF32)->UseRealTime();

}  // namespace
}  // namespace bitmill::bench
