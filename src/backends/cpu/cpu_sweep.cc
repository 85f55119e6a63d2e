// The GPTQ column sweep in factor form, left-looking, one tile of 256 rows per thread.
//
// H = L L^T in solving order (position n-1 first). With e_j = w_j - q_j of the positions j > k
// already solved,
//   t_k = w_k + (sum_j e_j L_jk) / L_kk,   q_k = round(t_k),   loss += L_kk^2 (t_k - q_k)^2 / 2.
// Per block of positions the sums over earlier blocks are one single-threaded product L[done,
// block]^T E[done]; inside the block they grow eight positions at a time. A tile lies transposed,
// [position][row], so that every inner loop runs over rows; its errors replace its weights in
// place. docs/algorithms.md derives all this.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "backends/cpu/cpu_backend.h"
#include "backends/cpu/cpu_blas.h"
#include "backends/cpu/dispatch.h"

namespace bitmill {
namespace {

constexpr int64_t kTileRows = 256;
constexpr int64_t kPanel = 8;     // positions between two register-blocked updates inside a block
constexpr int64_t kRowUnit = 16;  // tile rows are padded to a multiple of this

// What all tiles of a sweep share.
template <typename T>
struct Problem {
  const T* factor;
  int64_t n;
  const int32_t* order;           // original column of each position
  std::vector<int32_t> position;  // inverse of order
  int64_t block;
};

// The inner loops work on plain pointers: only then does the compiler prove them apart and
// vectorise over rows. Explicit fma gives the same bits on every machine, whatever the contraction
// flag says.

// y += factor * x.
template <typename T>
BITMILL_INLINE void add_scaled(int64_t rows, T factor, const T* __restrict x, T* __restrict y) {
  for (int64_t r = 0; r < rows; ++r) y[r] = std::fma(factor, x[r], y[r]);
}

// y0 += sum_j l[j][0] x[j], y1 += sum_j l[j][1] x[j] for four rows of x: eight factors stay in
// registers.
template <typename T>
BITMILL_INLINE void add_four(int64_t rows, const T* l, int64_t ldl, const T* __restrict x,
                             T* __restrict y0, T* __restrict y1) {
  const T *x0 = x, *x1 = x + rows, *x2 = x + 2 * rows, *x3 = x + 3 * rows;
  const T a0 = l[0], a1 = l[ldl], a2 = l[2 * ldl], a3 = l[3 * ldl];
  const T b0 = l[1], b1 = l[ldl + 1], b2 = l[2 * ldl + 1], b3 = l[3 * ldl + 1];
  for (int64_t r = 0; r < rows; ++r) {
    y0[r] =
        std::fma(a3, x3[r], std::fma(a2, x2[r], std::fma(a1, x1[r], std::fma(a0, x0[r], y0[r]))));
    y1[r] =
        std::fma(b3, x3[r], std::fma(b2, x2[r], std::fma(b1, x1[r], std::fma(b0, x0[r], y1[r]))));
  }
}

// acc[c][r] += sum_{j < count} l[j * ldl + c] * e[j][r] for c < width and all rows r.
template <typename T>
struct Accumulate {
  BITMILL_KERNEL void run(const T* l, int64_t ldl, const T* e, int64_t count, T* acc, int64_t width,
                          int64_t rows) {
    int64_t c = 0;
    for (; c + 2 <= width; c += 2) {
      T *y0 = acc + c * rows, *y1 = y0 + rows;
      int64_t j = 0;
      for (; j + 4 <= count; j += 4) add_four(rows, l + j * ldl + c, ldl, e + j * rows, y0, y1);
      for (; j < count; ++j) {
        add_scaled(rows, l[j * ldl + c], e + j * rows, y0);
        add_scaled(rows, l[j * ldl + c + 1], e + j * rows, y1);
      }
    }
    for (int64_t j = 0; c < width && j < count; ++j)
      add_scaled(rows, l[j * ldl + c], e + j * rows, acc + c * rows);
  }
};

// acc[c][r] += l[c] * e[r] for c < width.
template <typename T>
struct FeedBack {
  BITMILL_KERNEL void run(const T* l, const T* e, T* acc, int64_t width, int64_t rows) {
    for (int64_t c = 0; c < width; ++c) add_scaled(rows, l[c], e, acc + c * rows);
  }
};

// Rounds one position of all rows: t = w + inverse * sum. `e` holds the weights and receives the
// errors.
template <typename T, typename Codes>
struct RoundRows {
  BITMILL_KERNEL void run(int64_t rows, T inverse, T half_d, Codes codes, const T* __restrict sum,
                          const T* __restrict scale, const T* __restrict zero, T* __restrict e,
                          T* __restrict code, T* __restrict loss, T* __restrict square) {
    for (int64_t r = 0; r < rows; ++r) {
      const Grid<T> grid{scale[r], zero[r]};
      const T w = e[r], t = w + sum[r] * inverse;
      code[r] = codes.code(t, grid);
      const T q = codes.value(code[r], grid);
      loss[r] += half_d * ((t - q) * (t - q));
      e[r] = w - q;
      square[r] += (w - q) * (w - q);
    }
  }
};

template <typename T>
void narrow(int64_t rows, const T* __restrict code, uint8_t* __restrict out) {
  for (int64_t r = 0; r < rows; ++r) out[r] = static_cast<uint8_t>(static_cast<int32_t>(code[r]));
}

// One tile: rows [first, first + live) of one item.
template <typename T>
class TileSweep {
 public:
  TileSweep(const Problem<T>& problem, const SweepItem& item, int64_t first, int64_t live)
      : p_(problem),
        item_(item),
        first_(first),
        live_(live),
        rows_((live + kRowUnit - 1) / kRowUnit * kRowUnit),
        groups_(item.scales.cols()),
        reach_(p_.block + (item.refit_grids ? std::min(item.group_size, p_.n) : 0)),
        tile_(buffer(p_.n)),
        sums_(buffer(reach_)),
        scale_(buffer(groups_)),
        zero_(buffer(groups_)),
        code_(buffer(1)),
        loss_(buffer(1)),
        square_(buffer(1)),
        codes_(DType::kU8, {p_.n * rows_}),
        row_loss_(rows_, 0.0),
        row_square_(rows_, 0.0) {
    if (item.refit_grids) compensated_ = buffer(reach_), feedback_ = buffer(reach_);
  }

