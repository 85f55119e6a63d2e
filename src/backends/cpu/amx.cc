#include "backends/cpu/amx.h"

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

// The baseline is x86-64-v3: only these functions are compiled for AMX and AVX-512, and only available() CPUs run them.
#define BITMILL_AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl")))

namespace bitmill::amx {
namespace {

constexpr int64_t kRows = 16;          // rows of a tile
constexpr int64_t kDepth = 32;         // bf16 elements of a tile row
constexpr int64_t kTile = kRows * kDepth;
constexpr int64_t kBlock = 2 * kRows;  // a micro-kernel computes 32 x 32 results in four accumulators

// Steps of a slice of k in multiply_rows. 32 rows of A over a slice are 32 KiB, which stay in the L1 cache while all columns
// of B pass by; a slice of B stays in the L2 cache. Storing and loading sums changes no bits.
constexpr int64_t kSliceSteps = 16;

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// The compiler's own intrinsics do not say which memory they touch (GCC 12 drops stores that only a tile reads), so the
// few instructions are spelled out here.
template <int Tile>
BITMILL_AMX inline void tile_zero() {
  __asm__ __volatile__("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Tile>
BITMILL_AMX inline void tile_load(const void* at, int64_t stride_bytes) {
  __asm__ __volatile__("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(stride_bytes), "i"(Tile) : "memory");
}
template <int Tile>
BITMILL_AMX inline void tile_store(void* at, int64_t stride_bytes) {
  __asm__ __volatile__("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(stride_bytes), "i"(Tile) : "memory");
}
// Tile c += a b.
template <int C, int A, int B>
BITMILL_AMX inline void tile_multiply() {
  __asm__ __volatile__("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A tiles of one block of 32 rows: step s of the upper 16 rows at data + s * kTile, of the lower ones half_step further.
struct OperandA {
  const BFloat16* data;
  int64_t half_step;
};

// 32 x 32 results: accumulators 0-3, A tiles 4-5, B tiles 6-7.
BITMILL_AMX void multiply_block(const OperandA& a, const BFloat16* b, int64_t b_block, int64_t steps, float* c,
                                int64_t ldc, bool accumulate) {
  const int64_t ldc_bytes = ldc * int64_t{sizeof(float)};
  float* lower = c + kRows * ldc;
  if (accumulate) {
    tile_load<0>(c, ldc_bytes);
    tile_load<1>(c + kRows, ldc_bytes);
    tile_load<2>(lower, ldc_bytes);
    tile_load<3>(lower + kRows, ldc_bytes);
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  for (int64_t s = 0; s < steps; ++s) {
    tile_load<6>(b + s * kTile, 64);
    tile_load<4>(a.data + s * kTile, 64);
    tile_multiply<0, 4, 6>();
    tile_load<7>(b + b_block + s * kTile, 64);
    tile_multiply<1, 4, 7>();
    tile_load<5>(a.data + a.half_step + s * kTile, 64);
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
  tile_store<0>(c, ldc_bytes);
  tile_store<1>(c + kRows, ldc_bytes);
  tile_store<2>(lower, ldc_bytes);
  tile_store<3>(lower + kRows, ldc_bytes);
}

// A block at the lower or right edge: computed in a full-size buffer, the valid part is copied.
BITMILL_AMX void multiply_edge(const OperandA& a, const BFloat16* b, int64_t b_block, int64_t steps, int64_t rows,
                               int64_t cols, float* c, int64_t ldc, bool accumulate) {
  alignas(64) float full[kBlock * kBlock] = {};
  if (accumulate)
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(full + r * kBlock, c + r * ldc, static_cast<size_t>(cols) * sizeof(float));
  multiply_block(a, b, b_block, steps, full, kBlock, accumulate);
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(c + r * ldc, full + r * kBlock, static_cast<size_t>(cols) * sizeof(float));
}

// One block of up to 32 rows against all columns; b_block lies between two column blocks of B. Where the last pair of column
// blocks has one block only, the packed operand ends there: the first is read twice and the second result thrown away.
BITMILL_AMX void multiply_row_block(const OperandA& a, const BFloat16* b, int64_t b_block, int64_t rows, int64_t n,
                                    int64_t steps, float* c, int64_t ldc, bool accumulate) {
  for (int64_t col = 0; col < n; col += kBlock) {
    const int64_t cols = n - col < kBlock ? n - col : kBlock;
    const BFloat16* tiles = b + col / kRows * b_block;
    const int64_t second = cols > kRows ? b_block : 0;
    if (rows == kBlock && cols == kBlock)
      multiply_block(a, tiles, second, steps, c + col, ldc, accumulate);
    else
      multiply_edge(a, tiles, second, steps, rows, cols, c + col, ldc, accumulate);
  }
}

// Up to 32 rows [rows, k] into tiles of `steps` steps: upper 16 rows first. What is missing is zero.
void pack_a_rows(const BFloat16* a, int64_t lda, int64_t rows, int64_t k, int64_t steps, BFloat16* tiles) {
  const bool whole = rows == kBlock && k >= steps * kDepth;
  if (!whole) std::memset(tiles, 0, static_cast<size_t>(2 * steps * kTile) * sizeof(BFloat16));
  for (int64_t r = 0; r < rows; ++r) {
    BFloat16* to = tiles + r / kRows * steps * kTile + r % kRows * kDepth;
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t left = k - s * kDepth, count = left < kDepth ? left : kDepth;
      if (count == kDepth) std::memcpy(to + s * kTile, a + r * lda + s * kDepth, kDepth * sizeof(BFloat16));
      else std::memcpy(to + s * kTile, a + r * lda + s * kDepth, static_cast<size_t>(count) * sizeof(BFloat16));
    }
  }
}

// 16 x 16 transpose of 32-bit elements: in from rows of 64 bytes to rows of 64 bytes.
BITMILL_AMX void transpose_pairs(const BFloat16* in, int64_t in_stride, BFloat16* out) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + i * in_stride);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + i * kDepth, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 8) * kDepth, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_si512(out + (i + 4) * kDepth, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_si512(out + (i + 12) * kDepth, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
}

// Up to 16 values of a row, zeros behind `count`.
BITMILL_AMX __m512i load_widened(const BFloat16* row, int64_t count) {
  const __mmask16 mask = count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1u);
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
}

// B tile of pairs of rows 2 p, 2 p + 1 of x [rows, *]; rows beyond the end are zero.
BITMILL_AMX void pack_pairs(const BFloat16* x, int64_t stride, int64_t rows, int64_t cols, BFloat16* tile) {
  for (int64_t p = 0; p < kRows; ++p) {
    const __m512i even = 2 * p < rows ? load_widened(x + 2 * p * stride, cols) : _mm512_setzero_si512();
    const __m512i odd = 2 * p + 1 < rows ? load_widened(x + (2 * p + 1) * stride, cols) : _mm512_setzero_si512();
    _mm512_storeu_si512(tile + p * kDepth, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
}

void configure() {
  static constexpr TileConfig kConfig;
  __asm__ __volatile__("ldtilecfg %0" ::"m"(kConfig));
}

void release() { __asm__ __volatile__("tilerelease"); }

}  // namespace

bool available() {
  static const bool granted = [] {
    // The builtin knows the instruction set; Linux hands out the tile registers only on request (arch_prctl(2)).
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    unsigned a = 7, b, c = 0, d;
    __asm__ __volatile__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
}

int64_t packed_elements(int64_t blocks_of, int64_t k) { return round_up(blocks_of, kRows) * round_up(k, kDepth); }

BITMILL_AMX void pack_b_from_rows(const BFloat16* rows, int64_t n, int64_t k, int64_t stride, int64_t first, int64_t end,
                                  BFloat16* packed) {
  const int64_t steps = round_up(k, kDepth) / kDepth;
  for (int64_t block = first; block < end; ++block)
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t row = block * kRows, at = step * kDepth;
      BFloat16* tile = packed + (block * steps + step) * kTile;
      if (row + kRows <= n && at + kDepth <= k) {
        transpose_pairs(rows + row * stride + at, stride, tile);
        continue;
      }
      alignas(64) BFloat16 padded[kTile];
      std::memset(padded, 0, sizeof padded);
      const int64_t count = k - at < kDepth ? k - at : kDepth;
      for (int64_t r = 0; r < kRows && row + r < n; ++r)
        std::memcpy(padded + r * kDepth, rows + (row + r) * stride + at, static_cast<size_t>(count) * sizeof(BFloat16));
      transpose_pairs(padded, kDepth, tile);
    }
}

BITMILL_AMX void pack_gram(const BFloat16* x, int64_t tokens, int64_t n, int64_t first, int64_t end, BFloat16* packed_a,
                           BFloat16* packed_b) {
  const int64_t steps = round_up(tokens, kDepth) / kDepth;
  for (int64_t step = first; step < end; ++step)
    for (int64_t col = 0; col < n; col += kRows) {
      const int64_t at = (col / kRows * steps + step) * kTile;
      alignas(64) BFloat16 scratch[kTile];
      BFloat16* tile = packed_b != nullptr ? packed_b + at : scratch;
      pack_pairs(x + step * kDepth * n + col, n, tokens - step * kDepth, n - col, tile);
      if (packed_a != nullptr) transpose_pairs(tile, kDepth, packed_a + at);
    }
}

BITMILL_AMX void multiply_rows(const BFloat16* a, int64_t lda, const BFloat16* packed_b, int64_t m, int64_t n, int64_t k,
                               float* c, int64_t ldc, bool accumulate) {
  // A's rows are copied into tiles first: rows whose stride is a power of two would fight for the same cache sets, and a
  // ragged edge gets its zeros.
  alignas(64) BFloat16 slice[2 * kSliceSteps * kTile];
  const int64_t steps = round_up(k, kDepth) / kDepth;
  configure();
  for (int64_t s = 0; s < steps; s += kSliceSteps)
    for (int64_t row = 0; row < m; row += kBlock) {
      const int64_t rows = m - row < kBlock ? m - row : kBlock;
      const int64_t count = steps - s < kSliceSteps ? steps - s : kSliceSteps;
      pack_a_rows(a + row * lda + s * kDepth, lda, rows, k - s * kDepth, count, slice);
      const OperandA tiles{slice, count * kTile};
      multiply_row_block(tiles, packed_b + s * kTile, steps * kTile, rows, n, count, c + row * ldc, ldc,
                         accumulate || s > 0);
    }
  release();
}

BITMILL_AMX void multiply_packed(const BFloat16* packed_a, const BFloat16* packed_b, int64_t m, int64_t n, int64_t k,
                                 float* c, int64_t ldc) {
  const int64_t steps = round_up(k, kDepth) / kDepth;
  configure();
  for (int64_t row = 0; row < m; row += kBlock) {
    const int64_t rows = m - row < kBlock ? m - row : kBlock;
    const OperandA tiles{packed_a + row / kRows * steps * kTile, rows > kRows ? steps * kTile : 0};
    multiply_row_block(tiles, packed_b, steps * kTile, rows, n, steps, c + row * ldc, ldc, true);
  }
  release();
}

BITMILL_AMX void multiply_symmetric(const BFloat16* packed_a, const BFloat16* packed_b, int64_t n,
                                    int64_t k, float* c, int64_t ldc) {
  const int64_t steps = round_up(k, kDepth) / kDepth;
  configure();
  for (int64_t row = 0; row < n; row += kBlock) {
    const int64_t rows = n - row < kBlock ? n - row : kBlock;
    const OperandA tiles{packed_a + row / kRows * steps * kTile, rows > kRows ? steps * kTile : 0};
    multiply_row_block(tiles, packed_b, steps * kTile, rows, row + rows, steps, c + row * ldc, ldc,
                       true);
    for (int64_t j = 0; j < row; ++j)
      for (int64_t i = row; i < row + rows; ++i) c[j * ldc + i] = c[i * ldc + j];
  }
  release();
}

}  // namespace bitmill::amx
