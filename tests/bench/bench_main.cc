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

  // FLOP/s, best of this and all earlier calls.
  double rate() {
    constexpr int64_t kRepeats = 4;
    const double seconds = best_seconds(pool_, runs_, [&](int i) {
      for (int64_t r = 0; r < kRepeats; ++r)
        contexts_[i]->run(spec_, a_[i].data(), b_[i].data(), nullptr, c_[i].as<float>());
    });
    const double flop = static_cast<double>(pool_.size()) * kRepeats * 2 * kSize * kSize * kSize;
    best_ = std::max(best_, flop / seconds);
    runs_ = 1;
    return best_;
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
  double best_ = 0;
  int runs_ = kRuns;  // of the next call: the first one is thorough
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
}  // namespace

int threads() {
  static const int count = available_cpus();
  return count;
}

double matmul_rate(DType type) {
  static Products single(DType::kF32), half(DType::kBF16);
  return type == DType::kBF16 ? half.rate() : single.rate();
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
