// What `verify` looks at, one function per concern. Checks never throw for what they find: they add
// a sentence to VerifyReport and go on, so that one run names everything that is wrong. Tensors are
// read one at a time.
#pragma once

#include <optional>
#include <set>
#include <string>
#include <vector>

#include "formats/format.h"

namespace bitmill {

struct VerifyReport {
  std::vector<std::string> violations;  // the checkpoint is broken
  std::vector<std::string> warnings;    // some engine, or some split of it, will not take it
  int64_t linears = 0;                  // packed linears seen
  int64_t compared = 0;                 // of them, compared with the source
  double error_sum = 0;                 // relative weight errors ||W_q - W|| / ||W||
  double worst_ratio = 0;  // largest error over that of rounding to nearest on the same grid
  std::string worst_module;

  template <typename... Args>
  void violation(fmt::format_string<Args...> text, Args&&... args) {
    violations.push_back(fmt::format(text, std::forward<Args>(args)...));
  }
};

// The output as the checks see it.
struct VerifyInput {
  std::string directory;
  const Json& config;  // config.json
  const ModelSpec& spec;
  const Checkpoint& checkpoint;
  const OutputFormat* format;  // nullptr: a float checkpoint
  const Checkpoint* source;    // nullptr: without --against
  Backend& backend;
  std::set<std::string> folded = {};  // source tensors whose values the output changes, as its manifest says
};

// Names of shards and of stray files, the index and its total_size, header metadata, alignment.
// Needs no open Checkpoint.
void check_directory(const std::string& directory, bool is_output, VerifyReport& report);

// Every linear of every block: packed tensors or a float weight, codes, zero points, scales,
// groups, error against the source. Adds the tensor names it accounts for to `known`; returns what
// each linear is on disk.
std::vector<ModuleChoice> check_linears(const VerifyInput& input, std::set<std::string>& known,
                                        VerifyReport& report);

// Float tensors: present, of the right shape, equal to the source's; nothing left over; nothing of
// the source lost.
void check_floats(const VerifyInput& input, std::set<std::string>& known, VerifyReport& report);

// Config keys that loaders insist on, the repeated config file, and the load rules (as warnings).
void check_config(const VerifyInput& input, const std::vector<ModuleChoice>& modules,
                  VerifyReport& report);

// Tokenizer and generation files of the source: there, byte for byte.
void check_copied_files(const std::string& directory, const std::string& source,
                        VerifyReport& report);

}  // namespace bitmill
