// Strict reading and deterministic writing of JSON through nlohmann-json.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace bitmill {

using Json = nlohmann::json;                  // object keys sorted: deterministic text
using OrderedJson = nlohmann::ordered_json;   // keys in the order written

// Parses UTF-8 text; refuses duplicate keys, trailing text and nesting deeper than 64. Throws Error(kInput) naming
// `where` (a file) and the byte offset.
Json parse_json(const std::string& text, const std::string& where);
// Reads and parses a whole (small) file; at most `limit` bytes.
Json read_json(const std::string& path, int64_t limit = 64 << 20);

}  // namespace bitmill
