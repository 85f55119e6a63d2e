// Config files, command lines, rules: what is taken, in which order, and the sentence that refuses
// the rest.
#include "core/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <sstream>

#include "core/error.h"
#include "core/options_table.h"
#include "support/paths.h"

namespace bitmill {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

const std::vector<std::string> kCommands{"plan", "quantize", "eval", "inspect", "verify", "doctor"};

CommandLine parse(std::vector<std::string> arguments) {
  std::vector<const char*> argv{"bitmill"};
  for (const std::string& argument : arguments) argv.push_back(argument.c_str());
  return parse_command_line(static_cast<int>(argv.size()), argv.data(), kCommands,
                            {"inspect", "verify"});
}

RunOptions quantize(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "quantize");
  return parse(arguments).options;
}

// The text of the usage error; empty when there is none.
std::string refusal(std::vector<std::string> arguments) {
  try {
    parse(std::move(arguments));
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage) << error.what();
    return error.what();
  }
  return "";
}

class ConfigFile {
 public:
  explicit ConfigFile(const std::string& text) { std::ofstream(path()) << text; }
  std::string path() const { return directory_.file("test.cfg"); }

 private:
  testing::TemporaryDirectory directory_;
};

// ---- files and precedence ----

TEST(Options, DefaultsNeedNoFile) {
  const CommandLine line = parse({"quantize"});
  EXPECT_EQ(line.command, "quantize");
  EXPECT_TRUE(line.config_file.empty());
  EXPECT_EQ(line.options.quantize.bits, 4);
  EXPECT_EQ(effective_config(line.options, false), effective_config(RunOptions{}, false));
}

TEST(Options, FileSetsAndCommandLineReplaces) {
  const ConfigFile file(
      "# a comment\n[model]\npath = /data/model  # trailing comment\n"
      "[quantize]\nbits=3\ngroup_size = -1\nsymmetric=off\n\n[output]\nshard_size=2GiB\n");
  const RunOptions plain = quantize({file.path()});
  EXPECT_EQ(plain.model.path, "/data/model");
  EXPECT_EQ(plain.quantize.bits, 3);
  EXPECT_EQ(plain.quantize.group_size, -1);
  EXPECT_FALSE(plain.quantize.symmetric);
  EXPECT_EQ(plain.output.shard_size, int64_t{2} << 30);

  const RunOptions over =
      quantize({"--quantize.bits=8", file.path(), "--quantize.group_size", "64"});
  EXPECT_EQ(over.quantize.bits, 8);
  EXPECT_EQ(over.quantize.group_size, 64);
  EXPECT_FALSE(over.quantize.symmetric) << "untouched keys stay the file's";
}

TEST(Options, BothSpellingsAlsoForNegativeValues) {
  EXPECT_EQ(quantize({"--quantize.group_size", "-1"}).quantize.group_size, -1);
  EXPECT_EQ(quantize({"--quantize.group_size=-1"}).quantize.group_size, -1);
  EXPECT_EQ(quantize({"--output.path", "-out"}).output.path, "-out");
  EXPECT_EQ(quantize({"--output.path=a=b"}).output.path, "a=b");
}

TEST(Options, EveryBooleanSpelling) {
  for (const char* yes : {"true", "1", "yes", "on"})
    EXPECT_TRUE(quantize({"--quantize.mse", yes}).quantize.mse) << yes;
  for (const char* no : {"false", "0", "no", "off"})
    EXPECT_FALSE(quantize({"--quantize.symmetric", no}).quantize.symmetric) << no;
}

TEST(Options, EmptyValueClearsAFilesValue) {
  const ConfigFile file("[evaluate]\nreference=float\n");
  EXPECT_EQ(quantize({file.path()}).evaluate.reference, "float");
  EXPECT_EQ(quantize({file.path(), "--evaluate.reference="}).evaluate.reference, "");
}

TEST(Options, WindowsLineEndsAreFine) {
  const ConfigFile file("[quantize]\r\nbits=2\r\n");
  EXPECT_EQ(quantize({file.path()}).quantize.bits, 2);
}

// ---- refusals ----

