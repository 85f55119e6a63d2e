// Any text as model.safetensors.index.json.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "io/checkpoint.h"
#include "io/json.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  try {
    for (const auto& [tensor, file] :
         bitmill::read_weight_map(bitmill::parse_json(text, "index"), "index"))
      if (file.find('/') != std::string::npos || !file.ends_with(".safetensors")) std::abort();
  } catch (const bitmill::Error& error) {
    if (error.code() != bitmill::ExitCode::kInput) std::abort();
  }
  return 0;
}
