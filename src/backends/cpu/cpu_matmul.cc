// The matmul context over oneDNN, and the linear layer. oneDNN keeps one compiled product per spec;
// memory objects are made once and get new pointers on every call.
#include <dnnl.hpp>

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "backends/cpu/amx.h"
#include "backends/cpu/cpu_backend.h"
#include "backends/cpu/kernels.h"
#include "backends/cpu/matmul.h"

namespace bitmill {

namespace {
// Compiled products kept per thread; the shapes of one block are far fewer.
constexpr size_t kMaxProducts = 512;

struct Product {
  dnnl::matmul primitive;
  dnnl::memory a, b, bias, c, scratch;
};

dnnl::memory::desc matrix(int64_t rows, int64_t cols, int64_t stride, bool transposed, DType type) {
  const auto element =
      type == DType::kBF16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
  return {{rows, cols},
          element,
          transposed ? dnnl::memory::dims{1, stride} : dnnl::memory::dims{stride, 1}};
}

// Grows `buffer` to hold `bytes` behind its first 64-byte boundary, which is returned.
void* aligned(std::vector<std::byte>& buffer, size_t bytes) {
  if (buffer.size() < bytes + 64) buffer = std::vector<std::byte>(bytes + 64);
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
}

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}
}  // namespace

struct MatmulContext::State {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::map<MatmulSpec, Product> products;
  std::vector<std::byte> scratch, workspace;
  std::vector<float> wide_a, wide_b;  // bf16 widened, on CPUs without AVX-512

  Product make(const MatmulSpec& spec);
  const float* widen(const void* data, int64_t elements, std::vector<float>& buffer);
};

MatmulContext::MatmulContext() : state_(std::make_unique<State>()) {}
MatmulContext::~MatmulContext() = default;

Product MatmulContext::State::make(const MatmulSpec& spec) {
  const auto a = matrix(spec.m, spec.k, spec.lda, spec.transpose_a, spec.type);
  const auto b = matrix(spec.k, spec.n, spec.ldb, spec.transpose_b, spec.type);
  const auto c = matrix(spec.m, spec.n, spec.ldc, false, DType::kF32);
  const auto bias = matrix(1, spec.n, spec.n, false, DType::kF32);
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (spec.accumulate) {
    dnnl::post_ops post;
    post.append_sum(1.0f);
    attributes.set_post_ops(post);
  }
  const auto description =
      spec.bias ? dnnl::matmul::desc(a, b, bias, c) : dnnl::matmul::desc(a, b, c);
  const dnnl::matmul::primitive_desc primitive(description, attributes, engine);
  const auto handle = [&](const dnnl::memory::desc& d) { return dnnl::memory(d, engine, nullptr); };
  return {dnnl::matmul(primitive),
          handle(a),
          handle(b),
          handle(bias),
          handle(c),
          handle(primitive.scratchpad_desc())};
}

const float* MatmulContext::State::widen(const void* data, int64_t elements,
                                         std::vector<float>& buffer) {
  buffer.resize(std::max(buffer.size(), static_cast<size_t>(elements)));
  const auto* source = static_cast<const BFloat16*>(data);
  for (int64_t i = 0; i < elements; ++i) buffer[i] = to_float(source[i]);
  return buffer.data();
}

void MatmulContext::run(const MatmulSpec& spec, const void* a, const void* b, const float* bias,
                        float* c) {
  if (spec.type == DType::kBF16 && !matmul_has_bf16()) {
    const auto stored = [](int64_t rows, int64_t cols, int64_t stride) {
      return (rows - 1) * stride + cols;
    };
    const int64_t a_elements =
        spec.transpose_a ? stored(spec.k, spec.m, spec.lda) : stored(spec.m, spec.k, spec.lda);
    const int64_t b_elements =
        spec.transpose_b ? stored(spec.n, spec.k, spec.ldb) : stored(spec.k, spec.n, spec.ldb);
    MatmulSpec wide = spec;
    wide.type = DType::kF32;
    return run(wide, state_->widen(a, a_elements, state_->wide_a),
               state_->widen(b, b_elements, state_->wide_b), bias, c);
  }
  auto found = state_->products.find(spec);
  if (found == state_->products.end()) {
    if (state_->products.size() >= kMaxProducts) state_->products.clear();
    found = state_->products.emplace(spec, state_->make(spec)).first;
  }
  Product& product = found->second;
  product.a.set_data_handle(const_cast<void*>(a));
  product.b.set_data_handle(const_cast<void*>(b));
  product.c.set_data_handle(c);
  product.scratch.set_data_handle(aligned(state_->scratch, product.scratch.get_desc().get_size()));
  std::unordered_map<int, dnnl::memory> arguments{{DNNL_ARG_SRC, product.a},
                                                  {DNNL_ARG_WEIGHTS, product.b},
                                                  {DNNL_ARG_DST, product.c},
                                                  {DNNL_ARG_SCRATCHPAD, product.scratch}};
  if (spec.bias) {
    product.bias.set_data_handle(const_cast<float*>(bias));
    arguments.emplace(DNNL_ARG_BIAS, product.bias);
  }
  product.primitive.execute(state_->stream, arguments);
}

