// Element types: the safetensors spelling, bits per element, and bf16/f16 conversion (round half to even).
#pragma once

#include <bit>
#include <cstdint>
#include <optional>
#include <string_view>

namespace bitmill {

// Every dtype a safetensors header may name. Arithmetic exists for kF16, kBF16, kF32, kF64; integers are storage.
enum class DType : uint8_t {
  kBool, kF4, kF6E2M3, kF6E3M2, kU8, kI8, kF8E5M2, kF8E4M3, kF8E8M0, kF8E4M3FNUZ, kF8E5M2FNUZ,
  kI16, kU16, kF16, kBF16, kI32, kU32, kF32, kC64, kF64, kI64, kU64,
};  // in safetensors' alignment order: its writer sorts tensors by this, descending

// Bits per element (4 for kF4, 64 for kC64).
int dtype_bits(DType dtype);
// "BF16", "F32", ...: the safetensors spelling.
std::string_view dtype_name(DType dtype);
// Inverse of dtype_name; nullopt for an unknown spelling.
std::optional<DType> dtype_from_name(std::string_view name);
// kF16, kBF16 and kF32: the types a source weight may have.
bool is_source_float(DType dtype);

// IEEE bfloat16 in a 16-bit word.
struct BFloat16 {
  uint16_t bits;
};
// IEEE binary16 in a 16-bit word.
struct Float16 {
  uint16_t bits;
};

// Exact.
inline float to_float(BFloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

// Round to nearest even; NaN stays NaN (quiet). Branch-free so that loops vectorise.
inline BFloat16 to_bf16(float value) {
  const uint32_t u = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const uint32_t quiet = (u >> 16) | 0x40u;
  return {static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded)};
}

float to_float(Float16 value);    // exact
Float16 to_f16(float value);      // round to nearest even; overflow gives infinity
Float16 to_f16(double value);     // rounds once, straight from double

}  // namespace bitmill
