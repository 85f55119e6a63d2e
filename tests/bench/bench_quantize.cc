// Benchmarks of the solve: factorization, column sweep, grids.
#include <numeric>
#include <random>

#include "backends/backend.h"
#include "bench/machine.h"

namespace bitmill::bench {
namespace {

std::unique_ptr<Backend> open() {
  return make_backend({.kind = "cpu", .compute = DType::kF32, .threads = threads()});
}

Tensor random_tensor(Shape shape, uint64_t seed) {
  std::mt19937_64 generator(seed);
  Tensor out(DType::kF32, shape);
  for (int64_t i = 0; i < out.elements(); ++i) {
    out.as<float>()[i] = static_cast<float>(static_cast<double>(generator() >> 11) * 0x1p-53 - 0.5);
  }
  return out;
}

// Diagonally dominant: positive definite without a long setup.
Tensor positive_matrix(int64_t n) {
  Tensor a = random_tensor({n, n}, 1);
  for (int64_t i = 0; i < n; ++i) a.as<float>()[i * (n + 1)] = static_cast<float>(n);
  return a;
}

void bench_factorize(benchmark::State& state) {
  const int64_t n = state.range(0);
  const std::unique_ptr<Backend> backend = open();
  const Tensor a = positive_matrix(n);
  Tensor work(DType::kF32, {n, n});
  const double size = static_cast<double>(n);
  race(
      state, size * size * size / 3, DType::kF32,
      [&] { benchmark::DoNotOptimize(backend->factorize(work).ok); }, [&] { convert(a, work); });
}
BENCHMARK(bench_factorize)
    ->Arg(1024)
    ->Arg(2048)
    ->Arg(4096)
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

// rows, columns, 1 for grids refitted inside the sweep.
void bench_sweep(benchmark::State& state) {
  const int64_t rows = state.range(0), n = state.range(1), groups = group_count(n, 128);
  const std::unique_ptr<Backend> backend = open();
  Tensor factor = positive_matrix(n);
  backend->factorize(factor);
  const Tensor weight = random_tensor({rows, n}, 2);
  Tensor scales(DType::kF32, {rows, groups}), zeros(DType::kF32, {rows, groups}),
      loss(DType::kF64, {rows});
  Tensor column_group(DType::kI32, {n}), order(DType::kI32, {n}), codes(DType::kU8, {rows, n});
  for (int64_t c = 0; c < n; ++c) column_group.as<int32_t>()[c] = static_cast<int32_t>(c / 128);
  for (int64_t c = 0; c < n; ++c) order.as<int32_t>()[c] = static_cast<int32_t>((c * 5 + 3) % n);
  SweepItem item;
  item.grid = {4, true, false, DType::kF16};
  backend->fit_grids(weight, item.grid, 128, {}, scales, zeros);
  item.weight = weight, item.scales = scales, item.zeros = zeros, item.column_group = column_group;
  item.codes = codes, item.row_loss = loss;
  item.refit_grids = state.range(2) != 0;
  item.group_size = 128;
  race(state, static_cast<double>(rows * n * n), DType::kF32, [&] {
    backend->sweep(factor, order, 128, {&item, 1});
  });
}
BENCHMARK(bench_sweep)
    ->Args({2048, 2048, 0})
    ->Args({1024, 384, 0})
    ->Args({4096, 1024, 0})
    ->Args({2048, 2048, 1})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

void bench_fit_grids(benchmark::State& state) {
  const std::unique_ptr<Backend> backend = open();
  const Tensor weight = random_tensor({2048, 2048}, 3);
  Tensor scales(DType::kF32, {2048, 16}), zeros(DType::kF32, {2048, 16});
  Tensor importance(DType::kF32, {2048}), noise(DType::kF32, {2048});
  std::fill_n(importance.as<float>(), 2048, 1.0F);
  std::fill_n(noise.as<float>(), 2048, 0.5F);
  const ColumnStatsView columns =
      state.range(0) == 2 ? ColumnStatsView{importance, noise} : ColumnStatsView{};
  const GridOptions options{4, false, state.range(0) == 1, DType::kF16};
  for (auto _ : state)
    benchmark::DoNotOptimize(backend->fit_grids(weight, options, 128, columns, scales, zeros));
  count_bytes(state, static_cast<double>(weight.bytes()));
}
// 0: range of the weights, 1: mse search, 2: range search with column statistics.
BENCHMARK(bench_fit_grids)->Arg(0)->Arg(1)->Arg(2)->UseRealTime()->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace bitmill::bench
