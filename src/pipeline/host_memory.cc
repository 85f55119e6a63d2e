#include <algorithm>
#include <cctype>
#include <fstream>
#include <string>

#include "pipeline/memory.h"

namespace bitmill {

int64_t host_memory_per_rank(int ranks_on_node) {
  int64_t bytes = 0;
  std::ifstream meminfo("/proc/meminfo");
  for (std::string word; meminfo >> word;)
    if (word == "MemTotal:") {
      meminfo >> bytes;
      bytes *= 1024;
      break;
    }
  std::ifstream cgroup("/sys/fs/cgroup/memory.max");
  std::string limit;
  if (cgroup >> limit && !limit.empty() && std::isdigit(static_cast<unsigned char>(limit[0])))
    bytes = std::min<int64_t>(bytes == 0 ? INT64_MAX : bytes, std::stoll(limit));
  return bytes / std::max(1, ranks_on_node);
}

}  // namespace bitmill
