// Matrix products on AMX tiles: bf16 operands, fp32 accumulation. Own kernels, because both products of this project have an
// operand that is used many times (a weight over all micro-batches, a panel of activations over a row of Hessian tiles):
// packed once into tile order it is never copied again. Private to backends/cpu; called only where amx_available().
//
// Packed operand: 16 x 32 tiles of 1 KiB, tile (b, s) at ((b * ceil(k / 32)) + s) * 512 elements; b counts blocks of 16
// columns (of B) or rows (of A), s steps of 32 along k; both padded with zeros.
//   B tile: 16 rows of pairs, element (p, 2 j + h) = B[32 s + 2 p + h][16 b + j]
//   A tile: 16 rows,          element (i, t)       = A[16 b + i][32 s + t]
// The two are 32-bit transposes of each other. Summation order per element: ascending k, fixed by the instruction.
// bf16 products are exact, but TDPBF16PS takes subnormal operands (magnitude below 2^-126) as zero.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace bitmill::amx {

// Does this CPU have AMX bf16, and does the kernel let this process use it? Asks once.
bool available();

// Elements of a packed operand of `blocks_of` columns (or rows) and depth k.
int64_t packed_elements(int64_t blocks_of, int64_t k);

// B operand from rows [n, k] (a weight [out, in]: y = x W^T), row stride `stride`. Column blocks [first, end) of 16.
void pack_b_from_rows(const BFloat16* rows, int64_t n, int64_t k, int64_t stride, int64_t first, int64_t end,
                      BFloat16* packed);

// A and B operands of x^T x from x [tokens, n]: depth steps [first, end) of 32 tokens. Either may be null: not wanted.
void pack_gram(const BFloat16* x, int64_t tokens, int64_t n, int64_t first, int64_t end, BFloat16* packed_a,
               BFloat16* packed_b);

// c [m, n] F32 (row stride ldc) = or += a b. a is row-major bf16 [m, k] with row stride lda, b packed (n columns).
void multiply_rows(const BFloat16* a, int64_t lda, const BFloat16* packed_b, int64_t m, int64_t n, int64_t k, float* c,
                   int64_t ldc, bool accumulate);

// c [m, n] += a b, both packed.
void multiply_packed(const BFloat16* packed_a, const BFloat16* packed_b, int64_t m, int64_t n, int64_t k, float* c,
                     int64_t ldc);

// The same where b is a's transpose (pack_gram's pair) and c [n, n] is symmetric before: the
// product is symmetric to the last bit, so little more than its lower triangle is computed and the
// rest copied from there.
void multiply_symmetric(const BFloat16* packed_a, const BFloat16* packed_b, int64_t n, int64_t k,
                        float* c, int64_t ldc);

}  // namespace bitmill::amx
