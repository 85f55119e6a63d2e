// Kinds of values in the option table: integers, numbers, choices, sizes, times. Each turns a
// member of RunOptions into an OptionValue, which parses text strictly (locale-independent, the
// whole text) and names key, text and what is allowed when it refuses. Private to
// core/options_table.cc.
#pragma once

#include <fmt/ranges.h>

#include <charconv>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>

#include "core/error.h"
#include "core/options_table.h"

namespace bitmill::option_values {

// ---- text to numbers: locale-independent, the whole text must be used ----

template <typename T>
std::optional<T> parse_number(std::string_view text) {
  T value{};
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end) return std::nullopt;
  if constexpr (std::is_floating_point_v<T>)
    if (!std::isfinite(value)) return std::nullopt;
  return value;
}

[[noreturn]] inline void refuse(const std::string& key, const std::string& text,
                                const std::string& allowed) {
  fail(ExitCode::kUsage, "{}: found '{}', expected {}", key, text, allowed);
}

inline constexpr const char* kSizeText = "a size such as 1024, 500MB, 5GB or 16GiB";
inline constexpr const char* kDurationText = "a time such as 30s, 5m, 2h or 1:30:00";

// The shortest text that parse_size turns into exactly `bytes`.
std::string size_text(int64_t bytes);

// ---- kinds of values ----

// A member of one section of RunOptions, as reference getter and setter.
template <typename T>
struct Field {
  std::function<T&(RunOptions&)> ref;
  std::function<const T&(const RunOptions&)> get;
};

template <typename Section, typename Base, typename T>
Field<T> at(Section RunOptions::*section, T Base::*member) {
  return {[=](RunOptions& o) -> T& { return o.*section.*member; },
          [=](const RunOptions& o) -> const T& { return o.*section.*member; }};
}

template <typename T>
OptionValue integer(Field<T> field, int64_t low, int64_t high, std::string allowed) {
  auto set = [=](RunOptions& o, const std::string& key, const std::string& text) {
    const auto value = parse_number<int64_t>(text);
    if (!value || *value < low || *value > high) refuse(key, text, allowed);
    field.ref(o) = static_cast<T>(*value);
  };
  return {allowed, set, [=](const RunOptions& o) { return fmt::to_string(field.get(o)); }};
}

inline constexpr int64_t kMany = std::numeric_limits<int64_t>::max();

inline OptionValue count_up_to(Field<int64_t> field, int64_t low, int64_t high) {
  return integer(std::move(field), low, high, fmt::format("an integer from {} to {}", low, high));
}

inline OptionValue count(Field<int64_t> field, int64_t low) {
  return integer(std::move(field), low, kMany, fmt::format("an integer >= {}", low));
}

inline OptionValue real(Field<double> field, double low, bool low_allowed) {
  const std::string allowed = fmt::format("a number {} {}", low_allowed ? ">=" : ">", low);
  auto set = [=](RunOptions& o, const std::string& key, const std::string& text) {
    const auto value = parse_number<double>(text);
    if (!value || *value < low || (*value == low && !low_allowed)) refuse(key, text, allowed);
    field.ref(o) = *value;
  };
  return {allowed, set, [=](const RunOptions& o) { return fmt::format("{}", field.get(o)); }};
}

inline bool parse_bool(const std::string& key, const std::string& text) {
  for (const char* name : {"true", "1", "yes", "on"})
    if (text == name) return true;
  for (const char* name : {"false", "0", "no", "off"})
    if (text == name) return false;
  refuse(key, text, "true or false");
}

inline OptionValue boolean(Field<bool> field) {
  auto set = [=](RunOptions& o, const std::string& key, const std::string& text) {
    field.ref(o) = parse_bool(key, text);
  };
  return {"true or false", set,
          [=](const RunOptions& o) -> std::string { return field.get(o) ? "true" : "false"; }};
}

// A switch whose other position this version does not offer.
inline OptionValue only_false(Field<bool> field) {
  OptionValue value = boolean(field);
  value.allowed = "false";
  value.set = [](RunOptions&, const std::string& key, const std::string& text) {
    if (parse_bool(key, text))
      fail(ExitCode::kUsage, "{}: found '{}', which is not in this version; expected false", key,
           text);
  };
  return value;
}

