// Rows and elements of the forward pass: embedding, norm, rotary embedding, gated activation, token
// loss.
#include <algorithm>
#include <cmath>

#include "backends/cpu/cpu_backend.h"
#include "backends/cpu/kernels.h"

namespace bitmill {

namespace {
// Rows per work item: about 64 Ki elements, so that an item outweighs its hand-out and stays in
// cache.
int64_t rows_per_item(int64_t cols) {
  return std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(cols, 1));
}

template <typename Body>  // body(first row, end row)
void for_rows(ThreadPool& pool, int64_t rows, int64_t cols, Body body) {
  const int64_t step = rows_per_item(cols);
  pool.parallel_for((rows + step - 1) / step, [&](int64_t item, int) {
    body(item * step, std::min(rows, (item + 1) * step));
  });
}

// Calls body with a typed pointer to a float tensor's data.
template <typename Body>
void with_float_type(TensorView x, Body body) {
  switch (x.dtype) {
    case DType::kF32:
      return body(x.as<float>());
    case DType::kBF16:
      return body(x.as<BFloat16>());
    case DType::kF16:
      return body(x.as<Float16>());
    default:
      fail(ExitCode::kInternal, "{} is not a type of activations", dtype_name(x.dtype));
  }
}

// The same for outputs, which are never F16.
template <typename Body>
void with_out_type(TensorView x, Body body) {
  if (x.dtype == DType::kF32) return body(x.as<float>());
  BITMILL_CHECK(x.dtype == DType::kBF16);
  body(x.as<BFloat16>());
}

// log of the sum of e^logit; terms in fp32, their sum in double by lanes.
double log_sum_exp(const float* logits, int64_t n) {
  const float top = largest(logits, n);
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += fast_exp(logits[i + l] - top);
  for (int64_t l = 0; i < n; ++i, ++l) lanes[l] += fast_exp(logits[i] - top);
  return top + std::log(fold_lanes(lanes, Sum<double>{}));
}
}  // namespace

void CpuBackend::embed(TensorView ids, TensorView table, TensorView out) {
  const int64_t hidden = table.cols();
  BITMILL_CHECK(ids.dtype == DType::kI32 && out.rows() == ids.elements() && out.cols() == hidden);
  with_float_type(table, [&](auto* rows) {
    with_out_type(out, [&](auto* to) {
      for_rows(pool_, out.rows(), hidden, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const auto* row = rows + ids.as<int32_t>()[t] * hidden;
          for (int64_t i = 0; i < hidden; ++i) store_float(load_float(row[i]), to[t * hidden + i]);
        }
      });
    });
  });
}

void CpuBackend::rms_norm(TensorView x, TensorView weight, float eps, TensorView out) {
  const int64_t n = weight.elements(), tokens = x.elements() / n;
  BITMILL_CHECK(weight.dtype == DType::kF32 && out.elements() == x.elements() &&
                tokens * n == x.elements());
  with_float_type(x, [&](auto* from) {
    with_out_type(out, [&](auto* to) {
      for_rows(pool_, tokens, n, [&](int64_t begin, int64_t end) {
        using In = std::decay_t<decltype(*from)>;
        using Out = std::decay_t<decltype(*to)>;
        dispatch<NormRows<In, Out>>(from + begin * n, weight.as<float>(), eps, end - begin, n, to + begin * n);
      });
    });
  });
}

void CpuBackend::rope(TensorView x, int64_t heads, int64_t head_dim, TensorView table) {
  const int64_t length = table.rows(), pairs = table.cols() / 2, width = heads * head_dim;
  const int64_t tokens = x.elements() / width;
  BITMILL_CHECK(x.dtype == DType::kF32 && table.dtype == DType::kF32 &&
                tokens * width == x.elements());
  BITMILL_CHECK(2 * pairs <= head_dim && tokens % length == 0);
  for_rows(pool_, tokens, width, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* cosine = table.as<float>() + t % length * 2 * pairs;
      dispatch<RopeHeads>(x.as<float>() + t * width, heads, head_dim, cosine, cosine + pairs, pairs);
    }
  });
}

void CpuBackend::gated_activation(TensorView gate, TensorView up, Activation activation,
                                  TensorView out) {
  const int64_t n = out.elements();
  BITMILL_CHECK(gate.dtype == DType::kF32 && up.dtype == DType::kF32);
  BITMILL_CHECK(gate.elements() == n && up.elements() == n);
  with_out_type(out, [&](auto* to) {
    for_rows(pool_, n, 1, [&](int64_t begin, int64_t end) {
      gate_values(gate.as<float>() + begin, up.as<float>() + begin, activation, end - begin,
                  to + begin);
    });
  });
}

void CpuBackend::token_nll(TensorView logits, TensorView targets, TensorView nll) {
  const int64_t vocab = logits.cols();
  BITMILL_CHECK(logits.dtype == DType::kF32 && targets.dtype == DType::kI32 &&
                nll.dtype == DType::kF64);
  BITMILL_CHECK(targets.elements() == logits.rows() && nll.elements() == logits.rows());
  for_rows(pool_, logits.rows(), vocab, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* row = logits.as<float>() + t * vocab;
      const int32_t target = targets.as<int32_t>()[t];
      nll.as<double>()[t] = target < 0 ? 0 : log_sum_exp(row, vocab) - row[target];
    }
  });
}

}  // namespace bitmill
