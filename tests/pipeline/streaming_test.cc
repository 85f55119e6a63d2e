// Rows instead of whole tensors: the same values, from fewer bytes, in less memory.
#include <gtest/gtest.h>

#include <cstring>

#include "algorithms/quantizer.h"
#include "formats/format.h"
#include "pipeline/forward.h"
#include "pipeline/loader.h"
#include "support/checkpoint_maker.h"
#include "support/paths.h"
#include "support/sparse_checkpoint.h"

namespace bitmill {
namespace {

std::vector<float> values(TensorView tensor) {
  Tensor wide(DType::kF32, tensor.shape);
  convert(tensor, wide);
  return {wide.as<float>(), wide.as<float>() + wide.elements()};
}

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kInput);
    return error.what();
  }
  return "no error";
}

class StreamingTest : public ::testing::Test {
 protected:
  // Rows [first, end) of `linear` must be those of the whole weight.
  void expect_rows(const ModelSource& source, const LinearSpec& linear, DType dtype) {
    const Tensor whole = source.read_weight(linear, dtype, *backend_);
    ASSERT_EQ(whole.shape(), Shape({linear.out, linear.in}));
    const int64_t out = linear.out;
    for (const auto& [first, end] : std::vector<std::pair<int64_t, int64_t>>{
             {0, out}, {0, 1}, {3, 17}, {out - 1, out}, {5, 5}}) {
      const Tensor rows = source.read_weight_rows(linear, first, end, dtype, *backend_);
      ASSERT_EQ(rows.shape(), Shape({end - first, linear.in}));
      ASSERT_EQ(rows.dtype(), dtype);
      if (first == end) continue;
      EXPECT_EQ(values(rows), values(whole.view().slice(first, end))) << first << ".." << end;
    }
  }
  std::unique_ptr<Backend> backend_ = make_backend({"cpu", DType::kF32, 2});
  testing::TemporaryDirectory dir_;
};

TEST_F(StreamingTest, RowsAreThoseOfTheWholeWeight) {
  const ModelSource source = ModelSource::open(testing::source_path("tests/data/tiny-llama"));
  const LinearSpec plain = source.spec().blocks[0].linears[4];  // stored as [256, 128]
  LinearSpec turned = plain;
  std::swap(turned.in, turned.out);
  turned.transposed = true;
  for (const LinearSpec& linear : {plain, turned, source.spec().head_linear()})
    for (DType dtype : {DType::kF32, DType::kBF16}) expect_rows(source, linear, dtype);
}

TEST_F(StreamingTest, RowsOfAPackedLinear) {
  const ModelSource source = ModelSource::open(testing::source_path("tests/data/tiny-llama"));
  const LinearSpec linear = source.spec().blocks[1].linears[6];
  const Tensor weight = source.read_weight(linear, DType::kF32, *backend_);
  LinearProblem problem;
  problem.module = linear.module;
  problem.weight = weight;
  problem.settings.group_size = 32;
  const OutputFormat& format = find_format("gptq");
  const QuantizeResult result =
      std::move(find_quantizer("rtn").quantize({&problem, 1}, nullptr, *backend_)[0]);
  // The model as it is, and this linear in packed form.
  Json config = source.config();
  config["quantization_config"] =
      Json::parse(format.config(RunOptions::Quantize(), {}).quantization_config.dump());
  config["quantization_config"]["bits"] = 4;
  config["quantization_config"]["group_size"] = 32;
  std::vector<NamedTensor> tensors = format.pack(linear, result.linear, {});
  for (const auto& [name, entry] : source.checkpoint().tensors())
    if (name != linear.weight_name()) tensors.push_back({name, source.checkpoint().read(name)});
  std::vector<NamedView> views;
  for (const NamedTensor& tensor : tensors) views.push_back({tensor.name, tensor.data});
  write_safetensors(dir_.file("model.safetensors"), views);
  testing::write_bytes(dir_.file("config.json"), config.dump());

  const ModelSource packed = ModelSource::open(dir_.path());
  for (DType dtype : {DType::kF32, DType::kBF16}) expect_rows(packed, linear, dtype);
  packed.prefetch({{linear, 0, linear.out}}, 1 << 20);  // nothing to read ahead, and no trouble
  expect_rows(packed, linear, DType::kF32);
}

