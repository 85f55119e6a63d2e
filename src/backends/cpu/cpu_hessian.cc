// The Hessian: x^T x accumulated by tiles of the lower triangle, and the passes that read the
// packed triangle.
#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "backends/cpu/amx.h"
#include "backends/cpu/cpu_backend.h"
#include "backends/cpu/matmul.h"
#include "backends/cpu/vector_math.h"

namespace bitmill {

namespace {
// One tile of the lower triangle.
struct Tile {
  int64_t row, col;    // tile coordinates, col <= row
  int64_t rows, cols;  // edge lengths
  int64_t offset;      // of its first element in the packed triangle
};

int64_t tile_rows(int64_t n) {
  return (n + hessian_tile(n) - 1) / hessian_tile(n);
}

Tile tile_at(int64_t n, int64_t row, int64_t col) {
  const int64_t edge = hessian_tile(n);
  return {row, col, std::min(edge, n - row * edge), std::min(edge, n - col * edge),
          hessian_tile_offset(n, row, col)};
}

// All tiles, row of tiles by row of tiles.
std::vector<Tile> all_tiles(int64_t n) {
  std::vector<Tile> tiles;
  for (int64_t row = 0; row < tile_rows(n); ++row)
    for (int64_t col = 0; col <= row; ++col) tiles.push_back(tile_at(n, row, col));
  return tiles;
}

// Rows [begin, end) of x [tokens, n] into panels: per tile of columns a dense [tokens, columns],
// one after another.
void pack_panels(TensorView x, int64_t begin, int64_t end, char* panels) {
  const int64_t tokens = x.rows(), n = x.cols(), edge = hessian_tile(n),
                element = dtype_bits(x.dtype) / 8;
  for (int64_t col = 0; col < n; col += edge) {
    const int64_t cols = std::min(edge, n - col);
    char* panel = panels + col * tokens * element;
    for (int64_t t = begin; t < end; ++t)
      std::memcpy(panel + t * cols * element, x.as<char>() + (t * n + col) * element,
                  static_cast<size_t>(cols * element));
  }
}

// Rows of H that belong to tile row `row`, in full (the part right of the diagonal comes from the
// tiles below it).
template <typename T>
void expand_tile_row(const T* h, int64_t n, int64_t row, T* out) {
  const int64_t edge = hessian_tile(n);
  for (int64_t other = 0; other < tile_rows(n); ++other) {
    const Tile tile = tile_at(n, std::max(row, other), std::min(row, other));
    const T* from = h + tile.offset;
    T* to = out + other * edge;
    if (other <= row) {
      for (int64_t r = 0; r < tile.rows; ++r)
        std::copy_n(from + r * tile.cols, tile.cols, to + r * n);
    } else {
      for (int64_t c = 0; c < tile.cols; ++c)
        for (int64_t r = 0; r < tile.rows; ++r) to[c * n + r] = from[r * tile.cols + c];
    }
  }
}

template <typename T, typename Out>
void gather_row(const T* row, const int32_t* order, double factor, int64_t count, Out* out) {
  for (int64_t j = 0; j < count; ++j)
    out[j] = static_cast<Out>(factor * static_cast<double>(row[order[j]]));
}

double diagonal_value(TensorView diagonal, int64_t i) {
  return diagonal.dtype == DType::kF64 ? diagonal.as<double>()[i] : diagonal.as<float>()[i];
}

template <typename T, typename Out>
void gather(ThreadPool& pool, const std::vector<std::unique_ptr<MatmulContext>>& contexts,
            const T* h, const int32_t* order, double factor, TensorView diagonal, int64_t n,
            Out* out) {
  std::vector<int64_t> position(n);
  for (int64_t i = 0; i < n; ++i) position[order[i]] = i;
  const int64_t edge = hessian_tile(n);
  pool.parallel_for(tile_rows(n), [&](int64_t row, int thread) {
    const int64_t first = row * edge, rows = std::min(edge, n - first);
    T* full = static_cast<T*>(contexts[thread]->workspace(rows * n * int64_t{sizeof(T)}));
    expand_tile_row(h, n, row, full);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = position[first + r];
      gather_row(full + r * n, order, factor, at, out + at * n);
      out[at * n + at] = static_cast<Out>(diagonal_value(diagonal, first + r));
    }
  });
}

template <typename Body>
void with_real_type(TensorView x, Body body) {
  BITMILL_CHECK(x.dtype == DType::kF32 || x.dtype == DType::kF64);
  if (x.dtype == DType::kF32) return body(x.as<float>());
  body(x.as<double>());
}
}  // namespace

