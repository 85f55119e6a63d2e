// unpack(pack(x)) is x for every format of the table, through a file: random shapes, widths, group
// sizes and symmetries, as far as the format takes them.
#include <gtest/gtest.h>

#include <map>

#include "formats/quantized_fixture.h"
#include "io/safetensors.h"
#include "support/paths.h"

namespace bitmill {
namespace {

using namespace testing;  // NOLINT: the fixture helpers

struct Job {
  LinearSpec linear;
  QuantizeSettings settings;
};

Job random_job(std::mt19937& random) {
  const int64_t sides[] = {32, 64, 96, 160, 256};
  const int64_t groups[] = {-1, 8, 16, 32, 64, 128};
  Job job;
  job.linear.module = "model.layers.0.mlp.down_proj";
  job.linear.out = sides[random() % 5];
  job.linear.in = sides[random() % 5];
  job.settings.bits = static_cast<int>(2 + random() % 7);
  job.settings.group_size = groups[random() % 6];
  job.settings.symmetric = random() % 2 == 0;
  return job;
}

bool takes(const OutputFormat& format, const Job& job) {
  try {
    format.check(job.linear, job.settings);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage) << error.what();
    return false;
  }
  return true;
}

// What a reader of the file gets.
QuantizedLinear through_file(const OutputFormat& format, const Job& job, const QuantizedLinear& q) {
  const QuantizeSettings& s = job.settings;
  const TemporaryDirectory directory;
  const std::vector<NamedTensor> tensors = format.pack(job.linear, q, TensorView());
  std::vector<NamedView> views;
  for (const NamedTensor& tensor : tensors) views.push_back({tensor.name, tensor.data});
  write_safetensors(directory.file("model.safetensors"), views);
  RunOptions::Quantize all;
  static_cast<QuantizeSettings&>(all) = s;
  const std::vector<ModuleChoice> modules = {
      {job.linear.module, true, s.bits, s.group_size, s.symmetric}};
  const Json config = Json::parse(format.config(all, modules).quantization_config.dump());
  const Checkpoint checkpoint = Checkpoint::open(directory.path());
  EXPECT_TRUE(format.holds(checkpoint, job.linear));
  return format.unpack(checkpoint, job.linear, config);
}

Tensor dense(const QuantizedLinear& q) {
  const std::unique_ptr<Backend> backend = make_backend({"cpu", DType::kF32, 1});
  Tensor out(DType::kF32, q.codes.shape());
  backend->dequantize(q, out);
  return out;
}

TEST(RoundTrip, EveryFormatGivesBackCodesScalesAndZeros) {
  std::map<std::string, int> count;
  std::mt19937 random(17);
  for (const OutputFormat* format : output_formats())
    for (int i = 0; i < 150; ++i) {
      const Job job = random_job(random);
      if (!takes(*format, job)) continue;
      SCOPED_TRACE(fmt::format("{}: [{}, {}], {} bits, group {}, symmetric {}", format->name(),
                               job.linear.out, job.linear.in, job.settings.bits,
                               job.settings.group_size, job.settings.symmetric));
      const FixtureOptions options{job.settings.bits, job.settings.group_size,
                                   job.settings.symmetric, format->scale_dtype(DType::kBF16), 1};
      const QuantizedLinear q =
          random_quantized(job.linear.out, job.linear.in, options, static_cast<unsigned>(i));
      const QuantizedLinear back = through_file(*format, job, q);
      ASSERT_TRUE(same_bytes(back.codes, q.codes));
      ASSERT_TRUE(same_bytes(back.zeros, q.zeros));
      ASSERT_TRUE(same_bytes(back.g_idx, q.g_idx));
      ASSERT_TRUE(same_bytes(back.scales, q.scales));
      ASSERT_TRUE(same_bytes(dense(back), dense(q)));
      ++count[format->name()];
    }
  for (const OutputFormat* format : output_formats()) {
    EXPECT_GE(count[format->name()], 10) << format->name() << " took hardly any setting";
    fmt::print("{}: {} round trips\n", format->name(), count[format->name()]);
  }
}

}  // namespace
}  // namespace bitmill