TEST(Options, UnknownKeyNamesFileAndNearestKey) {
  const ConfigFile file("[quantize]\ngroupsize=128\n");
  EXPECT_THAT(refusal({"quantize", file.path()}),
              AllOf(HasSubstr(file.path()), HasSubstr("'quantize.groupsize'"),
                    HasSubstr("'quantize.group_size'")));
  const ConfigFile unknown("[hessians]\narchive=DIR\n");
  EXPECT_THAT(refusal({"quantize", unknown.path()}), HasSubstr("unknown key 'hessians.archive'"));
  const ConfigFile bare("bits=3\n");
  EXPECT_THAT(refusal({"quantize", bare.path()}), HasSubstr("'quantize.bits'"));
  EXPECT_THAT(refusal({"quantize", "--quantise.bits=3"}), HasSubstr("'--quantize.bits'"));
  EXPECT_THAT(refusal({"quantize", "--bits=3"}), HasSubstr("'--quantize.bits'"));
  EXPECT_THAT(refusal({"verify", "DIR", "--stric"}), HasSubstr("'--strict'"));
}

TEST(Options, AbbreviationsAndShortOptionsAreOff) {
  EXPECT_THAT(refusal({"quantize", "--quantize.bit=3"}), HasSubstr("unknown option"));
  EXPECT_THAT(refusal({"quantize", "--js", "x"}), HasSubstr("'--json'"));
  EXPECT_THAT(refusal({"quantize", "-h"}), HasSubstr("'-h'"));
}

TEST(Options, RuleOnlyNamesAreNoKeys) {
  EXPECT_THAT(refusal({"quantize", "--quantize.skip=true"}), HasSubstr("unknown option"));
}

TEST(Options, RepeatsAreRefused) {
  EXPECT_THAT(refusal({"quantize", "--quantize.bits=3", "--quantize.bits", "4"}),
              AllOf(HasSubstr("quantize.bits"), HasSubstr("twice")));
  EXPECT_THAT(refusal({"quantize", "--json=a", "--json=b"}), HasSubstr("--json is given twice"));
  const ConfigFile file("[quantize]\nbits=3\nbits=4\n");
  EXPECT_THAT(refusal({"quantize", file.path()}), HasSubstr("quantize.bits is given twice"));
}

TEST(Options, BrokenFiles) {
  const ConfigFile file("[quantize]\nthis is no assignment\n");
  EXPECT_THAT(refusal({"quantize", file.path()}),
              AllOf(HasSubstr(file.path()), HasSubstr("this is no assignment")));
  EXPECT_THAT(refusal({"quantize", "/nonexistent/x.cfg"}),
              AllOf(HasSubstr("/nonexistent/x.cfg"), HasSubstr("No such file")));
  const testing::TemporaryDirectory directory;
  EXPECT_THAT(refusal({"quantize", directory.path()}), HasSubstr("is a directory"));
}

struct BadValue {
  const char* key;
  const char* value;
  const char* expected;  // part of the sentence
};

class RefusedValue : public ::testing::TestWithParam<BadValue> {};

TEST_P(RefusedValue, NamesKeyValueAndWhatIsAllowed) {
  const BadValue& bad = GetParam();
  const std::string argument = std::string("--") + bad.key + "=" + bad.value;
  EXPECT_THAT(refusal({"quantize", argument}),
              AllOf(HasSubstr(std::string(bad.key) + ":"),
                    HasSubstr(std::string("'") + bad.value + "'"), HasSubstr(bad.expected)));
}

