// The elementwise kernels of the forward pass, for dispatch.h. Users are compiled like those of
// vector_math.h. Private to backends/cpu.
#pragma once

#include "backends/backend.h"
#include "backends/cpu/dispatch.h"
#include "backends/cpu/vector_math.h"

namespace bitmill {

// out = in in another float type.
template <typename In, typename Out>
struct Convert {
  BITMILL_KERNEL void run(const In* in, Out* __restrict out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) store_float(load_float(in[i]), out[i]);
  }
};

// out = x / sqrt(mean(x^2) + eps) * weight, row by row.
template <typename In, typename Out>
struct NormRows {
  BITMILL_KERNEL void run(const In* x, const float* weight, float eps, int64_t rows, int64_t n,
                          Out* out) {
    for (int64_t r = 0; r < rows; ++r) {
      const In* from = x + r * n;
      const float mean = sum_of_squares(from, n) / static_cast<float>(n);
      const float factor = 1.0f / std::sqrt(mean + eps);
      for (int64_t i = 0; i < n; ++i)
        store_float(load_float(from[i]) * factor * weight[i], out[r * n + i]);
    }
  }
};

// Rotary embedding of all heads of one token.
struct RopeHeads {
  BITMILL_KERNEL void run(float* __restrict x, int64_t heads, int64_t head_dim,
                          const float* __restrict cosine, const float* __restrict sine,
                          int64_t pairs) {
    for (int64_t h = 0; h < heads; ++h) {
      float *low = x + h * head_dim, *high = low + pairs;
      for (int64_t j = 0; j < pairs; ++j) {
        const float first = low[j], second = high[j];
        low[j] = first * cosine[j] - second * sine[j];
        high[j] = second * cosine[j] + first * sine[j];
      }
    }
  }
};

// `rows` rows of n elements, `stride` apart, to rows of C, `out_stride` apart.
template <typename C>
struct PackRows {
  BITMILL_KERNEL void run(const float* x, int64_t stride, int64_t rows, int64_t n,
                          C* __restrict out, int64_t out_stride) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < n; ++i) store_float(x[r * stride + i], out[r * out_stride + i]);
  }
};

// Rows of scores of one head, `keys` wide; row r sees keys [begin(r), first_end + r).
struct Softmax {
  float scale;  // > 0
  int64_t rows, keys;
  int64_t first_end, window;  // window 0: from key 0
};

// One row: p = e^(scale s - max) / sum over keys [begin, end), 0 elsewhere. scores and p may be the
// same memory. Scores beyond `end` are overwritten: whole vectors are computed, in which they count
// as nothing.
template <typename C>
BITMILL_INLINE void softmax_row(float* scores, float scale, int64_t keys, int64_t begin,
                                int64_t end, C* p) {
  const int64_t whole = begin + (end - begin + kLanes - 1) / kLanes * kLanes,
                padded = whole < keys ? whole : keys;
  for (int64_t j = end; j < padded; ++j) scores[j] = -INFINITY;
  const float top = largest(scores + begin, padded - begin) * scale;
  const float share = 1.0f / exponentials(scores + begin, padded - begin, scale, top);
  for (int64_t j = 0; j < begin; ++j) store_float(0.0f, p[j]);
  for (int64_t j = begin; j < padded; ++j) store_float(scores[j] * share, p[j]);
  for (int64_t j = end; j < keys; ++j) store_float(0.0f, p[j]);
}

template <typename C>
struct SoftmaxRows {
  BITMILL_KERNEL void run(float* scores, Softmax s, C* p) {
    for (int64_t r = 0; r < s.rows; ++r) {
      const int64_t end = s.first_end + r,
                    begin = s.window > 0 && end > s.window ? end - s.window : 0;
      softmax_row(scores + r * s.keys, s.scale, s.keys, begin, end, p + r * s.keys);
    }
  }
};

// out = a - b, rounded once.
template <typename A, typename B, typename Out>
struct Subtract {
  BITMILL_KERNEL void run(const A* a, const B* b, Out* __restrict out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) store_float(load_float(a[i]) - load_float(b[i]), out[i]);
  }
};

struct Silu {
  BITMILL_KERNEL float of(float x) { return x / (1.0f + exp_clamped(-x)); }
};
struct GeluTanh {  // (1 + tanh(u)) / 2 = 1 / (1 + e^(-2u))
  BITMILL_KERNEL float of(float x) {
    const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp_clamped(-2.0f * u));
  }
};
struct Relu {
  BITMILL_KERNEL float of(float x) { return x < 0.0f ? 0.0f : x; }
};

// out = act(gate) * up.
template <typename Act, typename Out>
struct Gate {
  BITMILL_KERNEL void run(const float* gate, const float* up, Out* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) store_float(Act::of(gate[i]) * up[i], out[i]);
  }
};

template <typename Out>
void gate_values(const float* gate, const float* up, Activation activation, int64_t count,
                 Out* out) {
  switch (activation) {
    case Activation::kSilu:
      return dispatch<Gate<Silu, Out>>(gate, up, out, count);
    case Activation::kGeluTanh:
      return dispatch<Gate<GeluTanh, Out>>(gate, up, out, count);
    case Activation::kRelu:
      return dispatch<Gate<Relu, Out>>(gate, up, out, count);
  }
}

}  // namespace bitmill
