#include "core/options.h"

#include <regex>
#include <fmt/ranges.h>

#include <algorithm>
#include <boost/program_options/options_description.hpp>
#include <boost/program_options/parsers.hpp>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <numeric>
#include <ostream>
#include <set>
#include <span>
#include <sstream>
#include <utility>

#include "core/error.h"
#include "core/options_table.h"

namespace bitmill {
namespace {

// ---- options that belong to one command ----

struct ExtraOption {
  std::string name;                   // without "--"
  std::string value;                  // "FILE"; empty: a switch
  std::vector<std::string> commands;  // that take it; empty: all
  std::string help;
  void (*set)(CommandLine&, const std::string& name, const std::string& value);
};

int parse_rank_count(const std::string& name, const std::string& value) {
  constexpr int kMost = 1'000'000;
  int count = 0;
  const char* end = value.data() + value.size();
  const auto [stop, error] = std::from_chars(value.data(), end, count);
  if (error != std::errc() || stop != end || count < 1 || count > kMost)
    fail(ExitCode::kUsage, "--{}: found '{}', expected an integer from 1 to {}", name, value,
         kMost);
  return count;
}

const std::vector<ExtraOption>& extra_options() {
  using Line = CommandLine;
  using Text = const std::string&;
  static const std::vector<ExtraOption> table{
      {"json",
       "FILE",
       {},
       "write the result as JSON",
       [](Line& line, Text, Text value) { line.options.extra.json = value; }},
      {"dump-logits",
       "FILE",
       {"eval"},
       "write float32 logits [samples, tokens, vocab] as safetensors",
       [](Line& line, Text, Text value) { line.options.extra.dump_logits = value; }},
      {"against",
       "SRC",
       {"verify"},
       "compare with this source checkpoint",
       [](Line& line, Text, Text value) { line.options.extra.against = value; }},
      {"strict",
       "",
       {"verify"},
       "warnings of the load check fail",
       [](Line& line, Text, Text) { line.options.extra.strict = true; }},
      {"tensor",
       "NAME",
       {"inspect"},
       "print a few codes of one tensor",
       [](Line& line, Text, Text value) { line.options.extra.tensor = value; }},
      {"ranks",
       "N",
       {"plan"},
       "plan for this many ranks instead of those running",
       [](Line& line, Text name, Text value) {
         line.options.extra.ranks = parse_rank_count(name, value);
       }},
      {"ranks_per_node",
       "N",
       {"plan"},
       "of them on each node",
       [](Line& line, Text name, Text value) {
         line.options.extra.ranks_per_node = parse_rank_count(name, value);
       }},
      {"benchmark",
       "",
       {"doctor"},
       "measure the rates of [machine], a few seconds",
       [](Line& line, Text, Text) { line.options.extra.benchmark = true; }},
      {"help", "", {}, "this text", [](Line& line, Text, Text) { line.help = true; }},
      {"version",
       "",
       {},
       "version of the program",
       [](Line& line, Text, Text) { line.version = true; }},
  };
  return table;
}

bool takes(const std::string& command, const ExtraOption& option) {
  return option.commands.empty() || std::ranges::count(option.commands, command) > 0;
}

// ---- names ----

size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i + 1);
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t replaced = diagonal + (a[i] != b[j]);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, diagonal + 1});
    }
  }
  return row.back();
}

const OptionRow* find_row(const std::string& key) {
  for (const OptionRow& row : option_table())
    if (row.key == key && row.scope != OptionScope::kRule) return &row;
  return nullptr;
}

// The key a mistyped one was meant to be. Without a section ("bits") names are compared without it.
std::string nearest_key(const std::string& word) {
  const bool bare = word.find('.') == std::string::npos;
  std::vector<std::string> keys, names;
  for (const OptionRow& row : option_table()) {
    if (row.scope == OptionScope::kRule) continue;
    keys.push_back(row.key);
    names.push_back(row.name());
  }
  if (!bare) return nearest_name(word, keys);
  const std::string name = nearest_name(word, names);
  return keys[std::ranges::find(names, name) - names.begin()];
}

// ---- sources of settings ----

struct Given {
  std::string key;
  std::string value;
};