// 64 MiB of bf16 become 128 MiB of F32: several pieces. Memory is the result and one piece.
TEST_F(StreamingTest, ConvertsInPieces) {
  const testing::SparseModel shape{1, 4096, 8192, 256};
  const std::string gate = "model.layers.0.mlp.gate_proj.weight";
  const std::string one("\x80\x3f", 2), nan("\xc0\x7f", 2);
  const int64_t row_bytes = 4096 * 2;
  testing::write_sparse_model(
      dir_.path(), shape,
      {{gate, "", {}, {{0, one}, {5000 * row_bytes + 6, one}, {8192 * row_bytes - 2, one}}}});
  const ModelSource source = ModelSource::open(dir_.path());
  const LinearSpec linear = source.spec().blocks[0].linears[4];
  ASSERT_EQ(linear.weight_name(), gate);
  HostAllocator& host = HostAllocator::instance();
  const int64_t before = host.peak_bytes(), now = host.current_bytes();
  const Tensor dense = source.read_weight(linear, DType::kF32, *backend_);
  EXPECT_LE(host.peak_bytes(), std::max(before, now + dense.bytes() + (17 << 20)));
  const float* w = dense.as<float>();
  double sum = 0;
  for (int64_t i = 0; i < dense.elements(); ++i) sum += w[i];
  EXPECT_EQ(sum, 3);
  EXPECT_EQ(w[0] + w[int64_t{5000} * 4096 + 3] + w[dense.elements() - 1], 3);

  testing::write_sparse_model(dir_.path(), shape, {{gate, "", {}, {{5000 * row_bytes + 6, nan}}}});
  const ModelSource bad = ModelSource::open(dir_.path());
  const std::string wanted = dir_.file("model.safetensors") + ": tensor " + gate +
                             " holds a NaN or infinity at element 20480003 of [8192, 4096]";
  const auto rows = [&](int64_t first, int64_t end, DType dtype) {
    return message_of([&] { (void)bad.read_weight_rows(linear, first, end, dtype, *backend_); });
  };
  EXPECT_EQ(rows(0, 8192, DType::kF32), wanted);
  EXPECT_EQ(rows(4999, 5002, DType::kF32), wanted);
  EXPECT_EQ(rows(5000, 5001, DType::kBF16), wanted);
  EXPECT_EQ(rows(0, 5000, DType::kF32), "no error") << "rows that are not read are not looked at";
  EXPECT_EQ(rows(5001, 8192, DType::kF32), "no error");
  EXPECT_EQ(message_of([&] { bad.read_pieces(gate, true, *backend_, [](int64_t, Tensor) {}); }),
            wanted);
  EXPECT_EQ(message_of([&] { bad.read_pieces(gate, false, *backend_, [](int64_t, Tensor) {}); }),
            "no error");
}

TEST_F(StreamingTest, PiecesAreTheStoredBytesInOrder) {
  const ModelSource source = ModelSource::open(testing::source_path("tests/data/tiny-llama"));
  const std::string name = source.spec().embedding.name;
  std::string bytes;
  source.read_pieces(name, true, *backend_, [&](int64_t offset, Tensor piece) {
    EXPECT_EQ(offset, static_cast<int64_t>(bytes.size()));
    bytes.append(piece.as<char>(), static_cast<size_t>(piece.bytes()));
  });
  const Tensor whole = source.checkpoint().read(name);
  EXPECT_EQ(bytes, std::string(whole.as<char>(), static_cast<size_t>(whole.bytes())));
}