  void run() {
    load_weights();
    load_grids();
    for (int64_t hi = p_.n; hi > 0; hi -= p_.block)
      solve_block(std::max<int64_t>(0, hi - p_.block), hi);
    store_codes();
    store_results();
  }

 private:
  static constexpr DType kType = sizeof(T) == 8 ? DType::kF64 : DType::kF32;
  Tensor buffer(int64_t columns) const { return Tensor(kType, {columns * rows_}); }
  T* column(const Tensor& buffer, int64_t index) const { return buffer.as<T>() + index * rows_; }
  int32_t group_of(int64_t position) const {
    return item_.column_group.as<int32_t>()[p_.order[position]];
  }

  // Sixteen source rows at a time stay in cache while their columns are visited in solving order.
  void load_weights() {
    std::memset(tile_.data(), 0, static_cast<size_t>(tile_.bytes()));
    for (int64_t r0 = 0; r0 < live_; r0 += kRowUnit) {
      const int64_t count = std::min(kRowUnit, live_ - r0);
      const T* w = item_.weight.as<T>() + (first_ + r0) * p_.n;
      for (int64_t k = 0; k < p_.n; ++k) {
        T* out = column(tile_, k) + r0;
        for (int64_t r = 0; r < count; ++r) out[r] = w[r * p_.n + p_.order[k]];
      }
    }
  }