INSTANTIATE_TEST_SUITE_P(
    Classes, RefusedValue,
    ::testing::Values(
        BadValue{"quantize.bits", "1", "from 2 to 8"},
        BadValue{"quantize.bits", "9", "from 2 to 8"},
        BadValue{"quantize.bits", "4x", "from 2 to 8"}, BadValue{"quantize.bits", "4.0", "integer"},
        BadValue{"quantize.bits", "", "integer"}, BadValue{"quantize.bits", " 4", "integer"},
        BadValue{"quantize.group_size", "0", "-1 or an integer >= 1"},
        BadValue{"quantize.group_size", "-2", "-1 or an integer >= 1"},
        BadValue{"quantize.block_size", "0", ">= 1"},
        BadValue{"quantize.block_size", "99999999999999999999", ">= 1"},
        BadValue{"quantize.damp", "-0.1", ">= 0"}, BadValue{"quantize.damp", "nan", ">= 0"},
        BadValue{"quantize.damp", "0,01", ">= 0"}, BadValue{"quantize.damp_step", "1", "> 1"},
        BadValue{"quantize.damp_max", "0.001", "at least quantize.damp (0.002)"},
        BadValue{"quantize.damp_max", "inf", "number"},
        BadValue{"quantize.symmetric", "True", "true or false"},
        BadValue{"quantize.on_failed", "skip", "rtn or fail"},
        BadValue{"quantize.act_order", "yes", "expected none or static or dynamic"},
        BadValue{"quantize.lm_head", "Yes please", "true or false"},
        BadValue{"quantize.untie", "2", "true or false"},
        BadValue{"quantize.min_expert_tokens", "-1", ">= 0"},
        BadValue{"quantize.algorithm", "", "an algorithm"},
        BadValue{"calibration.samples", "-1", "from 0 to 100000000"},
        BadValue{"calibration.samples", "100000001", "from 0 to 100000000"},
        BadValue{"calibration.sequence_length", "100000001", "from 0 to 100000000"},
        BadValue{"propagation.mode", "half", "quantized or full"},
        BadValue{"output.shard_size", "0", "above 0"},
        BadValue{"output.shard_size", "5 GB", "a size such as"},
        BadValue{"output.shard_size", "-5GB", "a size such as"},
        BadValue{"run.backend", "gpu", "auto or cpu or cuda"},
        BadValue{"run.transport", "tcp", "auto or mpi or nccl"},
        BadValue{"run.stage_width", "0", "auto or an integer >= 1"},
        BadValue{"run.resume", "must", "resuming is not in this version"},
        BadValue{"run.compute", "float16", "auto or float32 or bfloat16"},
        BadValue{"run.reduction_lanes", "0", "1 to 4096"},
        BadValue{"run.reduction_lanes", "4097", "1 to 4096"},
        BadValue{"run.microbatch_tokens", "0", ">= 1"}, BadValue{"run.threads", "0", "auto or"},
        BadValue{"run.device_memory", "0", "auto or a size"},
        BadValue{"run.device_memory", "lots", "a size such as"},
        BadValue{"run.max_time", "90", "a time such as"},
        BadValue{"run.checkpoint", "0 blocks", "N blocks"},
        BadValue{"run.checkpoint", "3 rocks", "N blocks"},
        BadValue{"run.watchdog", "0s", "above 0"},
        BadValue{"run.share_gpu", "maybe", "true or false"},
        BadValue{"run.max_time", "2h", "not in this version; expected empty"},
        BadValue{"run.checkpoint", "off", "not in this version; expected 60s"},
        BadValue{"run.checkpoint", "3 blocks", "not in this version; expected 60s"},
        BadValue{"run.watchdog", "1h", "not in this version; expected 300s"},
        BadValue{"run.share_gpu", "on", "not in this version; expected false"},
        BadValue{"run.break_lock", "true", "not in this version; expected false"},
        BadValue{"run.verify_input", "slow", "fast or full"}));

TEST(Options, BadValueInAFileNamesTheFile) {
  const ConfigFile file("[quantize]\nbits=five\n");
  EXPECT_THAT(refusal({"quantize", file.path()}),
              AllOf(HasSubstr(file.path()), HasSubstr("quantize.bits: found 'five'")));
}

TEST(Options, ValuesThatAreOnOffer) {
  const RunOptions o =
      quantize({"--quantize.damp=0", "--run.stage_width=1", "--run.resume=never",
                "--run.checkpoint=60s", "--run.device_memory=80GB", "--run.max_time=",
                "--run.share_gpu=no", "--calibration.samples=100000000", "--run.threads=2",
                "--run.watchdog=5m", "--run.compute=bfloat16", "--quantize.act_order=dynamic",
                "--output.format=anything", "--evaluate.reference="});
  EXPECT_EQ(o.quantize.damp, 0);
  EXPECT_EQ(o.run.checkpoint, "60s");
  EXPECT_EQ(o.calibration.samples, 100'000'000);
  EXPECT_EQ(o.run.watchdog, 300);
  EXPECT_EQ(o.run.compute, Compute::kBFloat16);
  EXPECT_EQ(o.quantize.act_order, ActOrder::kDynamic);
  EXPECT_EQ(o.output.format, "anything");
}

