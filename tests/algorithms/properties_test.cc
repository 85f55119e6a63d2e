// Properties that hold for every shape and setting, on several hundred seeded random layers in
// double. Each test prints how many it tried. Codes are compared exactly: a property that
// rearranges sums (permutations, block sizes) could flip a weight that lies within a rounding error
// of a border, which these seeds do not have.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "algorithms/problem_data.h"

namespace bitmill {
namespace {

using namespace testing;  // NOLINT: the data helpers

// One random layer and its settings.
struct Layer {
  int64_t rows, cols;
  Tensor weight, x;
  QuantizeSettings settings;
  DType scale_dtype;

  LinearProblem problem(TensorView w) const { return problem_of(w, settings, scale_dtype); }
  std::string text() const {
    return fmt::format("[{}, {}] {} bits, group {}, symmetric {}, act_order {}, block {}, damp {}",
                       rows, cols, settings.bits, settings.group_size, settings.symmetric,
                       act_order_name(settings.act_order), settings.block_size, settings.damp);
  }
};

// Whole numbers from low to high.
class Draw {
 public:
  explicit Draw(uint64_t seed) : generator_(seed) {}
  int64_t operator()(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(generator_() % static_cast<uint64_t>(high - low + 1));
  }

 private:
  std::mt19937_64 generator_;
};

Layer random_layer(uint64_t seed) {
  Draw draw(seed * 7919 + 3);
  Layer layer;
  layer.rows = draw(1, 24);
  layer.cols = draw(1, 72);
  layer.weight = random_matrix(layer.rows, layer.cols, seed * 2 + 1);
  layer.x =
      random_inputs(draw(1, 120), layer.cols, seed * 2 + 2);  // often fewer tokens than columns
  QuantizeSettings& s = layer.settings;
  s.bits = static_cast<int>(draw(2, 8));
  s.group_size = draw(0, 3) == 0 ? -1 : draw(1, layer.cols + 5);
  s.symmetric = draw(0, 1) == 1;
  s.act_order = std::array{ActOrder::kNone, ActOrder::kStatic, ActOrder::kDynamic}[draw(0, 2)];
  s.mse = draw(0, 3) == 0;
  s.block_size = draw(1, layer.cols + 20);
  s.damp = 0.001 * static_cast<double>(draw(1, 100));
  // Unrounded symmetric scales put the largest weight of a group exactly on a border.
  layer.scale_dtype = s.symmetric || draw(0, 1) == 0 ? DType::kF16 : DType::kF64;
  return layer;
}

class PropertiesTest : public ::testing::Test {
 protected:
  std::unique_ptr<Backend> backend_ = make_backend({"cpu", DType::kF32, 1});

  QuantizeResult solve(const Layer& layer, TensorView weight, TensorView x) {
    return quantize_one(layer.problem(weight), testing::hessian_of(x, *backend_), *backend_);
  }
  QuantizeResult solve(const Layer& layer) { return solve(layer, layer.weight, layer.x); }

