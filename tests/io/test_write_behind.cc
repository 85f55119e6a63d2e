#include "io/write_behind.h"

#include <sys/resource.h>

#include <csignal>
#include <cstring>
#include <filesystem>

#include "io/expect_error.h"
#include "support/checkpoint_maker.h"
#include "support/paths.h"

namespace bitmill {
namespace {
namespace fs = std::filesystem;
using testing::error_of;
using testing::read_bytes;

size_t files_in(const std::string& directory) {
  return static_cast<size_t>(
      std::distance(fs::directory_iterator(directory), fs::directory_iterator()));
}

// Bytes that differ from place to place and tensor to tensor.
Tensor filled(DType dtype, Shape shape, int seed) {
  Tensor tensor(dtype, shape);
  for (int64_t i = 0; i < tensor.bytes(); ++i)
    tensor.as<uint8_t>()[i] = static_cast<uint8_t>(i * 31 + (i >> 8) + seed * 77);
  return tensor;
}

// While it lives, no file of this process may grow beyond `bytes`: writes fail with EFBIG, like
// those to a full disk.
class FileLimit {
 public:
  explicit FileLimit(rlim_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileLimit() { setrlimit(RLIMIT_FSIZE, &before_); }

 private:
  rlimit before_{};
};

class WriteBehindTest : public ::testing::Test {
 protected:
  // The file that write_safetensors makes of these tensors.
  std::string wanted() {
    const std::string path = other_.file("wanted.safetensors");
    write_safetensors(path, {{"b", b_}, {"a", a_}, {"c", c_}, {"none", none_}});
    return read_bytes(path);
  }
  const Tensor a_ = filled(DType::kF32, {5, 7}, 1), b_ = filled(DType::kBF16, {300, 1000}, 2),
               c_ = filled(DType::kF32, {2}, 3), none_ = Tensor(DType::kI32, {0});
  const std::vector<NamedView> specs_{{"none", {nullptr, DType::kI32, {0}}},
                                      {"b", {nullptr, DType::kBF16, {300, 1000}}},
                                      {"c", {nullptr, DType::kF32, {2}}},
                                      {"a", {nullptr, DType::kF32, {5, 7}}}};
  testing::TemporaryDirectory dir_, other_;
  const std::string path_ = dir_.file("model.safetensors");
};

TEST_F(WriteBehindTest, TensorsInAnyOrderGiveTheBytesOfOneWrite) {
  WriteBehind queue(1 << 20);
  ShardWriter shard(path_, specs_, queue);
  shard.write("c", clone(c_));
  shard.write("a", clone(a_));
  shard.write("b", clone(b_));
  queue.drain();
  EXPECT_FALSE(fs::exists(path_)) << "nothing under the name before finish()";
  const PendingFile pending = shard.finish();
  pending.wait();
  EXPECT_TRUE(pending.durable());
  EXPECT_EQ(read_bytes(path_), wanted());
  EXPECT_EQ(shard.file_bytes(), static_cast<int64_t>(fs::file_size(path_)));
  EXPECT_EQ(files_in(dir_.path()), 1u);
}

TEST_F(WriteBehindTest, PartsOfATensorInAnyOrder) {
  WriteBehind queue(1 << 20);
  ShardWriter shard(path_, specs_, queue);
  const auto part = [&](int64_t begin, int64_t end) {
    Tensor bytes(DType::kU8, {end - begin});
    std::memcpy(bytes.data(), b_.as<uint8_t>() + begin, static_cast<size_t>(end - begin));
    shard.write_part("b", begin, std::move(bytes));
  };
  part(200'001, b_.bytes());
  part(0, 1000);
  shard.write("a", clone(a_));
  part(1000, 200'001);
  shard.write("c", clone(c_));
  shard.finish().wait();
  EXPECT_EQ(read_bytes(path_), wanted());
}

TEST_F(WriteBehindTest, WhatWaitsStaysBelowTheBound) {
  std::vector<NamedView> specs;
  for (int i = 0; i < 200; ++i)
    specs.push_back({fmt::format("t{}", i), {nullptr, DType::kU8, {10'000}}});
  WriteBehind queue(35'000);
  ShardWriter shard(path_, specs, queue);
  for (int i = 0; i < 200; ++i) shard.write(specs[i].name, filled(DType::kU8, {10'000}, i));
  shard.finish().wait();
  EXPECT_LE(queue.peak_bytes(), 35'000);
  const Tensor last = filled(DType::kU8, {10'000}, 99);
  const std::string bytes = read_bytes(path_);
  EXPECT_EQ(std::memcmp(bytes.data() + bytes.size() - 10'000, last.data(), 10'000), 0)
      << "t99 is the last of the names";

  WriteBehind small(10);  // a tensor above the bound still goes, alone
  ShardWriter large(dir_.file("b"), specs_, small);
  large.write("b", clone(b_));
  large.write("a", clone(a_));
  large.write("c", clone(c_));
  large.finish().wait();
  EXPECT_EQ(read_bytes(dir_.file("b")), wanted());
  EXPECT_EQ(small.peak_bytes(), b_.bytes());
}

TEST_F(WriteBehindTest, TwoFilesShareAQueue) {
  WriteBehind queue(1 << 20);
  std::vector<PendingFile> pending;
  for (const char* name : {"first", "second"}) {
    ShardWriter shard(dir_.file(name), specs_, queue);
    shard.write("a", clone(a_));
    shard.write("b", clone(b_));
    shard.write("c", clone(c_));
    pending.push_back(shard.finish());  // the writer goes, its file is still on its way
  }
  pending[1].wait();
  EXPECT_TRUE(pending[0].durable());
  for (const char* name : {"first", "second"}) EXPECT_EQ(read_bytes(dir_.file(name)), wanted());
}

TEST_F(WriteBehindTest, TheQueuesEndFinishesWhatWasHandedOver) {
  {
    WriteBehind queue(1 << 20);
    ShardWriter shard(path_, specs_, queue);
    shard.write("a", clone(a_));
    shard.write("b", clone(b_));
    shard.write("c", clone(c_));
    shard.finish();
  }
  EXPECT_EQ(read_bytes(path_), wanted());
}

TEST_F(WriteBehindTest, WithoutFinishNothingStays) {
  testing::write_bytes(path_, "old");
  {
    WriteBehind queue(1 << 20);
    ShardWriter shard(path_, specs_, queue);
    shard.write("b", clone(b_));
    EXPECT_EQ(files_in(dir_.path()), 2u);
  }
  EXPECT_EQ(read_bytes(path_), "old");
  EXPECT_EQ(files_in(dir_.path()), 1u);
}

TEST_F(WriteBehindTest, AMissingTensorIsOurMistake) {
  WriteBehind queue(1 << 20);
  ShardWriter shard(path_, specs_, queue);
  shard.write("b", clone(b_));
  shard.write("c", clone(c_));
  EXPECT_THROW(shard.write("c", clone(c_)), Error) << "twice";
  EXPECT_THROW(shard.write("a", clone(c_)), Error) << "another shape";
  EXPECT_THROW(shard.write("d", clone(c_)), Error) << "another name";
  EXPECT_THROW(shard.finish(), Error) << "a is missing";
}

TEST_F(WriteBehindTest, AFullDiskShowsAtTheStart) {
  WriteBehind queue(1 << 20);
  const FileLimit limit(10'000);
  const std::string message =
      error_of([&] { ShardWriter(path_, specs_, queue); }, ExitCode::kOutput);
  EXPECT_THAT(message, ::testing::HasSubstr(path_));
  EXPECT_THAT(message, ::testing::HasSubstr("File too large"));
  EXPECT_EQ(files_in(dir_.path()), 0u);
  EXPECT_NO_THROW(queue.check()) << "nothing was queued";
}

TEST_F(WriteBehindTest, AFailedWriteIsToldByEveryLaterCallAndLeavesNoFile) {
  {
    WriteBehind queue(1 << 20);
    ShardWriter good(dir_.file("good"), {{"c", {nullptr, DType::kF32, {2}}}}, queue);
    good.write("c", clone(c_));
    good.finish().wait();
    ShardWriter shard(path_, specs_, queue);
    const FileLimit limit(10'000);  // the disk fills up after the space was reserved
    shard.write("b", clone(b_));
    const std::string message = error_of([&] { queue.drain(); }, ExitCode::kOutput);
    EXPECT_THAT(message, ::testing::HasSubstr(path_));
    EXPECT_THAT(message, ::testing::HasSubstr("File too large"));
    EXPECT_EQ(error_of([&] { shard.write("a", clone(a_)); }, ExitCode::kOutput), message);
    EXPECT_EQ(error_of([&] { queue.check(); }, ExitCode::kOutput), message);
  }
  EXPECT_EQ(files_in(dir_.path()), 1u) << "the file that was durable before";
}

TEST_F(WriteBehindTest, AFailedRenameIsToldByThePendingFile) {
  WriteBehind queue(1 << 20);
  ShardWriter shard(path_, {{"c", {nullptr, DType::kF32, {2}}}}, queue);
  fs::create_directories(path_ + "/in the way");
  shard.write("c", clone(c_));
  const PendingFile pending = shard.finish();
  const std::string message = error_of([&] { pending.wait(); }, ExitCode::kOutput);
  EXPECT_THAT(message, ::testing::HasSubstr("rename"));
  EXPECT_EQ(error_of([&] { (void)pending.durable(); }, ExitCode::kOutput), message);
  EXPECT_EQ(files_in(dir_.path()), 1u);
}

}  // namespace
}  // namespace bitmill