// A scalar may be given once per source: two values mean that somebody overlooked one.
void refuse_repeats(std::span<const Given> given) {
  std::set<std::string> seen;
  for (const Given& entry : given) {
    const OptionRow* row = find_row(entry.key);
    if (!seen.insert(entry.key).second && (row == nullptr || !row->repeatable))
      fail(ExitCode::kUsage, "{} is given twice, the second time as '{}'", entry.key, entry.value);
  }
}

void apply(RunOptions& options, std::span<const Given> given, bool repeatable) {
  for (const Given& entry : given) {
    const OptionRow& row = *find_row(entry.key);
    if (row.repeatable == repeatable) row.value.set(options, row.key, entry.value);
  }
}

// Boost reads the INI syntax; keys are checked against our table for a message that names the
// nearest one.
std::vector<Given> read_file_keys(const std::string& file) {
  namespace po = boost::program_options;
  if (std::filesystem::is_directory(file))
    fail(ExitCode::kUsage,
         "{} is a directory, expected a config file (a model is given as --model.path=DIR)", file);
  std::ifstream in(file);
  if (!in) fail(ExitCode::kUsage, "config file {} cannot be read: {}", file, std::strerror(errno));
  std::vector<Given> given;
  try {
    for (const auto& option : po::parse_config_file(in, po::options_description(), true).options)
      given.push_back({option.string_key, option.value.empty() ? "" : option.value.front()});
  } catch (const po::error& error) {
    fail(ExitCode::kUsage, "config file {}: {}", file, error.what());
  }
  return given;
}

void apply_file(RunOptions& options, const std::string& file) {
  const std::vector<Given> given = read_file_keys(file);
  try {
    for (const Given& entry : given)
      if (find_row(entry.key) == nullptr)
        fail(ExitCode::kUsage, "unknown key '{}', the nearest known key is '{}'", entry.key,
             nearest_key(entry.key));
    refuse_repeats(given);
    apply(options, given, true);
    apply(options, given, false);
  } catch (const Error& error) {
    fail(error.code(), "config file {}: {}", file, error.what());
  }
}

// ---- command line ----

const ExtraOption* find_extra(const std::string& command, const std::string& name) {
  for (const ExtraOption& option : extra_options()) {
    if (option.name != name) continue;
    if (!takes(command, option))
      fail(ExitCode::kUsage, "--{} belongs to '{}', not to '{}'", name,
           fmt::join(option.commands, "', '"), command);
    return &option;
  }
  return nullptr;
}

[[noreturn]] void refuse_unknown(const std::string& command, const std::string& name) {
  std::string nearest = nearest_key(name);
  // A bare word like "bits" means quantize.bits unless an option of the command is as near.
  if (name.find('.') == std::string::npos) {
    std::vector<std::string> candidates;
    for (const ExtraOption& option : extra_options())
      if (takes(command, option)) candidates.push_back(option.name);
    candidates.push_back(nearest.substr(nearest.find('.') + 1));
    const std::string best = nearest_name(name, candidates);
    if (best != candidates.back()) nearest = best;
  }
  fail(ExitCode::kUsage, "unknown option '--{}', the nearest known one is '--{}'", name, nearest);
}

// The arguments after the command, one at a time.
class ArgumentReader {
 public:
  ArgumentReader(CommandLine& line, std::vector<std::string> arguments)
      : line_(line), arguments_(std::move(arguments)) {}

  void read() {
    while (at_ < arguments_.size()) {
      const std::string argument = arguments_[at_++];
      if (argument.starts_with("--"))
        read_option(argument.substr(2));
      else if (argument.size() > 1 && argument[0] == '-')
        fail(ExitCode::kUsage,
             "found '{}', but options are written in full, as --section.key=value", argument);
      else
        positionals_.push_back(argument);
    }
  }

  const std::vector<std::string>& positionals() const { return positionals_; }
  const std::vector<Given>& keys() const { return keys_; }

 private:
  void read_option(const std::string& option) {
    const size_t equals = option.find('=');
    const std::string name = option.substr(0, equals);
    const bool has_value = equals != std::string::npos;
    const std::string value = has_value ? option.substr(equals + 1) : "";
    if (const ExtraOption* extra = find_extra(line_.command, name)) {
      if (!extra_names_.insert(name).second) fail(ExitCode::kUsage, "--{} is given twice", name);
      if (extra->value.empty() && has_value)
        fail(ExitCode::kUsage, "--{} takes no value, found '{}'", name, value);
      const std::string given = extra->value.empty() || has_value ? value : next(name);
      if (!extra->value.empty() && given.empty())
        fail(ExitCode::kUsage, "--{}: found nothing, expected {}", name, extra->value);
      return extra->set(line_, name, given);
    }
    if (find_row(name) == nullptr) refuse_unknown(line_.command, name);
    keys_.push_back({name, has_value ? value : next(name)});
  }

