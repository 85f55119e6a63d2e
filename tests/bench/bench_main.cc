#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "backends/cpu/matmul.h"
#include "bench/machine.h"
#include "core/log.h"
#include "core/tensor.h"
#include "core/thread_pool.h"

namespace bitmill::bench {

namespace {
constexpr int kRuns = 20;

// Shortest of several runs of body(thread) on all threads, in seconds: other work on the machine
// only ever adds.
double best_seconds(ThreadPool& pool, int runs, const std::function<void(int)>& body) {
  double best = 1e9;
  for (int run = 0; run < runs; ++run) {
    const Stopwatch watch;
    pool.parallel_for(pool.size(), [&](int64_t item, int) { body(static_cast<int>(item)); });
    best = std::min(best, watch.seconds());
  }
  return best;
}

// One product per thread, all at once.
class Products {
 public:
  explicit Products(DType type) : pool_(threads()) {
    spec_.type = type;
    for (int i = 0; i < pool_.size(); ++i) {
      contexts_.push_back(std::make_unique<MatmulContext>());
      a_.push_back(Tensor::zeros(type, {kSize, kSize}));
      b_.push_back(Tensor::zeros(type, {kSize, kSize}));
      c_.push_back(Tensor::zeros(DType::kF32, {kSize, kSize}));
    }
  }

  double rate(double flop) {
    const double product = 2.0 * kSize * kSize * kSize * pool_.size();
    const auto repeats = std::max<int64_t>(1, std::llround(flop / product));
    const double seconds = best_seconds(pool_, 1, [&](int i) {
      for (int64_t r = 0; r < repeats; ++r)
        contexts_[i]->run(spec_, a_[i].data(), b_[i].data(), nullptr, c_[i].as<float>());
    });
    return product * static_cast<double>(repeats) / seconds;
  }

 private:
  static constexpr int64_t kSize = 512;
  MatmulSpec spec_{.m = kSize,
                   .n = kSize,
                   .k = kSize,
                   .lda = kSize,
                   .ldb = kSize,
                   .ldc = kSize,
                   .transpose_b = true};
  ThreadPool pool_;
  std::vector<std::unique_ptr<MatmulContext>> contexts_;
  std::vector<Tensor> a_, b_, c_;
};

double measure_copy() {
  constexpr int64_t kBytes = 64 << 20;
  ThreadPool pool(threads());
  std::vector<Tensor> from, to;
  for (int i = 0; i < pool.size(); ++i) {
    from.push_back(Tensor::zeros(DType::kU8, {kBytes}));
    to.push_back(Tensor::zeros(DType::kU8, {kBytes}));
  }
  const double seconds = best_seconds(pool, kRuns, [&](int i) {
    std::memcpy(to[i].data(), from[i].data(), static_cast<size_t>(kBytes));
  });
  return 2.0 * kBytes * pool.size() / seconds;
}
// Best of kRuns, each of some milliseconds.
double best_matmul_rate(DType type) {
  double best = 0;
  for (int run = 0; run < kRuns; ++run) best = std::max(best, matmul_rate(type, 4e9));
  return best;
}
}  // namespace

int threads() {
  static const int count = available_cpus();
  return count;
}

double matmul_rate(DType type, double flop) {
  static Products single(DType::kF32), half(DType::kBF16);
  return (type == DType::kBF16 ? half : single).rate(flop);
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
  for (const auto& [name, type] : {std::pair{"bf16", DType::kBF16}, std::pair{"fp32", DType::kF32}})
    benchmark::AddCustomContext(fmt::format("matmul {}", name),
                                fmt::format("{:.0f} GFLOP/s", bench::best_matmul_rate(type) / 1e9));
  benchmark::AddCustomContext("copy", fmt::format("{:.1f} GB/s", bench::copy_rate() / 1e9));
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
