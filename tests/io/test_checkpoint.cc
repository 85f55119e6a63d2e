#include "io/checkpoint.h"

#include <sys/stat.h>

#include <cstring>
#include <filesystem>
#include <thread>

#include "io/expect_error.h"
#include "support/checkpoint_maker.h"
#include "support/paths.h"
#include "io/json.h"

namespace bitmill {
namespace {
namespace fs = std::filesystem;
using testing::CheckpointMaker;
using testing::expect_input_error;
using testing::float_tensor;
using testing::random_tensor;
using testing::TemporaryDirectory;
using testing::write_bytes;

constexpr const char* kFirst = "model-00001-of-00002.safetensors";
constexpr const char* kSecond = "model-00002-of-00002.safetensors";

// Two shards: a, b in the first, c in the second.
CheckpointMaker sharded(const std::string& directory) {
  CheckpointMaker maker(directory);
  maker.add(float_tensor("a", "F32", {2, 3}, {0, 1, 2, 3, 4, 5}), kFirst)
      .add(float_tensor("b", "BF16", {2}, {1.5f, -2}), kFirst)
      .add(float_tensor("c", "F16", {3, 1}, {7, 8, 9}), kSecond);
  return maker;
}

void expect_refused(const std::string& directory, const std::vector<std::string>& names) {
  expect_input_error([&] { Checkpoint::open(directory); }, names);
}

void check_content(const Checkpoint& checkpoint) {
  EXPECT_EQ(checkpoint.tensors().size(), 3u);
  EXPECT_EQ(checkpoint.total_bytes(), 24 + 4 + 6);
  const Tensor a = checkpoint.read("a");
  EXPECT_EQ(a.shape(), Shape({2, 3}));
  for (int i = 0; i < 6; ++i) EXPECT_EQ(a.as<float>()[i], static_cast<float>(i));
  const Tensor b = checkpoint.read("b");
  EXPECT_EQ(b.dtype(), DType::kBF16);
  EXPECT_EQ(to_float(b.as<BFloat16>()[1]), -2.0f);
  const Tensor last = checkpoint.read_rows("a", 1, 2);
  EXPECT_EQ(last.shape(), Shape({1, 3}));
  EXPECT_EQ(last.as<float>()[0], 3.0f);
  const Tensor c = checkpoint.read_rows("c", 1, 3);
  EXPECT_EQ(to_float(c.as<Float16>()[0]), 8.0f);
  EXPECT_EQ(to_float(c.as<Float16>()[1]), 9.0f);
  EXPECT_EQ(checkpoint.read_rows("c", 2, 2).elements(), 0);
}

TEST(Checkpoint, SeesShardsAsOne) {
  const TemporaryDirectory dir;
  sharded(dir.path()).write();
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  EXPECT_EQ(checkpoint.files(), (std::vector<std::string>{kFirst, kSecond}));
  check_content(checkpoint);
  EXPECT_EQ(checkpoint.find("d"), nullptr);
  EXPECT_EQ(checkpoint.find("c")->file, 1);
}

TEST(Checkpoint, SingleFileWithAndWithoutIndex) {
  const TemporaryDirectory dir;
  CheckpointMaker maker(dir.path());
  maker.add(float_tensor("w", "F32", {1}, {4})).write();
  EXPECT_EQ(Checkpoint::open(dir.path()).read("w").as<float>()[0], 4.0f);
  maker.with_index().write();
  EXPECT_EQ(Checkpoint::open(dir.path()).files(), (std::vector<std::string>{"model.safetensors"}));
}

TEST(Checkpoint, TravelsAsText) {
  const TemporaryDirectory parent;
  const std::string dir = parent.file("odd \n \xff name");
  sharded(dir).write();
  const std::string text = Checkpoint::open(dir).directory_text();
  const Checkpoint copy = Checkpoint::from_text(text);
  EXPECT_EQ(copy.directory(), dir);
  EXPECT_EQ(copy.directory_text(), text);
  check_content(copy);
  // No file is touched before a read, and then the error is the reader's.
  fs::remove(fs::path(dir) / kSecond);
  const Checkpoint later = Checkpoint::from_text(text);
  EXPECT_NO_THROW(later.read("a"));
  EXPECT_THROW(later.read("c"), Error);
}

TEST(Checkpoint, FileCutShortAfterOpening) {
  const TemporaryDirectory dir;
  sharded(dir.path()).write();
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  fs::resize_file(dir.file(kSecond), fs::file_size(dir.file(kSecond)) - 1);
  expect_input_error([&] { checkpoint.read("c"); }, {kSecond, "ends at byte"});
  EXPECT_NO_THROW(checkpoint.read_rows("c", 0, 2));
}

TEST(Checkpoint, ReadsFromManyThreads) {
  const TemporaryDirectory dir;
  sharded(dir.path()).write();
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  std::vector<std::thread> threads;
  std::atomic<int> good = 0;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&, i] {
      for (int k = 0; k < 50; ++k)
        good += checkpoint.read(i % 2 ? "a" : "c").elements() == (i % 2 ? 6 : 3);
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, 200);
}

TEST(Checkpoint, MissingTensorNamesTheNearest) {
  const TemporaryDirectory dir;
  CheckpointMaker(dir.path())
      .add(random_tensor("model.layers.0.self_attn.q_proj.weight", "F32", {2}))
      .add(random_tensor("model.norm.weight", "F32", {2}))
      .write();
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  expect_input_error([&] { checkpoint.at("model.layers.0.self_attn.k_proj.weight"); },
                     {dir.path(), "\"model.layers.0.self_attn.k_proj.weight\" is missing",
                      "nearest: \"model.layers.0.self_attn.q_proj.weight\""});
}

TEST(CheckpointBadInput, MissingDirectoryOrFiles) {
  const TemporaryDirectory dir;
  expect_refused(dir.file("nowhere"), {"nowhere: no such directory"});
  write_bytes(dir.file("plain"), "");
  expect_refused(dir.file("plain"), {"plain: not a directory"});
  expect_refused(dir.path(),
                 {dir.path(), "neither model.safetensors.index.json nor model.safetensors"});
}

TEST(CheckpointBadInput, TruncatedShard) {
  const TemporaryDirectory dir;
  sharded(dir.path()).write();
  fs::resize_file(dir.file(kFirst), fs::file_size(dir.file(kFirst)) - 1);
  expect_refused(dir.path(), {kFirst, "header says 28 bytes of tensors, the file has 27"});
}

TEST(CheckpointBadInput, IndexThatIsNone) {
  const TemporaryDirectory dir;
  const auto refuse = [&](const std::string& index, const std::vector<std::string>& names) {
    SCOPED_TRACE(index);
    write_bytes(dir.file("model.safetensors.index.json"), index);
    expect_refused(dir.path(), names);
  };
  refuse("{", {"index.json", "not valid JSON at byte"});
  refuse("[]", {"index.json", "has no \"weight_map\""});
  refuse("{}", {"index.json", "has no \"weight_map\""});
  refuse(R"({"weight_map":[]})", {"\"weight_map\" is of type array"});
  refuse(R"({"weight_map":{}})", {"names no tensors"});
  refuse(R"({"weight_map":{"a":1}})", {"tensor \"a\" is of type number"});
  refuse(R"({"weight_map":{"a":"x.safetensors","a":"y.safetensors"}})", {"duplicate key \"a\""});
  refuse(R"({"weight_map":{"a":"x.safetensors"}})",
         {"names \"x.safetensors\", which is not there"});
}

TEST(CheckpointBadInput, IndexNamingPathsOutside) {
  const TemporaryDirectory dir;
  for (const std::string bad :
       {"../x.safetensors", "/etc/passwd", "a/b.safetensors", "", ".safetensors", "..",
        "a\\b.safetensors", "a b.safetensors", "model.bin", "x.safetensors "}) {
    SCOPED_TRACE(bad);
    const Json index = {{"metadata", Json::object()}, {"weight_map", {{"a", bad}}}};
    write_bytes(dir.file("model.safetensors.index.json"), index.dump());
    expect_refused(dir.path(),
                   {"index.json", "tensor \"a\" is " + Json(bad).dump(), "a plain name"});
  }
}

TEST(CheckpointBadInput, IndexAndShardsDisagree) {
  const TemporaryDirectory dir;
  sharded(dir.path()).index_says("ghost", kFirst).write();
  expect_refused(dir.path(), {"index.json", "names 1 tensors", "\"ghost\" of model-00001"});
  sharded(dir.path()).index_says("b", "").write();
  expect_refused(dir.path(),
                 {kFirst, "holds tensor \"b\", which model.safetensors.index.json does not name"});
  sharded(dir.path()).index_says("b", kSecond).write();
  expect_refused(dir.path(), {"\"b\" is in model-00002", "it is in model-00001"});
  sharded(dir.path()).add(float_tensor("a", "F32", {1}, {0}), kSecond).write();
  expect_refused(dir.path(), {"tensor \"a\" is in", kFirst, kSecond});
}

TEST(CheckpointBadInput, DuplicateNameInAHeader) {
  const TemporaryDirectory dir;
  const std::string w = R"("w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  write_bytes(dir.file("model.safetensors"),
              testing::safetensors_bytes("{" + w + "," + w + "}", ""));
  expect_refused(dir.path(), {"model.safetensors", "duplicate tensor name \"w\""});
}

TEST(CheckpointBadInput, SpecialFilesAndForeignLinks) {
  const TemporaryDirectory dir;
  const TemporaryDirectory other;
  CheckpointMaker(other.path()).config("{}").add(float_tensor("w", "F32", {1}, {4})).write();
  for (const std::string name : {"model.safetensors", "model.safetensors.index.json"}) {
    SCOPED_TRACE(name);
    fs::create_symlink(other.file("model.safetensors"), dir.file(name));
    expect_refused(dir.path(), {name + ": links to \"" + other.path(), "../../blobs/HEX"});
    fs::remove(dir.file(name));
    ASSERT_EQ(mkfifo(dir.file(name).c_str(), 0666), 0);
    expect_refused(dir.path(), {name + ": not a regular file"});
    fs::remove(dir.file(name));
  }
  sharded(dir.path()).write();
  fs::remove(dir.file(kSecond));
  fs::create_symlink("/etc/passwd", dir.file(kSecond));
  expect_refused(dir.path(), {kSecond, "\"/etc/passwd\""});
  fs::create_symlink(other.file("config.json"), dir.file("config.json"));
  expect_input_error([&] { read_model_config(dir.path()); }, {"config.json: links to"});
}

// A Hugging Face cache entry: snapshots/REV/NAME -> ../../blobs/HEX.
TEST(Checkpoint, FollowsLinksOfTheSameCacheEntry) {
  const TemporaryDirectory dir;
  const std::string snapshot = dir.file("snapshots/abc"), blobs = dir.file("blobs");
  fs::create_directories(snapshot);
  CheckpointMaker(blobs)
      .config(R"({"model_type":"llama"})")
      .add(float_tensor("w", "F32", {1}, {4}))
      .write();
  fs::rename(blobs + "/model.safetensors", blobs + "/0a1b");
  fs::rename(blobs + "/config.json", blobs + "/ffff");
  fs::create_symlink("../../blobs/0a1b", snapshot + "/model.safetensors");
  fs::create_symlink("../../blobs/ffff", snapshot + "/config.json");
  EXPECT_EQ(Checkpoint::open(snapshot).read("w").as<float>()[0], 4.0f);
  EXPECT_EQ(read_model_config(snapshot)["model_type"], "llama");

  const auto relink = [&](const std::string& target) {
    fs::remove(snapshot + "/model.safetensors");
    fs::create_symlink(target, snapshot + "/model.safetensors");
  };
  for (const std::string bad :
       {"../../blobs/../blobs/0a1b", "../../../blobs/0a1b", "../../blobs/", "../../blobs/0a1B"}) {
    relink(bad);
    expect_refused(snapshot, {"model.safetensors: links to \"" + bad + "\""});
  }
  relink("../../blobs/0dead");
  expect_refused(snapshot, {"../../blobs/0dead", "not there"});
  fs::create_symlink("/etc/passwd",
                     blobs + "/0bad");  // a blob that is itself a link leads out again
  relink("../../blobs/0bad");
  expect_refused(snapshot, {"not a regular file"});
}

TEST(ModelConfig, StrictAndPresent) {
  const TemporaryDirectory dir;
  expect_input_error([&] { read_model_config(dir.file("none")); }, {"none: no such directory"});
  expect_input_error([&] { read_model_config(dir.path()); },
                     {dir.path() + ": holds no config.json"});
  write_bytes(dir.file("config.json"), R"({"a": 1, "a": 2})");
  expect_input_error([&] { read_model_config(dir.path()); }, {"config.json: duplicate key \"a\""});
  write_bytes(dir.file("config.json"), "[]");
  expect_input_error([&] { read_model_config(dir.path()); }, {"config.json: is of type array"});
  fs::remove(dir.file("config.json"));
  fs::create_directory(dir.file("config.json"));
  expect_input_error([&] { read_model_config(dir.path()); }, {"config.json: not a regular file"});
}

TEST(Checkpoint, OpensTheModelsOfTheTree) {
  for (const std::string name :
       {"tiny-llama", "tiny-llama-bias", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"}) {
    const Checkpoint checkpoint = Checkpoint::open(testing::source_path("tests/data/" + name));
    EXPECT_NE(checkpoint.find("model.embed_tokens.weight"), nullptr) << name;
    EXPECT_TRUE(read_model_config(checkpoint.directory()).contains("model_type")) << name;
  }
}

}  // namespace
}  // namespace bitmill