// Small Hessians need many tiles to feed many threads (and waste less on the diagonal); large ones
// do fewer, larger products. Both sizes keep a tile and its two panels of a micro-batch in an L2
// cache.
int64_t hessian_tile(int64_t n) {
  return n < 2048 ? 128 : 256;
}

int64_t hessian_elements(int64_t n) {
  return hessian_tile_offset(n, tile_rows(n), 0);
}

int64_t hessian_tile_offset(int64_t n, int64_t tile_row, int64_t tile_col) {
  const int64_t edge = hessian_tile(n), begin = std::min(n, tile_row * edge);
  const int64_t rows = std::min(edge, n - begin);
  // Tile rows above are full (only the last one may be lower): row R holds edge x (R + 1) edge
  // elements.
  int64_t above = tile_row * (tile_row + 1) / 2 * edge * edge;
  if (tile_row * edge > n) {  // the end of the triangle, behind a short last row
    const int64_t last = n - (tile_row - 1) * edge;
    above = (tile_row - 1) * tile_row / 2 * edge * edge + last * n;
  }
  return above + rows * tile_col * edge;
}

void CpuBackend::hessian_update(TensorView x, TensorView h) {
  const int64_t tokens = x.rows(), n = x.cols(), edge = hessian_tile(n),
                element = dtype_bits(x.dtype) / 8;
  BITMILL_CHECK(h.elements() == hessian_elements(n));
  BITMILL_CHECK(h.dtype == (x.dtype == DType::kF64 ? DType::kF64 : DType::kF32));
  if (tokens == 0) return;
  if (amx_ && x.dtype == DType::kBF16) return hessian_update_amx(x, h);
  Tensor panels(x.dtype, {tokens, n});  // one dense panel of columns after another
  const auto panel = [&](int64_t i) { return panels.as<char>() + i * edge * tokens * element; };
  constexpr int64_t kPackRows = 128;
  pool_.parallel_for((tokens + kPackRows - 1) / kPackRows, [&](int64_t item, int) {
    pack_panels(x, item * kPackRows, std::min(tokens, (item + 1) * kPackRows), panels.as<char>());
  });
  const std::vector<Tile> tiles = all_tiles(n);
  pool_.parallel_for(static_cast<int64_t>(tiles.size()), [&](int64_t item, int thread) {
    const Tile& tile = tiles[item];
    if (x.dtype == DType::kF64) {
      cblas_dgemm(CblasRowMajor, CblasTrans, CblasNoTrans, static_cast<int>(tile.rows),
                  static_cast<int>(tile.cols), static_cast<int>(tokens), 1.0,
                  reinterpret_cast<const double*>(panel(tile.row)), static_cast<int>(tile.rows),
                  reinterpret_cast<const double*>(panel(tile.col)), static_cast<int>(tile.cols),
                  1.0, h.as<double>() + tile.offset, static_cast<int>(tile.cols));
      return;
    }
    contexts_[thread]->run({.type = x.dtype,
                            .m = tile.rows,
                            .n = tile.cols,
                            .k = tokens,
                            .lda = tile.rows,
                            .ldb = tile.cols,
                            .ldc = tile.cols,
                            .transpose_a = true,
                            .accumulate = true},
                           panel(tile.row), panel(tile.col), nullptr, h.as<float>() + tile.offset);
  });
}

