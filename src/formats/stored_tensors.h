// Small helpers that packed formats share: settings checks with one wording, transposes, reading
// with expectations.
#pragma once

#include <initializer_list>
#include <string>

#include "formats/format.h"

namespace bitmill {

// Throws Error(kUsage) unless `bits` is one of `allowed`; `hint` ends the sentence.
void check_bits(const std::string& format, const LinearSpec& linear, int bits,
                std::initializer_list<int> allowed, const std::string& hint);
// Throws Error(kUsage) unless group_size is -1 or divides the input columns.
void check_group_size(const std::string& format, const LinearSpec& linear, int64_t group_size);
// Throws Error(kUsage) naming the format and both modules when two quantized modules differ in
// symmetry.
void check_one_symmetry(const std::string& format, const std::vector<ModuleChoice>& modules);

// Internal consistency of what a quantizer hands over: shapes and dtypes of quantized.h.
void check_quantized(const LinearSpec& linear, const QuantizedLinear& quantized);
// For formats whose group of a column is its number / group_size. Both throw Error(kUsage) naming
// the module and the formats that can: for act_order=dynamic with groups, before any compute; for
// a g_idx that is not sequential, when packing.
void check_no_scatter(const std::string& format, const LinearSpec& linear,
                      const QuantizeSettings& settings);
void check_sequential(const std::string& format, const LinearSpec& linear,
                      const QuantizedLinear& quantized);
Tensor make_group_index(int64_t in, int64_t group_size);  // I32 [in], i / group_size

// [rows, cols] -> [cols, rows]; any dtype of 1, 2 or 4 bytes.
Tensor transposed(TensorView matrix);
// Copy in F16. Error(kInput) naming `what` and the element when a value is not finite in F16, or,
// with `exact`, when it is not the same number there.
Tensor as_f16(TensorView values, const std::string& what, bool exact);

// What `config` says of a packed linear: bits, group size and symmetry are set, tensors are empty.
// Error(kInput) when it leaves the linear in float.
QuantizedLinear described(const OutputFormat& format, const Checkpoint& checkpoint,
                          const LinearSpec& linear, const Json& config);
// Reads a whole tensor. Error(kInput) naming tensor, found and expected when it is missing or
// differs.
Tensor read_stored(const Checkpoint& checkpoint, const std::string& name,
                   std::initializer_list<DType> dtypes, const Shape& shape);

// Error(kInput) naming the tensor when a value lies outside 0..groups-1.
void check_group_index(const Tensor& g_idx, int64_t groups, const std::string& name);

}  // namespace bitmill
