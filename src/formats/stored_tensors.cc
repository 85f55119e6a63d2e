#include "formats/stored_tensors.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

namespace bitmill {

void check_bits(const std::string& format, const LinearSpec& linear, int bits,
                std::initializer_list<int> allowed, const std::string& hint) {
  if (std::find(allowed.begin(), allowed.end(), bits) != allowed.end()) return;
  fail(ExitCode::kUsage,
       "output.format={} stores {} or {} bits, quantize.bits={} was asked for {}{}", format,
       fmt::join(allowed.begin(), allowed.end() - 1, ", "), *(allowed.end() - 1), bits,
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

bool sequential_groups(const QuantizedLinear& quantized) {
  const int64_t group_size = quantized.group_size == -1 ? quantized.in() : quantized.group_size;
  const int32_t* g_idx = quantized.g_idx.as<int32_t>();
  for (int64_t i = 0; i < quantized.in(); ++i)
    if (g_idx[i] != i / group_size) return false;
  return true;
}

Tensor make_group_index(int64_t in, int64_t group_size) {
  Tensor g_idx(DType::kI32, {in});
  for (int64_t i = 0; i < in; ++i)
    g_idx.as<int32_t>()[i] = group_size == -1 ? 0 : static_cast<int32_t>(i / group_size);
  return g_idx;
}

namespace {
template <typename T>
void transpose_into(const T* in, int64_t rows, int64_t cols, T* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) out[c * rows + r] = in[r * cols + c];
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

int64_t config_integer(const Json& config, const char* key) {
  const auto at = config.find(key);
  if (at == config.end() || !at->is_number_integer())
    fail(ExitCode::kInput, "config.json: quantization_config.{} is {}, expected an integer", key,
         at == config.end() ? "missing" : at->dump());
  return at->get<int64_t>();
}

bool config_bool(const Json& config, const char* key, bool absent) {
  const auto at = config.find(key);
  if (at == config.end() || at->is_null()) return absent;
  if (!at->is_boolean())
    fail(ExitCode::kInput, "config.json: quantization_config.{} is {}, expected true or false", key,
         at->dump());
  return at->get<bool>();
}

}  // namespace bitmill
