// Seeded random layers for the algorithm tests: correlated inputs, so that the Hessian is far from
// diagonal.
#pragma once

#include <random>
#include <vector>

#include "algorithms/quantizer.h"

namespace bitmill::testing {

// The generator's bits are the same with every standard library; std's distributions are not.
class Random {
 public:
  explicit Random(uint64_t seed) : generator_(seed) {}
  // Sum of four uniforms in [-1/2, 1/2): near enough to normal.
  double normal() {
    double sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<double>(generator_() >> 11) * 0x1p-53 - 0.5;
    return sum;
  }

 private:
  std::mt19937_64 generator_;
};

inline Tensor to_type(TensorView source, DType dtype) {
  Tensor out(dtype, source.shape);
  convert(source, out);
  return out;
}

inline Tensor random_matrix(int64_t rows, int64_t cols, uint64_t seed) {
  Random random(seed);
  Tensor out(DType::kF64, {rows, cols});
  for (int64_t i = 0; i < out.elements(); ++i)
    out.as<double>()[i] = static_cast<float>(random.normal());
  return out;
}

// Inputs [tokens, cols] F64 whose columns share a common part and have spreads between 0.3 and 3.
inline Tensor random_inputs(int64_t tokens, int64_t cols, uint64_t seed) {
  Random random(seed);
  std::vector<double> spread(cols);
  for (double& s : spread) s = 0.3 + 2.7 * std::abs(random.normal());
  Tensor x(DType::kF64, {tokens, cols});
  for (int64_t t = 0; t < tokens; ++t) {
    const double common = random.normal();
    for (int64_t c = 0; c < cols; ++c) {
      x.as<double>()[t * cols + c] =
          static_cast<float>(spread[c] * (random.normal() + 0.7 * common));
    }
  }
  return x;
}

// tr(E H E^T), E = w - w_hat, H normalised and undamped.
inline double layer_error(TensorView w, TensorView w_hat, const Hessian& hessian,
                          Backend& backend) {
  Tensor rows(DType::kF64, {w.rows()});
  backend.layer_errors(w, w_hat, hessian.sum, hessian.factor(), rows);
  double sum = 0;
  for (int64_t r = 0; r < w.rows(); ++r) sum += rows.as<double>()[r];
  return sum;
}

inline Hessian hessian_of(TensorView x, Backend& backend) {
  HessianAccumulator accumulator(x.cols(), x.dtype, backend);
  accumulator.add(x, 8, 0);
  return accumulator.finish();
}

inline LinearProblem problem_of(TensorView weight, QuantizeSettings settings,
                                DType scale_dtype = DType::kF64) {
  LinearProblem problem;
  problem.module = "layer";
  problem.weight = weight;
  problem.settings = std::move(settings);
  problem.scale_dtype = scale_dtype;
  return problem;
}

inline QuantizeResult quantize_one(const LinearProblem& problem, const Hessian& hessian,
                                   Backend& backend) {
  return std::move(
      find_quantizer(problem.settings.algorithm).quantize({&problem, 1}, &hessian, backend)[0]);
}

inline std::vector<uint8_t> bytes_of(const Tensor& tensor) {
  const uint8_t* data = static_cast<const uint8_t*>(tensor.data());
  return {data, data + tensor.bytes()};
}

}  // namespace bitmill::testing
