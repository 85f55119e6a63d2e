// AWQ's searches on every backend: column magnitudes, errors of scaled weights, clipping limits.
// Grids are core/grid.h's, which is their definition.
#include <algorithm>
#include <cmath>

#include "conformance/backend_test.h"

namespace bitmill::testing {
namespace {

constexpr int64_t kTokens = 70, kRows = 270, kColumns = 150;  // two tiles of rows, two of columns

// w rounded in groups after scaling, scaled back.
Values rounded_weight(const Values& w, const Values& s, const GridOptions& options,
                      int64_t group_size) {
  Values out(w.size());
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t first = 0; first < kColumns; first += group_size) {
      Values group;
      for (int64_t c = first; c < first + group_size; ++c)
        group.push_back(w[r * kColumns + c] * s[c]);
      const Grid<double> grid = fit_grid(group.data(), group_size, 1, options);
      for (int64_t c = first; c < first + group_size; ++c)
        out[r * kColumns + c] =
            from_code(to_code(group[c - first], grid, double((1 << options.bits) - 1)), grid) /
            s[c];
    }
  return out;
}

class AwqOps : public BackendTest {
 protected:
  Tensor hessian(DType type) {
    Tensor h = backend().upload(Tensor::zeros(type, {hessian_elements(kColumns)}));
    if (type == DType::kF64) {
      backend().hessian_update(up(DType::kF64, {kTokens, kColumns}, x_), h);
    } else {
      Tensor exact = hessian(DType::kF64);
      backend().convert(exact, h);
    }
    return h;
  }

  Values x_ = random_values(kTokens * kColumns, 1),
         w_ = rounded(random_values(kRows * kColumns, 2), DType::kF32);
};
BITMILL_EVERY_BACKEND(AwqOps);

TEST_P(AwqOps, MagnitudesAddUp) {
  const Values a = random(33 * 130, 3, 10), b = random(5 * 130, 4, 10);
  Values want(130);
  for (size_t i = 0; i < a.size(); ++i) want[i % 130] += std::abs(a[i]);
  for (size_t i = 0; i < b.size(); ++i) want[i % 130] += std::abs(b[i]);
  Tensor sums = Tensor::zeros(DType::kF64, {130});
  backend().add_magnitudes(up(compute(), {33, 130}, a), sums);
  backend().add_magnitudes(up(compute(), {5, 130}, b), sums);
  EXPECT_LT(max_difference(to_values(sums), want), 1e-11 * max_magnitude(want));
}

TEST_P(AwqOps, ScalingErrorsAreOutputErrors) {
  Values scales;
  for (double ratio : {0.0, 0.4, 1.0})
    for (int64_t c = 0; c < kColumns; ++c)
      scales.push_back(std::pow(0.1 + static_cast<double>(c), ratio));
  for (const bool symmetric : {true, false})
    for (const DType type : {DType::kF64, DType::kF32}) {
      const GridOptions options{4, symmetric, false, DType::kF16};  // as stored: no exact ties
      Tensor errors(DType::kF64, {3});
      backend().scaling_errors(up(type, {kRows, kColumns}, w_), options, 50,
                               to_tensor(DType::kF64, {3, kColumns}, scales), hessian(type),
                               errors);
      for (int64_t k = 0; k < 3; ++k) {
        const Values s(scales.begin() + k * kColumns, scales.begin() + (k + 1) * kColumns);
        Values e = rounded_weight(w_, s, options, 50);
        for (size_t i = 0; i < e.size(); ++i) e[i] = w_[i] - e[i];
        double want = 0;
        for (double y : naive_matmul_bt(x_, e, kTokens, kRows, kColumns)) want += y * y;
        EXPECT_NEAR(errors.as<double>()[k] / want, 1, type == DType::kF64 ? 1e-10 : 1e-3) << k;
      }
    }
}

TEST_P(AwqOps, AScaleBeyondItsTypeIsNotANumber) {
  Values w = w_;
  w[7] = 1e7;  // / 15 is beyond fp16
  Tensor errors(DType::kF64, {1});
  backend().scaling_errors(up(DType::kF32, {kRows, kColumns}, w), {4, false, false, DType::kF16},
                           50, to_tensor(DType::kF64, {1, kColumns}, Values(kColumns, 1)),
                           hessian(DType::kF32), errors);
  EXPECT_TRUE(std::isnan(*errors.as<double>()));
}

TEST_P(AwqOps, ClipLimitsAreTheBestOfTen) {
  const GridOptions options{3, false, false, DType::kF16};
  for (const int64_t size :
       {int64_t{50}, kColumns}) {  // groups across the border of tiles, and whole rows
    Tensor limits(DType::kF64, {kRows, kColumns / size});
    backend().clip_limits(up(DType::kF64, {kRows, kColumns}, w_), options,
                          size == kColumns ? -1 : size, hessian(DType::kF64), limits);
    int64_t clipped = 0;
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t g = 0; g < kColumns / size; ++g) {
        const Values w(w_.begin() + r * kColumns + g * size,
                       w_.begin() + r * kColumns + (g + 1) * size);
        double top = 0, best = -1, limit = 0;
        for (double value : w) top = std::max(top, std::abs(value));
        for (int step = 0; step < 10; ++step) {
          const double m = top * (1 - step / 20.0);
          Values clamped = w;
          for (double& value : clamped) value = std::clamp(value, -m, m);
          const Grid<double> grid = fit_grid(clamped.data(), size, 1, options);
          double error = 0;
          for (int64_t t = 0; t < kTokens; ++t) {
            double y = 0;
            for (int64_t c = 0; c < size; ++c)
              y += x_[t * kColumns + g * size + c] *
                   (from_code(to_code(clamped[c], grid, 7.0), grid) - w[c]);
            error += y * y;
          }
          if (best < 0 || error < best * (1 - 1e-12)) best = error, limit = m;
        }
        EXPECT_NEAR(limits.as<double>()[r * (kColumns / size) + g], limit, 1e-12) << r << " " << g;
        clipped += limit < top;
      }
    EXPECT_GT(clipped, kRows / 4);
  }
}

}  // namespace
}  // namespace bitmill::testing
