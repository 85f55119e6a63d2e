// The golden suite's sample in tests/golden/data, in double (codes, zeros, groups and stored words
// equal, floats within the case's rtol) and in float (GPTQ: layer error within the case's bound and
// not above plain rounding on the same grid; rounding: nearly all codes equal).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "golden/golden_runner.h"
#include "io/json.h"
#include "support/naive.h"
#include "support/paths.h"

namespace bitmill::golden {
namespace {

using testing::to_values;
using testing::Values;

std::string data_directory() {
  return testing::source_path("tests/golden/data");
}

Json all_cases() {
  return read_json(data_directory() + "/cases.json").at("cases");
}

// A float case in double: what the layer error needs.
struct Layer {
  int64_t rows, cols;
  Values weight, hessian;

  explicit Layer(const Tensors& inputs) {
    const Tensor& w = inputs.at("in.weight");
    rows = w.rows(), cols = w.cols(), weight = to_values(w);
    if (inputs.contains("in.hessian")) {
      hessian = to_values(inputs.at("in.hessian"));
      return;
    }
    const Tensor& x = inputs.at("in.x");
    hessian = testing::naive_gram(to_values(x), x.shape()[0] * x.shape()[1], cols);
    for (double& value : hessian) value *= 2.0 / static_cast<double>(x.shape()[0]);
  }

  double error_of(const Values& w_hat) const {
    double sum = 0;
    std::vector<double> e(cols);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) e[c] = weight[r * cols + c] - w_hat[r * cols + c];
      for (int64_t i = 0; i < cols; ++i) {
        for (int64_t j = 0; j < cols; ++j) sum += e[i] * hessian[i * cols + j] * e[j];
      }
    }
    return sum;
  }
};

// The same for a ternary grid (core/grid.h): code 0 is out.neg, 1 is 0, 2 is the scale.
Values on_ternary_grid(const Tensors& got, const Values* weight) {
  const Values high = to_values(got.at("out.scales")), low = to_values(got.at("out.neg"));
  Values values = to_values(got.at("out.codes"));
  const int64_t cols = got.at("out.codes").cols(), groups = got.at("out.scales").cols();
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / cols;
    const int64_t at =
        row * groups + got.at("out.g_idx").as<int32_t>()[static_cast<int64_t>(i) % cols];
    if (weight) values[i] = (*weight)[i] > high[at] / 2 ? 2 : (*weight)[i] < low[at] / 2 ? 0 : 1;
    values[i] = values[i] == 2 ? high[at] : values[i] == 0 ? low[at] : 0;
  }
  return values;
}

// AWQ in float: the same scales, and nearly all limits and codes. A group clipped on both sides has
// its zero point on an exact tie, which two precisions may round differently.
void expect_alike(const Tensors& got, const Tensors& want) {
  for (const auto& [name, tensor] : want) {
    const bool limits = name.starts_with("out.clip");
    if (name != "out.s" && !limits && !name.ends_with("codes")) continue;
    ASSERT_TRUE(got.contains(name)) << name;
    const Values a = to_values(got.at(name)), b = to_values(tensor);
    double equal = 0;
    for (size_t i = 0; i < a.size(); ++i) equal += std::abs(a[i] - b[i]) <= 1e-5 * std::abs(b[i]);
    EXPECT_GE(equal / static_cast<double>(a.size()), name == "out.s" ? 1 : 0.9) << name;
  }
}

// Values of the outcome's codes, or of the weight rounded plainly onto the outcome's grids.
Values on_grid(const Tensors& got, int bits, const Values* weight) {
  if (got.contains("out.neg")) return on_ternary_grid(got, weight);
  const Values scales = to_values(got.at("out.scales")), zeros = to_values(got.at("out.zeros"));
  Values values = to_values(got.at("out.codes"));
  const int64_t cols = got.at("out.codes").cols(), groups = got.at("out.scales").cols();
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / cols;
    const int64_t at =
        row * groups + got.at("out.g_idx").as<int32_t>()[static_cast<int64_t>(i) % cols];
    if (weight) {
      values[i] = std::clamp(std::rint((*weight)[i] / scales[at]) + zeros[at], 0.0,
                             double((1 << bits) - 1));
    }
    values[i] = scales[at] * (values[i] - zeros[at]);
  }
  return values;
}

class GoldenTest : public ::testing::TestWithParam<Json> {
 protected:
  const Json& test_case() const { return GetParam(); }
  std::string name() const { return test_case().at("name"); }

