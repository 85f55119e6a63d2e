// Words, names, shapes and refusals of the GPTQ v1 and v2 layout.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "formats/quantized_fixture.h"
#include "io/json.h"

namespace bitmill {
namespace {

using testing::FixtureOptions;
using ::testing::HasSubstr;
using testing::random_quantized;
using testing::tensor_named;
using testing::thrown;
using testing::word;

const LinearSpec kLinear{"model.layers.0.self_attn.q_proj", 32, 64, true};

std::vector<NamedTensor> pack(const std::string& format, const QuantizedLinear& q,
                              TensorView bias = {}) {
  return find_format(format).pack({"m", q.out(), q.in(), bias.data != nullptr}, q, bias);
}

TEST(Gptq, CodesRunDownTheColumnsOfQweight) {
  QuantizedLinear q = random_quantized(8, 16, {.group_size = 8});
  for (int64_t o = 0; o < 8; ++o)
    for (int64_t i = 0; i < 16; ++i)
      q.codes.as<uint8_t>()[o * 16 + i] = static_cast<uint8_t>(i % 8);
  q.codes.as<uint8_t>()[3 * 16 + 8] =
      15;  // row 3, column 8: word row 1, word column 3, lowest nibble
  const auto tensors = pack("gptq", q);
  const Tensor& qweight = tensor_named(tensors, "m.qweight");
  EXPECT_EQ(qweight.shape(), Shape({2, 8}));
  EXPECT_EQ(word(qweight, 0), 0x76543210u);
  EXPECT_EQ(word(qweight, 8 + 2), 0x76543210u);
  EXPECT_EQ(word(qweight, 8 + 3), 0x7654321Fu);
}

TEST(Gptq, VersionOneStoresZeroPointsMinusOne) {
  struct Case {
    int bits;
    uint32_t v1, v2;
  };
  for (const Case& c : {Case{4, 0x77777777, 0x88888888}, Case{2, 0x55555555, 0xAAAAAAAA},
                        Case{8, 0x7F7F7F7F, 0x80808080}, Case{3, 0xDB6DB6DB, 0x24924924}}) {
    const QuantizedLinear q = random_quantized(32, 64, {.bits = c.bits});
    EXPECT_EQ(word(tensor_named(pack("gptq", q), "m.qzeros"), 0), c.v1) << c.bits;
    EXPECT_EQ(word(tensor_named(pack("gptq_v2", q), "m.qzeros"), 0), c.v2) << c.bits;
  }
  QuantizedLinear q = random_quantized(8, 32, {.symmetric = false});
  for (int64_t o = 0; o < 8; ++o) q.zeros.as<uint8_t>()[o] = static_cast<uint8_t>(5 + o);
  EXPECT_EQ(word(tensor_named(pack("gptq", q), "m.qzeros"), 0), 0xBA987654u);
  EXPECT_EQ(word(tensor_named(pack("gptq_v2", q), "m.qzeros"), 0), 0xCBA98765u);
}

TEST(Gptq, VersionOneRefusesAZeroPointOfZero) {
  QuantizedLinear q = random_quantized(32, 64, {.symmetric = false});
  q.zeros.as<uint8_t>()[5 * 2 + 1] = 0;
  const auto [code, text] = thrown([&] { pack("gptq", q); });
  EXPECT_EQ(code, ExitCode::kInput);
  EXPECT_THAT(text, HasSubstr("row 5, group 1"));
  EXPECT_THAT(text, HasSubstr("gptq_v2"));
  EXPECT_NO_THROW(pack("gptq_v2", q));
}

TEST(Gptq, ScalesAreTransposedAndHalf) {
  const QuantizedLinear q = random_quantized(32, 64, {});
  const auto tensors = pack("gptq", q);
  const Tensor& scales = tensor_named(tensors, "m.scales");
  ASSERT_EQ(scales.dtype(), DType::kF16);
  ASSERT_EQ(scales.shape(), Shape({2, 32}));
  EXPECT_EQ(scales.as<uint16_t>()[1 * 32 + 9], q.scales.as<uint16_t>()[9 * 2 + 1]);
}

TEST(Gptq, BiasIsRoundedToHalfAndRefusedBeyondIt) {
  const QuantizedLinear q = random_quantized(8, 32, {});
  Tensor bias = Tensor::zeros(DType::kF32, {8});
  bias.as<float>()[0] = 1.0f + 0x1p-11f;             // half way: to even, 1
  bias.as<float>()[1] = 1.0f + 0x1p-10f + 0x1p-11f;  // half way: to even, 1 + 2^-9
  const auto tensors = pack("gptq", q, bias);
  const Tensor& stored = tensor_named(tensors, "m.bias");
  ASSERT_EQ(stored.dtype(), DType::kF16);
  EXPECT_EQ(to_float(stored.as<Float16>()[0]), 1.0f);
  EXPECT_EQ(to_float(stored.as<Float16>()[1]), 1.0f + 0x1p-9f);
  bias.as<float>()[6] = 70000;
  const auto [code, text] = thrown([&] { pack("gptq", q, bias); });
  EXPECT_EQ(code, ExitCode::kInput);
  EXPECT_THAT(text, HasSubstr("m.bias"));
  EXPECT_THAT(text, HasSubstr("70000"));
}

TEST(Gptq, RowGroupsHaveOneGroupAndZeroIndex) {
  const QuantizedLinear q = random_quantized(32, 64, {.group_size = -1});
  const auto tensors = pack("gptq", q);
  EXPECT_EQ(tensor_named(tensors, "m.scales").shape(), Shape({1, 32}));
  for (int64_t i = 0; i < 64; ++i) EXPECT_EQ(tensor_named(tensors, "m.g_idx").as<int32_t>()[i], 0);
}

TEST(Gptq, SpecsSayWhatPackWrites) {
  Tensor bias = Tensor::zeros(DType::kBF16, {32});
  for (const char* format : {"gptq", "gptq_v2", "compressed-tensors"})
    for (int bits : {2, 4, 8})
      for (int64_t group_size : {int64_t{-1}, int64_t{32}}) {
        QuantizeSettings settings;
        settings.bits = bits;
        settings.group_size = group_size;
        const OutputFormat& f = find_format(format);
        const auto tensors = f.pack(kLinear,
                                    random_quantized(32, 64,
                                                     {.bits = bits,
                                                      .group_size = group_size,
                                                      .scale_dtype = f.scale_dtype(DType::kBF16)}),
                                    bias);
        const auto specs = f.packed_specs(kLinear, settings, DType::kBF16);
        ASSERT_EQ(specs.size(), tensors.size());
        for (size_t i = 0; i < specs.size(); ++i) {
          EXPECT_EQ(specs[i].name, tensors[i].name);
          EXPECT_EQ(specs[i].dtype, tensors[i].data.dtype()) << specs[i].name;
          EXPECT_EQ(specs[i].shape, tensors[i].data.shape()) << specs[i].name;
        }
      }
}

std::pair<ExitCode, std::string> checked(const std::string& format, const LinearSpec& linear,
                                         const QuantizeSettings& settings) {
  return thrown([&] { find_format(format).check(linear, settings); });
}

TEST(GptqCheck, NamesWhatCannotBeStored) {
  QuantizeSettings settings;
  settings.group_size = 32;
  EXPECT_EQ(checked("gptq", kLinear, settings).first, ExitCode::kDone);

  settings.bits = 5;
  auto [code, text] = checked("gptq", kLinear, settings);
  EXPECT_EQ(code, ExitCode::kUsage);
  EXPECT_THAT(
      text, HasSubstr("output.format=gptq stores 2, 3, 4 or 8 bits, quantize.bits=5 was asked for"));

  settings.bits = 4;
  settings.symmetric = false;
  std::tie(code, text) = checked("gptq", kLinear, settings);
  EXPECT_EQ(code, ExitCode::kUsage);
  EXPECT_THAT(text, HasSubstr("output.format=gptq_v2"));
  EXPECT_EQ(checked("gptq_v2", kLinear, settings).first, ExitCode::kDone);

  settings.symmetric = true;
  settings.group_size = 48;
  std::tie(code, text) = checked("gptq", kLinear, settings);
  EXPECT_EQ(code, ExitCode::kUsage);
  EXPECT_THAT(text, HasSubstr("quantize.group_size=48 does not divide the 64 input columns"));

  settings.group_size = -1;
  std::tie(code, text) = checked("gptq", {"m", 36, 64, false}, settings);
  EXPECT_EQ(code, ExitCode::kUsage);
  EXPECT_THAT(text, HasSubstr("[36, 64]"));

  settings.skip = true;
  EXPECT_EQ(checked("gptq", {"m", 36, 64, false}, settings).first, ExitCode::kDone);
}

TEST(GptqCheck, ThreeBitsNeedWholeTriplesOfWords) {
  QuantizeSettings settings;
  settings.bits = 3;
  settings.group_size = -1;
  EXPECT_EQ(checked("gptq", {"m", 32, 96, false}, settings).first, ExitCode::kDone);
  EXPECT_EQ(checked("gptq", {"m", 32, 80, false}, settings).first, ExitCode::kUsage);
  EXPECT_EQ(checked("gptq", {"m", 48, 96, false}, settings).first, ExitCode::kUsage);
}

TEST(FormatTable, UnknownNameListsTheKnownOnes) {
  const auto [code, text] = thrown([] { find_format("ggml"); });
  EXPECT_EQ(code, ExitCode::kUsage);
  EXPECT_THAT(text, HasSubstr("gptq, gptq_v2, compressed-tensors"));
}

TEST(FormatTable, FormatOfReadsTheConfig) {
  const auto named = [](const char* text) {
    const OutputFormat* format = format_of(Json::parse(text));
    return format == nullptr ? std::string("float") : format->name();
  };
  EXPECT_EQ(named("{}"), "float");
  EXPECT_EQ(named(R"({"quantization_config": {"quant_method": "gptq"}})"), "gptq");
  EXPECT_EQ(
      named(
          R"({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "format": "x"}})"),
      "gptq_v2");
  EXPECT_EQ(named(R"({"quantization_config": {"quant_method": "gptq", "format": "gptq_v2"}})"),
            "gptq_v2");
  EXPECT_EQ(
      named(
          R"({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}})"),
      "compressed-tensors");
  const auto [code, text] =
      thrown([&] { named(R"({"quantization_config": {"quant_method": "fp8"}})"); });
  EXPECT_EQ(code, ExitCode::kInput);
  EXPECT_THAT(text, HasSubstr("fp8"));
}

}  // namespace
}  // namespace bitmill
