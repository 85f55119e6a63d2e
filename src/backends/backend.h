// Backend: the manual of the coarse operations that every device implements. The pipeline, the families and the
// algorithms are written once over this interface; CpuBackend is what other backends are checked against
// (tests/conformance runs every op on every backend).
//
// Conventions
// - Tensors are row-major. `tokens` is the leading dimension of activations; a micro-batch holds whole sequences of equal
//   length, concatenated.
// - "compute type" C is kBF16 or kF32 (Backend::compute). Rounding points for C = kBF16, the same on every device:
//     weights, embedding rows, norm outputs, attention's q/k/v after rope, attention probabilities, attention output,
//     gated activation, and block-boundary activations are rounded to bf16 (round half to even);
//     products accumulate in fp32; norms, softmax, rope, residual and linear outputs are fp32.
//     A product of two bf16 values is exact in fp32, except that AMX (TDPBF16PS) counts subnormal
//     operands, below 2^-126 in magnitude, as zero.
//   For C = kF32 nothing is rounded.
// - Every op gives the same bits for any number of threads: work is cut into tiles whose shape depends on the arguments
//   alone, each computed by one thread with single-threaded library calls.
// - Ops are ordered; results are visible to the host after `synchronize` (a no-op on the CPU).
// - Arguments are checked by the caller's contract (BITMILL_CHECK), not by user-facing errors.
// - Quantization ops accept kF32 and kF64: the golden suite runs the same code in double precision.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/grid.h"
#include "core/quantized.h"
#include "core/tensor.h"
#include "core/thread_pool.h"

namespace bitmill {

// A weight [out, in] in the device's favourite layout for `linear`. Made once per linear, used for every micro-batch.
class PreparedWeight {
 public:
  virtual ~PreparedWeight() = default;
  virtual int64_t out() const = 0;
  virtual int64_t in() const = 0;
  virtual int64_t bytes() const = 0;  // memory it holds
};

enum class Activation { kSilu, kGeluTanh, kRelu };

// Shape of one attention call: `sequences` of `length` tokens each.
struct AttentionShape {
  int64_t sequences = 0, length = 0;
  int64_t heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 0;             // multiplies q.k
  int64_t sliding_window = 0;  // query i sees keys j with i - window < j <= i; 0: all j <= i
};

// Tile edge of a Hessian of n columns (a function of n alone).
int64_t hessian_tile(int64_t n);
// Number of elements of the packed lower triangle of an n x n Hessian: full tiles (I, J <= I), row of tiles by row of
// tiles, each tile row-major with its own edge lengths (edge tiles are smaller). Diagonal tiles are stored in full.
int64_t hessian_elements(int64_t n);
// Offset of tile (I, J), J <= I.
int64_t hessian_tile_offset(int64_t n, int64_t tile_row, int64_t tile_col);

// What a solver knows about the columns of a weight, for the range search of a grid (core/grid.h, ColumnStats). Both
// F32/F64 [n] of the weight's type in host memory, by original column; empty: no search.
struct ColumnStatsView {
  TensorView importance, noise;
};

// Result of `factorize`.
struct FactorState {
  bool ok = false;
  int64_t failed_pivot = -1;  // column (processing order) whose pivot was not positive; -1 when ok
  double smallest_pivot = 0;  // min over D_k (squared diagonal of the Cholesky factor)
};

// One linear of a `sweep`: weights that share the factor.
struct SweepItem {
  TensorView weight;        // [rows, n] F32/F64, original column order, dead columns zeroed; not modified
  TensorView scales;        // [rows, groups] F32/F64 (values already rounded to the stored type)
  TensorView zeros;         // [rows, groups] F32/F64 (integers)
  TensorView column_group;  // I32 [n]: group of each ORIGINAL column
  TensorView codes;         // out: U8 [rows, n], original column order
  TensorView row_loss;      // out: F64 [rows], sum_k D_k (t_k - q_k)^2 / 2
  TensorView row_error;     // out, may be empty: F64 [rows], sum_k (w_k - q_k)^2
  int bits = 4;
  // Grids taken inside the sweep: each group of `group_size` columns in processing order gets its grid from the weights
  // as compensated at the last block boundary (docs/algorithms.md). scales, zeros and column_group are then outputs;
  // a scale that does not fit its stored type is infinite.
  bool refit_grids = false;
  int64_t group_size = -1;  // refit_grids only
  GridOptions grid;         // kind: always; the rest with refit_grids only, then grid.bits == bits
  ColumnStatsView columns;  // refit_grids only
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string name() const = 0;  // "cpu", "cuda"
  // One line about device, instruction set and library versions: what equal bytes are promised for.
  virtual std::string description() const = 0;
  virtual DType compute() const = 0;  // kBF16 or kF32
  virtual Allocator& allocator() = 0;
  virtual void synchronize() = 0;
  // Threads of this rank for host work that is no operation of the device (AWQ's search works on host weights). Fixed
  // tiles, as everywhere.
  virtual ThreadPool& host_threads() = 0;