  // Padding rows get the harmless grid (1, 0).
  void load_grids() {
    std::fill_n(scale_.as<T>(), groups_ * rows_, T(1));
    std::fill_n(zero_.as<T>(), groups_ * rows_, T(0));
    if (item_.refit_grids) return;
    for (int64_t r = 0; r < live_; ++r) {
      for (int64_t g = 0; g < groups_; ++g) {
        column(scale_, g)[r] = item_.scales.as<T>()[(first_ + r) * groups_ + g];
        column(zero_, g)[r] = item_.zeros.as<T>()[(first_ + r) * groups_ + g];
      }
    }
  }

  // Solves positions [lo, hi), last first.
  void solve_block(int64_t lo, int64_t hi) {
    const int64_t from = std::min(lo, first_needed(lo, hi));
    sum_done(from, hi);
    if (item_.refit_grids) refit(lo, hi, from);
    std::fill_n(loss_.as<T>(), rows_, T(0));
    std::fill_n(square_.as<T>(), rows_, T(0));
    substitute(column(tile_, lo), column(sums_, lo - from), lo, hi,
               [&](int64_t k, T* sum, T* e) { round(k, sum, e); });
    for (int64_t r = 0; r < rows_; ++r) {
      row_loss_[r] += static_cast<double>(loss_.as<T>()[r]);
      row_square_[r] += static_cast<double>(square_.as<T>()[r]);
    }
  }

  // Lowest position whose sum the block needs: groups that start in it are fitted whole.
  int64_t first_needed(int64_t lo, int64_t hi) const {
    if (!item_.refit_grids) return lo;
    const int64_t last_start =
        (p_.n - 1 - lo) / item_.group_size * item_.group_size;  // processing index
    if (last_start < p_.n - hi) return lo;
    return p_.n - std::min(last_start + item_.group_size, p_.n);
  }

  // sums[k - from] = sum over done positions j >= hi of L_jk e_j, for k in [from, hi).
  void sum_done(int64_t from, int64_t hi) {
    if (hi == p_.n) {
      std::memset(sums_.data(), 0, static_cast<size_t>((hi - from) * rows_) * sizeof(T));
      return;
    }
    blas::gemm(true, false, hi - from, rows_, p_.n - hi, T(1), p_.factor + hi * p_.n + from, p_.n,
               column(tile_, hi), rows_, T(0), sums_.as<T>(), rows_);
  }

  // Back substitution through L[lo:hi, lo:hi]: completes `sums` of positions [lo, hi), last first;
  // `finish` turns the sum of a position into the value fed back to those below it. e and sums
  // point at position lo.
  template <typename Finish>
  void substitute(T* e, T* sums, int64_t lo, int64_t hi, const Finish& finish) {
    for (int64_t top = hi; top > lo;) {
      const int64_t bottom = std::max(lo, top - kPanel);
      if (top < hi) {
        dispatch<Accumulate<T>>(p_.factor + top * p_.n + bottom, p_.n, e + (top - lo) * rows_,
                                hi - top, sums + (bottom - lo) * rows_, top - bottom, rows_);
      }
      for (int64_t k = top - 1; k >= bottom; --k) {
        finish(k, sums + (k - lo) * rows_, e + (k - lo) * rows_);
        dispatch<FeedBack<T>>(p_.factor + k * p_.n + bottom, e + (k - lo) * rows_,
                              sums + (bottom - lo) * rows_, k - bottom, rows_);
      }
      top = bottom;
    }
  }

  // Rounds position k: `e` holds its weights and receives its errors.
  void round(int64_t k, const T* sum, T* e) {
    const T pivot = p_.factor[k * p_.n + k];
    const int32_t group = group_of(k);
    with_codes<T>({item_.bits, item_.grid.kind}, [&](const auto& codes) {
      dispatch<RoundRows<T, std::decay_t<decltype(codes)>>>(
          rows_, T(1) / pivot, pivot * pivot / 2, codes, sum, column(scale_, group),
          column(zero_, group), e, code_.as<T>(), loss_.as<T>(), square_.as<T>());
    });
    narrow(rows_, code_.as<T>(), codes_.as<uint8_t>() + k * rows_);
  }