  std::string next(const std::string& name) {
    if (at_ == arguments_.size() || arguments_[at_].starts_with("--"))
      fail(ExitCode::kUsage, "--{} needs a value, as --{}=VALUE", name, name);
    return arguments_[at_++];
  }

  CommandLine& line_;
  std::vector<std::string> arguments_;
  size_t at_ = 0;
  std::vector<std::string> positionals_;
  std::vector<Given> keys_;
  std::set<std::string> extra_names_;
};

void take_positional(CommandLine& line, const std::vector<std::string>& positionals,
                     bool directory) {
  if (positionals.size() > 1)
    fail(ExitCode::kUsage, "'{}' takes one {}, found also '{}'", line.command,
         directory ? "directory" : "config file", positionals[1]);
  if (directory && positionals.empty())
    fail(ExitCode::kUsage, "'{}' needs a directory, as bitmill {} DIR", line.command, line.command);
  if (!positionals.empty()) (directory ? line.directory : line.config_file) = positionals[0];
}

// ---- rules ----

const OptionRow& rule_row(const std::string& name) {
  std::vector<std::string> names;
  for (const OptionRow& row : option_table()) {
    if (row.scope == OptionScope::kConfig) continue;
    if (row.name() == name) return row;
    names.push_back(row.name());
  }
  fail(ExitCode::kUsage, "unknown key '{}', the nearest known one is '{}'", name,
       nearest_name(name, names));
}

void parse_rule_setting(QuantizeRule& rule, const std::string& token) {
  const size_t equals = token.find('=');
  if (equals == std::string::npos) fail(ExitCode::kUsage, "found '{}', expected key=value", token);
  const std::string name = token.substr(0, equals), value = token.substr(equals + 1);
  const OptionRow& row = rule_row(name);
  RunOptions scratch;
  row.value.set(scratch, name, value);
  for (const auto& [earlier, ignored] : rule.settings)
    if (earlier == name) fail(ExitCode::kUsage, "{} is given twice", name);
  rule.settings.emplace_back(name, value);
}

QuantizeSettings apply_rule(const QuantizeRule& rule, const QuantizeSettings& base) {
  RunOptions scratch;
  static_cast<QuantizeSettings&>(scratch.quantize) = base;
  for (const auto& [name, value] : rule.settings) rule_row(name).value.set(scratch, name, value);
  return scratch.quantize;
}

void check_damping(const QuantizeSettings& settings, const std::string& where) {
  if (settings.damp_max < settings.damp)
    fail(ExitCode::kUsage, "{}quantize.damp_max: found '{}', expected at least quantize.damp ({})",
         where, settings.damp_max, settings.damp);
}

// What no single key can know.
void check_together(const RunOptions& options) {
  check_damping(options.quantize, "");
  for (const QuantizeRule& rule : options.quantize.rules)
    check_damping(apply_rule(rule, options.quantize),
                  fmt::format("quantize.rule '{}': ", rule.text));
}

// ---- help ----

// `left` in a column of its own, `right` wrapped beside it.
void print_entry(std::ostream& out, const std::string& left, const std::string& right) {
  constexpr size_t kColumn = 38, kWidth = 100;
  std::istringstream words(right);
  std::string line = fmt::format("{:<{}}", "  " + left, kColumn), word;
  if (line.size() > kColumn) {
    out << line << '\n';
    line.assign(kColumn, ' ');
  }
  while (words >> word) {
    if (line.size() + 1 + word.size() > kWidth) {
      out << line << '\n';
      line.assign(kColumn, ' ');
    }
    line += ' ' + word;
  }
  out << line << '\n';
}

}  // namespace

