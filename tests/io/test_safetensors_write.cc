#include <filesystem>

#include "io/expect_error.h"
#include "io/safetensors.h"
#include "support/checkpoint_maker.h"
#include "support/paths.h"

namespace bitmill {
namespace {
using testing::expect_error;
using testing::read_bytes;
using testing::TemporaryDirectory;

// Data of the test lives here; views point into it.
Tensor filled(DType dtype, Shape shape, int first) {
  Tensor tensor(dtype, shape);
  for (int64_t i = 0; i < tensor.bytes(); ++i)
    tensor.as<uint8_t>()[i] = static_cast<uint8_t>(first + i);
  return tensor;
}

TEST(SafetensorsWrite, TheHundredByteExample) {
  const TemporaryDirectory dir;
  const Tensor a = filled(DType::kF16, {2}, 1);
  write_safetensors(dir.file("a.safetensors"), {{"a", a}});
  const std::string expected =
      std::string("\x58\0\0\0\0\0\0\0", 8) +
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}})" +
      "   \x01\x02\x03\x04";
  EXPECT_EQ(expected.size(), 100u);
  EXPECT_EQ(read_bytes(dir.file("a.safetensors")), expected);
  EXPECT_EQ(safetensors_file_bytes({{"a", a}}), 100);
}

TEST(SafetensorsWrite, WideTypesFirstThenNames) {
  const TemporaryDirectory dir;
  const Tensor half = filled(DType::kF16, {3}, 0), word = filled(DType::kI32, {2}, 10),
               full = filled(DType::kF32, {1}, 20), byte = filled(DType::kU8, {5}, 30),
               other = filled(DType::kF16, {1, 2}, 40), empty(DType::kF32, {0, 3}),
               scalar = filled(DType::kF32, {}, 50);
  const std::vector<NamedView> tensors = {{"m.b", half},  {"z", word},  {"y", full},  {"a", byte},
                                          {"m.a", other}, {"x", empty}, {"w", scalar}};
  write_safetensors(dir.file("t.safetensors"), tensors);
  std::map<std::string, std::string> metadata;
  const auto entries = read_safetensors_header(dir.file("t.safetensors"), &metadata);
  std::string order;
  for (const TensorEntry& entry : entries) order += entry.name + " ";
  EXPECT_EQ(order, "w x y z m.a m.b a ");  // F32, I32, F16, U8
  EXPECT_EQ(metadata, (std::map<std::string, std::string>{{"format", "pt"}}));
  const std::string bytes = read_bytes(dir.file("t.safetensors"));
  EXPECT_EQ(static_cast<int64_t>(bytes.size()), safetensors_file_bytes(tensors));
  for (const TensorEntry& entry : entries) {
    EXPECT_EQ(entry.offset % (dtype_bits(entry.dtype) / 8), 0) << entry.name;
    for (const NamedView& tensor : tensors)
      if (tensor.name == entry.name) {
        EXPECT_EQ(tensor.data.dtype, entry.dtype);
        EXPECT_EQ(tensor.data.shape, entry.shape);
        EXPECT_EQ(bytes.substr(static_cast<size_t>(entry.offset), static_cast<size_t>(entry.bytes)),
                  std::string(tensor.data.as<char>(), static_cast<size_t>(tensor.data.bytes())));
      }
  }
}

TEST(SafetensorsWrite, BytesDoNotDependOnTheOrderGiven) {
  const TemporaryDirectory dir;
  const Tensor a = filled(DType::kF16, {2}, 1), b = filled(DType::kF32, {2}, 5),
               c = filled(DType::kF16, {7}, 9);
  write_safetensors(dir.file("1"), {{"a", a}, {"b", b}, {"c", c}});
  write_safetensors(dir.file("2"), {{"c", c}, {"b", b}, {"a", a}});
  EXPECT_EQ(read_bytes(dir.file("1")), read_bytes(dir.file("2")));
}

TEST(SafetensorsWrite, NamesAreEscaped) {
  const TemporaryDirectory dir;
  const Tensor a = filled(DType::kU8, {1}, 1);
  const std::string name = "quote\" back\\slash \n \xc3\xa9";
  write_safetensors(dir.file("t"), {{name, a}});
  EXPECT_EQ(read_safetensors_header(dir.file("t")).at(0).name, name);
}

TEST(SafetensorsWrite, NoTensors) {
  const TemporaryDirectory dir;
  write_safetensors(dir.file("t"), {});
  EXPECT_TRUE(read_safetensors_header(dir.file("t")).empty());
}

TEST(SafetensorsWrite, DuplicateNamesAreADefect) {
  const TemporaryDirectory dir;
  const Tensor a = filled(DType::kU8, {1}, 1), b = filled(DType::kF32, {1}, 1);
  expect_error(
      [&] {
        write_safetensors(dir.file("t"), {{"a", a}, {"a", b}});
      },
      ExitCode::kInternal, {"\"a\""});
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

TEST(SafetensorsStream, EqualsTheWholeWriter) {
  const TemporaryDirectory dir;
  const Tensor a = filled(DType::kF16, {100}, 1), b = filled(DType::kF32, {33}, 5);
  write_safetensors(dir.file("whole"), {{"a", a}, {"b", b}});
  std::vector<NamedView> specs = {{"a", a}, {"b", b}};
  for (NamedView& spec : specs) spec.data.data = nullptr;
  {
    SafetensorsStream stream(dir.file("stream"), specs);
    ASSERT_EQ(stream.order().size(), 2u);
    EXPECT_EQ(stream.order()[0].name, "b");
    stream.append(b.data(), 100);
    stream.append(b.as<char>() + 100, b.bytes() - 100);
    stream.append(a.data(), a.bytes());
    EXPECT_FALSE(std::filesystem::exists(dir.file("stream")));
    stream.commit();
  }
  EXPECT_EQ(read_bytes(dir.file("whole")), read_bytes(dir.file("stream")));
}

TEST(SafetensorsStream, CountsItsBytes) {
  const TemporaryDirectory dir;
  const Tensor a = filled(DType::kF16, {4}, 1);
  {
    SafetensorsStream stream(dir.file("short"), {{"a", a}});
    stream.append(a.data(), 6);
    expect_error([&] { stream.commit(); }, ExitCode::kInternal, {"internal error"});
    expect_error([&] { stream.append(a.data(), 3); }, ExitCode::kInternal, {"internal error"});
  }
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

TEST(SafetensorsWrite, RewritingARealCheckpointGivesItsBytes) {
  // The demo model was written by the format's own library.
  const std::string path = testing::source_path("configs/demo/model/model.safetensors");
  const std::string bytes = read_bytes(path);
  const TemporaryDirectory dir;
  std::vector<NamedView> tensors;
  for (const TensorEntry& entry : read_safetensors_header(path))
    tensors.push_back(
        {entry.name, {const_cast<char*>(bytes.data()) + entry.offset, entry.dtype, entry.shape}});
  write_safetensors(dir.file("again"), tensors);
  EXPECT_EQ(read_bytes(dir.file("again")), bytes);
}

}  // namespace
}  // namespace bitmill
