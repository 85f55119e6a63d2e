// Typed reading of config.json: every accessor names the key, what was found and what was expected.
// A key whose value is null counts as absent, as in the files themselves; size_or_off tells them
// apart.
#pragma once

#include <string>
#include <vector>

#include "core/error.h"
#include "io/json_fwd.h"

namespace bitmill {

class ConfigKeys {
 public:
  // `object` must outlive this; `path` is put before keys in messages ("rope_scaling.").
  explicit ConfigKeys(const Json& object, std::string path = "");

  bool has(const std::string& key) const;
  // The required value: an error when the key is absent.
  int64_t size(const std::string& key) const;   // whole number in [1, 2^31)
  int64_t count(const std::string& key) const;  // whole number in [0, 2^31)
  double positive(const std::string& key) const;
  std::string text(const std::string& key) const;
  std::vector<double> positives(const std::string& key) const;
  std::vector<std::string> texts(const std::string& key) const;
  ConfigKeys object(const std::string& key) const;
  // The value, or `fallback` when the key is absent.
  int64_t size_or(const std::string& key, int64_t fallback) const;
  // For keys where null switches something off: 0 for null, `fallback` when the key is not there.
  int64_t size_or_off(const std::string& key, int64_t fallback) const;
  double positive_or(const std::string& key, double fallback) const;
  bool flag_or(const std::string& key, bool fallback) const;
  std::string text_or(const std::string& key, const std::string& fallback) const;

  const Json& json() const { return object_; }
  // Full name of a key for messages.
  std::string label(const std::string& key) const { return path_ + key; }

 private:
  const Json& value(const std::string& key) const;
  [[noreturn]] void refuse(const std::string& key, const std::string& expected) const;

  const Json& object_;
  std::string path_;
};

}  // namespace bitmill
