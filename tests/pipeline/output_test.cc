#include "pipeline/output.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>

#include "io/checkpoint.h"
#include "support/checkpoint_maker.h"
#include "support/paths.h"
#include "io/json.h"

namespace bitmill {
namespace {
namespace fs = std::filesystem;

// A plan of two shards, "block-00000" in two parts and "norm", made by hand.
Plan small_plan(bool joined) {
  Plan plan;
  plan.shards = {{"block-00000.part-1", 0, {{"b.a", DType::kF32, {2}}, {"b.b", DType::kBF16, {3}}}, 14},
                 {"block-00000.part-2", 0, {{"b.c", DType::kI32, {1, 2}}}, 8},
                 {"norm", 0, {{"n", DType::kF32, {1}}}, 4}};
  plan.output_bytes = 26;
  plan.joined = joined;
  plan.files = joined ? std::vector<std::string>{"model.safetensors"}
                      : std::vector<std::string>{"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
                                                 "model-00003-of-00003.safetensors"};
  return plan;
}

std::vector<NamedTensor> block() {
  std::vector<NamedTensor> tensors;
  for (const auto& [name, dtype, shape] : std::vector<std::tuple<std::string, DType, Shape>>{
           {"b.a", DType::kF32, {2}}, {"b.b", DType::kBF16, {3}}, {"b.c", DType::kI32, {1, 2}}}) {
    tensors.push_back({name, Tensor::zeros(dtype, shape)});
    std::memset(tensors.back().data.data(), name.back(), static_cast<size_t>(tensors.back().data.bytes()));
  }
  return tensors;
}

class OutputTest : public ::testing::TestWithParam<bool> {
 protected:
  void write_all() {
    output_.prepare(plan_, {{"k", "v"}}, {"config.json", "model.safetensors.index.json", "notes.txt"});
    output_.write_shards(plan_, "block-00000", block());
    std::vector<NamedTensor> norm;
    norm.push_back({"n", Tensor::zeros(DType::kF32, {1})});
    output_.write_shards(plan_, "norm", norm);
  }
  OutputDirectory::Finish finish() {
    return {source_.path(), {"tokenizer.json"}, {{"notes.txt", "hello"}}, "{}\n",
            {"complete", {{"k", "v"}}, plan_.files, Json::array()}};
  }
  testing::TemporaryDirectory root_, source_;
  Plan plan_ = small_plan(GetParam());
  OutputDirectory output_{root_.file("out")};
};

TEST_P(OutputTest, NothingIsVisibleBeforeCommitAndAllAfter) {
  std::ofstream(source_.file("tokenizer.json")) << "{\"vocab\": 1}";
  write_all();
  for (const auto& entry : fs::directory_iterator(output_.path())) EXPECT_EQ(entry.path().filename(), "bitmill");
  output_.commit(plan_, finish());
  EXPECT_TRUE(fs::exists(output_.path() + "/config.json"));
  EXPECT_TRUE(fs::exists(output_.path() + "/notes.txt"));
  EXPECT_EQ(fs::exists(output_.path() + "/model.safetensors.index.json"), !GetParam());
  EXPECT_FALSE(fs::exists(output_.path() + "/bitmill/shards"));
  const Checkpoint checkpoint = Checkpoint::open(output_.path());
  ASSERT_EQ(checkpoint.tensors().size(), 4u);
  const std::vector<NamedTensor> wanted = block();
  for (const NamedTensor& want : wanted) {
    const Tensor got = checkpoint.read(want.name);
    ASSERT_EQ(got.bytes(), want.data.bytes());
    EXPECT_EQ(std::memcmp(got.data(), want.data.data(), static_cast<size_t>(got.bytes())), 0) << want.name;
  }
  EXPECT_EQ(read_manifest(output_.path()).state, "complete");
}

// Tensors handed over one by one, in parts and in any order, make the files of one call.
TEST_P(OutputTest, ShardsWrittenBehindHaveTheSameBytes) {
  write_all();
  std::map<std::string, std::string> wanted;
  const std::string shards = output_.path() + "/bitmill/shards";
  for (const auto& entry : fs::directory_iterator(shards))
    wanted[entry.path().filename()] = testing::read_bytes(entry.path());
  ASSERT_EQ(wanted.size(), 3u);
  fs::remove_all(shards);
  fs::create_directories(shards);

  WriteBehind queue(16);
  KeyWriter writer = output_.start_shards(plan_, "block-00000", 0, queue);
  std::vector<NamedTensor> tensors = block();
  const int64_t bytes = writer.file_bytes();
  for (const int64_t at : {4, 0}) {  // b.a, its second half first
    Tensor half(DType::kU8, {4});
    std::memcpy(half.data(), tensors[0].data.as<char>() + at, 4);
    writer.write_part("b.a", at, std::move(half));
  }
  tensors.erase(tensors.begin());
  writer.write(std::move(tensors));
  EXPECT_TRUE(std::none_of(fs::directory_iterator(shards), fs::directory_iterator(),
                           [](const auto& entry) { return entry.path().extension() == ".safetensors"; }));
  for (const PendingFile& file : writer.finish()) file.wait();
  KeyWriter norm = output_.start_shards(plan_, "norm", 0, queue);
  norm.write({"n", Tensor::zeros(DType::kF32, {1})});
  norm.finish();
  queue.drain();
  int64_t found = 0;
  for (const auto& entry : fs::directory_iterator(shards)) {
    const std::string name = entry.path().filename();
    EXPECT_EQ(testing::read_bytes(entry.path()), wanted[name]) << name;
    if (name != "norm.safetensors") found += static_cast<int64_t>(fs::file_size(entry.path()));
  }
  EXPECT_EQ(found, bytes);
  EXPECT_EQ(std::distance(fs::directory_iterator(shards), fs::directory_iterator()), 3);
  EXPECT_THROW(norm.write({"m", Tensor::zeros(DType::kF32, {1})}), Error);
}

TEST_P(OutputTest, PrepareRemovesOnlyWhatTheManifestNames) {
  std::ofstream(source_.file("tokenizer.json")) << "{}";
  write_all();
  output_.commit(plan_, finish());
  std::ofstream(output_.path() + "/mine.txt") << "kept";
  output_.prepare(plan_, {{"k", "w"}}, {});
  EXPECT_TRUE(fs::exists(output_.path() + "/mine.txt"));
  EXPECT_FALSE(fs::exists(output_.path() + "/" + plan_.files.front()));
  EXPECT_EQ(read_manifest(output_.path()).state, "running");
}

INSTANTIATE_TEST_SUITE_P(JoinedAndSharded, OutputTest, ::testing::Bool());

TEST(CompanionFiles, TokenizerAndLicenceComeAlongWeightsAndCodeDoNot) {
  testing::TemporaryDirectory model;
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "LICENSE-NOTE.txt", "generation_config.json",
                           "model.safetensors", "pytorch_model.bin", "modeling_x.py", "config.json", "README.md"})
    std::ofstream(model.file(name)) << name;
  EXPECT_EQ(companion_files(model.path()), (std::vector<std::string>{"LICENSE-NOTE.txt", "generation_config.json",
                                                                      "tokenizer.json", "tokenizer_config.json"}));
}

