// Small quantized linears for format tests.
#pragma once

#include <random>
#include <string>

#include "core/quantized.h"
#include "formats/format.h"

namespace bitmill::testing {

struct FixtureOptions {
  int bits = 4;
  int64_t group_size = 32;
  bool symmetric = true;
  DType scale_dtype = DType::kF16;
  int smallest_zero = 1;  // of asymmetric zero points
};

// Random codes over the whole range, scales in (0, 2) exactly representable in every stored type,
// g_idx = i / group_size.
inline QuantizedLinear random_quantized(int64_t out, int64_t in, const FixtureOptions& options,
                                        unsigned seed = 7) {
  std::mt19937 random(seed);
  const int64_t groups = group_count(in, options.group_size);
  QuantizedLinear q;
  q.bits = options.bits;
  q.group_size = options.group_size;
  q.symmetric = options.symmetric;
  q.codes = Tensor(DType::kU8, {out, in});
  const unsigned levels = 1u << options.bits;
  for (int64_t i = 0; i < q.codes.elements(); ++i)
    q.codes.as<uint8_t>()[i] = static_cast<uint8_t>(random() % levels);
  Tensor scales(DType::kF32, {out, groups});
  for (int64_t i = 0; i < scales.elements(); ++i)
    scales.as<float>()[i] = static_cast<float>(1 + random() % 127) / 64.0f;
  q.scales = Tensor(options.scale_dtype, {out, groups});
  convert(scales, q.scales);
  q.zeros = Tensor(DType::kU8, {out, groups});
  for (int64_t i = 0; i < q.zeros.elements(); ++i)
    q.zeros.as<uint8_t>()[i] =
        options.symmetric ? static_cast<uint8_t>(levels / 2)
                          : static_cast<uint8_t>(options.smallest_zero +
                                                 random() % (levels - options.smallest_zero));
  q.g_idx = Tensor(DType::kI32, {in});
  for (int64_t i = 0; i < in; ++i)
    q.g_idx.as<int32_t>()[i] =
        options.group_size == -1 ? 0 : static_cast<int32_t>(i / options.group_size);
  return q;
}

inline const Tensor& tensor_named(const std::vector<NamedTensor>& tensors,
                                  const std::string& name) {
  for (const NamedTensor& tensor : tensors)
    if (tensor.name == name) return tensor.data;
  throw std::runtime_error("no tensor " + name);
}

// Word `i` of an I32 tensor, as the unsigned number that hex dumps show.
inline uint32_t word(const Tensor& tensor, int64_t i) {
  return static_cast<uint32_t>(tensor.as<int32_t>()[i]);
}

inline bool same_bytes(const Tensor& a, const Tensor& b) {
  return a.dtype() == b.dtype() && a.shape() == b.shape() &&
         std::string_view(a.as<char>(), static_cast<size_t>(a.bytes())) ==
             std::string_view(b.as<char>(), static_cast<size_t>(b.bytes()));
}

// Exit code and text of what `body` throws; kDone and "" when it does not.
template <typename Body>
std::pair<ExitCode, std::string> thrown(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    return {error.code(), error.what()};
  }
  return {ExitCode::kDone, ""};
}

}  // namespace bitmill::testing
