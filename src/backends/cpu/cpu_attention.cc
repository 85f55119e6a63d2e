// Causal attention. A work item is one tile of query rows for a few query heads that share a kv
// head: their scores are one product with the visible keys (tiles above the diagonal and outside
// the window are never computed), softmax runs over the rows in fp32, the probabilities are rounded
// to C, and a second product gives the output.
#include <algorithm>

#include "backends/cpu/cpu_backend.h"
#include "backends/cpu/kernels.h"
#include "backends/cpu/matmul.h"

namespace bitmill {

namespace {
constexpr int64_t kQueryRows =
    64;  // query rows per tile: half a tile per row is wasted above the diagonal
constexpr int64_t kScoreLimit =
    1 << 19;  // scores per item that still fit an L2 cache; more heads are split

// How one call is cut; a function of the shape alone.
struct Cut {
  explicit Cut(const AttentionShape& s)
      : shape(s),
        group(s.heads / s.kv_heads),
        tiles((s.length + kQueryRows - 1) / kQueryRows),
        heads_per_item(std::clamp<int64_t>(kScoreLimit / (kQueryRows * s.length), 1, group)) {
    while (group % heads_per_item != 0) --heads_per_item;
  }
  int64_t items() const { return tiles * shape.sequences * shape.heads / heads_per_item; }
  int64_t rows_of(int64_t tile) const {
    return std::min(kQueryRows, shape.length - tile * kQueryRows);
  }
  // Packed q: per sequence and kv head, per tile, the heads' rows one after another.
  int64_t query_offset(int64_t sequence, int64_t head, int64_t tile) const {
    const int64_t kv_head = head / group, rows = rows_of(tile);
    return ((sequence * shape.kv_heads + kv_head) * group * shape.length +
            tile * kQueryRows * group + head % group * rows) *
           shape.head_dim;
  }
  // Packed k and v: per sequence and kv head.
  int64_t key_offset(int64_t sequence, int64_t kv_head) const {
    return (sequence * shape.kv_heads + kv_head) * shape.length * shape.head_dim;
  }