  // Calls body(layer) for `count` layers and prints how many it saw.
  template <typename Body>
  void for_layers(int count, uint64_t seed, const Body& body) {
    for (int i = 0; i < count; ++i) {
      Layer layer = random_layer(seed + static_cast<uint64_t>(i));
      SCOPED_TRACE(layer.text());
      body(layer);
      if (::testing::Test::HasFatalFailure()) return;
    }
    fmt::print("{} random layers\n", count);
  }
};

Tensor columns_taken(const Tensor& source, const std::vector<int64_t>& from) {
  Tensor out(DType::kF64, source.shape());
  const int64_t n = source.cols();
  for (int64_t r = 0; r < source.rows(); ++r)
    for (int64_t c = 0; c < n; ++c)
      out.as<double>()[r * n + c] = source.as<double>()[r * n + from[c]];
  return out;
}

std::vector<int64_t> random_permutation(int64_t n, uint64_t seed) {
  Draw draw(seed);
  std::vector<int64_t> from(n);
  std::iota(from.begin(), from.end(), 0);
  for (int64_t i = n - 1; i > 0; --i) std::swap(from[i], from[draw(0, i)]);
  return from;
}

// With a row grid the order is by diagonal, so it does not matter how the inputs were numbered.
// Dynamic groups follow the solving order, so they move along with their columns.
TEST_F(PropertiesTest, PermutedInputsGivePermutedCodes) {
  uint64_t seed = 1;
  for_layers(120, 1000, [&](Layer& layer) {
    layer.settings.act_order = layer.cols % 2 == 0 ? ActOrder::kStatic : ActOrder::kDynamic;
    if (layer.settings.act_order == ActOrder::kStatic) layer.settings.group_size = -1;
    const std::vector<int64_t> from = random_permutation(layer.cols, ++seed);
    const Tensor weight = columns_taken(layer.weight, from), x = columns_taken(layer.x, from);
    const QuantizeResult plain = solve(layer), moved = solve(layer, weight, x);
    for (int64_t r = 0; r < layer.rows; ++r)
      for (int64_t c = 0; c < layer.cols; ++c)
        ASSERT_EQ(moved.linear.codes.as<uint8_t>()[r * layer.cols + c],
                  plain.linear.codes.as<uint8_t>()[r * layer.cols + from[c]])
            << r << ", " << c;
  });
}

TEST_F(PropertiesTest, PowersOfTwoScaleRowsExactly) {
  for_layers(120, 2000, [&](Layer& layer) {
    layer.scale_dtype = DType::kF64;  // fp16 has subnormals
    const QuantizeResult plain = solve(layer);
    Tensor weight = clone(layer.weight);
    const double factors[] = {0.25, 1, 8, 0x1p-20, 0x1p30};
    for (int64_t i = 0; i < weight.elements(); ++i)
      weight.as<double>()[i] *= factors[i / layer.cols % 5];
    const QuantizeResult scaled = solve(layer, weight, layer.x);
    ASSERT_EQ(bytes_of(scaled.linear.codes), bytes_of(plain.linear.codes));
    ASSERT_EQ(bytes_of(scaled.linear.zeros), bytes_of(plain.linear.zeros));
    const int64_t groups = plain.linear.groups();
    for (int64_t i = 0; i < plain.linear.scales.elements(); ++i) {
      // A group of zeros keeps its scale of [-1, 1].
      const double before = plain.linear.scales.as<double>()[i],
                   after = scaled.linear.scales.as<double>()[i];
      ASSERT_TRUE(after == before * factors[i / groups % 5] || after == before) << i;
    }
  });
}

TEST_F(PropertiesTest, AnySubsetOfRowsAloneGivesTheSameCodes) {
  for_layers(120, 3000, [&](Layer& layer) {
    const QuantizeResult whole = solve(layer);
    Draw draw(static_cast<uint64_t>(layer.rows * 100 + layer.cols));
    std::vector<int64_t> rows;
    for (int64_t r = 0; r < layer.rows; ++r)
      if (draw(0, 1) == 1) rows.push_back(r);
    if (rows.empty()) rows.push_back(draw(0, layer.rows - 1));
    const int64_t n = layer.cols;
    Tensor part(DType::kF64, {static_cast<int64_t>(rows.size()), n});
    for (size_t i = 0; i < rows.size(); ++i)
      std::copy_n(layer.weight.as<double>() + rows[i] * n, n,
                  part.as<double>() + static_cast<int64_t>(i) * n);
    const QuantizeResult alone = solve(layer, part, layer.x);
    for (size_t i = 0; i < rows.size(); ++i)
      ASSERT_TRUE(std::equal(whole.linear.codes.as<uint8_t>() + rows[i] * n,
                             whole.linear.codes.as<uint8_t>() + (rows[i] + 1) * n,
                             alone.linear.codes.as<uint8_t>() + static_cast<int64_t>(i) * n))
          << "row " << rows[i];
  });
}

// Not so where groups are refitted inside a block that is larger than they are: then the block
// border decides which errors a grid has seen (docs/algorithms.md).
TEST_F(PropertiesTest, BlockSizeDoesNotChangeCodes) {
  int sizes = 0;
  for_layers(40, 4000, [&](Layer& layer) {
    const bool refits =
        layer.settings.group_size != -1 && layer.settings.act_order != ActOrder::kStatic;
    if (refits) layer.settings.act_order = ActOrder::kStatic;
    layer.settings.block_size = layer.cols;
    const std::vector<uint8_t> codes = bytes_of(solve(layer).linear.codes);
    for (int64_t block = 1; block <= layer.cols; ++block, ++sizes) {
      layer.settings.block_size = block;
      ASSERT_EQ(bytes_of(solve(layer).linear.codes), codes) << "block_size " << block;
    }
  });
  fmt::print("{} block sizes\n", sizes);
}

TEST_F(PropertiesTest, ThreadsGiveTheSameBits) {
  int count = 0;
  for (uint64_t seed = 5000; seed < 5024; ++seed) {
    Layer layer = random_layer(seed);
    SCOPED_TRACE(layer.text());
    // Several tiles of 256 rows, and more columns than a tile of the factor where the seed is even.
    layer.rows = 200 + static_cast<int64_t>(seed % 7) * 64;
    layer.cols = seed % 2 == 0 ? 261 : 48;
    layer.weight = to_type(random_matrix(layer.rows, layer.cols, seed), DType::kF32);
    layer.x = to_type(random_inputs(90, layer.cols, seed), DType::kF32);
    layer.scale_dtype = DType::kF16;
    std::vector<uint8_t> codes, scales;
    double error = 0;
    for (int threads : {1, 2, 3}) {
      const std::unique_ptr<Backend> backend = make_backend({"cpu", DType::kF32, threads});
      const QuantizeResult result = quantize_one(layer.problem(layer.weight),
                                                 testing::hessian_of(layer.x, *backend), *backend);
      if (threads == 1)
        codes = bytes_of(result.linear.codes), scales = bytes_of(result.linear.scales),
        error = result.record.error;
      ASSERT_EQ(bytes_of(result.linear.codes), codes) << threads << " threads";
      ASSERT_EQ(bytes_of(result.linear.scales), scales) << threads << " threads";
      ASSERT_EQ(result.record.error, error) << threads << " threads";
    }
    ++count;
  }
  fmt::print("{} random layers\n", count);
}

// Optimal Brain Quantization with a given order, from its definition: quantize a column, move the
// error of the others by the inverse Hessian of what is left, remove the column from that inverse
// by one elimination step. Frantar and Alistarh, arXiv 2208.11580; nothing of the product's
// arithmetic but the grid.
class TextbookObq {
 public:
  // `h` [n, n]: normalised and damped, dead columns at 1 and their weights zeroed.
  TextbookObq(std::vector<double> h, int64_t n) : n_(n), inverse_(invert(std::move(h), n)) {}