  // Grids of the groups that start in [lo, hi), from the weights as compensated for all blocks
  // done. The working sums are not that compensation (they hold only what the next position needs);
  // it is y with y U = sums, U unit upper, so
  //   y_k = (sum_k - sum_{j > k, not done} L_jk y_j) / L_kk,   compensated_k = w_k + y_k.
  void refit(int64_t lo, int64_t hi, int64_t from) {
    const int64_t first_start =
        (p_.n - hi + item_.group_size - 1) / item_.group_size * item_.group_size;
    if (first_start >= p_.n - lo) return;
    const int64_t bottom = first_needed(lo, hi);
    std::memcpy(compensated_.data(), column(sums_, bottom - from),
                static_cast<size_t>((hi - bottom) * rows_) * sizeof(T));
    substitute(feedback_.as<T>(), compensated_.as<T>(), bottom, hi,
               [&](int64_t k, T* sum, T* feedback) {
                 const T inverse = T(1) / p_.factor[k * p_.n + k];
                 const T* w = column(tile_, k);
                 for (int64_t r = 0; r < rows_; ++r) {
                   const T y = sum[r] * inverse;
                   feedback[r] = -y;
                   sum[r] = w[r] + y;
                 }
               });
    for (int64_t start = first_start; start < p_.n - lo; start += item_.group_size) {
      const int64_t end = std::min(start + item_.group_size, p_.n);
      fit_group(start / item_.group_size, column(compensated_, p_.n - end - bottom), end - start);
    }
  }

  // Values of `by_column` for the `count` positions of a group as they lie in the tile, lowest
  // position first; empty without values.
  std::vector<T> in_solving_order(TensorView by_column, int64_t group, int64_t count) const {
    std::vector<T> values;
    if (!by_column.data) return values;
    const int64_t bottom = p_.n - group * item_.group_size - count;
    for (int64_t i = 0; i < count; ++i) values.push_back(by_column.as<T>()[p_.order[bottom + i]]);
    return values;
  }

  void fit_group(int64_t group, const T* weights, int64_t count) {
    const std::vector<T> importance = in_solving_order(item_.columns.importance, group, count);
    const std::vector<T> noise = in_solving_order(item_.columns.noise, group, count);
    std::vector<T> row(static_cast<size_t>(count)), spread(row.size());
    for (int64_t r = 0; r < live_; ++r) {
      for (int64_t i = 0; i < count; ++i) row[i] = weights[i * rows_ + r];
      const ColumnStats<T> stats{importance.empty() ? nullptr : importance.data(), noise.data()};
      const Grid<T> grid = fit_grid(row.data(), count, item_.grid, stats, spread.data());
      column(scale_, group)[r] = grid.scale;
      column(zero_, group)[r] = grid.zero;
    }
  }

  // Back to rows, in original column order.
  void store_codes() {
    for (int64_t r0 = 0; r0 < live_; r0 += kRowUnit) {
      const int64_t count = std::min(kRowUnit, live_ - r0);
      uint8_t* out = item_.codes.as<uint8_t>() + (first_ + r0) * p_.n;
      for (int64_t c = 0; c < p_.n; ++c) {
        const uint8_t* codes = codes_.as<uint8_t>() + p_.position[c] * rows_ + r0;
        for (int64_t r = 0; r < count; ++r) out[r * p_.n + c] = codes[r];
      }
    }
  }

