// Every way a header can lie, each refused with exit code 3 and a sentence that names the thing.
#include <fcntl.h>
#include <sys/stat.h>

#include <filesystem>

#include "io/expect_error.h"
#include "io/safetensors.h"
#include "support/checkpoint_maker.h"
#include "support/paths.h"

namespace bitmill {
namespace {
using testing::expect_input_error;
using testing::safetensors_bytes;
using testing::TemporaryDirectory;
using testing::write_bytes;

// Reads a file of these bytes.
std::vector<TensorEntry> read_file(const std::string& bytes,
                                   std::map<std::string, std::string>* metadata = nullptr) {
  const TemporaryDirectory dir;
  write_bytes(dir.file("t.safetensors"), bytes);
  return read_safetensors_header(dir.file("t.safetensors"), metadata);
}

void expect_refused(const std::string& bytes, std::vector<std::string> names) {
  names.push_back("t.safetensors: ");
  expect_input_error([&] { read_file(bytes); }, names);
}

void expect_header_refused(const std::string& header, int64_t buffer_bytes,
                           const std::vector<std::string>& names) {
  SCOPED_TRACE(header);
  expect_refused(safetensors_bytes(header, std::string(static_cast<size_t>(buffer_bytes), 'x')),
                 names);
}

// One entry "w" with these fields.
std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"w":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets +
         "}}";
}

TEST(SafetensorsRead, FindsTensorsInOffsetOrder) {
  std::map<std::string, std::string> metadata;
  const std::string header =
      R"({"b":{"dtype":"F32","shape":[],"data_offsets":[4,8]},"__metadata__":)"
      R"({"format":"pt","x":""},)"
      R"("a":{"shape":[2],"data_offsets":[0,4],"dtype":"F16"}})";
  const auto entries = read_file(safetensors_bytes(header, "12345678"), &metadata);
  ASSERT_EQ(entries.size(), 2u);
  EXPECT_EQ(entries[0].name, "a");
  EXPECT_EQ(entries[0].dtype, DType::kF16);
  EXPECT_EQ(entries[0].shape, Shape({2}));
  EXPECT_EQ(entries[0].offset, static_cast<int64_t>(8 + header.size()));
  EXPECT_EQ(entries[1].name, "b");
  EXPECT_EQ(entries[1].shape.rank(), 0);
  EXPECT_EQ(entries[1].bytes, 4);
  EXPECT_EQ(metadata, (std::map<std::string, std::string>{{"format", "pt"}, {"x", ""}}));
}

TEST(SafetensorsRead, BlanksAtTheEndAndEmptyFilesAreFine) {
  EXPECT_EQ(read_file(safetensors_bytes("{}", "")).size(), 0u);
  EXPECT_EQ(read_file(safetensors_bytes("{\n} \x20  ", "")).size(), 0u);
  EXPECT_EQ(read_file(safetensors_bytes(R"({"__metadata__":{}})", "")).size(), 0u);
}

TEST(SafetensorsRead, EmptyTensorsTileExactly) {
  // Three empty tensors around one of 4 bytes; two of them share an offset.
  const std::string header = R"({"e":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},)"
                             R"("f":{"dtype":"F32","shape":[2,0],"data_offsets":[0,0]},)"
                             R"("w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                             R"("z":{"dtype":"U8","shape":[0,7],"data_offsets":[4,4]}})";
  EXPECT_EQ(read_file(safetensors_bytes(header, "1234")).size(), 4u);
  // One inside another tensor, and one behind the buffer.
  expect_header_refused(R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                        R"("e":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}})",
                        4, {"\"e\"", "begins at byte 2", "byte 4 was expected"});
  expect_header_refused(R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                        R"("e":{"dtype":"U8","shape":[0],"data_offsets":[8,8]}})",
                        4, {"\"e\"", "a hole"});
}

TEST(SafetensorsRead, LengthPrefix) {
  expect_refused("", {"has 0 bytes", "at least 8"});
  expect_refused("1234567", {"has 7 bytes"});
  const auto with_length = [](uint64_t length) {
    return std::string(reinterpret_cast<const char*>(&length), 8) + "{}";
  };
  expect_refused(with_length(0), {"does not start with '{'"});
  expect_refused(with_length(3), {"header length 3 is beyond the file", "2 bytes after it"});
  expect_refused(with_length(99'999'999), {"header length 99999999 is beyond the file"});
  expect_refused(with_length(100'000'001), {"header length 100000001", "limit of 100000000"});
  expect_refused(with_length(~uint64_t{0}), {"header length 18446744073709551615"});
}

TEST(SafetensorsRead, TruncatedOrTrailing) {
  const std::string good =
      safetensors_bytes(entry("F32", "[250]", "[0,1000]"), std::string(1000, 'x'));
  EXPECT_EQ(read_file(good).size(), 1u);
  expect_refused(good.substr(0, good.size() - 1),
                 {"header says 1000 bytes of tensors, the file has 999"});
  expect_refused(good + "y", {"header says 1000 bytes of tensors, the file has 1001"});
}

TEST(SafetensorsRead, TextThatIsNotAHeader) {
  expect_header_refused("[]", 0, {"does not start with '{'"});
  expect_header_refused(" {}", 0, {"does not start with '{'"});
  expect_header_refused("\xef\xbb\xbf{}", 0, {"does not start with '{'"});
  expect_header_refused("{}\n", 0, {"does not end with '}' and blanks"});
  expect_header_refused("{}x}", 0, {"not valid JSON at byte"});
  expect_header_refused(std::string("{}\0", 3), 0, {"does not end with '}'"});
  expect_header_refused("{", 0, {"does not end with '}'"});
  expect_header_refused("{\"a}", 0, {"not valid JSON at byte"});
  expect_header_refused(std::string("{}\0{}", 5), 0, {"not valid JSON at byte 11", "NUL"});
  expect_header_refused(R"({"a)"
                        "\xff"
                        R"(":1})",
                        0, {"not valid JSON at byte"});
  expect_header_refused(R"({"a":1})", 0, {"\"a\"", "the number 1"});
  expect_header_refused(R"({"a":[]})", 0, {"\"a\"", "an array"});
  expect_header_refused(R"({"a":null})", 0, {"\"a\"", "null"});
  expect_header_refused(R"({"a":)" + std::string(100'000, '[') + "}", 0, {"\"a\"", "an array"});
  expect_header_refused(R"({"__metadata__":{"a":1}})", 0,
                        {"__metadata__", "\"a\"", "the number 1"});
  expect_header_refused(R"({"__metadata__":"x"})", 0, {"__metadata__", "the string"});
  expect_header_refused(R"({"__metadata__":{"a":{}}})", 0, {"__metadata__", "an object"});
}

TEST(SafetensorsRead, DuplicateNames) {
  const std::string w = R"("w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  expect_header_refused("{" + w + "," + w + "}", 0, {"duplicate tensor name \"w\"", "at byte"});
  expect_header_refused(R"({"w":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0,
                        {"\"w\"", "duplicate field \"dtype\""});
  expect_header_refused(R"({"__metadata__":{"k":"1","k":"2"}})", 0, {"duplicate key \"k\""});
  expect_header_refused(R"({"__metadata__":{},"__metadata__":{}})", 0,
                        {"duplicate", "__metadata__"});
}

TEST(SafetensorsRead, FieldsOfAnEntry) {
  expect_header_refused(R"({"w":{}})", 0, {"\"w\" has no dtype"});
  expect_header_refused(R"({"w":{"dtype":"U8","shape":[0]}})", 0, {"\"w\" has no data_offsets"});
  expect_header_refused(R"({"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":1}})", 0,
                        {"\"w\" has unknown field \"x\""});
  expect_header_refused(R"({"w":{"dtype":1,"shape":[0],"data_offsets":[0,0]}})", 0,
                        {"\"w\"", "the number 1"});
  expect_header_refused(R"({"w":{"dtype":"U8","shape":"x","data_offsets":[0,0]}})", 0,
                        {"\"w\"", "the string"});
  expect_header_refused(entry("Q5", "[1]", "[0,1]"), 1, {"\"w\" has unknown dtype \"Q5\""});
  expect_header_refused(entry("f32", "[1]", "[0,4]"), 4, {"\"w\" has unknown dtype \"f32\""});
  expect_header_refused(entry("U8", "[1]", "[0]"), 1, {"\"w\" has 1 data_offsets"});
  expect_header_refused(entry("U8", "[1]", "[0,1,1]"), 1, {"\"w\"", "third data offset"});
  expect_header_refused(entry("U8", "[[1]]", "[0,1]"), 1, {"\"w\"", "an array"});
  expect_header_refused(entry("U8", "[1,1,1,1,1]", "[0,1]"), 1,
                        {"\"w\" has more than 4 dimensions"});
  expect_header_refused(R"({"a\u0000b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0,
                        {"NUL character", "a\\u0000b"});
}

TEST(SafetensorsRead, NumbersAreWholeAndNotNegative) {
  for (const std::string bad : {"-1", "-0", "1.0", "1e0", "1e3", "true", "null", "\"1\"",
                                "281474976710656", "18446744073709551616"}) {
    expect_header_refused(entry("U8", "[" + bad + "]", "[0,1]"), 1, {"\"w\""});
    expect_header_refused(entry("U8", "[1]", "[0," + bad + "]"), 1, {"\"w\""});
  }
  expect_header_refused(entry("U8", "[01]", "[0,1]"), 1, {"not valid JSON"});
  expect_header_refused(entry("U8", "[1e400]", "[0,1]"), 1, {"not valid JSON", "1e400"});
}

TEST(SafetensorsRead, BytesMustFollowFromDtypeAndShape) {
  expect_header_refused(entry("F32", "[2,3]", "[0,23]"), 23,
                        {"\"w\" is F32 [2, 3]", "needs 24 bytes", "hold 23"});
  expect_header_refused(entry("F16", "[]", "[0,4]"), 4, {"\"w\"", "needs 2 bytes"});
  expect_header_refused(entry("F32", "[0]", "[0,4]"), 4, {"\"w\"", "needs 0 bytes"});
  expect_header_refused(entry("U8", "[4]", "[4,0]"), 4, {"\"w\"", "reversed data_offsets [4, 0]"});
  EXPECT_EQ(read_file(safetensors_bytes(entry("F4", "[2,3]", "[0,3]"), "123")).size(), 1u);
  EXPECT_EQ(read_file(safetensors_bytes(entry("F6_E2M3", "[4]", "[0,3]"), "123")).size(), 1u);
  expect_header_refused(entry("F4", "[3]", "[0,1]"), 1, {"\"w\" has 12 bits, not a whole number"});
}

TEST(SafetensorsRead, SizesThatOverflow) {
  // The product wraps 2^64 and would come out small.
  expect_header_refused(entry("U8", "[4194305,4194305,211106198978564]", "[0,4]"), 4,
                        {"\"w\"", "overflows"});
  expect_header_refused(entry("F64", "[281474976710655,65536]", "[0,8]"), 8,
                        {"\"w\"", "overflows"});
  // A zero hides nothing, wherever it stands.
  expect_header_refused(entry("U8", "[281474976710655,281474976710655,0]", "[0,0]"), 0,
                        {"overflows"});
  expect_header_refused(entry("U8", "[0,281474976710655,281474976710655]", "[0,0]"), 0,
                        {"overflows"});
}

TEST(SafetensorsRead, OverlapsHolesAndTheEnd) {
  const auto two = [](const std::string& a, const std::string& b) {
    return R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)" + a +
           R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)" + b + "}}";
  };
  EXPECT_EQ(read_file(safetensors_bytes(two("[4,8]", "[0,4]"), "12345678")).size(), 2u);
  expect_header_refused(two("[0,4]", "[3,7]"), 8,
                        {"\"b\" begins at byte 3", "byte 4 was expected (an overlap)"});
  expect_header_refused(two("[0,4]", "[0,4]"), 8, {"\"b\" begins at byte 0", "an overlap"});
  expect_header_refused(two("[0,4]", "[5,9]"), 9, {"\"b\" begins at byte 5", "a hole"});
  expect_header_refused(two("[1,5]", "[5,9]"), 9,
                        {"\"a\" begins at byte 1", "byte 0 was expected"});
  expect_header_refused(two("[0,4]", "[4,8]"), 7,
                        {"header says 8 bytes of tensors, the file has 7"});
  expect_header_refused(two("[0,4]", "[281474976710000,281474976710004]"), 8,
                        {"\"b\" begins at byte 281474976710000"});
}

