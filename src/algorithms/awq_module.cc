#include "algorithms/awq_module.h"

#include <algorithm>
#include <cmath>

#include "algorithms/rounding.h"

namespace bitmill {
namespace {

template <typename T>
using Matrix = std::vector<T>;

// y [rows, out] = x [rows, in] w^T; sums in order of columns.
template <typename T>
Matrix<T> project(const T* x, int64_t rows, const Matrix<T>& w, int64_t in) {
  const int64_t out = static_cast<int64_t>(w.size()) / in;
  Matrix<T> y(static_cast<size_t>(rows * out));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < out; ++o) {
      T sum = 0;
      for (int64_t i = 0; i < in; ++i) sum += x[r * in + i] * w[o * in + i];
      y[r * out + o] = sum;
    }
  return y;
}

// Rotary embedding of x [length, heads * d], halves convention, positions from 0.
template <typename T>
void rotate(Matrix<T>& x, int64_t length, int64_t heads, int64_t d) {
  const int64_t half = d / 2;
  for (int64_t t = 0; t < length; ++t)
    for (int64_t j = 0; j < half; ++j) {
      const double angle =
          static_cast<double>(t) *
          std::pow(10000.0, -2.0 * static_cast<double>(j) / static_cast<double>(d));
      const T cosine = static_cast<T>(std::cos(angle)), sine = static_cast<T>(std::sin(angle));
      for (int64_t h = 0; h < heads; ++h) {
        T& a = x[(t * heads + h) * d + j];
        T& b = x[(t * heads + h) * d + j + half];
        const T first = a * cosine - b * sine;
        b = b * cosine + a * sine;
        a = first;
      }
    }
}

template <typename T>
class Module {
 public:
  using Weights = std::map<std::string, Matrix<T>>;

  explicit Module(const AwqModule& module)
      : module_(module), in_(module.x.shape[2]), length_(module.x.shape[1]) {
    for (const auto& [name, w] : module.weights) {
      const T* first = static_cast<const T*>(w.data);
      weights_[name].assign(first, first + w.elements());
    }
  }

  const Weights& weights() const { return weights_; }
  int64_t sequences() const { return module_.x.shape[0]; }

  // Output of one sequence.
  Matrix<T> output(const Weights& w, int64_t sequence) const {
    const T* x = module_.x.as<T>() + sequence * length_ * in_;
    return module_.kind == ModuleKind::kMlp ? mlp(w, x) : attention(w, x);
  }

 private:
  Matrix<T> mlp(const Weights& w, const T* x) const {
    Matrix<T> gated = project(x, length_, w.at("gate"), in_);
    const Matrix<T> up = project(x, length_, w.at("up"), in_);
    for (size_t i = 0; i < gated.size(); ++i)
      gated[i] = gated[i] / (1 + std::exp(-gated[i])) * up[i];
    return project(gated.data(), length_, w.at("down"),
                   static_cast<int64_t>(gated.size()) / length_);
  }

  Matrix<T> attention(const Weights& w, const T* x) const {
    Matrix<T> q = project(x, length_, w.at("q"), in_), k = project(x, length_, w.at("k"), in_);
    const Matrix<T> v = project(x, length_, w.at("v"), in_);
    const int64_t width = static_cast<int64_t>(q.size()) / length_, d = width / module_.heads;
    rotate(q, length_, module_.heads, d);
    rotate(k, length_, module_.kv_heads, d);
    Matrix<T> mixed(q.size());
    for (int64_t head = 0; head < module_.heads; ++head) mix(q, k, v, head, d, mixed);
    return project(mixed.data(), length_, w.at("o"), width);
  }

