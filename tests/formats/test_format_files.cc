// pack -> file -> unpack is the identity, and unpack refuses files that do not fit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "formats/quantized_fixture.h"
#include "io/json.h"
#include "support/paths.h"

namespace bitmill {
namespace {

using testing::FixtureOptions;
using ::testing::HasSubstr;
using testing::random_quantized;
using testing::same_bytes;
using testing::thrown;

const LinearSpec kLinear{"model.layers.0.mlp.down_proj", 32, 96, false};

struct Stored {
  testing::TemporaryDirectory directory;
  Json config;

  Checkpoint write(const std::vector<NamedTensor>& tensors) {
    std::vector<NamedView> views;
    for (const NamedTensor& tensor : tensors) views.push_back({tensor.name, tensor.data.view()});
    write_safetensors(directory.file("model.safetensors"), views);
    return Checkpoint::open(directory.path());
  }
};

Json config_of(const OutputFormat& format, const QuantizedLinear& q) {
  ModuleChoice choice;
  choice.module = kLinear.module;
  choice.bits = q.bits;
  choice.group_size = q.group_size;
  choice.symmetric = q.symmetric;
  return Json::parse(format.config({}, {choice}).quantization_config.dump());
}

TEST(FormatFiles, RoundTripIsExact) {
  for (const OutputFormat* format : output_formats())
    for (int bits : {2, 3, 4, 8})
      for (int64_t group_size : {int64_t{-1}, int64_t{32}, int64_t{96}})
        for (bool symmetric : {true, false})
          for (DType model : {DType::kF16, DType::kBF16, DType::kF32}) {
            if (bits == 3 && format->name() == "compressed-tensors") continue;
            if (bits != 4 && format->name() == "awq") continue;
            SCOPED_TRACE(fmt::format("{} {} bits, group {}, symmetric {}", format->name(), bits,
                                     group_size, symmetric));
            const QuantizedLinear q = random_quantized(32, 96,
                                                       {.bits = bits,
                                                        .group_size = group_size,
                                                        .symmetric = symmetric,
                                                        .scale_dtype = format->scale_dtype(model)});
            Stored stored;
            const Checkpoint checkpoint = stored.write(format->pack(kLinear, q, {}));
            ASSERT_TRUE(format->holds(checkpoint, kLinear));
            const QuantizedLinear back = format->unpack(checkpoint, kLinear, config_of(*format, q));
            EXPECT_EQ(back.bits, q.bits);
            EXPECT_EQ(back.group_size, q.group_size);
            EXPECT_EQ(back.symmetric, q.symmetric);
            EXPECT_TRUE(same_bytes(back.codes, q.codes));
            EXPECT_TRUE(same_bytes(back.scales, q.scales));
            EXPECT_TRUE(same_bytes(back.zeros, q.zeros));
            EXPECT_TRUE(same_bytes(back.g_idx, q.g_idx));
          }
}

TEST(FormatFiles, ScatteredGroupsSurviveGptq) {
  QuantizedLinear q = random_quantized(32, 96, {});
  std::mt19937 random(3);
  std::shuffle(q.g_idx.as<int32_t>(), q.g_idx.as<int32_t>() + 96, random);
  const OutputFormat& format = find_format("gptq");
  Stored stored;
  const Checkpoint checkpoint = stored.write(format.pack(kLinear, q, {}));
  EXPECT_TRUE(same_bytes(format.unpack(checkpoint, kLinear, config_of(format, q)).g_idx, q.g_idx));
}

// Changes one stored tensor (or drops it, when `change` leaves it empty) and reports what unpack
// says.
std::pair<ExitCode, std::string> broken(const std::string& format_name, const std::string& suffix,
                                        const std::function<void(Tensor&)>& change) {
  const OutputFormat& format = find_format(format_name);
  const QuantizedLinear q = random_quantized(32, 96, {.symmetric = format_name == "gptq"});
  std::vector<NamedTensor> tensors = format.pack(kLinear, q, {});
  std::erase_if(tensors, [&](NamedTensor& tensor) {
    if (tensor.name.ends_with(suffix)) change(tensor.data);
    return tensor.data.empty();
  });
  Stored stored;
  const Checkpoint checkpoint = stored.write(tensors);
  return thrown([&] { format.unpack(checkpoint, kLinear, config_of(format, q)); });
}

TEST(FormatFiles, UnpackNamesTheTensorThatDoesNotFit) {
  const auto drop = [](Tensor& tensor) { tensor.reset(); };
  const auto flat = [](Tensor& tensor) { tensor.reshape({tensor.elements()}); };
  for (const char* suffix : {".qweight", ".qzeros", ".scales", ".g_idx"}) {
    const auto [code, text] = broken("gptq", suffix, drop);
    EXPECT_EQ(code, ExitCode::kInput);
    EXPECT_THAT(text, HasSubstr(suffix));
    EXPECT_THAT(text, HasSubstr("missing"));
  }
  auto [code, text] = broken("gptq", ".qweight", flat);
  EXPECT_EQ(code, ExitCode::kInput);
  EXPECT_THAT(text, HasSubstr("[384]"));
  EXPECT_THAT(text, HasSubstr("[12, 32]"));
  std::tie(code, text) = broken("gptq", ".g_idx", [](Tensor& t) { t.as<int32_t>()[17] = 3; });
  EXPECT_EQ(code, ExitCode::kInput);
  EXPECT_THAT(text, HasSubstr("column 17 has group 3, expected 0..2"));
  std::tie(code, text) = broken("gptq", ".qzeros", [](Tensor& t) { t.as<int32_t>()[0] = -1; });
  EXPECT_EQ(code, ExitCode::kInput);
  EXPECT_THAT(text, HasSubstr(".qzeros"));
  for (const char* suffix :
       {".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point"}) {
    const bool found =
        broken("compressed-tensors", suffix, drop).second.find(suffix) != std::string::npos;
    EXPECT_TRUE(found) << suffix;
  }
  for (const char* suffix : {".qweight", ".qzeros", ".scales"}) {
    std::tie(code, text) = broken("awq", suffix, drop);
    EXPECT_EQ(code, ExitCode::kInput);
    EXPECT_THAT(text, HasSubstr(suffix));
  }
  std::tie(code, text) = broken("awq", ".qweight", flat);
  EXPECT_THAT(text, HasSubstr("[96, 4]"));
  std::tie(code, text) =
      broken("compressed-tensors", ".weight_shape", [](Tensor& t) { t.as<int64_t>()[0] = 33; });
  EXPECT_EQ(code, ExitCode::kInput);
  EXPECT_THAT(text, HasSubstr("[33, 96]"));
}

TEST(FormatFiles, PackedButFloatByConfigIsRefused) {
  const OutputFormat& format = find_format("gptq");
  const QuantizedLinear q = random_quantized(32, 96, {});
  Stored stored;
  const Checkpoint checkpoint = stored.write(format.pack(kLinear, q, {}));
  Json config = config_of(format, q);
  config["dynamic"] = Json{{"-:.*down_proj", Json::object()}};
  EXPECT_EQ(thrown([&] { format.unpack(checkpoint, kLinear, config); }).first, ExitCode::kInput);
}

}  // namespace
}  // namespace bitmill
