// Any text as JSON: what is accepted must survive a round trip through its own text.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "core/error.h"
#include "io/json.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  try {
    const bitmill::Json json = bitmill::parse_json(text, "fuzz");
    if (bitmill::parse_json(json.dump(), "again") != json) std::abort();
  } catch (const bitmill::Error& error) {
    if (error.code() != bitmill::ExitCode::kInput) std::abort();
  }
  return 0;
}
