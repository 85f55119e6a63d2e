#include "core/dtype.h"

#include <immintrin.h>

#include <array>

namespace bitmill {
namespace {

struct Row {
  DType dtype;
  int bits;
  std::string_view name;
};

constexpr std::array<Row, 22> kTable{{
    {DType::kBool, 8, "BOOL"},          {DType::kF4, 4, "F4"},
    {DType::kF6E2M3, 6, "F6_E2M3"},     {DType::kF6E3M2, 6, "F6_E3M2"},
    {DType::kU8, 8, "U8"},              {DType::kI8, 8, "I8"},
    {DType::kF8E5M2, 8, "F8_E5M2"},     {DType::kF8E4M3, 8, "F8_E4M3"},
    {DType::kF8E8M0, 8, "F8_E8M0"},     {DType::kF8E4M3FNUZ, 8, "F8_E4M3FNUZ"},
    {DType::kF8E5M2FNUZ, 8, "F8_E5M2FNUZ"}, {DType::kI16, 16, "I16"},
    {DType::kU16, 16, "U16"},           {DType::kF16, 16, "F16"},
    {DType::kBF16, 16, "BF16"},         {DType::kI32, 32, "I32"},
    {DType::kU32, 32, "U32"},           {DType::kF32, 32, "F32"},
    {DType::kC64, 64, "C64"},           {DType::kF64, 64, "F64"},
    {DType::kI64, 64, "I64"},           {DType::kU64, 64, "U64"},
}};

}  // namespace

int dtype_bits(DType dtype) { return kTable[static_cast<size_t>(dtype)].bits; }

std::string_view dtype_name(DType dtype) { return kTable[static_cast<size_t>(dtype)].name; }

std::optional<DType> dtype_from_name(std::string_view name) {
  for (const Row& row : kTable)
    if (row.name == name) return row.dtype;
  return std::nullopt;
}

bool is_source_float(DType dtype) {
  return dtype == DType::kF16 || dtype == DType::kBF16 || dtype == DType::kF32;
}

// F16C is part of the x86-64-v3 baseline.
float to_float(Float16 value) { return _cvtsh_ss(value.bits); }

Float16 to_f16(float value) { return {_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)}; }

Float16 to_f16(double value) {
  // double -> float rounds once, float -> half a second time: wrong only when the float lands exactly on a half tie
  // that the double was not on. Step the float off the tie towards the double first (round-to-odd).
  float f = static_cast<float>(value);
  if (static_cast<double>(f) != value) {
    uint32_t u = std::bit_cast<uint32_t>(f);
    const bool away = (static_cast<double>(f) < value) == (value > 0);  // |value| > |f|
    if ((u & 1u) == 0) u = away ? u + 1 : u - 1;
    f = std::bit_cast<float>(u);
  }
  return to_f16(f);
}

}  // namespace bitmill
