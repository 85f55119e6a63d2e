// Kernels of the CPU backend that exist twice: AVX-512 and the baseline give the same bits.
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "backends/cpu/kernels.h"
#include "support/naive.h"

namespace bitmill::testing {
namespace {

std::vector<float> floats(int64_t n, uint64_t seed, double scale) {
  const Values values = random_values(n, seed, scale);
  return {values.begin(), values.end()};
}

// Runs `call(out)` for both copies of a kernel on outputs of `count` elements, and compares them.
template <typename Out, typename Wide, typename Baseline>
void same_bits(int64_t count, const std::vector<Out>& start, const Wide& wide,
               const Baseline& baseline) {
  if (!cpu_has_avx512()) GTEST_SKIP() << "this CPU has no AVX-512";
  std::vector<Out> a = start, b = start;
  a.resize(count), b.resize(count);
  wide(a.data()), baseline(b.data());
  EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(Out)), 0);
}

constexpr int64_t kCount = 1003;  // no multiple of any vector

template <typename Act>
void check_gate() {
  using Kernel = Gate<Act, float>;
  const std::vector<float> gate = floats(kCount, 1, 12), up = floats(kCount, 2, 3);
  same_bits<float>(
      kCount, {}, [&](float* out) { run_avx512<Kernel>(gate.data(), up.data(), out, kCount); },
      [&](float* out) { run_baseline<Kernel>(gate.data(), up.data(), out, kCount); });
}

TEST(Dispatch, Gate) {
  check_gate<Silu>();
  check_gate<GeluTanh>();
  check_gate<Relu>();
}

TEST(Dispatch, Norm) {
  using Kernel = NormRows<float, BFloat16>;
  const std::vector<float> x = floats(3 * kCount, 3, 5), weight = floats(kCount, 4, 1);
  same_bits<BFloat16>(
      3 * kCount, {},
      [&](BFloat16* out) {
        run_avx512<Kernel>(x.data(), weight.data(), 1e-5f, int64_t{3}, kCount, out);
      },
      [&](BFloat16* out) {
        run_baseline<Kernel>(x.data(), weight.data(), 1e-5f, int64_t{3}, kCount, out);
      });
}

TEST(Dispatch, Rope) {
  const std::vector<float> x = floats(4 * 96, 5, 2), table = floats(2 * 43, 6, 1);
  const float *cosine = table.data(), *sine = cosine + 43;
  same_bits<float>(
      4 * 96, x,
      [&](float* out) {
        run_avx512<RopeHeads>(out, int64_t{4}, int64_t{96}, cosine, sine, int64_t{43});
      },
      [&](float* out) {
        run_baseline<RopeHeads>(out, int64_t{4}, int64_t{96}, cosine, sine, int64_t{43});
      });
}

TEST(Dispatch, Softmax) {
  using Kernel = SoftmaxRows<BFloat16>;
  for (const int64_t window : {0, 25})
    for (const int64_t keys : {1, 64, 203}) {
      const Softmax softmax{0.3f, 1 + keys / 2, keys, keys - keys / 2, window};
      const std::vector<float> scores = floats(softmax.rows * keys, 7, 9);
      std::vector<float> a = scores, b = scores;
      same_bits<BFloat16>(
          softmax.rows * keys, {},
          [&](BFloat16* out) { run_avx512<Kernel>(a.data(), softmax, out); },
          [&](BFloat16* out) { run_baseline<Kernel>(b.data(), softmax, out); });
    }
}

TEST(Dispatch, Conversions) {
  const std::vector<float> x = floats(kCount, 8, 1e3);
  same_bits<BFloat16>(
      kCount, {},
      [&](BFloat16* out) { run_avx512<Convert<float, BFloat16>>(x.data(), out, kCount); },
      [&](BFloat16* out) { run_baseline<Convert<float, BFloat16>>(x.data(), out, kCount); });
}

TEST(Dispatch, Differences) {
  using Kernel = Subtract<float, float, BFloat16>;
  const std::vector<float> a = floats(kCount, 9, 3), b = floats(kCount, 10, 3);
  same_bits<BFloat16>(
      kCount, {}, [&](BFloat16* out) { run_avx512<Kernel>(a.data(), b.data(), out, kCount); },
      [&](BFloat16* out) { run_baseline<Kernel>(a.data(), b.data(), out, kCount); });
}

}  // namespace
}  // namespace bitmill::testing
