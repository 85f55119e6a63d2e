#include "formats/stored_tensors.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

namespace bitmill {

void check_bits(const std::string& format, const LinearSpec& linear, int bits,
                std::initializer_list<int> allowed, const std::string& hint) {
  if (std::find(allowed.begin(), allowed.end(), bits) != allowed.end()) return;
  const int* last = allowed.end() - 1;
  fail(ExitCode::kUsage, "output.format={} stores {}{}{} bits, quantize.bits={} was asked for {}{}",
       format, fmt::join(allowed.begin(), last, ", "), allowed.size() > 1 ? " or " : "", *last, bits,
       linear.module, hint);
}

void check_group_size(const std::string& format, const LinearSpec& linear, int64_t group_size) {
  if (group_size == -1 || (group_size > 0 && linear.in % group_size == 0)) return;
  fail(ExitCode::kUsage,
       "quantize.group_size={} does not divide the {} input columns of {}; output.format={} needs "
       "a divisor of them, or "
       "-1 for one group per row",
       group_size, linear.in, linear.module, format);
}

void check_one_symmetry(const std::string& format, const std::vector<ModuleChoice>& modules) {
  const ModuleChoice* first = nullptr;
  for (const ModuleChoice& module : modules) {
    if (!module.quantized) continue;
    if (first == nullptr) first = &module;
    if (module.symmetric != first->symmetric)
      fail(ExitCode::kUsage,
           "output.format={} has one quantize.symmetric for the whole model, but {} has "
           "symmetric={} and {} has "
           "symmetric={}",
           format, first->module, first->symmetric, module.module, module.symmetric);
  }
}

void check_quantized(const LinearSpec& linear, const QuantizedLinear& quantized) {
  BITMILL_CHECK(quantized.codes.dtype() == DType::kU8 &&
                quantized.codes.shape() == Shape({linear.out, linear.in}));
  BITMILL_CHECK(quantized.scales.shape().rank() == 2 && quantized.scales.rows() == linear.out);
  BITMILL_CHECK(quantized.zeros.dtype() == DType::kU8 &&
                quantized.zeros.shape() == quantized.scales.shape());
  BITMILL_CHECK(quantized.g_idx.dtype() == DType::kI32 &&
                quantized.g_idx.shape() == Shape({linear.in}));
  BITMILL_CHECK(quantized.groups() == group_count(linear.in, quantized.group_size));
}

void check_no_scatter(const std::string& format, const LinearSpec& linear,
                      const QuantizeSettings& settings) {
  if (settings.act_order != ActOrder::kDynamic || settings.group_size == -1) return;
  fail(ExitCode::kUsage,
       "output.format={} has no place for the scattered groups of quantize.act_order=dynamic "
       "(asked for {}); use static, or output.format=gptq or gptq_v2",
       format, linear.module);
}

namespace {
bool sequential_groups(const QuantizedLinear& quantized) {
  const int64_t group_size = quantized.group_size == -1 ? quantized.in() : quantized.group_size;
  const int32_t* g_idx = quantized.g_idx.as<int32_t>();
  for (int64_t i = 0; i < quantized.in(); ++i)
    if (g_idx[i] != i / group_size) return false;
  return true;
}

}  // namespace

void check_sequential(const std::string& format, const LinearSpec& linear,
                      const QuantizedLinear& quantized) {
  if (!sequential_groups(quantized))
    fail(ExitCode::kUsage,
         "{}: output.format={} has no place for act-order groups, use gptq or gptq_v2",
         linear.module, format);
}

QuantizedLinear described(const OutputFormat& format, const Checkpoint& checkpoint,
                          const LinearSpec& linear, const Json& config) {
  const ModuleChoice choice = format.configured(config, linear.module);
  if (!choice.quantized)
    fail(ExitCode::kInput, "{}: {} is packed, but quantization_config leaves it in float",
         checkpoint.directory(), linear.module);
  QuantizedLinear quantized;
  quantized.bits = choice.bits;
  quantized.group_size = choice.group_size;
  quantized.symmetric = choice.symmetric;
  return quantized;
}

Tensor make_group_index(int64_t in, int64_t group_size) {
  Tensor g_idx(DType::kI32, {in});
  for (int64_t i = 0; i < in; ++i)
    g_idx.as<int32_t>()[i] = group_size == -1 ? 0 : static_cast<int32_t>(i / group_size);
  return g_idx;
}

namespace {
// In squares that stay inside the first-level cache: a plain double loop touches a new line of
// `out` with every element.
template <typename T>
void transpose_into(const T* in, int64_t rows, int64_t cols, T* out) {
  constexpr int64_t kTile = 64;
  for (int64_t r0 = 0; r0 < rows; r0 += kTile)
    for (int64_t c0 = 0; c0 < cols; c0 += kTile)
      for (int64_t c = c0; c < std::min(c0 + kTile, cols); ++c)
        for (int64_t r = r0; r < std::min(r0 + kTile, rows); ++r)
          out[c * rows + r] = in[r * cols + c];
}

std::string dtype_names(std::initializer_list<DType> dtypes) {
  std::string text;
  for (DType dtype : dtypes) text += (text.empty() ? "" : " or ") + std::string(dtype_name(dtype));
  return text;
}
}  // namespace

Tensor transposed(TensorView matrix) {
  Tensor out(matrix.dtype, {matrix.cols(), matrix.rows()});
  switch (dtype_bits(matrix.dtype)) {
    case 8:
      transpose_into(matrix.as<uint8_t>(), matrix.rows(), matrix.cols(), out.as<uint8_t>());
      break;
    case 16:
      transpose_into(matrix.as<uint16_t>(), matrix.rows(), matrix.cols(), out.as<uint16_t>());
      break;
    case 32:
      transpose_into(matrix.as<uint32_t>(), matrix.rows(), matrix.cols(), out.as<uint32_t>());
      break;
    default:
      BITMILL_CHECK(!"transposed: elements of 1, 2 or 4 bytes");
  }
  return out;
}

Tensor as_f16(TensorView values, const std::string& what, bool exact) {
  if (values.dtype == DType::kF16) return clone(values);
  Tensor wide(DType::kF32, values.shape), out(DType::kF16, values.shape);
  convert(values, wide);
  for (int64_t i = 0; i < wide.elements(); ++i) {
    const float value = wide.as<float>()[i];
    const Float16 half = to_f16(value);
    if (!std::isfinite(to_float(half)) || (exact && to_float(half) != value))
      fail(ExitCode::kInput, "{}: element {} is {}, which F16 (up to 65504) cannot hold{}", what, i,
           value, exact ? " exactly" : "");
    out.as<Float16>()[i] = half;
  }
  return out;
}

Tensor read_stored(const Checkpoint& checkpoint, const std::string& name,
                   std::initializer_list<DType> dtypes, const Shape& shape) {
  const TensorEntry* entry = checkpoint.find(name);
  if (entry == nullptr)
    fail(ExitCode::kInput, "{}: tensor {} is missing, expected {} {}", checkpoint.directory(), name,
         dtype_names(dtypes), shape.text());
  if (std::find(dtypes.begin(), dtypes.end(), entry->dtype) == dtypes.end() ||
      !(entry->shape == shape))
    fail(ExitCode::kInput, "{}: tensor {} is {} {}, expected {} {}", checkpoint.directory(), name,
         dtype_name(entry->dtype), entry->shape.text(), dtype_names(dtypes), shape.text());
  return checkpoint.read(name);
}

void check_group_index(const Tensor& g_idx, int64_t groups, const std::string& name) {
  for (int64_t i = 0; i < g_idx.elements(); ++i)
    if (const int32_t group = g_idx.as<int32_t>()[i]; group < 0 || group >= groups)
      fail(ExitCode::kInput, "tensor {}: column {} has group {}, expected 0..{}", name, i, group,
           groups - 1);
}

}  // namespace bitmill
