#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "backends/cpu/matmul.h"
#include "bench/machine.h"
#include "core/log.h"
#include "core/tensor.h"
#include "core/thread_pool.h"

namespace bitmill::bench {

namespace {
// Shortest of several runs of body(thread) on all threads, in seconds: other work on the machine
// only ever adds.
double best_seconds(ThreadPool& pool, const std::function<void(int)>& body) {
  constexpr int kRuns = 20;
  double best = 1e9;
  for (int run = 0; run < kRuns; ++run) {
    const Stopwatch watch;
    pool.parallel_for(pool.size(), [&](int64_t item, int) { body(static_cast<int>(item)); });
    best = std::min(best, watch.seconds());
  }
  return best;
}

double measure_matmul(DType type) {
  constexpr int64_t kSize = 512, kRepeats = 16;
  ThreadPool pool(threads());
  std::vector<std::unique_ptr<MatmulContext>> contexts;
  std::vector<Tensor> a, b, c;
  for (int i = 0; i < pool.size(); ++i) {
    contexts.push_back(std::make_unique<MatmulContext>());
    a.push_back(Tensor::zeros(type, {kSize, kSize}));
    b.push_back(Tensor::zeros(type, {kSize, kSize}));
    c.push_back(Tensor::zeros(DType::kF32, {kSize, kSize}));
  }
  const MatmulSpec spec{.type = type,
                        .m = kSize,
                        .n = kSize,
                        .k = kSize,
                        .lda = kSize,
                        .ldb = kSize,
                        .ldc = kSize,
                        .transpose_b = true};
  const double seconds = best_seconds(pool, [&](int i) {
    for (int64_t r = 0; r < kRepeats; ++r)
      contexts[i]->run(spec, a[i].data(), b[i].data(), nullptr, c[i].as<float>());
  });
  return static_cast<double>(pool.size()) * kRepeats * 2 * kSize * kSize * kSize / seconds;
}

double measure_copy() {
  constexpr int64_t kBytes = 64 << 20;
  ThreadPool pool(threads());
  std::vector<Tensor> from, to;
  for (int i = 0; i < pool.size(); ++i) {
    from.push_back(Tensor::zeros(DType::kU8, {kBytes}));
    to.push_back(Tensor::zeros(DType::kU8, {kBytes}));
  }
  const double seconds = best_seconds(
      pool, [&](int i) { std::memcpy(to[i].data(), from[i].data(), static_cast<size_t>(kBytes)); });
  return 2.0 * kBytes * pool.size() / seconds;
}
}  // namespace

int threads() {
  static const int count = available_cpus();
  return count;
}

double matmul_rate(DType type) {
  static const double single = measure_matmul(DType::kF32);
  if (type != DType::kBF16) return single;
  static const double half = measure_matmul(DType::kBF16);
  return half;
}

double copy_rate() {
  static const double rate = measure_copy();
  return rate;
}

}  // namespace bitmill::bench

int main(int argc, char** argv) {
  using namespace bitmill;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("threads", std::to_string(bench::threads()));
  benchmark::AddCustomContext(
      "matmul bf16", fmt::format("{:.0f} GFLOP/s", bench::matmul_rate(DType::kBF16) / 1e9));
  benchmark::AddCustomContext("matmul fp32",
                              fmt::format("{:.0f} GFLOP/s", bench::matmul_rate(DType::kF32) / 1e9));
  benchmark::AddCustomContext("copy", fmt::format("{:.1f} GB/s", bench::copy_rate() / 1e9));
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