  // Codes of one row in original columns; `grid_of(column)`.
  template <typename GridOf>
  std::vector<uint8_t> solve(std::vector<double> w, const std::vector<int32_t>& order, double maxq,
                             const GridOf& grid_of) const {
    std::vector<double> p = inverse_;
    std::vector<uint8_t> codes(static_cast<size_t>(n_));
    for (int32_t k : order) {
      const Grid<double> grid = grid_of(k);
      const double code = to_code(w[k], grid, maxq), pivot = p[k * n_ + k];
      codes[k] = static_cast<uint8_t>(code);
      const double step = (w[k] - from_code(code, grid)) / pivot;
      for (int64_t j = 0; j < n_; ++j) w[j] -= step * p[k * n_ + j];
      const std::vector<double> row(p.begin() + k * n_, p.begin() + (k + 1) * n_);
      for (int64_t i = 0; i < n_; ++i)
        for (int64_t j = 0; j < n_; ++j) p[i * n_ + j] -= row[i] * row[j] / pivot;
    }
    return codes;
  }

 private:
  // Gauss-Jordan with pivoting.
  static std::vector<double> invert(std::vector<double> a, int64_t n) {
    std::vector<double> inverse(static_cast<size_t>(n * n), 0.0);
    for (int64_t i = 0; i < n; ++i) inverse[i * n + i] = 1;
    for (int64_t c = 0; c < n; ++c) {
      int64_t best = c;
      for (int64_t r = c; r < n; ++r)
        if (std::abs(a[r * n + c]) > std::abs(a[best * n + c])) best = r;
      for (int64_t j = 0; j < n; ++j) {
        std::swap(a[c * n + j], a[best * n + j]);
        std::swap(inverse[c * n + j], inverse[best * n + j]);
      }
      const double pivot = a[c * n + c];
      for (int64_t j = 0; j < n; ++j) a[c * n + j] /= pivot, inverse[c * n + j] /= pivot;
      for (int64_t r = 0; r < n; ++r) {
        const double factor = r == c ? 0 : a[r * n + c];
        for (int64_t j = 0; factor != 0 && j < n; ++j) {
          a[r * n + j] -= factor * a[c * n + j];
          inverse[r * n + j] -= factor * inverse[c * n + j];
        }
      }
    }
    return inverse;
  }

