#include "support/naive.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace bitmill::testing {

namespace {
// A linear congruential generator with an output scramble: std::normal_distribution differs between
// libraries.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 0x632BE59BD9B4E019u) {}
  double uniform() {  // (0, 1)
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z ^= z >> 31;
    return (static_cast<double>(z >> 11) + 0.5) * 0x1p-53;
  }

 private:
  uint64_t state_;
};

double load(TensorView view, int64_t i) {
  switch (view.dtype) {
    case DType::kF16:
      return to_float(view.as<Float16>()[i]);
    case DType::kBF16:
      return to_float(view.as<BFloat16>()[i]);
    case DType::kF32:
      return view.as<float>()[i];
    case DType::kF64:
      return view.as<double>()[i];
    case DType::kI32:
      return view.as<int32_t>()[i];
    case DType::kU8:
      return view.as<uint8_t>()[i];
    default:
      break;
  }
  fail(ExitCode::kInternal, "naive: no conversion from {}", dtype_name(view.dtype));
}

void store(TensorView view, int64_t i, double value) {
  switch (view.dtype) {
    case DType::kF16:
      view.as<Float16>()[i] = to_f16(value);
      return;
    case DType::kBF16:
      view.as<BFloat16>()[i] = to_bf16(static_cast<float>(value));
      return;
    case DType::kF32:
      view.as<float>()[i] = static_cast<float>(value);
      return;
    case DType::kF64:
      view.as<double>()[i] = value;
      return;
    case DType::kI32:
      view.as<int32_t>()[i] = static_cast<int32_t>(value);
      return;
    case DType::kU8:
      view.as<uint8_t>()[i] = static_cast<uint8_t>(value);
      return;
    default:
      break;
  }
  fail(ExitCode::kInternal, "naive: no conversion to {}", dtype_name(view.dtype));
}
}  // namespace

Values random_values(int64_t count, uint64_t seed, double scale) {
  constexpr double kTwoPi = 6.283185307179586476925;
  Random random(seed);
  Values values(static_cast<size_t>(count));
  for (double& value : values) {  // Box-Muller
    const double radius = std::sqrt(-2 * std::log(random.uniform()));
    value = scale * radius * std::cos(kTwoPi * random.uniform());
  }
  return values;
}

Tensor to_tensor(DType dtype, Shape shape, const Values& values) {
  Tensor tensor(dtype, shape);
  BITMILL_CHECK(tensor.elements() == static_cast<int64_t>(values.size()));
  for (int64_t i = 0; i < tensor.elements(); ++i) store(tensor, i, values[i]);
  return tensor;
}

Values to_values(TensorView view) {
  Values values(static_cast<size_t>(view.elements()));
  for (int64_t i = 0; i < view.elements(); ++i) values[i] = load(view, i);
  return values;
}

Values rounded(const Values& values, DType dtype) {
  return to_values(to_tensor(dtype, {static_cast<int64_t>(values.size())}, values));
}

double max_difference(const Values& a, const Values& b) {
  if (a.size() != b.size()) return std::numeric_limits<double>::infinity();
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i]))) continue;
    const double difference = std::abs(a[i] - b[i]);
    if (std::isnan(difference)) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, difference);
  }
  return worst;
}

double max_magnitude(const Values& values) {
  double worst = 0;
  for (double value : values) worst = std::max(worst, std::abs(value));
  return worst;
}

Values naive_matmul_bt(const Values& a, const Values& b, int64_t m, int64_t n, int64_t k) {
  Values c(static_cast<size_t>(m * n));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t p = 0; p < k; ++p) sum += a[i * k + p] * b[j * k + p];
      c[i * n + j] = sum;
    }
  return c;
}

Values naive_rms_norm(const Values& x, const Values& weight, double eps, int64_t tokens,
                      int64_t n) {
  Values out(x.size());
  for (int64_t t = 0; t < tokens; ++t) {
    double squares = 0;
    for (int64_t i = 0; i < n; ++i) squares += x[t * n + i] * x[t * n + i];
    const double factor = 1 / std::sqrt(squares / static_cast<double>(n) + eps);
    for (int64_t i = 0; i < n; ++i) out[t * n + i] = x[t * n + i] * factor * weight[i];
  }
  return out;
}