  // ---- memory ------------------------------------------------------------------------------------------------
  Tensor allocate(DType dtype, Shape shape) { return Tensor(dtype, shape, allocator()); }
  // Host tensor to the device; moves (no copy) where device memory is host memory.
  virtual Tensor upload(Tensor host) = 0;
  virtual Tensor download(Tensor device) = 0;
  // out = in in another float type (F16, BF16, F32, F64); equal element counts. out may alias in only if dtypes are equal.
  virtual void convert(TensorView in, TensorView out) = 0;

  // ---- forward -----------------------------------------------------------------------------------------------
  // out[t, :] = table[ids[t], :] in out's dtype. ids I32 [tokens] (valid), table F16/BF16/F32 [vocab, hidden].
  virtual void embed(TensorView ids, TensorView table, TensorView out) = 0;

  // out[t, :] = x[t, :] / sqrt(mean(x[t, :]^2) + eps) * weight. x F32/BF16 [tokens, n], weight F32 [n], out C or F32;
  // fp32 arithmetic, one rounding at the end. out may alias x when dtypes are equal.
  virtual void rms_norm(TensorView x, TensorView weight, float eps, TensorView out) = 0;

  // Layout of `weight` [out, in] (F32 or C) for `linear`, rounded to C.
  virtual std::unique_ptr<PreparedWeight> prepare_linear(TensorView weight) = 0;

  // out[t, o] = sum_i x[t, i] w[o, i] + bias[o] (+ residual[t, o]). x C [tokens, in], out F32 [tokens, out],
  // bias F32 [out] or empty, residual F32/BF16 [tokens, out] or empty (may alias out). fp32 accumulation.
  virtual void linear(TensorView x, const PreparedWeight& weight, TensorView bias, TensorView residual,
                      TensorView out) = 0;

  // Rotary embedding in place on x F32 [tokens, heads * head_dim] (NeoX halves over the first 2 * pairs dims of each
  // head, the rest passes). table F32 [length, 2 * pairs]: cos then sin of positions 0..length-1, attention factor
  // included. tokens = sequences * length.
  virtual void rope(TensorView x, int64_t heads, int64_t head_dim, TensorView table) = 0;

  // Causal softmax(scale q k^T) v per head with grouped kv heads. q F32 [tokens, heads*head_dim], k and v F32
  // [tokens, kv_heads*head_dim]; q, k, v and the probabilities are rounded to C; out C [tokens, heads*head_dim].
  virtual void attention(TensorView q, TensorView k, TensorView v, const AttentionShape& shape, TensorView out) = 0;

  // out = act(gate) * up, elementwise; gate, up F32 [tokens, n]; out C.
  virtual void gated_activation(TensorView gate, TensorView up, Activation activation, TensorView out) = 0;

