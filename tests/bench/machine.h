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
// FLOP/s of about `flop` of independent 512 x 512 x 512 products, every thread its own, operands in
// cache: what the matmul library can give right now.
double matmul_rate(DType type, double flop);
// Bytes/s (read plus written) of copying 64 MiB per thread.
double copy_rate();

// Runs body() as the benchmark's iterations, `flop` each, and before each the machine's own
// products of as many. Counters: "GFLOP/s" of the fastest iteration, "of_matmul" its share of the
// fastest products. Other work on a shared machine comes and goes: runs of equal length that take
// turns are hit alike, and the fastest are hit least. prepare() comes before each iteration,
// untimed.
template <typename Body, typename Prepare>
void race(benchmark::State& state, double flop, DType type, const Body& body,
          const Prepare& prepare) {
  double best = 0, machine = 0;
  for (auto _ : state) {
    state.PauseTiming();
    prepare();
    machine = std::max(machine, matmul_rate(type, flop));
    state.ResumeTiming();
    const Stopwatch watch;
    body();
    best = std::max(best, flop / watch.seconds());
  }
  state.counters["GFLOP/s"] = best / 1e9;
  state.counters["of_matmul"] = best / machine;
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
