// This machine's own rates, measured in the same process right before the benchmarks: every rate is
// also shown as a share of them, which says more than GFLOP/s on a machine that nobody knows.
#pragma once

#include <benchmark/benchmark.h>

#include "core/dtype.h"

namespace bitmill::bench {

// Threads of all benchmarks: the CPUs of the affinity mask.
int threads();
// FLOP/s of independent 512 x 512 x 512 products, one per thread, operands in cache: what the
// matmul library can give.
double matmul_rate(DType type);
// Bytes/s (read plus written) of copying 64 MiB per thread.
double copy_rate();

// Counters "GFLOP/s" and "of_matmul" for `flop` per iteration in `type`.
inline void count_flop(benchmark::State& state, double flop, DType type) {
  using Counter = benchmark::Counter;
  const auto iterations = static_cast<double>(state.iterations());
  state.counters["GFLOP/s"] = Counter(flop * iterations / 1e9, Counter::kIsRate);
  state.counters["of_matmul"] = Counter(flop * iterations / matmul_rate(type), Counter::kIsRate);
}
// Counters "GB/s" and "of_copy" for `bytes` moved per iteration.
inline void count_bytes(benchmark::State& state, double bytes) {
  using Counter = benchmark::Counter;
  const auto iterations = static_cast<double>(state.iterations());
  state.counters["GB/s"] = Counter(bytes * iterations / 1e9, Counter::kIsRate);
  state.counters["of_copy"] = Counter(bytes * iterations / copy_rate(), Counter::kIsRate);
}

}  // namespace bitmill::bench