Values naive_rope(const Values& x, const Values& table, int64_t tokens, int64_t heads,
                  int64_t head_dim, int64_t length, int64_t pairs) {
  Values out = x;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t j = 0; j < pairs; ++j) {
        const double cosine = table[(t % length) * 2 * pairs + j];
        const double sine = table[(t % length) * 2 * pairs + pairs + j];
        const int64_t first = (t * heads + h) * head_dim + j, second = first + pairs;
        out[first] = x[first] * cosine - x[second] * sine;
        out[second] = x[second] * cosine + x[first] * sine;
      }
  return out;
}

Values naive_attention(const Values& q, const Values& k, const Values& v,
                       const NaiveAttention& shape) {
  const int64_t d = shape.head_dim, group = shape.heads / shape.kv_heads;
  const auto at = [&](const Values& x, int64_t heads, int64_t token, int64_t head) {
    return x.data() + (token * heads + head) * d;
  };
  Values out(q.size());
  for (int64_t s = 0; s < shape.sequences; ++s)
    for (int64_t h = 0; h < shape.heads; ++h)
      for (int64_t i = 0; i < shape.length; ++i) {
        const int64_t row = s * shape.length + i;
        const int64_t begin = shape.window > 0 ? std::max<int64_t>(0, i - shape.window + 1) : 0;
        Values p;
        double largest = -std::numeric_limits<double>::infinity(), sum = 0;
        for (int64_t j = begin; j <= i; ++j) {
          double dot = 0;
          const double* key = at(k, shape.kv_heads, s * shape.length + j, h / group);
          for (int64_t e = 0; e < d; ++e) dot += at(q, shape.heads, row, h)[e] * key[e];
          p.push_back(dot * shape.scale);
          largest = std::max(largest, p.back());
        }
        for (double& value : p) sum += value = std::exp(value - largest);
        for (int64_t j = begin; j <= i; ++j)
          for (int64_t e = 0; e < d; ++e)
            out[(row * shape.heads + h) * d + e] +=
                p[j - begin] / sum * at(v, shape.kv_heads, s * shape.length + j, h / group)[e];
      }
  return out;
}

double naive_silu(double x) {
  return x / (1 + std::exp(-x));
}

double naive_gelu_tanh(double x) {
  constexpr double kSqrtTwoOverPi = 0.79788456080286535588;
  return 0.5 * x * (1 + std::tanh(kSqrtTwoOverPi * (x + 0.044715 * x * x * x)));
}

double naive_relu(double x) {
  return std::max(x, 0.0);
}

Values naive_token_nll(const Values& logits, const std::vector<int>& targets, int64_t vocab) {
  Values nll(targets.size());
  for (size_t t = 0; t < targets.size(); ++t) {
    if (targets[t] < 0) continue;
    const double* row = logits.data() + static_cast<int64_t>(t) * vocab;
    const double largest = *std::max_element(row, row + vocab);
    double sum = 0;
    for (int64_t i = 0; i < vocab; ++i) sum += std::exp(row[i] - largest);
    nll[t] = largest + std::log(sum) - row[targets[t]];
  }
  return nll;
}

Values naive_gram(const Values& x, int64_t tokens, int64_t n) {
  Values h(static_cast<size_t>(n * n));
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) h[i * n + j] += x[t * n + i] * x[t * n + j];
  return h;
}

Values naive_cholesky(const Values& a, int64_t n) {
  Values l(static_cast<size_t>(n * n));
  for (int64_t j = 0; j < n; ++j) {
    double pivot = a[j * n + j];
    for (int64_t p = 0; p < j; ++p) pivot -= l[j * n + p] * l[j * n + p];
    if (!(pivot > 0)) return {};
    l[j * n + j] = std::sqrt(pivot);
    for (int64_t i = j + 1; i < n; ++i) {
      double sum = a[i * n + j];
      for (int64_t p = 0; p < j; ++p) sum -= l[i * n + p] * l[j * n + p];
      l[i * n + j] = sum / l[j * n + j];
    }
  }
  return l;
}

}  // namespace bitmill::testing
