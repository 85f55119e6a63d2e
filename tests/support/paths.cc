#include "support/paths.h"

#include <cstdlib>
#include <filesystem>
#include <stdexcept>

namespace bitmill::testing {
namespace fs = std::filesystem;

namespace {
fs::path source_root() {
  if (const char* set = std::getenv("BITMILL_SOURCE_DIR")) return set;
  for (fs::path at = fs::current_path(); at != at.root_path(); at = at.parent_path())
    if (fs::exists(at / "tests/data") && fs::exists(at / "CMakePresets.json")) return at;
  throw std::runtime_error("source tree not found; set BITMILL_SOURCE_DIR");
}
}  // namespace

std::string source_path(const std::string& relative) { return (source_root() / relative).string(); }

std::string fixture_path(const std::string& relative) {
  const char* set = std::getenv("BITMILL_FIXTURES");
  const fs::path path = (set ? fs::path(set) : source_root() / "../shared") / relative;
  return fs::exists(path) ? fs::weakly_canonical(path).string() : std::string();
}

TemporaryDirectory::TemporaryDirectory() {
  std::string pattern = (fs::temp_directory_path() / "bitmill-test-XXXXXX").string();
  if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
  path_ = pattern;
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

}  // namespace bitmill::testing