  AttentionShape shape;
  int64_t group, tiles, heads_per_item;
};

// Rounds one tile of rows of q, k, v to C and lays each head's rows side by side, which is what the
// products read fastest.
template <typename C>
void pack_tile(const Cut& cut, int64_t sequence, int64_t tile, const float* q, const float* k,
               const float* v, C* q_out, C* k_out, C* v_out) {
  const AttentionShape& s = cut.shape;
  const int64_t width = s.heads * s.head_dim, kv_width = s.kv_heads * s.head_dim,
                rows = cut.rows_of(tile);
  const int64_t row = tile * kQueryRows, token = sequence * s.length + row;
  for (int64_t h = 0; h < s.heads; ++h)
    dispatch<PackRows<C>>(q + token * width + h * s.head_dim, width, rows, s.head_dim,
                          q_out + cut.query_offset(sequence, h, tile), s.head_dim);
  for (int64_t h = 0; h < s.kv_heads; ++h) {
    const int64_t from = token * kv_width + h * s.head_dim,
                  to = cut.key_offset(sequence, h) + row * s.head_dim;
    dispatch<PackRows<C>>(k + from, kv_width, rows, s.head_dim, k_out + to, s.head_dim);
    dispatch<PackRows<C>>(v + from, kv_width, rows, s.head_dim, v_out + to, s.head_dim);
  }
}

// Heads [head, head + heads_per_item) of one sequence, one tile of query rows.
struct Item {
  int64_t sequence, head, tile;
};

template <typename C>
struct Packed {
  const C *q, *k, *v;
  DType type;
};

template <typename C>
void attend(const Cut& cut, const Item& item, const Packed<C>& packed, MatmulContext& context,
            C* out) {
  const AttentionShape& s = cut.shape;
  const int64_t row = item.tile * kQueryRows, rows = cut.rows_of(item.tile), d = s.head_dim;
  const int64_t first = s.sliding_window > 0 ? std::max<int64_t>(0, row - s.sliding_window + 1) : 0;
  const int64_t key =
      first / kQueryRows * kQueryRows;  // on a tile edge: few distinct product shapes
  const int64_t keys = row + rows - key, m = rows * cut.heads_per_item;
  const int64_t kv = cut.key_offset(item.sequence, item.head / cut.group) + key * d;

  auto* scores =
      static_cast<float*>(context.workspace(m * (2 * keys + d) * int64_t{sizeof(float)}));
  float* result = scores + m * keys;
  auto* p = reinterpret_cast<C*>(result + m * d);
  context.run({.type = packed.type,
               .m = m,
               .n = keys,
               .k = d,
               .lda = d,
               .ldb = d,
               .ldc = keys,
               .transpose_b = true},
              packed.q + cut.query_offset(item.sequence, item.head, item.tile), packed.k + kv,
              nullptr, scores);
  const Softmax softmax{s.scale, rows, keys, row - key + 1, s.sliding_window};
  for (int64_t h = 0; h < cut.heads_per_item; ++h)
    dispatch<SoftmaxRows<C>>(scores + h * rows * keys, softmax, p + h * rows * keys);
  context.run({.type = packed.type, .m = m, .n = d, .k = keys, .lda = keys, .ldb = d, .ldc = d}, p,
              packed.v + kv, nullptr, result);
  const int64_t width = s.heads * d;
  C* const first_out = out + (item.sequence * s.length + row) * width + item.head * d;
  for (int64_t h = 0; h < cut.heads_per_item; ++h)
    dispatch<PackRows<C>>(result + h * rows * d, d, rows, d, first_out + h * d, width);
}

template <typename C>
void run_attention(ThreadPool& pool, const std::vector<std::unique_ptr<MatmulContext>>& contexts,
                   const float* q, const float* k, const float* v, const AttentionShape& shape,
                   DType type, C* out) {
  const Cut cut(shape);
  const int64_t tokens = shape.sequences * shape.length;
  Tensor q_packed(type, {tokens * shape.heads * shape.head_dim});
  Tensor k_packed(type, {tokens * shape.kv_heads * shape.head_dim});
  Tensor v_packed(type, {tokens * shape.kv_heads * shape.head_dim});
  pool.parallel_for(shape.sequences * cut.tiles, [&](int64_t i, int) {
    pack_tile(cut, i / cut.tiles, i % cut.tiles, q, k, v, q_packed.as<C>(), k_packed.as<C>(),
              v_packed.as<C>());
  });
  const Packed<C> packed{q_packed.as<C>(), k_packed.as<C>(), v_packed.as<C>(), type};
  const int64_t items_per_row = shape.heads / cut.heads_per_item;
  const int64_t items_per_tile = shape.sequences * items_per_row;
  pool.parallel_for(cut.items(), [&](int64_t i, int thread) {
    const int64_t rest = i % items_per_tile;
    const Item item{
        .sequence = rest / items_per_row,
        .head = rest % items_per_row * cut.heads_per_item,
        .tile = cut.tiles - 1 - i / items_per_tile};  // longest first: threads end together
    attend(cut, item, packed, *contexts[thread], out);
  });
}
}  // namespace

void CpuBackend::attention(TensorView q, TensorView k, TensorView v, const AttentionShape& shape,
                           TensorView out) {
  const int64_t tokens = shape.sequences * shape.length, d = shape.head_dim;
  BITMILL_CHECK(q.dtype == DType::kF32 && k.dtype == DType::kF32 && v.dtype == DType::kF32);
  BITMILL_CHECK(shape.scale > 0 && shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0 &&
                out.dtype == compute_);
  BITMILL_CHECK(q.elements() == tokens * shape.heads * d &&
                k.elements() == tokens * shape.kv_heads * d);
  BITMILL_CHECK(v.elements() == k.elements() && out.elements() == q.elements());
  if (tokens == 0) return;
  const auto run = [&](auto* to) {
    run_attention(pool_, contexts_, q.as<float>(), k.as<float>(), v.as<float>(), shape, compute_,
                  to);
  };
  if (compute_ == DType::kBF16)
    run(out.as<BFloat16>());
  else
    run(out.as<float>());
}

}  // namespace bitmill
