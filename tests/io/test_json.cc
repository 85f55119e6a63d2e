#include "io/json.h"

#include "io/expect_error.h"
#include "support/checkpoint_maker.h"
#include "support/paths.h"

namespace bitmill {
namespace {
using testing::expect_input_error;
using testing::TemporaryDirectory;

void expect_refused(const std::string& text, const std::vector<std::string>& names) {
  std::vector<std::string> all = names;
  all.push_back("some.json: ");
  expect_input_error([&] { parse_json(text, "some.json"); }, all);
}

TEST(Json, BuildsTheSameTreeAsTheLibrary) {
  const std::string text =
      R"( {"b": [1, -2, 2.5, true, null, "x\u00e9", [], {}], "a": {"b": {"c": [[1], [2]]}},)"
      R"( "big": 18446744073709551615, "": "empty key"} )";
  EXPECT_EQ(parse_json(text, "some.json"), Json::parse(text));
  EXPECT_EQ(parse_json("7", "some.json"), Json(7));
  EXPECT_EQ(parse_json("\"s\"", "some.json"), Json("s"));
}

TEST(Json, RefusesDuplicateKeysAtAnyDepth) {
  expect_refused(R"({"a": 1, "a": 2})", {"duplicate key \"a\"", "at byte 12"});
  expect_refused(R"([{"x": {"y": 1, "y": 1}}])", {"duplicate key \"y\""});
  // Escapes are resolved first: "\u0061" is "a".
  expect_refused(R"({"a": 1, "\u0061": 2})", {"duplicate key \"a\""});
  // The same key in different objects is fine.
  EXPECT_NO_THROW(parse_json(R"([{"a": {"a": 1}}, {"a": 2}])", "some.json"));
}

TEST(Json, RefusesDeepNesting) {
  EXPECT_NO_THROW(parse_json(std::string(64, '[') + std::string(64, ']'), "some.json"));
  expect_refused(std::string(65, '[') + std::string(65, ']'), {"deeper than 64", "at byte 65"});
  expect_refused(std::string(1'000'000, '['), {"deeper than 64"});
}

TEST(Json, RefusesWhatIsNotJson) {
  expect_refused("", {"not valid JSON", "at byte"});
  expect_refused("{\"a\": 1} x", {"not valid JSON at byte 10"});
  expect_refused("{\"a\": 1", {"not valid JSON"});
  expect_refused("{'a': 1}", {"not valid JSON at byte 2"});
  expect_refused("[1, 2,]", {"not valid JSON at byte 7"});
  expect_refused("[NaN]", {"not valid JSON"});
  expect_refused("[1] // comment", {"not valid JSON"});
  expect_refused("\"\xff\"", {"not valid JSON at byte 2"});
  expect_refused("[1e999]", {"not valid JSON"});
  expect_refused(std::string("[1]\0", 4), {"not valid JSON at byte 4"});
  expect_refused(std::string("[1]\0[2]", 7), {"not valid JSON at byte 4"});
  expect_refused(std::string("\0", 1), {"not valid JSON at byte 1"});
}

TEST(Json, ReadsWholeFilesUpToALimit) {
  const TemporaryDirectory dir;
  testing::write_bytes(dir.file("a.json"), "[1, 2, 3]");
  EXPECT_EQ(read_json(dir.file("a.json"), 9), Json::parse("[1,2,3]"));
  expect_input_error([&] { read_json(dir.file("a.json"), 8); }, {"a.json: has 9 bytes, at most 8"});
  expect_input_error([&] { read_json(dir.file("b.json")); }, {"b.json", "No such file"});
  expect_input_error([&] { read_json(dir.path()); }, {dir.path(), "not a regular file"});
}

TEST(Json, NamesAreShownEscapedAndShort) {
  EXPECT_EQ(quote_name("a\nb"), "\"a\\nb\"");
  EXPECT_EQ(quote_name(std::string(500, 'x')), "\"" + std::string(120, 'x') + "...\"");
  EXPECT_NO_THROW(quote_name("\xff\xfe"));
}

}  // namespace
}  // namespace bitmill