TEST_F(StreamingTest, WhatWasReadAheadIsTakenByTheNextRead) {
  const ModelSource source = ModelSource::open(testing::source_path("tests/data/tiny-llama"));
  const ModelSource other = ModelSource::open(testing::source_path("tests/data/tiny-llama"));
  const BlockSpec& block = source.spec().blocks[0];
  for (int cut = 0; cut < static_cast<int>(block.cuts.size()); ++cut) {
    source.prefetch_cut(block, cut, 1 << 20);
    for (const int linear : block.cuts[cut].linears)
      EXPECT_EQ(values(source.read_weight(block.linears[linear], DType::kF32, *backend_)),
                values(other.read_weight(block.linears[linear], DType::kF32, *backend_)));
  }
  // The thread may be slower than the reads; a request that nothing races with is taken for sure.
  const LinearSpec& linear = block.linears[0];
  source.forget();
  source.prefetch({{linear, 8, 24}}, 1 << 20);
  const int64_t before = source.checkpoint().prefetched_bytes();
  source.checkpoint().wait_prefetched();
  (void)source.read_weight_rows(linear, 8, 16, DType::kF32, *backend_);
  (void)source.read_weight_rows(linear, 16, 40, DType::kF32, *backend_);
  const int64_t row_bytes = source.checkpoint().at(linear.weight_name()).bytes / linear.out;
  EXPECT_EQ(source.checkpoint().prefetched_bytes() - before, 16 * row_bytes);
}

class EmbedTest : public StreamingTest {
 protected:
  // Hidden states of `ids` [samples, length] in batches of `per_batch` samples.
  std::vector<float> embed(const ModelSource& source, const std::vector<int32_t>& ids,
                           int64_t samples, int64_t per_batch) {
    Tensor tokens(DType::kI32, {samples, static_cast<int64_t>(ids.size()) / samples});
    std::memcpy(tokens.data(), ids.data(), ids.size() * sizeof ids[0]);
    std::vector<BatchRange> ranges;
    for (int64_t first = 0; first < samples; first += per_batch) {
      BatchRange range;
      range.first_sample = first;
      range.samples = std::min(per_batch, samples - first);
      ranges.push_back(range);
    }
    Activations activations = make_activations(ranges, tokens.cols());
    embed_tokens(source, tokens, activations, *backend_);
    std::vector<float> all;
    for (const MicroBatch& batch : activations.batches) {
      const std::vector<float> part = values(batch.hidden);
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  }
};

TEST_F(EmbedTest, EveryTokenGetsItsRow) {
  const ModelSource source = ModelSource::open(testing::source_path("tests/data/tiny-llama"));
  const int64_t vocab = source.spec().vocab, hidden = source.spec().hidden;
  std::vector<int32_t> ids{0, 7, 8, 9, 7, static_cast<int32_t>(vocab - 1), 300, 0, 10, 301, 8, 300};
  const std::vector<float> table = values(source.checkpoint().read(source.spec().embedding.name));
  std::vector<float> wanted;
  for (const int32_t id : ids)
    wanted.insert(wanted.end(), table.begin() + id * hidden, table.begin() + (id + 1) * hidden);
  EXPECT_EQ(embed(source, ids, 3, 1), wanted);
  EXPECT_EQ(embed(source, ids, 3, 2), wanted);
  EXPECT_EQ(embed(source, ids, 1, 1), wanted);
}

// 1 GB of embedding, of which three rows are touched.
TEST_F(EmbedTest, ReadsOnlyTheRowsOfItsTokens) {
  const testing::SparseModel shape{1, 512, 1024, 1 << 20};
  const std::string name = "model.embed_tokens.weight", nan("\xc0\x7f", 2), two("\x00\x40", 2);
  const int64_t row = 512 * 2;
  testing::write_sparse_model(
      dir_.path(), shape, {{name, "", {}, {{700'000 * row + 2, two}, {700'002 * row + 4, nan}}}});
  const ModelSource source = ModelSource::open(dir_.path());
  HostAllocator& host = HostAllocator::instance();
  const int64_t before = host.peak_bytes(), now = host.current_bytes();
  const std::vector<float> hidden = embed(source, {5, 700'000, 700'001, 5}, 1, 1);
  EXPECT_LE(host.peak_bytes(), std::max(before, now + (1 << 20)));
  for (size_t i = 0; i < hidden.size(); ++i) EXPECT_EQ(hidden[i], i == 512 + 1 ? 2 : 0);
  EXPECT_EQ(message_of([&] {
              embed(source, {700'001, 700'002}, 1, 1);
            }),
            dir_.file("model.safetensors") + ": tensor " + name +
                " holds a NaN or infinity at element 358401026 of [1048576, 512]");
}

}  // namespace
}  // namespace bitmill