// Both operands are packed once per micro-batch; every tile then streams two packed panels.
void CpuBackend::hessian_update_amx(TensorView x, TensorView h) {
  const int64_t tokens = x.rows(), n = x.cols(), edge = hessian_tile(n);
  Tensor a(DType::kBF16, {amx::packed_elements(n, tokens)}), b(DType::kBF16, {amx::packed_elements(n, tokens)});
  constexpr int64_t kSteps = 4;  // 128 tokens per packing item
  const int64_t steps = (tokens + 31) / 32;
  pool_.parallel_for((steps + kSteps - 1) / kSteps, [&](int64_t item, int) {
    amx::pack_gram(x.as<BFloat16>(), tokens, n, item * kSteps, std::min(steps, (item + 1) * kSteps), a.as<BFloat16>(),
                   b.as<BFloat16>());
  });
  const std::vector<Tile> tiles = all_tiles(n);
  pool_.parallel_for(static_cast<int64_t>(tiles.size()), [&](int64_t item, int) {
    const Tile& tile = tiles[item];
    const BFloat16* rows = a.as<BFloat16>() + amx::packed_elements(tile.row * edge, tokens);
    const BFloat16* cols = b.as<BFloat16>() + amx::packed_elements(tile.col * edge, tokens);
    float* const sums = h.as<float>() + tile.offset;
    if (tile.row == tile.col)
      amx::multiply_symmetric(rows, cols, tile.rows, tokens, sums, tile.cols);
    else
      amx::multiply_packed(rows, cols, tile.rows, tile.cols, tokens, sums, tile.cols);
  });
}

void CpuBackend::add_magnitudes(TensorView x, TensorView sums) {
  const int64_t tokens = x.rows(), n = x.cols();
  BITMILL_CHECK(sums.dtype == DType::kF64 && sums.elements() == n);
  constexpr int64_t kColumns = 64;  // a column belongs to one thread, whatever their number
  const auto add_columns = [&](const auto* from, int64_t first) {
    const int64_t count = std::min(kColumns, n - first);
    double* to = sums.as<double>() + first;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t c = 0; c < count; ++c) {
        const auto value = from[t * n + first + c];
        if constexpr (std::is_same_v<std::decay_t<decltype(value)>, double>)
          to[c] += std::abs(value);
        else
          to[c] += std::abs(double{load_float(value)});
      }
  };
  pool_.parallel_for((n + kColumns - 1) / kColumns, [&](int64_t item, int) {
    const int64_t first = item * kColumns;
    if (x.dtype == DType::kBF16) return add_columns(x.as<BFloat16>(), first);
    if (x.dtype == DType::kF32) return add_columns(x.as<float>(), first);
    BITMILL_CHECK(x.dtype == DType::kF64);
    add_columns(x.as<double>(), first);
  });
}

void CpuBackend::add(TensorView a, TensorView b) {
  BITMILL_CHECK(a.dtype == b.dtype && a.elements() == b.elements());
  constexpr int64_t kChunk = 1 << 16;
  const int64_t n = a.elements();
  with_real_type(a, [&](auto* to) {
    const auto* from = static_cast<decltype(to)>(b.data);
    pool_.parallel_for((n + kChunk - 1) / kChunk, [&](int64_t item, int) {
      const int64_t end = std::min(n, (item + 1) * kChunk);
      for (int64_t i = item * kChunk; i < end; ++i) to[i] += from[i];
    });
  });
}

void CpuBackend::hessian_diagonal(TensorView h, int64_t n, TensorView out) {
  BITMILL_CHECK(h.elements() == hessian_elements(n) && out.elements() == n);
  const int64_t edge = hessian_tile(n);
  with_real_type(h, [&](const auto* from) {
    with_real_type(out, [&](auto* to) {
      for (int64_t i = 0; i < n; ++i) {
        const Tile tile = tile_at(n, i / edge, i / edge);
        to[i] = static_cast<std::decay_t<decltype(*to)>>(
            from[tile.offset + i % edge * (tile.cols + 1)]);
      }
    });
  });
}

void CpuBackend::hessian_gather(TensorView h, TensorView order, double factor, TensorView diagonal,
                                TensorView out) {
  const int64_t n = order.elements();
  BITMILL_CHECK(h.elements() == hessian_elements(n) && order.dtype == DType::kI32);
  BITMILL_CHECK(diagonal.elements() == n && out.rows() == n && out.cols() == n);
  with_real_type(h, [&](const auto* from) {
    with_real_type(out, [&](auto* to) {
      gather(pool_, contexts_, from, order.as<int32_t>(), factor, diagonal, n, to);
    });
  });
}

}  // namespace bitmill