// ---- commands ----

TEST(Options, ExtraOptionsBelongToTheirCommands) {
  EXPECT_EQ(parse({"plan", "--ranks", "8", "--ranks_per_node=4"}).options.extra.ranks, 8);
  EXPECT_EQ(parse({"eval", "--dump-logits", "f"}).options.extra.dump_logits, "f");
  EXPECT_EQ(parse({"inspect", "DIR", "--tensor=a.weight"}).options.extra.tensor, "a.weight");
  const CommandLine verify =
      parse({"verify", "DIR", "--strict", "--against", "SRC", "--json", "j"});
  EXPECT_EQ(verify.directory, "DIR");
  EXPECT_TRUE(verify.options.extra.strict);
  EXPECT_EQ(verify.options.extra.against, "SRC");
  EXPECT_EQ(verify.options.extra.json, "j");
  EXPECT_THAT(refusal({"quantize", "--strict"}),
              AllOf(HasSubstr("--strict"), HasSubstr("'verify'"), HasSubstr("'quantize'")));
  EXPECT_THAT(refusal({"plan", "--ranks=0"}), HasSubstr("--ranks: found '0'"));
  EXPECT_EQ(parse({"plan", "--ranks=1000000"}).options.extra.ranks, 1'000'000);
  for (const char* option : {"--ranks", "--ranks_per_node"})
    EXPECT_THAT(refusal({"plan", option, "1000001"}),
                AllOf(HasSubstr(option), HasSubstr("from 1 to 1000000")));
  EXPECT_THAT(refusal({"verify", "DIR", "--strict=yes"}), HasSubstr("takes no value"));
  EXPECT_THAT(refusal({"quantize", "--json"}), HasSubstr("--json needs a value"));
  EXPECT_THAT(refusal({"quantize", "--json", "--quantize.bits=3"}),
              HasSubstr("--json needs a value"));
}

TEST(Options, CommandsAndPositionals) {
  EXPECT_TRUE(parse({}).command.empty());
  EXPECT_TRUE(parse({"--help"}).help);
  EXPECT_TRUE(parse({"--version"}).version);
  EXPECT_TRUE(parse({"quantize", "missing.cfg", "--help"}).help);
  EXPECT_THAT(refusal({"quantise"}), HasSubstr("nearest known one is 'quantize'"));
  EXPECT_THAT(refusal({"verify"}), HasSubstr("needs a directory"));
  EXPECT_THAT(refusal({"verify", "a", "b"}),
              AllOf(HasSubstr("takes one directory"), HasSubstr("'b'")));
  EXPECT_THAT(refusal({"quantize", "a", "b"}), HasSubstr("takes one config file"));
}

// ---- rules ----

TEST(Rules, FirstMatchWinsAndMatchesTheWholeName) {
  const RunOptions o = quantize({"--quantize.bits=4", "--quantize.damp=0.05",
                                 R"(--quantize.rule=model\.layers\.0\..* bits=8 group_size=-1)",
                                 "--quantize.rule", R"(.*\.down_proj  bits=3	symmetric=false)",
                                 "--quantize.rule=down_proj skip=true"});
  const QuantizeSettings first = o.settings_for("model.layers.0.mlp.down_proj");
  EXPECT_EQ(first.bits, 8);
  EXPECT_EQ(first.group_size, -1);
  EXPECT_TRUE(first.symmetric) << "later rules add nothing";
  EXPECT_EQ(first.damp, 0.05) << "keys not given come from [quantize]";
  const QuantizeSettings second = o.settings_for("model.layers.1.mlp.down_proj");
  EXPECT_EQ(second.bits, 3);
  EXPECT_FALSE(second.symmetric);
  EXPECT_EQ(o.settings_for("model.layers.1.mlp.down_proj.x").bits, 4) << "the whole name";
  EXPECT_FALSE(second.skip);
  EXPECT_TRUE(o.settings_for("down_proj").skip);
}

