// Comparing two models' predictions.
#include <cmath>

#include "backends/cpu/cpu_backend.h"
#include "backends/cpu/vector_math.h"

namespace bitmill {
namespace {

struct Row {
  int64_t top = 0;       // index of the largest logit, the first of equals
  double log_total = 0;  // log sum e^logit
};

Row describe(const float* logits, int64_t vocab) {
  Row row;
  const float top = largest(logits, vocab);
  while (row.top + 1 < vocab && logits[row.top] != top) ++row.top;
  double sum = 0;
  for (int64_t i = 0; i < vocab; ++i) sum += std::exp(static_cast<double>(logits[i]) - top);
  row.log_total = top + std::log(sum);
  return row;
}

}  // namespace

void CpuBackend::token_kl(TensorView reference, TensorView logits, TensorView kl, TensorView agree) {
  const int64_t rows = logits.rows(), vocab = logits.cols();
  BITMILL_CHECK(reference.dtype == DType::kF32 && logits.dtype == DType::kF32 && reference.shape == logits.shape);
  BITMILL_CHECK(kl.dtype == DType::kF64 && kl.elements() == rows);
  BITMILL_CHECK(agree.dtype == DType::kI32 && agree.elements() == rows);
  pool_.parallel_for(rows, [&](int64_t t, int) {
    const float* p = reference.as<float>() + t * vocab;
    const float* q = logits.as<float>() + t * vocab;
    const Row a = describe(p, vocab), b = describe(q, vocab);
    double sum = 0;
    for (int64_t i = 0; i < vocab; ++i) {
      const double log_p = p[i] - a.log_total;
      sum += std::exp(log_p) * (log_p - (q[i] - b.log_total));
    }
    kl.as<double>()[t] = sum;
    agree.as<int32_t>()[t] = a.top == b.top;
  });
}

}  // namespace bitmill