  // out = act(x gate^T + gate_bias) * (x up^T + up_bias): `linear` twice and gated_activation, without F32 outputs in memory.
  // x C [tokens, in], gate and up [n, in], biases F32 [n] or empty, out C [tokens, n].
  virtual void gated_linear(TensorView x, const PreparedWeight& gate, TensorView gate_bias, const PreparedWeight& up,
                            TensorView up_bias, Activation activation, TensorView out) = 0;

  // nll[t] = logsumexp(logits[t, :]) - logits[t, targets[t]]; logits F32 [tokens, vocab], targets I32 [tokens] (-1: 0 is
  // written), nll F64 [tokens]; sums in double.
  virtual void token_nll(TensorView logits, TensorView targets, TensorView nll) = 0;

  // kl[t] = sum_i p_i (log p_i - log q_i), p = softmax(reference[t, :]), q = softmax(logits[t, :]), in double; agree[t] = 1 if
  // both have their largest logit at the same index (the first of equals), else 0. reference, logits F32 [tokens, vocab];
  // kl F64 [tokens]; agree I32 [tokens].
  virtual void token_kl(TensorView reference, TensorView logits, TensorView kl, TensorView agree) = 0;

  // ---- Hessian -----------------------------------------------------------------------------------------------
  // h += x^T x, lower triangle in tile-packed layout. x C [tokens, n] (or F64), h F32 (F64) [hessian_elements(n)].
  // bf16 inputs multiply exactly (subnormal ones count as zero on AMX) with fp32 accumulation
  // (formula: docs/algorithms.md).
  virtual void hessian_update(TensorView x, TensorView h) = 0;
  // sums[c] += sum over tokens of |x[t, c]|, in double and in order of tokens. x C or F64 [tokens, n], sums F64 [n].
  virtual void add_magnitudes(TensorView x, TensorView sums) = 0;
  // a += b, elementwise (F32 or F64): folding of lanes.
  virtual void add(TensorView a, TensorView b) = 0;
  // m += a^T b. a C [tokens, rows], b C [tokens, cols] (or both F64), m F32 (F64) [rows, cols]; exactness as above.
  virtual void cross_update(TensorView a, TensorView b, TensorView m) = 0;
  // out = a - b, computed in fp32 (F64: double), rounded to out's type. a and b F32 or BF16 (or all F64), equal shapes.
  virtual void difference(TensorView a, TensorView b, TensorView out) = 0;
  // Diagonal of the packed h into out F32/F64 [n] (host memory).
  virtual void hessian_diagonal(TensorView h, int64_t n, TensorView out) = 0;
  // out [n, n] lower triangle = factor * H[order[i], order[j]], diagonal replaced by `diagonal[order[i]]`
  // (host values: the caller has put damping and dead-column ones there). order I32 [n] host.
  virtual void hessian_gather(TensorView h, TensorView order, double factor, TensorView diagonal, TensorView out) = 0;

  // ---- quantization ------------------------------------------------------------------------------------------
  // In-place lower Cholesky of the lower triangle of a [n, n] (F32/F64), tiled. A non-positive or non-finite pivot is a
  // returned state, and `a` is then undefined.
  virtual FactorState factorize(TensorView a) = 0;
  // variance[k] (factor's type, [n], host) = sum_{j > k} (L_jj (L^-1)_jk)^2: by how much independent rounding errors of
  // unit variance at the positions solved before k spread t_k (docs/algorithms.md). Estimated with 256 fixed sign
  // vectors, so a relative standard deviation of 9% is in it; the same on every machine and for any number of threads.
  virtual void feedback_variance(TensorView factor, TensorView variance) = 0;

  // The weight that serves the float model best on inputs that are not the float model's (gptaq, docs/algorithms.md):
  //   out = w + (c_factor w C + r_factor R) H^-1
  // with H = L L^T the factorized Hessian whose position p is original column order[p], C the mismatch [n, n] of inputs,
  // R [rows, n] that of the residual stream (may be empty). w, out [rows, n], C, R and L of one type, F32/F64; out may not
  // alias w. Tiles of 256 rows.
  virtual void correct_weight(TensorView w, TensorView c, double c_factor, TensorView r, double r_factor, TensorView l,
                              TensorView order, TensorView out) = 0;

