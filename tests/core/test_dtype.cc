// Rounding of bf16 and f16 against exact arithmetic on the neighbours of a value.
#include "core/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace bitmill {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

float bf16(float value) {
  return to_float(to_bf16(value));
}
uint16_t f16_bits(double value) {
  return to_f16(value).bits;
}

// Nearest binary16 by definition: the two neighbours on the grid, exact distances, ties to the even
// code.
uint16_t reference_f16(double value) {
  const double magnitude = std::abs(value);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (magnitude >= 65520) return sign | 0x7C00;  // half way from 65504 to the next power
  const int exponent = std::max(magnitude == 0 ? -14 : std::ilogb(magnitude), -14);
  const double step = std::ldexp(1.0, exponent - 10);
  const double steps = magnitude / step;  // exact: a power of two
  double low = std::floor(steps);
  const double rest = steps - low;
  if (rest > 0.5 || (rest == 0.5 && std::fmod(low, 2) == 1)) low += 1;
  const double code = (exponent + 14) * 1024.0 + low;  // subnormal and normal codes are contiguous
  return sign | static_cast<uint16_t>(code);
}

TEST(DType, NamesAndBits) {
  EXPECT_EQ(dtype_name(DType::kBF16), "BF16");
  EXPECT_EQ(dtype_bits(DType::kF4), 4);
  EXPECT_EQ(dtype_bits(DType::kC64), 64);
  for (int i = 0; i <= static_cast<int>(DType::kU64); ++i) {
    const DType dtype = static_cast<DType>(i);
    EXPECT_EQ(dtype_from_name(dtype_name(dtype)), dtype) << dtype_name(dtype);
  }
  EXPECT_EQ(dtype_from_name("bf16"), std::nullopt);
  EXPECT_TRUE(is_source_float(DType::kF16) && is_source_float(DType::kBF16) &&
              is_source_float(DType::kF32));
  EXPECT_FALSE(is_source_float(DType::kF64) || is_source_float(DType::kF8E4M3));
}

TEST(BFloat16, EveryCodeSurvivesTheRoundTrip) {
  for (uint32_t code = 0; code < 0x10000; ++code) {
    const float value = to_float(BFloat16{static_cast<uint16_t>(code)});
    if (std::isnan(value))
      EXPECT_TRUE(std::isnan(bf16(value))) << code;
    else
      ASSERT_EQ(to_bf16(value).bits, code);
  }
}

TEST(BFloat16, TiesGoToEven) {
  EXPECT_EQ(bf16(1 + 0x1p-8f), 1.0f);
  EXPECT_EQ(bf16(1 + 0x3p-8f), 1 + 0x1p-6f);
  EXPECT_EQ(bf16(std::nextafter(1 + 0x1p-8f, 2.0f)), 1 + 0x1p-7f);
  EXPECT_EQ(bf16(-(1 + 0x1p-8f)), -1.0f);
  EXPECT_EQ(bf16(std::numeric_limits<float>::max()), kInf);
  EXPECT_EQ(bf16(kInf), kInf);
  EXPECT_EQ(bf16(-kInf), -kInf);
  EXPECT_EQ(bf16(0x1p-133f), 0x1p-133f) << "smallest subnormal";
  EXPECT_EQ(bf16(0x1p-134f), 0.0f) << "tie with zero";
  EXPECT_TRUE(std::signbit(bf16(-0.0f)));
}

TEST(BFloat16, NaNStaysNaN) {
  for (uint32_t bits : {0x7F800001u, 0x7FFFFFFFu, 0xFFFFFFFFu, 0xFF800001u, 0x7FC00000u})
    EXPECT_TRUE(std::isnan(bf16(std::bit_cast<float>(bits)))) << bits;
}

TEST(Float16, EveryCodeSurvivesTheRoundTrip) {
  for (uint32_t code = 0; code < 0x10000; ++code) {
    const float value = to_float(Float16{static_cast<uint16_t>(code)});
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(to_float(to_f16(value)))) << code;
      EXPECT_TRUE(std::isnan(to_float(to_f16(static_cast<double>(value))))) << code;
    } else {
      ASSERT_EQ(to_f16(value).bits, code);
      ASSERT_EQ(f16_bits(value), code);
    }
  }
}

TEST(Float16, KnownValues) {
  EXPECT_EQ(to_float(Float16{0x3C00}), 1.0f);
  EXPECT_EQ(to_float(Float16{0x0001}), 0x1p-24f);
  EXPECT_EQ(to_float(Float16{0x7BFF}), 65504.0f);
  EXPECT_EQ(f16_bits(65519.999), 0x7BFF);
  EXPECT_EQ(f16_bits(65520.0), 0x7C00) << "overflow gives infinity";
  EXPECT_EQ(f16_bits(1e300), 0x7C00);
  EXPECT_EQ(f16_bits(-1e300), 0xFC00);
  EXPECT_EQ(f16_bits(0x1p-25), 0) << "tie with zero";
  EXPECT_EQ(f16_bits(std::nextafter(0x1p-25, 1.0)), 1);
  EXPECT_EQ(f16_bits(1e-300), 0);
  EXPECT_EQ(f16_bits(-1e-300), 0x8000);
}

// Every midpoint between neighbouring halves, and the doubles right beside it: where rounding
// through float goes wrong.
TEST(Float16, DoubleRoundsOnceAtEveryTie) {
  for (uint16_t code = 0; code < 0x7BFF; ++code) {
    const double low = to_float(Float16{code}),
                 high = to_float(Float16{static_cast<uint16_t>(code + 1)});
    const double tie = (low + high) / 2;
    const uint16_t even = code % 2 == 0 ? code : code + 1;
    ASSERT_EQ(f16_bits(tie), even) << code;
    ASSERT_EQ(f16_bits(std::nextafter(tie, 0.0)), code);
    ASSERT_EQ(f16_bits(std::nextafter(tie, 1e9)), code + 1);
    ASSERT_EQ(f16_bits(-std::nextafter(tie, 0.0)), code | 0x8000);
    ASSERT_EQ(f16_bits(-std::nextafter(tie, 1e9)), (code + 1) | 0x8000);
  }
}

TEST(Float16, RandomDoublesMatchTheDefinition) {
  std::mt19937_64 random(7);
  std::uniform_real_distribution<double> mantissa(1, 2);
  std::uniform_int_distribution<int> exponent(-30, 17);
  for (int i = 0; i < 1'000'000; ++i) {
    double value = std::ldexp(mantissa(random), exponent(random));
    if (i % 2 == 1) value = -value;
    ASSERT_EQ(f16_bits(value), reference_f16(value)) << value;
    const float single = static_cast<float>(value);
    ASSERT_EQ(to_f16(single).bits, reference_f16(single)) << single;
  }
}

}  // namespace
}  // namespace bitmill
