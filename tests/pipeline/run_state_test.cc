#include "pipeline/run_state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "io/durable.h"
#include "support/paths.h"
#include "io/json.h"

namespace bitmill {
namespace {
namespace fs = std::filesystem;
using ::testing::HasSubstr;

std::string message_of(const std::string& directory, const Fingerprint& fingerprint, ExitCode code) {
  try {
    inspect_output(directory, fingerprint, false);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code);
    return error.what();
  }
  return "no error";
}

class OutputStateTest : public ::testing::Test {
 protected:
  void finish(const std::string& state) {
    fs::create_directories(out_ + "/bitmill");
    for (const char* name : {"model.safetensors", "config.json"}) std::ofstream(out_ + "/" + name) << name;
    write_manifest(out_, {state, settings_, {"model.safetensors", "config.json"}, Json::array()});
  }
  testing::TemporaryDirectory directory_;
  std::string out_ = directory_.file("out");
  Fingerprint settings_{{"quantize.bits", "4"}, {"input.model", "abc"}};
};

TEST_F(OutputStateTest, MissingAndEmptyAreFresh) {
  EXPECT_EQ(inspect_output(out_, settings_, false), OutputState::kFresh);
  fs::create_directory(out_);
  EXPECT_EQ(inspect_output(out_, settings_, false), OutputState::kFresh);
}

TEST_F(OutputStateTest, ForeignDirectoryIsRefusedAlsoWithOverwrite) {
  fs::create_directory(out_);
  std::ofstream(out_ + "/thesis.tex") << "years of work";
  EXPECT_THAT(message_of(out_, settings_, ExitCode::kUsage), HasSubstr("not an output of bitmill"));
  EXPECT_THROW(inspect_output(out_, settings_, true), Error);
  EXPECT_TRUE(fs::exists(out_ + "/thesis.tex"));
}

TEST_F(OutputStateTest, CompleteWithTheSameSettings) {
  finish("complete");
  EXPECT_EQ(inspect_output(out_, settings_, false), OutputState::kComplete);
  EXPECT_EQ(inspect_output(out_, settings_, true), OutputState::kUnfinished);
}

TEST_F(OutputStateTest, CompleteNeedsAllFiles) {
  finish("complete");
  fs::remove(out_ + "/model.safetensors");
  EXPECT_EQ(inspect_output(out_, settings_, false), OutputState::kUnfinished);
}

TEST_F(OutputStateTest, ARunThatDiedBeforeItsManifestLeavesAFreshDirectory) {
  fs::create_directories(out_ + "/bitmill");
  std::ofstream(out_ + "/bitmill/manifest.json.tmp-1-2") << "{";
  EXPECT_EQ(inspect_output(out_, settings_, false), OutputState::kFresh);
  fs::create_directories(out_ + "/bitmill/mine");
  EXPECT_THROW(inspect_output(out_, settings_, false), Error);
}

TEST_F(OutputStateTest, UnfinishedIsOurs) {
  finish("running");
  EXPECT_EQ(inspect_output(out_, settings_, false), OutputState::kUnfinished);
}

TEST_F(OutputStateTest, OtherSettingsAreNamed) {
  finish("complete");
  Fingerprint other = settings_;
  other["quantize.bits"] = "3";
  EXPECT_THAT(message_of(out_, other, ExitCode::kUsage), HasSubstr("quantize.bits was 4, is now 3"));
}

TEST_F(OutputStateTest, AFileInTheWay) {
  std::ofstream(out_) << "x";
  EXPECT_THAT(message_of(out_, settings_, ExitCode::kUsage), HasSubstr("not a directory"));
}

TEST_F(OutputStateTest, AManifestThatNamesForeignPathsIsRefused) {
  fs::create_directories(out_ + "/bitmill");
  write_manifest(out_, {"running", settings_, {"../precious"}, Json::array()});
  EXPECT_THROW(read_manifest(out_), Error);
}

TEST(Fingerprint, DigestDependsOnEveryEntry) {
  const Fingerprint a{{"x", "1"}, {"y", "2"}}, b{{"x", "1"}, {"y", "3"}}, c{{"x", "1"}};
  EXPECT_NE(fingerprint_digest(a), fingerprint_digest(b));
  EXPECT_NE(fingerprint_digest(a), fingerprint_digest(c));
  EXPECT_EQ(fingerprint_digest(a).size(), 16u);
}

}  // namespace
}  // namespace bitmill
