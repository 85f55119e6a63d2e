// What ModelSource makes of stored weights: transposed ones (GPT-2's Conv1D), and the head, float,
// tied or packed.
#include "pipeline/loader.h"

#include <gtest/gtest.h>

#include "algorithms/quantizer.h"
#include "support/paths.h"

namespace bitmill {
namespace {

class LoaderTest : public ::testing::Test {
 protected:
  std::unique_ptr<Backend> backend_ = make_backend({"cpu", DType::kF32, 1});
  ModelSource source_ = ModelSource::open(testing::source_path("tests/data/tiny-llama"));

  // q_proj of the model as a checkpoint with Conv1D weights would describe it.
  static LinearSpec conv1d(LinearSpec linear) {
    std::swap(linear.in, linear.out);
    linear.transposed = true;
    return linear;
  }
};

std::vector<float> values(const Tensor& tensor) {
  return {tensor.as<float>(), tensor.as<float>() + tensor.elements()};
}

// gate_proj is stored as [256, 128]. Read as a Conv1D of 256 inputs and 128 outputs it is the same
// numbers turned round.
TEST_F(LoaderTest, TransposedWeightsAreTurnedRound) {
  const LinearSpec plain = source_.spec().blocks[0].linears[4], turned = conv1d(plain);
  ASSERT_EQ(plain.stored_shape(), Shape({256, 128}));
  ASSERT_EQ(turned.stored_shape(), plain.stored_shape());
  ASSERT_EQ(turned.out, 128);
  const Tensor stored = source_.read_weight(plain, DType::kF32, *backend_);
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    const Tensor weight = source_.read_weight(turned, dtype, *backend_);
    ASSERT_EQ(weight.shape(), Shape({128, 256}));
    ASSERT_EQ(weight.dtype(), dtype);
    Tensor wide(DType::kF32, weight.shape());
    convert(weight, wide);
    for (int64_t o = 0; o < 128; ++o)
      for (int64_t i = 0; i < 256; ++i)
        ASSERT_EQ(wide.as<float>()[o * 256 + i], stored.as<float>()[i * 128 + o]);
  }
}

// A Conv1D goes through the quantizers like any linear: the codes are those of the turned weight.
TEST_F(LoaderTest, TransposedWeightsQuantizeAsTheirTranspose) {
  const LinearSpec turned = conv1d(source_.spec().blocks[0].linears[4]);
  const Tensor weight = source_.read_weight(turned, DType::kF32, *backend_);
  Tensor x = Tensor::zeros(DType::kF32, {40, turned.in});
  for (int64_t i = 0; i < x.elements(); ++i)
    x.as<float>()[i] = static_cast<float>(i * 7919 % 1013) / 1013 - 0.5f;
  HessianAccumulator sum(turned.in, DType::kF32, *backend_);
  sum.add(x, 4, 0);
  const Hessian hessian = sum.finish();
  LinearProblem problem;
  problem.module = turned.module;
  problem.weight = weight;
  problem.settings.group_size = 32;
  for (const char* algorithm : {"gptq", "rtn"}) {
    problem.settings.algorithm = algorithm;
    const QuantizeResult result =
        std::move(find_quantizer(algorithm).quantize({&problem, 1}, &hessian, *backend_)[0]);
    EXPECT_EQ(result.linear.out(), 128);
    EXPECT_EQ(result.linear.in(), 256);
    // The layer y = x W of the stored [in, out] weight, against the quantized one.
    Tensor w_hat(DType::kF32, weight.shape());
    backend_->dequantize(result.linear, w_hat);
    const Tensor stored = source_.read_float(turned.weight_name(), *backend_);
    Tensor wide(DType::kF32, stored.shape());
    convert(stored, wide);
    double error = 0;
    for (int64_t t = 0; t < x.rows(); ++t)
      for (int64_t o = 0; o < 128; ++o) {
        double e = 0;
        for (int64_t i = 0; i < 256; ++i)
          e += double{x.as<float>()[t * 256 + i]} *
               (wide.as<float>()[i * 128 + o] - w_hat.as<float>()[o * 256 + i]);
        error += e * e;
      }
    EXPECT_NEAR(2.0 / 4 * error / result.record.error, 1, 1e-3) << algorithm;
  }
}

TEST_F(LoaderTest, TransposedShapesAreCheckedAsStored) {
  ModelSpec spec = source_.spec();
  spec.blocks[0].linears[4] = conv1d(spec.blocks[0].linears[4]);
  EXPECT_NO_THROW(check_tensors(spec, source_.checkpoint()));
  spec.blocks[0].linears[4].transposed = false;  // [128, 256] instead of the stored [256, 128]
  EXPECT_THROW(check_tensors(spec, source_.checkpoint()), Error);
}

TEST_F(LoaderTest, HeadOfAnUntiedAndATiedModel) {
  const Tensor head = source_.read_weight(source_.spec().head_linear(), DType::kF32, *backend_);
  const Tensor stored = source_.read_float("lm_head.weight", *backend_);
  Tensor wide(DType::kF32, stored.shape());
  convert(stored, wide);
  EXPECT_EQ(values(head), values(wide));
  EXPECT_FALSE(source_.head_packed());

  const ModelSource tied = ModelSource::open(testing::source_path("configs/demo/model"));
  ASSERT_TRUE(tied.spec().tied);
  const Tensor embedding = tied.read_float(tied.spec().embedding.name, *backend_);
  Tensor table(DType::kF32, embedding.shape());
  convert(embedding, table);
  EXPECT_EQ(values(tied.read_weight(tied.spec().head_linear(), DType::kF32, *backend_)),
            values(table));
}

}  // namespace
}  // namespace bitmill
