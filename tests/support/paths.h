// Where tests find their data, and temporary directories that clean up after themselves.
#pragma once

#include <string>

namespace bitmill::testing {

// A file or folder of the source tree ("tests/data/tiny-llama"). Relies on BITMILL_SOURCE_DIR (set by ctest), else on the
// current directory and its parents.
std::string source_path(const std::string& relative);

// A path inside the folder of larger, optional fixtures: $BITMILL_FIXTURES, else "../shared" beside the source tree.
// Empty when it is not there: the test must then GTEST_SKIP with a reason.
std::string fixture_path(const std::string& relative);

// A fresh directory under the system's temporary folder, removed with its content on destruction.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

}  // namespace bitmill::testing
