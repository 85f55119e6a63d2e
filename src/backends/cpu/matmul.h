// One matrix product on the calling thread, through oneDNN. Private to backends/cpu.
#pragma once

#include <compare>
#include <cstdint>
#include <memory>

#include "core/dtype.h"

namespace bitmill {

// c [m, n] (F32, row stride ldc) = or += a b (+ bias [n], F32), a and b both of `type` (kBF16 or
// kF32), fp32 accumulation.
//   a is [m, k] with row stride lda, or, transposed, stored as [k, m]
//   b is [k, n] with row stride ldb, or, transposed, stored as [n, k]
// oneDNN's fastest kernels want operands without gaps: stride = stored columns.
struct MatmulSpec {
  DType type = DType::kF32;
  int64_t m = 0, n = 0, k = 0;
  int64_t lda = 0, ldb = 0, ldc = 0;
  bool transpose_a = false, transpose_b = false;
  bool accumulate = false;
  bool bias = false;
  auto operator<=>(const MatmulSpec&) const = default;
};

// What one pool thread needs to multiply: engine, stream, compiled products by spec, scratch memory
// and a workspace. Not thread-safe: one per thread. Runs on one thread because the pool's threads
// set OpenMP to one.
class MatmulContext {
 public:
  MatmulContext();
  ~MatmulContext();
  MatmulContext(const MatmulContext&) = delete;
  MatmulContext& operator=(const MatmulContext&) = delete;

  void run(const MatmulSpec& spec, const void* a, const void* b, const float* bias, float* c);

  // Memory for the tile that the calling thread works on: 64-byte aligned, uninitialised, valid
  // until the next call.
  void* workspace(int64_t bytes);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Does oneDNN multiply bf16 on this CPU (AVX-512; in hardware or emulated)? Where not, run() widens
// bf16 to fp32 first, which is exact.
bool matmul_has_bf16();

}  // namespace bitmill
