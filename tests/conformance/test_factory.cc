// Which backends a build has, and what asking for others says.
#include <gtest/gtest.h>

#include <algorithm>

#include "backends/backend.h"

namespace bitmill {
namespace {

TEST(BackendFactory, EveryNameCanBeMade) {
  ASSERT_FALSE(backend_names().empty());
  for (const std::string& name : backend_names()) {
    const auto backend = make_backend({.kind = name, .compute = DType::kF32, .threads = 1});
    EXPECT_EQ(backend->name(), name);
    EXPECT_EQ(backend->compute(), DType::kF32);
    EXPECT_EQ(backend->description().find('\n'), std::string::npos);
    EXPECT_EQ(backend->description().rfind(name + ": ", 0), 0u) << backend->description();
  }
}

TEST(BackendFactory, AutoIsOneOfThem) {
  const std::vector<std::string> names = backend_names();
  EXPECT_NE(std::find(names.begin(), names.end(), make_backend({})->name()), names.end());
}

TEST(BackendFactory, UnknownKindIsAUsageError) {
  try {
    make_backend({.kind = "tpu"});
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
    EXPECT_STREQ(error.what(), "run.backend=tpu: unknown backend; expected auto, cpu or cuda");
  }
}

TEST(BackendFactory, MissingCudaDoesNotFit) {
  const std::vector<std::string> names = backend_names();
  if (std::find(names.begin(), names.end(), "cuda") != names.end())
    GTEST_SKIP() << "this build has a CUDA backend";
  try {
    make_backend({.kind = "cuda"});
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kDoesNotFit);
    EXPECT_STREQ(error.what(), "run.backend=cuda: this build has no CUDA backend; use cpu");
  }
}

}  // namespace
}  // namespace bitmill
