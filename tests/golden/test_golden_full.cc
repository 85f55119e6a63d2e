// The whole golden suite, where its folder lies beside the source tree, judged by the suite's own
// checker (needs python3 with numpy). Skipped visibly otherwise.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>

#include "support/paths.h"

namespace bitmill {
namespace {

class FullSuite : public ::testing::TestWithParam<const char*> {};

TEST_P(FullSuite, CheckerFindsNoFailure) {
  const std::string suite = testing::fixture_path("golden");
  if (suite.empty()) GTEST_SKIP() << "no golden suite beside the source tree";
  if (std::system("python3 -c 'import numpy' 2>/dev/null") != 0)
    GTEST_SKIP() << "python3 has no numpy";
  const std::string precision = GetParam();
  testing::TemporaryDirectory directory;
  const std::string out = directory.path();
  const std::string run = std::string(BITMILL_GOLDEN_PROGRAM) + " '" + suite + "' '" + out +
                          "' --precision " + precision;
  ASSERT_EQ(std::system(run.c_str()), 0);
  // The checker judges the cases that the program says this version can run (OUT/cases.json).
  std::filesystem::create_directory_symlink(std::filesystem::absolute(suite) / "expected",
                                            out + "/expected");
  std::filesystem::create_directory_symlink(std::filesystem::absolute(suite) / "inputs",
                                            out + "/inputs");
  const std::string check = "python3 -B '" + suite + "/check.py' '" + out + "' --golden '" + out +
                            "' --precision " + precision;
  EXPECT_EQ(std::system(check.c_str()), 0);
}

INSTANTIATE_TEST_SUITE_P(Precision, FullSuite, ::testing::Values("fp64", "fp32"));

}  // namespace
}  // namespace bitmill
