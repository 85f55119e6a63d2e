// Checks that a call fails as the user would see it: exit code, and what the sentence names.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "core/error.h"

namespace bitmill::testing {

// The message of the Error that `call` throws; a test failure if it throws none or another code.
inline std::string error_of(const std::function<void()>& call, ExitCode code) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(static_cast<int>(error.code()), static_cast<int>(code)) << error.what();
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << "one line, please";
    return error.what();
  }
  ADD_FAILURE() << "no Error was thrown";
  return {};
}

inline void expect_error(const std::function<void()>& call, ExitCode code,
                         const std::vector<std::string>& names) {
  const std::string message = error_of(call, code);
  for (const std::string& name : names) EXPECT_THAT(message, ::testing::HasSubstr(name));
}

inline void expect_input_error(const std::function<void()>& call,
                               const std::vector<std::string>& names) {
  expect_error(call, ExitCode::kInput, names);
}

}  // namespace bitmill::testing