TEST(CompanionFiles, ALinkOutOfTheModelIsRefused) {
  testing::TemporaryDirectory model;
  fs::create_symlink("/etc/hostname", model.file("tokenizer_config.json"));
  try {
    companion_files(model.path());
    FAIL() << "a foreign file would be copied into the output";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kInput);
    EXPECT_NE(std::string(error.what()).find("tokenizer_config.json"), std::string::npos);
  }
}

// The text file cannot be placed (its name is a directory in the way): nothing of a checkpoint may stay visible.
TEST_P(OutputTest, AFailedCommitLeavesNothingVisible) {
  std::ofstream(source_.file("tokenizer.json")) << "{}";
  write_all();
  fs::create_directories(output_.path() + "/config.json/in-the-way");
  OutputDirectory::Finish failing = finish();
  failing.manifest.files = plan_.files;
  failing.manifest.files.insert(failing.manifest.files.end(), {"tokenizer.json", "notes.txt", "model.safetensors.index.json"});
  EXPECT_THROW(output_.commit(plan_, failing), Error);
  for (const char* name : {"model.safetensors", "model-00001-of-00003.safetensors", "model.safetensors.index.json",
                           "tokenizer.json", "notes.txt"})
    EXPECT_FALSE(fs::exists(output_.path() + "/" + name)) << name;
  EXPECT_TRUE(fs::exists(output_.path() + "/bitmill/shards/norm.safetensors"));
}

TEST(CutShards, GreedyInKeyOrder) {
  const std::vector<PackedSpec> tensors{{"a", DType::kU8, {4}}, {"b", DType::kU8, {4}}, {"c", DType::kU8, {20}},
                                        {"d", DType::kU8, {1}}};
  using Cut = std::pair<size_t, size_t>;
  EXPECT_EQ(cut_shards(tensors, 8), (std::vector<Cut>{{0, 2}, {2, 3}, {3, 4}}));
  EXPECT_EQ(cut_shards(tensors, 100), (std::vector<Cut>{{0, 4}}));
}

}  // namespace
}  // namespace bitmill