TEST(Rules, CommandLineComesBeforeTheFile) {
  const ConfigFile file("[quantize]\nbits=2\nrule=a bits=5\nrule=b bits=5\nrule=.* bits=6\n");
  const RunOptions o =
      quantize({file.path(), "--quantize.rule=a bits=7", "--quantize.rule=a bits=8"});
  ASSERT_EQ(o.quantize.rules.size(), 5u);
  EXPECT_EQ(o.settings_for("a").bits, 7);
  EXPECT_EQ(o.settings_for("b").bits, 5);
  EXPECT_EQ(o.settings_for("c").bits, 6);
}

TEST(Rules, ARuleWithoutKeysShieldsFromLaterOnes) {
  const RunOptions o = quantize({"--quantize.rule=a", "--quantize.rule=.* bits=8"});
  EXPECT_EQ(o.settings_for("a").bits, 4);
  EXPECT_EQ(o.settings_for("b").bits, 8);
}

TEST(Rules, EveryKeyOfTheSettings) {
  const RunOptions o =
      quantize({"--quantize.rule=a algorithm=rtn bits=2 group_size=32 symmetric=0 "
                "act_order=none mse=1 range_search=0 block_size=64 damp=0.5 damp_step=2 damp_max=2 "
                "on_failed=fail skip=yes"});
  const QuantizeSettings s = o.settings_for("a");
  EXPECT_EQ(s.algorithm, "rtn");
  EXPECT_EQ(s.bits, 2);
  EXPECT_EQ(s.group_size, 32);
  EXPECT_FALSE(s.symmetric);
  EXPECT_EQ(s.act_order, ActOrder::kNone);
  EXPECT_TRUE(s.mse);
  EXPECT_FALSE(s.range_search);
  EXPECT_EQ(s.block_size, 64);
  EXPECT_EQ(s.damp, 0.5);
  EXPECT_EQ(s.damp_step, 2);
  EXPECT_EQ(s.damp_max, 2);
  EXPECT_EQ(s.on_failed, OnFailed::kFail);
  EXPECT_TRUE(s.skip);
}

TEST(Rules, RefusalsNameTheRule) {
  const auto rule = [](const std::string& text) {
    return refusal({"quantize", "--quantize.rule=" + text});
  };
  EXPECT_THAT(rule("a bits=9"), AllOf(HasSubstr("'a bits=9'"), HasSubstr("bits: found '9'")));
  EXPECT_THAT(rule("( bits=3"), HasSubstr("no ECMAScript regex"));
  EXPECT_THAT(rule("a bit=3"), AllOf(HasSubstr("'bit'"), HasSubstr("'bits'")));
  EXPECT_THAT(rule("a lm_head=true"), HasSubstr("unknown key 'lm_head'"));
  EXPECT_THAT(rule("a 8"), HasSubstr("expected key=value"));
  EXPECT_THAT(rule("a bits=3 bits=4"), HasSubstr("bits is given twice"));
  EXPECT_THAT(rule("a#b bits=3"), HasSubstr("\\x23"));
  EXPECT_THAT(rule("  "), HasSubstr("expected REGEX"));
  EXPECT_THAT(rule("a damp=2"), AllOf(HasSubstr("'a damp=2'"), HasSubstr("quantize.damp_max")));
}

// ---- sizes, times, names ----