QuantizeRule parse_rule(const std::string& text) {
  std::istringstream words(text);
  std::vector<std::string> tokens{std::istream_iterator<std::string>(words), {}};
  if (tokens.empty())
    fail(ExitCode::kUsage, "quantize.rule: found '{}', expected REGEX key=value ...", text);
  QuantizeRule rule;
  rule.text = fmt::format("{}", fmt::join(tokens, " "));
  try {
    // A '#' would start a comment when the echoed settings are read back.
    if (text.find('#') != std::string::npos)
      fail(ExitCode::kUsage, "found '#', which is written as \\x23 in a rule");
    rule.matches = [pattern = std::regex(tokens[0], std::regex::ECMAScript | std::regex::optimize)](
                       const std::string& module) { return std::regex_match(module, pattern); };
    for (const std::string& token : std::span(tokens).subspan(1)) parse_rule_setting(rule, token);
  } catch (const std::regex_error& error) {
    fail(ExitCode::kUsage, "quantize.rule '{}': '{}' is no ECMAScript regex: {}", rule.text,
         tokens[0], error.what());
  } catch (const Error& error) {
    fail(error.code(), "quantize.rule '{}': {}", rule.text, error.what());
  }
  return rule;
}

QuantizeSettings RunOptions::settings_for(const std::string& module) const {
  for (const QuantizeRule& rule : quantize.rules)
    if (rule.matches(module)) return apply_rule(rule, quantize);
  return quantize;
}

std::string nearest_name(const std::string& word, const std::vector<std::string>& candidates) {
  const auto best = std::ranges::min_element(
      candidates, {}, [&](const std::string& name) { return edit_distance(word, name); });
  return best == candidates.end() ? std::string() : *best;
}

CommandLine parse_command_line(int argc, const char* const* argv,
                               const std::vector<std::string>& commands,
                               const std::vector<std::string>& directory_commands) {
  CommandLine line;
  const std::vector<std::string> words(argv + std::min(argc, 1), argv + argc);
  if (words.empty()) return line;
  line.help = std::ranges::count(words, "--help") > 0;
  line.version = std::ranges::count(words, "--version") > 0;
  const std::string& command = words[0];
  if (command == "--help" || command == "--version") return line;
  if (std::ranges::count(commands, command) == 0)
    fail(ExitCode::kUsage, "unknown command '{}', the nearest known one is '{}'", command,
         nearest_name(command, commands));
  line.command = command;
  if (line.help || line.version) return line;

  ArgumentReader reader(line, {words.begin() + 1, words.end()});
  reader.read();
  refuse_repeats(reader.keys());
  take_positional(line, reader.positionals(), std::ranges::count(directory_commands, command) > 0);
  apply(line.options, reader.keys(), true);
  if (!line.config_file.empty()) apply_file(line.options, line.config_file);
  apply(line.options, reader.keys(), false);
  check_together(line.options);
  return line;
}

void print_option_help(std::ostream& out, const std::string& command) {
  const bool directory = command == "inspect" || command == "verify";
  out << fmt::format("usage: bitmill {} {} [--section.key=value ...]\n\nOptions\n",
                     command.empty() ? "COMMAND" : command, directory ? "DIR" : "[CONFIG]");
  for (const ExtraOption& option : extra_options())
    if (command.empty() || takes(command, option))
      print_entry(out, fmt::format("--{} {}", option.name, option.value), option.help);
  out << "\nKeys of the config file, also as --section.key=value (default; unit; allowed)\n";
  std::string section;
  for (const OptionRow& row : option_table()) {
    if (row.section() != section) out << fmt::format("[{}]\n", section = row.section());
    const std::string name = row.name() + (row.scope == OptionScope::kRule ? " (rules only)" : "");
    const std::string unit = row.unit == "-" ? "" : row.unit + "; ";
    print_entry(out, fmt::format("{} = {}", name, row.default_text()),
                fmt::format("{} ({}{})", row.help, unit, row.value.allowed));
  }
}

std::string effective_config(const RunOptions& options, bool numeric_only) {
  std::string text;
  for (const OptionRow& row : option_table()) {
    if (row.scope == OptionScope::kRule || (numeric_only && !row.numeric)) continue;
    const std::string value = row.value.get(options);
    if (row.repeatable && value.empty()) continue;
    std::istringstream lines(value + "\n");
    for (std::string line; std::getline(lines, line);)
      text += fmt::format("{} = {}\n", row.key, line);
  }
  return text;
}

}  // namespace bitmill