  // One head: mixed[t] = sum_u softmax(q_t k_u / sqrt(d)) v_u over u <= t.
  void mix(const Matrix<T>& q, const Matrix<T>& k, const Matrix<T>& v, int64_t head, int64_t d,
           Matrix<T>& mixed) const {
    const int64_t heads = module_.heads, shared = module_.kv_heads, group = head / (heads / shared);
    const T root = std::sqrt(static_cast<T>(d));
    Matrix<T> p(static_cast<size_t>(length_));
    for (int64_t t = 0; t < length_; ++t) {
      for (int64_t u = 0; u <= t; ++u) {
        T dot = 0;
        for (int64_t j = 0; j < d; ++j)
          dot += q[(t * heads + head) * d + j] * k[(u * shared + group) * d + j];
        p[u] = dot / root;
      }
      const T top = *std::max_element(p.begin(), p.begin() + t + 1);
      T sum = 0;
      for (int64_t u = 0; u <= t; ++u) sum += p[u] = std::exp(p[u] - top);
      for (int64_t u = 0; u <= t; ++u)
        for (int64_t j = 0; j < d; ++j)
          mixed[(t * heads + head) * d + j] += p[u] / sum * v[(u * shared + group) * d + j];
    }
  }

  const AwqModule& module_;
  int64_t in_, length_;
  Weights weights_;
};

// Q(w s) / s on the problem's grid.
template <typename T>
Matrix<T> rounded(const LinearProblem& problem, TensorView scales, Backend& backend) {
  const int64_t cols = problem.weight.cols();
  Tensor scaled = clone(problem.weight);
  multiply_columns(scaled, scales, backend);
  LinearProblem trial = problem;
  trial.weight = scaled;
  trial.settings.mse = false;
  const QuantizedLinear linear = round_to_nearest(trial, nullptr, backend).linear;
  backend.dequantize(linear, scaled);
  Matrix<T> w(scaled.as<T>(), scaled.as<T>() + scaled.elements());
  for (size_t i = 0; i < w.size(); ++i)
    w[i] /= static_cast<T>(scales.as<double>()[static_cast<int64_t>(i) % cols]);
  return w;
}

template <typename T>
std::vector<double> losses_of(const AwqModule& shape, const std::vector<std::string>& scaled,
                              std::span<const LinearProblem> problems, TensorView candidates,
                              Backend& backend) {
  const Module<T> module(shape);
  const int64_t count = candidates.rows(), n = candidates.cols(), sequences = module.sequences();
  std::vector<typename Module<T>::Weights> trials(count, module.weights());
  for (int64_t k = 0; k < count; ++k)
    for (size_t i = 0; i < scaled.size(); ++i)
      trials[k].at(scaled[i]) =
          rounded<T>(problems[i], candidates.slice(k, k + 1).reshaped({n}), backend);
  std::vector<double> sums(static_cast<size_t>(sequences * count));
  std::vector<int64_t> elements(static_cast<size_t>(sequences));
  backend.host_threads().parallel_for(sequences, [&](int64_t s, int) {
    const Matrix<T> want = module.output(module.weights(), s);
    elements[s] = static_cast<int64_t>(want.size());
    for (int64_t k = 0; k < count; ++k) {
      const Matrix<T> got = module.output(trials[k], s);
      for (size_t i = 0; i < want.size(); ++i) {
        const double e = static_cast<double>(want[i]) - static_cast<double>(got[i]);
        sums[s * count + k] += e * e;
      }
    }
  });
  std::vector<double> losses(static_cast<size_t>(count));
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t s = 0; s < sequences; ++s) losses[k] += sums[s * count + k];
    losses[k] /= static_cast<double>(sequences * elements[0]);
  }
  return losses;
}

}  // namespace

ScaleLoss module_loss(const AwqModule& module, const std::vector<std::string>& scaled,
                      std::span<const LinearProblem> problems, Backend& backend) {
  return [&module, &scaled, problems, &backend](TensorView candidates) {
    if (module.x.dtype == DType::kF64)
      return losses_of<double>(module, scaled, problems, candidates, backend);
    return losses_of<float>(module, scaled, problems, candidates, backend);
  };
}

}  // namespace bitmill
