#include "models/config_keys.h"
#include "io/json.h"

#include <cmath>
#include <limits>

namespace bitmill {

namespace {

// Long values would bury the message.
std::string shown(const Json& value) {
  const std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  return text.size() <= 60 ? text : text.substr(0, 57) + "...";
}

// The bound keeps products of two sizes inside 64 bits.
bool is_whole(const Json& value, int64_t least) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (!value.is_number_integer()) return false;
  if (value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{kMost}) return false;
  return value.get<int64_t>() >= least && value.get<int64_t>() <= kMost;
}

bool is_positive(const Json& value) {
  return value.is_number() && std::isfinite(value.get<double>()) && value.get<double>() > 0;
}

}  // namespace

ConfigKeys::ConfigKeys(const Json& object, std::string path)
    : object_(object), path_(std::move(path)) {
  if (!object_.is_object())
    fail(ExitCode::kInput, "config.json: {} is {}, expected an object",
         path_.empty() ? "the whole file" : path_.substr(0, path_.size() - 1), shown(object_));
}

void ConfigKeys::refuse(const std::string& key, const std::string& expected) const {
  fail(ExitCode::kInput, "config.json: {} is {}, expected {}", label(key), shown(object_.at(key)),
       expected);
}

bool ConfigKeys::has(const std::string& key) const {
  const auto found = object_.find(key);
  return found != object_.end() && !found->is_null();
}

const Json& ConfigKeys::value(const std::string& key) const {
  if (!has(key)) fail(ExitCode::kInput, "config.json: the key {} is missing", label(key));
  return object_.at(key);
}

int64_t ConfigKeys::size(const std::string& key) const {
  if (!is_whole(value(key), 1)) refuse(key, "a positive whole number below 2^31");
  return value(key).get<int64_t>();
}

int64_t ConfigKeys::count(const std::string& key) const {
  if (!is_whole(value(key), 0)) refuse(key, "a whole number from 0 to 2^31 - 1");
  return value(key).get<int64_t>();
}

double ConfigKeys::positive(const std::string& key) const {
  if (!is_positive(value(key))) refuse(key, "a positive number");
  return value(key).get<double>();
}

std::string ConfigKeys::text(const std::string& key) const {
  if (!value(key).is_string()) refuse(key, "a string");
  return value(key).get<std::string>();
}

std::vector<double> ConfigKeys::positives(const std::string& key) const {
  const Json& list = value(key);
  if (!list.is_array()) refuse(key, "a list of positive numbers");
  std::vector<double> numbers;
  for (const Json& item : list) {
    if (!is_positive(item)) refuse(key, "a list of positive numbers");
    numbers.push_back(item.get<double>());
  }
  return numbers;
}

std::vector<std::string> ConfigKeys::texts(const std::string& key) const {
  const Json& list = value(key);
  if (!list.is_array()) refuse(key, "a list of strings");
  std::vector<std::string> items;
  for (const Json& item : list) {
    if (!item.is_string()) refuse(key, "a list of strings");
    items.push_back(item.get<std::string>());
  }
  return items;
}

ConfigKeys ConfigKeys::object(const std::string& key) const {
  return ConfigKeys(value(key), label(key) + ".");
}

int64_t ConfigKeys::size_or(const std::string& key, int64_t fallback) const {
  return has(key) ? size(key) : fallback;
}

int64_t ConfigKeys::size_or_off(const std::string& key, int64_t fallback) const {
  return size_or(key, object_.contains(key) ? 0 : fallback);
}

double ConfigKeys::positive_or(const std::string& key, double fallback) const {
  return has(key) ? positive(key) : fallback;
}

bool ConfigKeys::flag_or(const std::string& key, bool fallback) const {
  if (!has(key)) return fallback;
  if (!value(key).is_boolean()) refuse(key, "true or false");
  return value(key).get<bool>();
}

std::string ConfigKeys::text_or(const std::string& key, const std::string& fallback) const {
  return has(key) ? text(key) : fallback;
}

}  // namespace bitmill
