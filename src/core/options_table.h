// The table of configuration keys: one row per key, read by parsing, validation, --help, the echo
// and the documentation test. A new key is one member of RunOptions and one row of option_table().
// Private to core and its tests.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core/options.h"

namespace bitmill {

// How the text of one key becomes a member of RunOptions and back.
struct OptionValue {
  std::string allowed;  // completes "expected ..."
  // Parses, validates and stores. Error(kUsage) names `key`, the text found and what is allowed.
  std::function<void(RunOptions&, const std::string& key, const std::string& text)> set;
  // The text `set` would take; for a repeatable key one line per value.
  std::function<std::string(const RunOptions&)> get;
};

enum class OptionScope {
  kConfig,         // file and command line
  kConfigAndRule,  // also as `name=value` in a rule
  kRule,           // in rules only
};

struct OptionRow {
  std::string key;  // "section.name"
  OptionValue value;
  std::string unit;  // "-": none
  bool numeric;      // changes the numbers or the files of the result: part of the fingerprint
  OptionScope scope;
  std::string help;         // one line
  bool repeatable = false;  // values add up, the command line's first

  std::string section() const { return key.substr(0, key.find('.')); }
  std::string name() const { return key.substr(key.find('.') + 1); }
  std::string default_text() const { return value.get(RunOptions{}); }
};

// All rows in the order of help and echo.
const std::vector<OptionRow>& option_table();

// One `REGEX name=value ...`, every name and value checked. Error(kUsage) names the rule.
QuantizeRule parse_rule(const std::string& text);

}  // namespace bitmill
