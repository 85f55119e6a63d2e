// GPTQ v1 and v2 tensors: names, shapes and words (docs/formats/gptq.md).
#include "formats/gptq.h"

#include "formats/bitstream.h"
#include "formats/stored_tensors.h"

namespace bitmill {

void GptqFormat::check_shape(const LinearSpec& linear, int bits) const {
  // Words run along the input in qweight and along the output in qzeros; both must be whole. 3-bit
  // words come in threes.
  const int64_t multiple = bits == 3 ? 32 : 32 / bits;
  if (linear.in % multiple == 0 && linear.out % multiple == 0) return;
  fail(ExitCode::kUsage,
       "output.format={} packs {} values of {} bits into whole 32-bit words, but {} is [{}, {}]; "
       "leave it in float with "
       "quantize.rule=... skip=true",
       name(), multiple, bits, linear.module, linear.out, linear.in);
}

void GptqFormat::check(const LinearSpec& linear, const QuantizeSettings& settings) const {
  if (settings.skip) return;
  check_bits(name(), linear, settings.bits, {2, 3, 4, 8}, "");
  if (version_ == 1 && !settings.symmetric)
    fail(ExitCode::kUsage,
         "output.format=gptq with quantize.symmetric=false (asked for {}) is refused by loaders, "
         "because zero points are "
         "stored minus one and 0 has no place; use output.format=gptq_v2",
         linear.module);
  check_group_size(name(), linear, settings.group_size);
  check_shape(linear, settings.bits);
}

std::vector<NamedTensor> GptqFormat::pack(const LinearSpec& linear,
                                          const QuantizedLinear& quantized, TensorView bias) const {
  const int bits = quantized.bits;
  check_bits(name(), linear, bits, {2, 3, 4, 8}, "");
  check_shape(linear, bits);
  check_quantized(linear, quantized);
  const int64_t out = linear.out, in = linear.in, groups = quantized.groups();

  Tensor qweight(DType::kI32, {packed_words(in, bits), out});
  pack_rows_transposed(quantized.codes.as<uint8_t>(), out, in, bits, qweight.as<int32_t>());

  Tensor zeros = transposed(quantized.zeros);
  if (version_ == 1)
    for (int64_t i = 0; i < zeros.elements(); ++i)
      if (zeros.as<uint8_t>()[i]-- == 0)
        fail(ExitCode::kInput,
             "{}: row {}, group {} has zero point 0, which format gptq (it stores the zero point "
             "minus one) cannot hold; "
             "use output.format=gptq_v2",
             linear.module, i % out, i / out);
  Tensor qzeros(DType::kI32, {groups, packed_words(out, bits)});
  pack_rows(zeros.as<uint8_t>(), groups, out, bits, qzeros.as<int32_t>());

  std::vector<NamedTensor> tensors;
  tensors.push_back({linear.module + ".qweight", std::move(qweight)});
  tensors.push_back({linear.module + ".qzeros", std::move(qzeros)});
  tensors.push_back({linear.module + ".scales",
                     transposed(as_f16(quantized.scales, linear.module + " scales", true))});
  tensors.push_back({linear.module + ".g_idx", clone(quantized.g_idx)});
  if (bias.data != nullptr)
    tensors.push_back({linear.bias_name(), as_f16(bias, linear.bias_name(), false)});
  return tensors;
}

std::vector<PackedSpec> GptqFormat::packed_specs(const LinearSpec& linear,
                                                 const QuantizeSettings& settings, DType) const {
  const int64_t groups = group_count(linear.in, settings.group_size);
  std::vector<PackedSpec> specs = {
      {linear.module + ".qweight",
       DType::kI32,
       {packed_words(linear.in, settings.bits), linear.out}},
      {linear.module + ".qzeros", DType::kI32, {groups, packed_words(linear.out, settings.bits)}},
      {linear.module + ".scales", DType::kF16, {groups, linear.out}},
      {linear.module + ".g_idx", DType::kI32, {linear.in}}};
  if (linear.bias) specs.push_back({linear.bias_name(), DType::kF16, {linear.out}});
  return specs;
}

bool GptqFormat::holds(const Checkpoint& checkpoint, const LinearSpec& linear) const {
  return checkpoint.find(linear.module + ".qweight") != nullptr;
}

// [groups, out] true zero points. A v1 word of all ones would be the zero point 2^bits (or 0):
// readers disagree on it.
Tensor GptqFormat::unpack_zeros(const Tensor& qzeros, int64_t out, int bits,
                                const std::string& name) const {
  const int64_t groups = qzeros.rows();
  Tensor zeros(DType::kU8, {groups, out});
  unpack_rows(qzeros.as<int32_t>(), groups, out, bits, zeros.as<uint8_t>());
  if (version_ == 1)
    for (int64_t i = 0; i < zeros.elements(); ++i)
      if (zeros.as<uint8_t>()[i]++ == (1 << bits) - 1)
        fail(ExitCode::kInput,
             "tensor {}: row {}, group {} stores {}, a zero point of {} or 0; expected at most {}",
             name, i % out, i / out, (1 << bits) - 1, 1 << bits, (1 << bits) - 2);
  return transposed(zeros);
}

QuantizedLinear GptqFormat::unpack(const Checkpoint& checkpoint, const LinearSpec& linear,
                                   const Json& config) const {
  QuantizedLinear quantized = described(*this, checkpoint, linear, config);
  const int bits = quantized.bits;
  const std::string& module = linear.module;
  const int64_t groups = group_count(linear.in, quantized.group_size);
  const Tensor qweight = read_stored(checkpoint, module + ".qweight", {DType::kI32},
                                     {packed_words(linear.in, bits), linear.out});
  const Tensor qzeros = read_stored(checkpoint, module + ".qzeros", {DType::kI32},
                                    {groups, packed_words(linear.out, bits)});
  const Tensor scales = read_stored(checkpoint, module + ".scales",
                                    {DType::kF16, DType::kBF16, DType::kF32}, {groups, linear.out});
  quantized.g_idx = read_stored(checkpoint, module + ".g_idx", {DType::kI32}, {linear.in});
  check_group_index(quantized.g_idx, groups, module + ".g_idx");
  quantized.codes = Tensor(DType::kU8, {linear.out, linear.in});
  unpack_rows_transposed(qweight.as<int32_t>(), linear.out, linear.in, bits,
                         quantized.codes.as<uint8_t>());
  quantized.scales = transposed(scales);
  quantized.zeros = unpack_zeros(qzeros, linear.out, bits, module + ".qzeros");
  return quantized;
}

}  // namespace bitmill