  Outcome run(DType dtype) const {
    return run_case(test_case(), data_directory(), dtype, *make_backend({"cpu", DType::kF32, 2}));
  }
  Tensors expected() const {
    return load_tensors(data_directory() + "/expected/" + name() + ".safetensors");
  }

  // True when the case is about a refusal, which has then been checked.
  bool refusal(const Outcome& outcome) const {
    EXPECT_EQ(outcome.skipped, "");
    const bool wanted = test_case().at("expect") == "rejected";
    EXPECT_EQ(!outcome.rejected.empty(), wanted) << outcome.rejected;
    return wanted || !outcome.rejected.empty();
  }

  void expect_no_refused_words(const Tensors& got) const {
    for (const std::string& format :
         test_case().value("refuse_formats", std::vector<std::string>())) {
      for (const auto& [tensor, data] : got)
        EXPECT_NE(tensor.rfind("out." + format + ".", 0), 0U) << tensor;
    }
  }
};

void expect_close(const std::string& name, const Values& got, const Values& want, double rtol) {
  ASSERT_EQ(got.size(), want.size()) << name;
  double largest = 0;
  for (double value : want) largest = std::max(largest, std::abs(value));
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_LE(std::abs(got[i] - want[i]), rtol * (std::abs(want[i]) + largest))
        << name << " [" << i << "]";
  }
}

std::vector<uint8_t> raw(const Tensor& tensor) {
  const uint8_t* data = static_cast<const uint8_t*>(tensor.data());
  return {data, data + tensor.bytes()};
}

TEST_P(GoldenTest, Double) {
  const Outcome outcome = run(DType::kF64);
  if (refusal(outcome)) return;
  expect_no_refused_words(outcome.tensors);
  EXPECT_EQ(outcome.fallback, test_case().at("expect") == "fallback");
  const Tensors want = expected();
  for (const auto& [output, entry] : test_case().at("outputs").items()) {
    if (!outcome.tensors.contains(output)) {
      EXPECT_TRUE(entry.value("info", false)) << output << " is missing";
      continue;
    }
    const Tensor& got = outcome.tensors.at(output);
    ASSERT_EQ(got.shape(), want.at(output).shape()) << output;
    ASSERT_EQ(got.dtype(), want.at(output).dtype()) << output;
    if (entry.contains("rtol")) {
      expect_close(output, to_values(got), to_values(want.at(output)), entry["rtol"]);
    } else {
      EXPECT_EQ(raw(got), raw(want.at(output))) << output;
    }
  }
}

TEST_P(GoldenTest, Float) {
  const Outcome outcome = run(DType::kF32);
  if (refusal(outcome) || test_case().at("kind") == "pack") return;
  const Tensors want = expected();
  if (test_case().at("kind") == "hessian") {
    const Values a = to_values(outcome.tensors.at("out.hessian")),
                 b = to_values(want.at("out.hessian"));
    EXPECT_LT(testing::max_difference(a, b), 1e-5 * testing::max_magnitude(b));
    return;
  }
  const std::string kind = test_case().at("kind");
  if (kind.starts_with("awq")) return expect_alike(outcome.tensors, want);
  const int bits = test_case().at("options").value("bits", 4);
  if (test_case().at("kind") == "rtn" || outcome.fallback) {
    const Values a = on_grid(outcome.tensors, bits, nullptr), b = on_grid(want, bits, nullptr);
    double equal = 0;
    for (size_t i = 0; i < a.size(); ++i) equal += std::abs(a[i] - b[i]) <= 1e-6 * std::abs(b[i]);
    EXPECT_GE(equal / static_cast<double>(a.size()),
              test_case()["options"].value("mse", false) ? 0.98 : 0.995);
    return;
  }
  const Layer layer(
      load_tensors(data_directory() + "/" + test_case().at("input").get<std::string>()));
  const double error = layer.error_of(on_grid(outcome.tensors, bits, nullptr));
  const double golden = to_values(want.at("out.layer_error"))[0];
  EXPECT_NEAR(error / golden, 1, test_case().at("fp32_layer_error_rtol").get<double>());
  EXPECT_LE(error, layer.error_of(on_grid(outcome.tensors, bits, &layer.weight)));
}

std::string test_name(const ::testing::TestParamInfo<Json>& info) {
  return info.param.at("name");
}

INSTANTIATE_TEST_SUITE_P(Sample, GoldenTest,
                         ::testing::ValuesIn(all_cases().get<std::vector<Json>>()), test_name);

}  // namespace
}  // namespace bitmill::golden