TEST(SafetensorsRead, HostileNamesStayOnOneLine) {
  expect_header_refused(R"({"a\nb":{"dtype":"?","shape":[0],"data_offsets":[0,0]}})", 0, {"a\\nb"});
  const std::string message = testing::error_of(
      [] { read_file(safetensors_bytes("{\"" + std::string(100'000, 'n') + "\":1}", "")); },
      ExitCode::kInput);
  EXPECT_LT(message.size(), 400u);
}

TEST(SafetensorsRead, OnlyRegularFiles) {
  const TemporaryDirectory dir;
  expect_input_error([&] { read_safetensors_header(dir.file("none")); },
                     {"/none", "No such file or directory"});
  expect_input_error([&] { read_safetensors_header(dir.path()); }, {"not a regular file"});
  ASSERT_EQ(mkfifo(dir.file("pipe").c_str(), 0666), 0);
  expect_input_error([&] { read_safetensors_header(dir.file("pipe")); },
                     {"/pipe: not a regular file"});
}

TEST(RangeReader, ReadsExactlyAndNoticesAShortFile) {
  const TemporaryDirectory dir;
  write_bytes(dir.file("f"), "0123456789");
  RangeReader first(dir.file("f"));
  const RangeReader reader(std::move(first));
  EXPECT_EQ(reader.file_bytes(), 10);
  std::string out(4, '?');
  reader.read(3, 4, out.data());
  EXPECT_EQ(out, "3456");
  reader.read(10, 0, out.data());
  expect_input_error([&] { reader.read(8, 4, out.data()); }, {"/f: ends at byte 10", "up to 12"});
  std::filesystem::resize_file(dir.file("f"), 5);  // truncated while open
  expect_input_error([&] { reader.read(3, 4, out.data()); }, {"/f: ends at byte 5"});
}

}  // namespace
}  // namespace bitmill