  void store_results() {
    std::copy_n(row_loss_.data(), live_, item_.row_loss.as<double>() + first_);
    if (item_.row_error.data)
      std::copy_n(row_square_.data(), live_, item_.row_error.as<double>() + first_);
    if (!item_.refit_grids) return;
    for (int64_t r = 0; r < live_; ++r) {
      for (int64_t g = 0; g < groups_; ++g) {
        item_.scales.as<T>()[(first_ + r) * groups_ + g] = column(scale_, g)[r];
        item_.zeros.as<T>()[(first_ + r) * groups_ + g] = column(zero_, g)[r];
      }
    }
  }

  const Problem<T>& p_;
  const SweepItem& item_;
  int64_t first_, live_, rows_, groups_;
  int64_t reach_;         // positions a block may need sums of
  Tensor tile_;           // [n][rows]: weights of open positions, errors of solved ones
  Tensor sums_;           // [reach][rows]
  Tensor scale_, zero_;   // [groups][rows]
  Tensor code_;           // [rows], of the open position
  Tensor loss_, square_;  // [rows], of the open block
  Tensor codes_;          // U8 [n][rows]
  std::vector<double> row_loss_, row_square_;
  Tensor compensated_, feedback_;  // [reach][rows], refit_grids only
};

void check_item(const SweepItem& item, int64_t n, DType dtype) {
  const int64_t rows = item.weight.rows();
  BITMILL_CHECK(item.weight.dtype == dtype && item.weight.cols() == n);
  BITMILL_CHECK(item.scales.dtype == dtype && item.zeros.dtype == dtype &&
                item.scales.shape == item.zeros.shape);
  BITMILL_CHECK(item.scales.rows() == rows && item.codes.dtype == DType::kU8 &&
                item.codes.shape == item.weight.shape);
  BITMILL_CHECK(item.row_loss.dtype == DType::kF64 && item.row_loss.elements() == rows);
  BITMILL_CHECK(item.column_group.dtype == DType::kI32 && item.column_group.elements() == n);
  if (!item.refit_grids) return;
  BITMILL_CHECK(item.group_size > 0 && item.scales.cols() == group_count(n, item.group_size));
  BITMILL_CHECK(item.grid.bits == item.bits);
}

template <typename T>
void sweep_all(TensorView factor, TensorView order, int64_t block_size,
               std::span<const SweepItem> items, ThreadPool& pool) {
  struct Tile {
    const SweepItem* item;
    int64_t first;
  };
  const int64_t n = factor.rows();
  Problem<T> problem{factor.as<T>(), n, order.as<int32_t>(), std::vector<int32_t>(n),
                     std::min(block_size, n)};
  for (int64_t k = 0; k < n; ++k) problem.position[problem.order[k]] = static_cast<int32_t>(k);
  std::vector<Tile> tiles;
  for (const SweepItem& item : items) {
    check_item(item, n, factor.dtype);
    for (int64_t k = 0; item.refit_grids && k < n; ++k) {
      item.column_group.as<int32_t>()[problem.order[k]] =
          static_cast<int32_t>((n - 1 - k) / item.group_size);
    }
    for (int64_t r = 0; r < item.weight.rows(); r += kTileRows) tiles.push_back({&item, r});
  }
  pool.parallel_for(static_cast<int64_t>(tiles.size()), [&](int64_t index, int) {
    const Tile& tile = tiles[index];
    TileSweep<T>(problem, *tile.item, tile.first,
                 std::min(kTileRows, tile.item->weight.rows() - tile.first))
        .run();
  });
}

}  // namespace

void CpuBackend::sweep(TensorView factor, TensorView order, int64_t block_size,
                       std::span<const SweepItem> items) {
  BITMILL_CHECK(factor.shape.rank() == 2 && factor.rows() == factor.cols() && block_size > 0);
  BITMILL_CHECK(order.dtype == DType::kI32 && order.elements() == factor.rows());
  if (factor.dtype == DType::kF64)
    return sweep_all<double>(factor, order, block_size, items, pool_);
  BITMILL_CHECK(factor.dtype == DType::kF32);
  sweep_all<float>(factor, order, block_size, items, pool_);
}

}  // namespace bitmill