  int64_t n_;
  std::vector<double> inverse_;
};

TEST_F(PropertiesTest, FactorFormIsTextbookObq) {
  int64_t codes = 0;
  for_layers(150, 6000, [&](Layer& layer) {
    const int64_t n = layer.cols, tokens = layer.x.rows();
    if (layer.settings.group_size != -1) layer.settings.act_order = ActOrder::kStatic;
    for (int64_t t = 0; n > 4 && t < tokens; ++t)
      layer.x.as<double>()[t * n + n / 2] = 0;  // a dead column
    const QuantizeResult result = solve(layer);
    ASSERT_EQ(result.record.method, "gptq");

    std::vector<double> h(static_cast<size_t>(n * n), 0.0);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j)
          h[i * n + j] +=
              2.0 / 8 * layer.x.as<double>()[t * n + i] * layer.x.as<double>()[t * n + j];
    std::vector<bool> dead(static_cast<size_t>(n));
    double mean = 0;
    for (int64_t i = 0; i < n; ++i) {
      dead[i] = h[i * n + i] == 0;
      if (dead[i]) h[i * n + i] = 1;
      mean += h[i * n + i] / static_cast<double>(n);
    }
    std::vector<int32_t> order(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    if (layer.settings.act_order != ActOrder::kNone)
      std::stable_sort(order.begin(), order.end(),
                       [&](int32_t a, int32_t b) { return h[a * n + a] > h[b * n + b]; });
    for (int64_t i = 0; i < n; ++i) h[i * n + i] += result.record.damp * mean;
    const TextbookObq obq(h, n);

    const int64_t groups = result.linear.groups();
    const Tensor scales = to_type(result.linear.scales, DType::kF64);
    for (int64_t r = 0; r < layer.rows; ++r) {
      std::vector<double> w(layer.weight.as<double>() + r * n,
                            layer.weight.as<double>() + (r + 1) * n);
      for (int64_t c = 0; c < n; ++c)
        if (dead[c]) w[c] = 0;
      const std::vector<uint8_t> wanted =
          obq.solve(w, order, double((1 << layer.settings.bits) - 1), [&](int32_t column) {
            const int64_t at = r * groups + result.linear.g_idx.as<int32_t>()[column];
            return Grid<double>{scales.as<double>()[at],
                                double(result.linear.zeros.as<uint8_t>()[at])};
          });
      ASSERT_TRUE(
          std::equal(wanted.begin(), wanted.end(), result.linear.codes.as<uint8_t>() + r * n))
          << "row " << r;
      codes += n;
    }
  });
  fmt::print("{} codes equal\n", codes);
}

}  // namespace
}  // namespace bitmill