void* MatmulContext::workspace(int64_t bytes) {
  return aligned(state_->workspace, static_cast<size_t>(bytes));
}

bool matmul_has_bf16() {
  static const bool has = [] {
    const auto isa = dnnl::get_effective_cpu_isa();
    return isa != dnnl::cpu_isa::sse41 && isa != dnnl::cpu_isa::avx && isa != dnnl::cpu_isa::avx2 &&
           isa != dnnl::cpu_isa::avx2_vnni;
  }();
  return has;
}

namespace {
// Packed into AMX tiles where the CPU has them; else row-major [out, in] as stored, which oneDNN multiplies faster than its
// own packed layout.
class CpuWeight final : public PreparedWeight {
 public:
  CpuWeight(Tensor data, int64_t out, int64_t in, bool packed)
      : data_(std::move(data)), out_(out), in_(in), packed_(packed) {}
  int64_t out() const override { return out_; }
  int64_t in() const override { return in_; }
  int64_t bytes() const override { return data_.bytes(); }
  const Tensor& data() const { return data_; }
  bool packed() const { return packed_; }

 private:
  Tensor data_;
  int64_t out_, in_;
  bool packed_;
};

// Tile of `linear`: 256 tokens by up to 1024 outputs, 512 where rows are long. The tile's operands and result stay in a
// 2 MB L2 cache, and the 2048 tokens of a micro-batch give work to 8 threads even at 1024 outputs.
constexpr int64_t kLinearRows = 256;
constexpr int64_t kLinearCols = 1024, kLongRow = 512;

// Width of a column tile: outputs in equal tiles, rounded to the 64 columns of oneDNN's inner
// block.
int64_t linear_tile_cols(const CpuWeight& weight) {
  const int64_t out = weight.out(), limit = weight.packed() && weight.in() > kLongRow ? kLinearCols / 2 : kLinearCols;
  const int64_t tiles = (out + limit - 1) / limit;
  return round_up((out + tiles - 1) / tiles, 64);
}

// One output tile, on one thread: rows [row, row + rows) and columns [col, col + cols) of the output, written to `to`
// with row stride `stride`.
struct LinearTile {
  int64_t row, rows, col, cols;
  float* to;
  int64_t stride;
};

// Tile = residual tile; the product is then accumulated onto it.
void fill_residual(TensorView residual, int64_t width, const LinearTile& t) {
  for (int64_t r = 0; r < t.rows; ++r) {
    float* to = t.to + r * t.stride;
    const int64_t from = (t.row + r) * width + t.col;
    if (residual.dtype == DType::kBF16)
      for (int64_t c = 0; c < t.cols; ++c) to[c] = to_float(residual.as<BFloat16>()[from + c]);
    else if (residual.as<float>() + from != to)
      std::memcpy(to, residual.as<float>() + from, static_cast<size_t>(t.cols) * sizeof(float));
  }
}

// The tile starts as residual and bias, and the product is added: AMX kernels know no other epilogue.
void multiply_tile_amx(TensorView x, const CpuWeight& weight, TensorView bias, TensorView residual, const LinearTile& t) {
  const bool fill = residual.data != nullptr || bias.data != nullptr;
  if (residual.data != nullptr) fill_residual(residual, weight.out(), t);
  for (int64_t r = 0; fill && r < t.rows; ++r) {
    float* to = t.to + r * t.stride;
    if (residual.data == nullptr) std::memset(to, 0, static_cast<size_t>(t.cols) * sizeof(float));
    if (bias.data == nullptr) continue;
    for (int64_t c = 0; c < t.cols; ++c) to[c] += bias.as<float>()[t.col + c];
  }
  const int64_t in = weight.in();
  amx::multiply_rows(x.as<BFloat16>() + t.row * in, in, weight.data().as<BFloat16>() + amx::packed_elements(t.col, in),
                     t.rows, t.cols, in, t.to, t.stride, fill);
}

void multiply_tile_onednn(TensorView x, const CpuWeight& weight, TensorView bias, TensorView residual, const LinearTile& t,
                          MatmulContext& context) {
  const int64_t in = weight.in(), element = dtype_bits(x.dtype) / 8;
  if (residual.data != nullptr) fill_residual(residual, weight.out(), t);
  context.run({.type = x.dtype,
               .m = t.rows,
               .n = t.cols,
               .k = in,
               .lda = in,
               .ldb = in,
               .ldc = t.stride,
               .transpose_b = true,
               .accumulate = residual.data != nullptr,
               .bias = bias.data != nullptr},
              x.as<char>() + t.row * in * element, weight.data().view().as<char>() + t.col * in * element,
              bias.data != nullptr ? bias.as<float>() + t.col : nullptr, t.to);
}

void multiply_tile(TensorView x, const CpuWeight& weight, TensorView bias, TensorView residual, const LinearTile& t,
                   MatmulContext& context) {
  if (weight.packed()) multiply_tile_amx(x, weight, bias, residual, t);
  else multiply_tile_onednn(x, weight, bias, residual, t, context);
}

const CpuWeight& checked(const PreparedWeight& weight, TensorView x, TensorView bias, DType compute) {
  const auto& w = dynamic_cast<const CpuWeight&>(weight);
  BITMILL_CHECK(x.dtype == compute && x.cols() == w.in());
  BITMILL_CHECK(bias.data == nullptr || (bias.dtype == DType::kF32 && bias.elements() == w.out()));
  return w;
}
}  // namespace

