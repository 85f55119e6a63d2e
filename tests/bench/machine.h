// This machine's own rates, measured in the same process: every rate is also shown as a share of
// them, which says more than GFLOP/s on a machine that nobody knows.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>

#include "core/dtype.h"
#include "core/log.h"

namespace bitmill::bench {

// Threads of all benchmarks: the CPUs of the affinity mask.
int threads();
// FLOP/s of independent 512 x 512 x 512 products, one per thread, operands in cache: what the
// matmul library can give. Measures a few milliseconds, returns the fastest of all calls so far.
double matmul_rate(DType type);
// Bytes/s (read plus written) of copying 64 MiB per thread.
double copy_rate();

// Runs body() as the benchmark's iterations, `flop` each, and between them the machine's own
// products. Counters: "GFLOP/s" of the fastest iteration, "of_matmul" its share of the fastest
// product of `type` since the program began: other work on a shared machine slows both down at its
// own times, averages would compare that. prepare() comes before each iteration, untimed.
template <typename Body, typename Prepare>
void race(benchmark::State& state, double flop, DType type, const Body& body,
          const Prepare& prepare) {
  double best = 0;
  for (auto _ : state) {
    state.PauseTiming();
    matmul_rate(type);
    prepare();
    state.ResumeTiming();
    const Stopwatch watch;
    body();
    best = std::max(best, flop / watch.seconds());
  }
  state.counters["GFLOP/s"] = best / 1e9;
  state.counters["of_matmul"] = best / matmul_rate(type);
}
template <typename Body>
void race(benchmark::State& state, double flop, DType type, const Body& body) {
  race(state, flop, type, body, [] {});
}

// Counters "GB/s" and "of_copy" for `bytes` moved per iteration.
inline void count_bytes(benchmark::State& state, double bytes) {
  using Counter = benchmark::Counter;
  const auto iterations = static_cast<double>(state.iterations());
  state.counters["GB/s"] = Counter(bytes * iterations / 1e9, Counter::kIsRate);
  state.counters["of_copy"] = Counter(bytes * iterations / copy_rate(), Counter::kIsRate);
}

}  // namespace bitmill::bench