TEST(Values, Sizes) {
  EXPECT_EQ(parse_size("1024", "k"), 1024);
  EXPECT_EQ(parse_size("7B", "k"), 7);
  EXPECT_EQ(parse_size("5GB", "k"), 5'000'000'000);
  EXPECT_EQ(parse_size("1.5KB", "k"), 1500);
  EXPECT_EQ(parse_size("16GiB", "k"), int64_t{16} << 30);
  EXPECT_EQ(parse_size("2TiB", "k"), int64_t{2} << 40);
  EXPECT_EQ(parse_size("3TB", "k"), 3'000'000'000'000);
  EXPECT_EQ(parse_size("4MiB", "k"), 4 << 20);
  EXPECT_EQ(parse_size("4MB", "k"), 4'000'000);
  EXPECT_EQ(parse_size("1KiB", "k"), 1024);
  for (const char* bad : {"", "GB", "5gb", "5G", "1.5", "1..5GB", "99999999TB", "1e3", "+5"})
    EXPECT_THROW(parse_size(bad, "k"), Error) << bad;
}

TEST(Values, Durations) {
  EXPECT_EQ(parse_duration("60s", "k"), 60);
  EXPECT_EQ(parse_duration("0.5s", "k"), 0.5);
  EXPECT_EQ(parse_duration("5m", "k"), 300);
  EXPECT_EQ(parse_duration("2h", "k"), 7200);
  EXPECT_EQ(parse_duration("1:30:00", "k"), 5400);
  EXPECT_EQ(parse_duration("100:00:09", "k"), 360009);
  for (const char* bad :
       {"", "s", "60", "5 m", "-5m", "1:30", "1:60:00", "1:00:60", "1:5:00", "x:00:00", "infs"})
    EXPECT_THROW(parse_duration(bad, "k"), Error) << bad;
}

TEST(Values, NearestName) {
  EXPECT_EQ(nearest_name("gptqq", {"rtn", "gptq"}), "gptq");
  EXPECT_EQ(nearest_name("rnt", {"gptq", "rtn"}), "rtn");
  EXPECT_EQ(nearest_name("x", {}), "");
}

// ---- the table, its echo and its documentation ----

TEST(OptionTable, EveryDefaultIsAValueTheKeyTakes) {
  for (const OptionRow& row : option_table()) {
    RunOptions options;
    if (row.repeatable) continue;
    EXPECT_NO_THROW(row.value.set(options, row.key, row.default_text())) << row.key;
    EXPECT_EQ(effective_config(options, false), effective_config(RunOptions{}, false)) << row.key;
  }
}

TEST(OptionTable, TheEchoIsAConfigFileThatGivesTheSameOptions) {
  const RunOptions o =
      quantize({"--quantize.bits=3", "--output.shard_size=1500", "--quantize.damp=0.013",
                "--quantize.rule=b\\x23 bits=8", "--quantize.rule=.* mse=1",
                "--run.threads=3", "--model.path=/a b/c"});
  const std::string echo = effective_config(o, false);
  EXPECT_THAT(echo, HasSubstr("output.shard_size = 1500B\n"));
  const ConfigFile file(echo);
  EXPECT_EQ(effective_config(quantize({file.path()}), false), echo);
}

TEST(OptionTable, NumericEchoIgnoresPlacesAndMachines) {
  const std::string plain = effective_config(RunOptions{}, true);
  EXPECT_EQ(effective_config(
                quantize({"--model.path=/x", "--output.path=/y", "--run.threads=3",
                          "--run.backend=cpu", "--report.html=false", "--evaluate.after=true",
                          "--run.verify_input=full"}),
                true),
            plain);
  for (const char* change :
       {"--quantize.bits=3", "--quantize.rule=a bits=3", "--run.compute=float32",
        "--run.reduction_lanes=16", "--run.microbatch_tokens=512", "--calibration.samples=64",
        "--output.format=gptq_v2", "--output.shard_size=1MB"})
    EXPECT_NE(effective_config(quantize({change}), true), plain) << change;
}

TEST(OptionTable, HelpListsEveryKeyAndOnlyTheCommandsOptions) {
  std::ostringstream out;
  print_option_help(out, "plan");
  for (const OptionRow& row : option_table())
    EXPECT_THAT(out.str(), HasSubstr("\n  " + row.name())) << row.key;
  EXPECT_THAT(out.str(), AllOf(HasSubstr("--ranks N"), HasSubstr("shard_size = 5GB")));
  EXPECT_THAT(out.str(), ::testing::Not(HasSubstr("--strict")));
  std::istringstream lines(out.str());
  for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 100u) << line;
}

TEST(OptionTable, TheConfigurationPageHasExactlyTheseRows) {
  std::ifstream in(testing::source_path("docs/configuration.md"));
  ASSERT_TRUE(in);
  std::vector<std::string> expected, found;
  for (const OptionRow& row : option_table()) {
    const std::string value = row.default_text();
    expected.push_back(fmt::format("| `{}` | {} | {} | {} | {} |", row.key,
                                   value.empty() ? "" : "`" + value + "`", row.unit,
                                   row.value.allowed, row.help));
  }
  for (std::string line; std::getline(in, line);)
    if (line.starts_with("| `")) found.push_back(line);
  EXPECT_THAT(found, ::testing::ElementsAreArray(expected));
}

}  // namespace
}  // namespace bitmill
