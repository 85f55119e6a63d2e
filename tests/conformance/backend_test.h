// Fixture of the conformance tests: every test runs on every backend of the build, in both compute
// types. A new backend joins through backend_names(); it needs no test of its own.
//
// Tolerances are constant x size x epsilon: a sum of k products of magnitude m computed in fp32 may
// differ from the definition by k * m * 2^-24 (times a constant of 4), and an output rounded to
// bf16 by 2^-8 of its magnitude.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "backends/backend.h"
#include "support/naive.h"

namespace bitmill::testing {

struct BackendCase {
  std::string name;
  DType compute;
};

inline void PrintTo(const BackendCase& value, std::ostream* out) {
  *out << value.name << " " << dtype_name(value.compute);
}

inline std::vector<BackendCase> all_backend_cases() {
  std::vector<BackendCase> cases;
  for (const std::string& name : backend_names())
    for (DType compute : {DType::kF32, DType::kBF16}) cases.push_back({name, compute});
  return cases;
}

inline std::string case_name(const ::testing::TestParamInfo<BackendCase>& info) {
  return info.param.name + "_" + std::string(dtype_name(info.param.compute));
}

constexpr double kSingle = 0x1p-24;  // unit roundoff of fp32
constexpr double kHalf = 0x1p-8;     // of bf16

class BackendTest : public ::testing::TestWithParam<BackendCase> {
 protected:
  void SetUp() override { open(2); }
  void open(int threads) {
    backend_ =
        make_backend({.kind = GetParam().name, .compute = GetParam().compute, .threads = threads});
  }

  Backend& backend() { return *backend_; }
  DType compute() const { return GetParam().compute; }
  Tensor up(DType dtype, Shape shape, const Values& values) {
    return backend_->upload(to_tensor(dtype, shape, values));
  }
  Values down(Tensor tensor) {
    backend_->synchronize();
    return to_values(backend_->download(std::move(tensor)));
  }
  // Random values that C represents exactly, so that the definition and the device start from equal
  // inputs.
  Values random(int64_t count, uint64_t seed, double scale = 1.0) {
    return rounded(random_values(count, seed, scale), compute());
  }
  // Slack of one output: `k` products of magnitude `magnitude`; one rounding to `out`.
  static double tolerance(int64_t k, double magnitude, DType out = DType::kF32) {
    return 4 * static_cast<double>(k) * magnitude * kSingle +
           (out == DType::kBF16 ? kHalf * magnitude : 0);
  }

  std::unique_ptr<Backend> backend_;
};

#define BITMILL_EVERY_BACKEND(suite) \
  INSTANTIATE_TEST_SUITE_P(Backends, suite, ::testing::ValuesIn(all_backend_cases()), case_name)

}  // namespace bitmill::testing
