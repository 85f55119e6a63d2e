// The one exception type. Its code is the process exit code (docs/exit_codes.md), its text one sentence for the user.
#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace bitmill {

// Exit codes of every command; all ranks of a job leave with the same one.
enum class ExitCode : int {
  kDone = 0,
  kInternal = 1,    // a broken invariant: a defect of bitmill
  kUsage = 2,       // command line or configuration
  kInput = 3,       // a model, tokenizer or calibration file is refused
  kDoesNotFit = 4,  // memory or device missing
  kNumeric = 5,     // quantize.on_failed=fail met a failed module
  kOutput = 6,      // output directory or I/O
  kStopped = 75,    // stopped cleanly, run again to continue
  kPeerLost = 79,   // watchdog
};

// What every layer throws for outside failures. Expected numeric failures are values, never exceptions.
class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ExitCode code() const { return code_; }

 private:
  ExitCode code_;
};

// Throws Error with a formatted sentence that names the file, tensor or key, what was found and what was expected.
template <typename... Args>
[[noreturn]] void fail(ExitCode code, fmt::format_string<Args...> text, Args&&... args) {
  throw Error(code, fmt::format(text, std::forward<Args>(args)...));
}

}  // namespace bitmill

// Invariant of bitmill itself, always checked.
#define BITMILL_CHECK(condition)                                                                     \
  do {                                                                                               \
    if (!(condition))                                                                                \
      ::bitmill::fail(::bitmill::ExitCode::kInternal, "internal error at {}:{}: {} does not hold", \
                      __FILE__, __LINE__, #condition);                                               \
  } while (false)