std::unique_ptr<PreparedWeight> CpuBackend::prepare_linear(TensorView weight) {
  const int64_t out = weight.rows(), in = weight.cols();
  Tensor rounded;
  if (weight.dtype != compute_ || !amx_) {
    rounded = Tensor(compute_, weight.shape);
    convert(weight, rounded);
  }
  if (!amx_) return std::make_unique<CpuWeight>(std::move(rounded), out, in, false);
  const TensorView rows = rounded.empty() ? weight : rounded.view();
  Tensor packed(DType::kBF16, {amx::packed_elements(out, in)});
  pool_.parallel_for((out + 15) / 16, [&](int64_t block, int) {
    amx::pack_b_from_rows(rows.as<BFloat16>(), out, in, in, block, block + 1, packed.as<BFloat16>());
  });
  return std::make_unique<CpuWeight>(std::move(packed), out, in, true);
}

void CpuBackend::linear(TensorView x, const PreparedWeight& weight, TensorView bias, TensorView residual,
                        TensorView out) {
  const CpuWeight& w = checked(weight, x, bias, compute_);
  const int64_t tokens = x.rows(), outputs = w.out();
  BITMILL_CHECK(out.dtype == DType::kF32 && out.rows() == tokens && out.cols() == outputs);
  BITMILL_CHECK(residual.data == nullptr || residual.elements() == out.elements());
  const int64_t width = linear_tile_cols(w), tiles = (outputs + width - 1) / width;
  const int64_t row_tiles = (tokens + kLinearRows - 1) / kLinearRows;
  pool_.parallel_for(row_tiles * tiles, [&](int64_t item, int thread) {
    const int64_t row = item / tiles * kLinearRows, col = item % tiles * width;
    multiply_tile(x, w, bias, residual,
                  {row, std::min(kLinearRows, tokens - row), col, std::min(width, outputs - col),
                   out.as<float>() + row * outputs + col, outputs},
                  *contexts_[thread]);
  });
}

// Tiles of gate and up stay in the L2 cache until their product is taken.
void CpuBackend::gated_linear(TensorView x, const PreparedWeight& gate, TensorView gate_bias, const PreparedWeight& up,
                              TensorView up_bias, Activation activation, TensorView out) {
  constexpr int64_t kRows = 128, kCols = 512;
  const CpuWeight &g = checked(gate, x, gate_bias, compute_), &u = checked(up, x, up_bias, compute_);
  const int64_t tokens = x.rows(), n = g.out(), tiles = (n + kCols - 1) / kCols;
  BITMILL_CHECK(u.out() == n && out.dtype == compute_ && out.elements() == tokens * n);
  pool_.parallel_for((tokens + kRows - 1) / kRows * tiles, [&](int64_t item, int thread) {
    const int64_t row = item / tiles * kRows, col = item % tiles * kCols;
    const int64_t rows = std::min(kRows, tokens - row), cols = std::min(kCols, n - col);
    auto* gated = static_cast<float*>(contexts_[thread]->workspace(2 * rows * cols * int64_t{sizeof(float)}));
    float* const factor = gated + rows * cols;
    multiply_tile(x, g, gate_bias, {}, {row, rows, col, cols, gated, cols}, *contexts_[thread]);
    multiply_tile(x, u, up_bias, {}, {row, rows, col, cols, factor, cols}, *contexts_[thread]);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (row + r) * n + col;
      if (compute_ == DType::kBF16)
        gate_values(gated + r * cols, factor + r * cols, activation, cols, out.as<BFloat16>() + at);
      else
        gate_values(gated + r * cols, factor + r * cols, activation, cols, out.as<float>() + at);
    }
  });
}

}  // namespace bitmill