  // Grids of weight [rows, cols] F32/F64: one per row and group of `group_size` consecutive columns (-1: whole row; the
  // last group may be shorter). scales, zeros out: same type as weight, [rows, groups]. core/grid.h has the arithmetic.
  // `columns` turns the range search on. Returns false when a scale does not fit its stored type (beyond fp16); scales
  // are then undefined.
  virtual bool fit_grids(TensorView weight, const GridOptions& options, int64_t group_size,
                         const ColumnStatsView& columns, TensorView scales, TensorView zeros) = 0;
  // codes U8 [rows, cols] = clamp(round(w / scale) + zero, 0, maxq) with column_group I32 [cols]
  // (or as the kind has it).
  virtual void round_to_grid(TensorView weight, TensorView scales, TensorView zeros,
                             TensorView column_group, CodeType type, TensorView codes) = 0;
  // AWQ's search: errors[k] = sum_{rows} e H e^T with H the packed h and e = w - q / scales[k], q the weight
  // w * scales[k] rounded to its grid (one per row and group of consecutive columns). weight [rows, n] and h F32/F64 of one
  // type, scales F64 [candidates, n], errors out F64 [candidates]; a candidate with a scale beyond its stored type gets
  // NaN. Products in weight's type, sums in double. Tiles of 256 rows.
  virtual void scaling_errors(TensorView weight, const GridOptions& options, int64_t group_size, TensorView scales,
                              TensorView h, TensorView errors) = 0;
  // AWQ's clipping: per row and group the m in max|w| * (1 - i/20), i = 0..9, for which clamping to [-m, m] and rounding to
  // the grid of the clamped group gives the least e_g H_gg e_g^T, e = w - q; the first of equals. weight [rows, n] and
  // h as above, limits out F64 [rows, groups]. Rows of at most 32 per tile.
  virtual void clip_limits(TensorView weight, const GridOptions& options, int64_t group_size, TensorView h,
                           TensorView limits) = 0;
  // The GPTQ column sweep in factor form (docs/algorithms.md): `factor` is what `factorize` left, its rows and columns in
  // the order `order` (I32 [n] host): position p of the factor is original column order[p], and positions are solved
  // from n-1 down to 0. block_size columns per lazy update; tiles of 256 rows, all items' tiles scheduled together.
  virtual void sweep(TensorView factor, TensorView order, int64_t block_size, std::span<const SweepItem> items) = 0;
  // out [out, in] (F32 or C) = scale * (code - zero) in fp32 (or as the kind has it), then rounded
  // to out's type. The one dequantization.
  virtual void dequantize(const QuantizedLinear& linear, TensorView out) = 0;
  // errors[r] = e_r H e_r^T for e = w - w_hat, H = factor * packed h (undamped); w, w_hat [rows, n] F32/F64, errors F64
  // [rows] in host memory. In double. An empty w_hat stands for zeros: the signal w_r H w_r^T, whose products may be fp32.
  // Tiles of 256 rows.
  virtual void layer_errors(TensorView w, TensorView w_hat, TensorView h, double factor, TensorView errors) = 0;

  // First non-finite element of a float tensor, or -1.
  virtual int64_t first_non_finite(TensorView x) = 0;
};

struct BackendOptions {
  std::string kind = "auto";      // auto | cpu | cuda
  DType compute = DType::kF32;    // resolved by resolve_compute
  int threads = 1;                // CPU threads of this rank
};

// Names of the backends in this build.
std::vector<std::string> backend_names();
// Throws kDoesNotFit when `kind` asks for a device that is not there, kUsage for an unknown kind.
std::unique_ptr<Backend> make_backend(const BackendOptions& options);
// Does this CPU multiply bf16 in hardware (AVX512-BF16 or AMX)?
bool cpu_has_bf16();

}  // namespace bitmill
