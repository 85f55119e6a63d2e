// Strict reading and deterministic writing of JSON through nlohmann-json.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "io/json_fwd.h"

namespace bitmill {

// Parses UTF-8 text; refuses duplicate keys, trailing text and nesting deeper than 64. Throws Error(kInput) naming
// `where` (a file) and the byte offset.
Json parse_json(const std::string& text, const std::string& where);
// The bytes of a whole (small) file, at most `limit`. Error(kInput).
std::string read_text_file(const std::string& path, int64_t limit = 64 << 20);
// Reads and parses a whole (small) file; at most `limit` bytes.
Json read_json(const std::string& path, int64_t limit = 64 << 20);

// "name" as a JSON string, cut when it is long: how names that come from files are shown in messages.
std::string quote_name(std::string_view name);

// Strict parse as events, for texts of a fixed shape that are checked while they are read (no tree is built). A subclass
// implements nlohmann's callbacks; it refuses the text by calling `refuse`. Syntax errors throw Error(kInput).
class JsonEvents : public nlohmann::json_sax<Json> {
 public:
  // `where` names the file in messages; `base` is the offset of the text in that file.
  explicit JsonEvents(std::string where, int64_t base = 0) : where_(std::move(where)), base_(base) {}
  // Feeds the whole text; trailing text after the value is an error. Only once per object.
  void parse(std::string_view text);
  bool parse_error(size_t position, const std::string& last_token,
                   const nlohmann::json::exception& error) final;

 protected:
  // Throws Error(kInput): "WHERE: WHAT at byte N".
  [[noreturn]] void refuse(const std::string& what) const;
  const std::string& where() const { return where_; }

 private:
  std::string where_;
  int64_t base_, position_ = 0;
};

}  // namespace bitmill
