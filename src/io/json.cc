// A strict tree builder over nlohmann's event parser: what the library accepts silently (duplicate
// keys, any depth) is an error here.
#include "io/json.h"

#include <iterator>
#include <utility>
#include <vector>

#include "core/error.h"
#include "io/safetensors.h"

namespace bitmill {
namespace {

constexpr size_t kMaxDepth = 64;
constexpr size_t kShownBytes = 120;  // of a name or a parser's reason in a message

// Characters of a text that tell their reader how far the parser has come: nlohmann's callbacks do
// not.
class CountingIterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  CountingIterator(const char* at, int64_t* count) : at_(at), count_(count) {}
  reference operator*() const { return *at_; }
  CountingIterator& operator++() {
    ++at_;
    ++*count_;
    return *this;
  }
  CountingIterator operator++(int) {
    CountingIterator before = *this;
    ++*this;
    return before;
  }
  bool operator==(const CountingIterator& other) const { return at_ == other.at_; }
  bool operator!=(const CountingIterator& other) const { return at_ != other.at_; }

 private:
  const char* at_;
  int64_t* count_;
};

class TreeBuilder final : public JsonEvents {
 public:
  using JsonEvents::JsonEvents;
  Json take() { return std::move(root_); }

  bool null() override { return put(nullptr); }
  bool boolean(bool value) override { return put(value); }
  bool number_integer(number_integer_t value) override { return put(value); }
  bool number_unsigned(number_unsigned_t value) override { return put(value); }
  bool number_float(number_float_t value, const string_t&) override { return put(value); }
  bool string(string_t& value) override { return put(std::move(value)); }
  bool binary(binary_t&) override { return false; }  // never comes from text
  bool start_object(size_t) override { return open(Json::object()); }
  bool start_array(size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& name) override {
    if (open_.back()->contains(name)) refuse("duplicate key " + quote_name(name));
    key_ = std::move(name);
    return true;
  }

 private:
  // Stores a value where the text has it and returns its place.
  Json* place(Json value) {
    if (open_.empty()) return &(root_ = std::move(value));
    Json& parent = *open_.back();
    if (parent.is_object()) return &(parent[key_] = std::move(value));
    parent.push_back(std::move(value));
    return &parent.back();
  }
  bool put(Json value) {
    place(std::move(value));
    return true;
  }
  bool open(Json container) {
    if (open_.size() == kMaxDepth) refuse(fmt::format("nesting deeper than {}", kMaxDepth));
    open_.push_back(place(std::move(container)));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  Json root_;
  std::vector<Json*>
      open_;  // containers around the current place; a parent grows only after its child has closed
  std::string key_;
};

// The library's reason without its own prefix ("[json.exception...] parse error at line 1, column
// 2: ") and without the text it read last, which may be of any length.
std::string reason(const nlohmann::json::exception& error) {
  std::string text = error.what();
  text = text.substr(0, text.find("; last read"));
  if (const size_t bracket = text.find("] "); bracket != std::string::npos)
    text.erase(0, bracket + 2);
  if (const size_t column = text.find("column "); column != std::string::npos)
    if (const size_t colon = text.find(": ", column); colon != std::string::npos)
      text.erase(0, colon + 2);
  return text.substr(0, kShownBytes);
}

}  // namespace

void JsonEvents::parse(std::string_view text) {
  // The library takes a NUL for the end of the text and would never look at what follows.
  if (const size_t nul = text.find('\0'); nul != std::string_view::npos)
    fail(ExitCode::kInput, "{}: not valid JSON at byte {}: NUL character", where_,
         base_ + static_cast<int64_t>(nul) + 1);
  const CountingIterator begin(text.data(), &position_), end(text.data() + text.size(), &position_);
  BITMILL_CHECK(Json::sax_parse(begin, end, this));  // every refusal throws
}

bool JsonEvents::parse_error(size_t position, const std::string&,
                             const nlohmann::json::exception& error) {
  fail(ExitCode::kInput, "{}: not valid JSON at byte {}: {}", where_,
       base_ + static_cast<int64_t>(position), reason(error));
}

void JsonEvents::refuse(const std::string& what) const {
  fail(ExitCode::kInput, "{}: {} at byte {}", where_, what, base_ + position_);
}

std::string quote_name(std::string_view name) {
  const bool cut = name.size() > kShownBytes;
  const std::string shown(cut ? name.substr(0, kShownBytes) : name);
  const std::string text = Json(shown).dump(-1, ' ', false, Json::error_handler_t::replace);
  return cut ? text.substr(0, text.size() - 1) + "...\"" : text;
}

Json parse_json(const std::string& text, const std::string& where) {
  TreeBuilder builder(where);
  builder.parse(text);
  return builder.take();
}

std::string read_text_file(const std::string& path, int64_t limit) {
  const RangeReader file(path);
  if (file.file_bytes() > limit)
    fail(ExitCode::kInput, "{}: has {} bytes, at most {} are allowed", path, file.file_bytes(),
         limit);
  std::string text(static_cast<size_t>(file.file_bytes()), '\0');
  file.read(0, file.file_bytes(), text.data());
  return text;
}

Json read_json(const std::string& path, int64_t limit) {
  return parse_json(read_text_file(path, limit), path);
}

}  // namespace bitmill
