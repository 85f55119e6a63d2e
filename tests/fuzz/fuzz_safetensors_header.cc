// Any bytes as a safetensors file: read whole through the file reader (a memory file), so the
// length prefix is fuzzed too.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <string>

#include "io/safetensors.h"

namespace {

// What the reader promises of every file that it accepts.
void check_promises(const std::vector<bitmill::TensorEntry>& entries, size_t file_bytes) {
  int64_t end = entries.empty() ? 0 : entries.front().offset;
  for (const bitmill::TensorEntry& entry : entries) {
    if (entry.offset != end ||
        entry.shape.elements() * bitmill::dtype_bits(entry.dtype) != entry.bytes * 8)
      std::abort();
    end += entry.bytes;
  }
  if (!entries.empty() && end != static_cast<int64_t>(file_bytes)) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const int fd = memfd_create("fuzz", MFD_CLOEXEC);
  if (fd < 0 || write(fd, data, size) != static_cast<ssize_t>(size)) std::abort();
  try {
    std::map<std::string, std::string> metadata;
    check_promises(
        bitmill::read_safetensors_header("/proc/self/fd/" + std::to_string(fd), &metadata), size);
  } catch (const bitmill::Error& error) {
    if (error.code() != bitmill::ExitCode::kInput) std::abort();
  }
  close(fd);
  return 0;
}