// A value that the interface knows and this version does not offer, and what it would bring.
struct Later {
  std::string value;
  std::string what;
};

inline void check_choice(const std::string& key, const std::string& text,
                         const std::vector<std::string>& names, const std::vector<Later>& later) {
  const std::string allowed = fmt::format("{}", fmt::join(names, " or "));
  for (const std::string& name : names)
    if (text == name) return;
  for (const Later& other : later)
    if (text == other.value)
      fail(ExitCode::kUsage, "{}: found '{}', but {} is not in this version; expected {}", key,
           text, other.what, allowed);
  refuse(key, text, allowed);
}

inline OptionValue choice(Field<std::string> field, std::vector<std::string> names,
                          std::vector<Later> later = {}) {
  auto set = [=](RunOptions& o, const std::string& key, const std::string& text) {
    check_choice(key, text, names, later);
    field.ref(o) = text;
  };
  return {fmt::format("{}", fmt::join(names, ", ")), set, field.get};
}

// `values`: those on offer, in the order of --help; `name_of` is the enum's string table.
template <typename E>
OptionValue enumeration(Field<E> field, std::vector<E> values, std::string_view (*name_of)(E),
                        std::vector<Later> later = {}) {
  std::vector<std::string> names;
  for (E value : values) names.emplace_back(name_of(value));
  auto set = [=](RunOptions& o, const std::string& key, const std::string& text) {
    check_choice(key, text, names, later);
    for (E value : values)
      if (text == name_of(value)) field.ref(o) = value;
  };
  return {fmt::format("{}", fmt::join(names, ", ")), set,
          [=](const RunOptions& o) { return std::string(name_of(field.get(o))); }};
}

// Free text whose meaning another table or the file system decides; `may_be_empty`: empty means
// "not given".
inline OptionValue text(Field<std::string> field, std::string allowed, bool may_be_empty) {
  auto set = [=](RunOptions& o, const std::string& key, const std::string& value) {
    if (value.empty() && !may_be_empty) refuse(key, value, allowed);
    field.ref(o) = value;
  };
  return {allowed, set, field.get};
}

inline OptionValue path(Field<std::string> field, std::string what) {
  return text(std::move(field), std::move(what), true);
}

// Kept as text, because only the machine it runs on gives it a value; `check` throws.
template <typename Check>
OptionValue checked(Field<std::string> field, std::string allowed, Check check) {
  auto set = [=](RunOptions& o, const std::string& key, const std::string& value) {
    if (!check(key, value)) refuse(key, value, allowed);
    field.ref(o) = value;
  };
  return {allowed, set, field.get};
}

inline OptionValue size(Field<int64_t> field) {
  const std::string allowed = std::string(kSizeText) + ", above 0";
  auto set = [=](RunOptions& o, const std::string& key, const std::string& value) {
    const int64_t bytes = parse_size(value, key);
    if (bytes <= 0) refuse(key, value, allowed);
    field.ref(o) = bytes;
  };
  return {allowed, set, [=](const RunOptions& o) { return size_text(field.get(o)); }};
}

inline OptionValue duration(Field<double> field) {
  const std::string allowed = std::string(kDurationText) + ", above 0";
  auto set = [=](RunOptions& o, const std::string& key, const std::string& value) {
    const double seconds = parse_duration(value, key);
    if (seconds <= 0) refuse(key, value, allowed);
    field.ref(o) = seconds;
  };
  return {allowed, set, [=](const RunOptions& o) { return fmt::format("{}s", field.get(o)); }};
}

// A key whose feature this version does not have: text that `value` would not take is refused as
// always, and of what it would take only the default. `what` is the feature.
inline OptionValue only_default(OptionValue value, const std::string& what) {
  const OptionValue inner = value;
  const std::string standard = value.get(RunOptions{});
  value.allowed = standard.empty() ? "empty" : standard;
  value.set = [inner, what, standard, allowed = value.allowed](RunOptions&, const std::string& key,
                                                               const std::string& text) {
    RunOptions scratch;
    inner.set(scratch, key, text);
    if (inner.get(scratch) != standard)
      fail(ExitCode::kUsage, "{}: found '{}', but {} is not in this version; expected {}", key,
           text, what, allowed);
  };
  return value;
}

}  // namespace bitmill::option_values
