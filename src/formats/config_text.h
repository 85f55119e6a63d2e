// Parts of a quantization_config that several formats write, read or judge.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "formats/format.h"

namespace bitmill {

// ---- writing ----

// The `dynamic` object of GPTQModel and vLLM for what differs from `base`: "-:REGEX" leaves modules
// in float, "+:REGEX" gives them another scheme. Empty when all block linears have `base`.
OrderedJson dynamic_rules(const std::vector<ModuleChoice>& modules, const ModuleChoice& base);
// The `meta` object: who wrote the file, and the settings that no loader reads.
OrderedJson meta_object(const RunOptions::Quantize& settings);

// ---- reading ----

// A member of a quantization_config; Error(kInput) naming the key when it is missing or of another
// type.
int64_t config_integer(const Json& config, const char* key);
bool config_bool(const Json& config, const char* key, bool absent);

// Does the regex match from the start of the name, as the loaders' re.match does? Error(kInput) for
// a regex that cannot be read.
bool starts_match(const std::string& regex, const std::string& module);
// Is `module` the whole of `name` or does it end with ".name"?
bool ends_with_name(const std::string& module, const std::string& name);
// Applies the first matching rule of a `dynamic` object, if there is one.
void apply_dynamic(const Json& config, ModuleChoice& choice);

// Error(kInput) naming `key` and the module when a quantized module's bits are none of `allowed`,
// or its group size is neither -1 nor positive.
void check_configured(const ModuleChoice& choice, const char* bits_key,
                      std::initializer_list<int> allowed);

// ---- judging (OutputFormat::config_violations) ----

void expect_text(const Json& config, const char* key, const std::string& expected,
                 std::vector<std::string>& found);
// Keys without which an engine picks a slower path or refuses.
void expect_integer(const Json& config, const char* key, std::vector<std::string>& found);
void expect_bool(const Json& config, const char* key, std::vector<std::string>& found);
// One sentence per module that is something else on disk than `config` says.
void compare_with_disk(const OutputFormat& format, const Json& config,
                       const std::vector<ModuleChoice>& modules, std::vector<std::string>& found);

}  // namespace bitmill
