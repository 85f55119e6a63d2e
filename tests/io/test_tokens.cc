// HDF5 files are made here through the C API, without the code under test.
#include "io/tokens.h"

#include <hdf5.h>

#include <cstring>
#include <filesystem>
#include <functional>

#include "io/expect_error.h"
#include "support/checkpoint_maker.h"
#include "support/paths.h"

namespace bitmill {
namespace {
using testing::expect_input_error;
using testing::RawTensor;
using testing::TemporaryDirectory;
using testing::write_bytes;

constexpr const char* kKey = "calibration.tokens";

template <typename T>
std::string raw(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

// A safetensors file with one tensor.
void write_tokens(const std::string& path, const RawTensor& tensor) {
  write_bytes(path, testing::safetensors_bytes({tensor}));
}

// An HDF5 file; `fill` puts things into it.
void write_hdf5(const std::string& path, const std::function<void(hid_t)>& fill) {
  const hid_t file = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  ASSERT_GE(file, 0);
  fill(file);
  H5Fclose(file);
}

void add_dataset(hid_t file, const char* name, hid_t stored, hid_t memory,
                 const std::vector<hsize_t>& dims, const void* data, hid_t creation = H5P_DEFAULT) {
  const hid_t space = H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr);
  const hid_t dataset = H5Dcreate2(file, name, stored, space, H5P_DEFAULT, creation, H5P_DEFAULT);
  ASSERT_GE(dataset, 0);
  if (data != nullptr) {
    EXPECT_GE(H5Dwrite(dataset, memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, data), 0);
  }
  H5Dclose(dataset);
  H5Sclose(space);
}

std::vector<int32_t> values(const Tensor& tensor) {
  EXPECT_EQ(tensor.dtype(), DType::kI32);
  return {tensor.as<int32_t>(), tensor.as<int32_t>() + tensor.elements()};
}

void expect_refused(const std::string& path, int64_t samples, int64_t length, int64_t vocab,
                    const std::vector<std::string>& names) {
  std::vector<std::string> all = names;
  all.push_back(std::string(kKey) + "=" + path + ": ");
  expect_input_error([&] { read_token_file(path, samples, length, vocab, kKey); }, all);
}

TEST(Tokens, SafetensorsOfBothWidths) {
  const TemporaryDirectory dir;
  const std::string path = dir.file("t.safetensors");
  write_tokens(path, {"input_ids", "I32", {2, 3}, raw<int32_t>({0, 1, 2, 3, 4, 5})});
  EXPECT_EQ(values(read_token_file(path, 0, 0, 6, kKey)), (std::vector<int32_t>{0, 1, 2, 3, 4, 5}));
  write_tokens(path, {"input_ids", "I64", {2, 3}, raw<int64_t>({0, 1, 2, 3, 4, 5})});
  const Tensor cut = read_token_file(path, 1, 2, 6, kKey);
  EXPECT_EQ(cut.shape(), Shape({1, 2}));
  EXPECT_EQ(values(cut), (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(values(read_token_file(path, 2, 2, 6, kKey)), (std::vector<int32_t>{0, 1, 3, 4}));
}

TEST(Tokens, Hdf5OfEveryWidth) {
  const TemporaryDirectory dir;
  const int64_t ids[6] = {0, 1, 2, 3, 4, 5};
  for (const hid_t stored :
       {H5T_STD_I32LE, H5T_STD_I32BE, H5T_STD_U32LE, H5T_STD_I64LE, H5T_STD_U64LE, H5T_STD_U64BE}) {
    for (const std::string name : {"t.h5", "t.hdf5"}) {
      const std::string path = dir.file(name);
      write_hdf5(path, [&](hid_t file) {
        add_dataset(file, "input_ids", stored, H5T_NATIVE_INT64, {2, 3}, ids);
      });
      EXPECT_EQ(values(read_token_file(path, 0, 0, 6, kKey)),
                (std::vector<int32_t>{0, 1, 2, 3, 4, 5}));
      EXPECT_EQ(values(read_token_file(path, 2, 2, 6, kKey)), (std::vector<int32_t>{0, 1, 3, 4}));
      EXPECT_EQ(values(read_token_file(path, 1, 0, 6, kKey)), (std::vector<int32_t>{0, 1, 2}));
    }
  }
}

TEST(Tokens, CompressedHdf5InSeveralBatches) {
  const TemporaryDirectory dir;
  constexpr int64_t kRows = 300, kColumns = 1000;  // more ids than are read at a time
  std::vector<int32_t> ids(kRows * kColumns);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * 31 % 997);
  const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
  const hsize_t chunk[2] = {64, 100};
  H5Pset_chunk(creation, 2, chunk);
  H5Pset_deflate(creation, 6);
  write_hdf5(dir.file("t.h5"), [&](hid_t file) {
    add_dataset(file, "input_ids", H5T_STD_I32LE, H5T_NATIVE_INT32, {kRows, kColumns}, ids.data(),
                creation);
  });
  H5Pclose(creation);
  EXPECT_EQ(values(read_token_file(dir.file("t.h5"), 0, 0, 997, kKey)), ids);
  write_tokens(dir.file("t.safetensors"), {"input_ids", "I32", {kRows, kColumns}, raw(ids)});
  EXPECT_EQ(values(read_token_file(dir.file("t.safetensors"), 0, 0, 997, kKey)), ids);
  ids[299 * 1000 + 7] = 997;
  write_tokens(dir.file("t.safetensors"), {"input_ids", "I32", {kRows, kColumns}, raw(ids)});
  expect_refused(dir.file("t.safetensors"), 0, 0, 997,
                 {"id 997 at [299, 7]", "vocabulary has 997"});
  EXPECT_NO_THROW(
      read_token_file(dir.file("t.safetensors"), 299, 0, 997, kKey));  // the row is not looked at
}

TEST(Tokens, DemoFilesAgree) {
  const std::string demo = testing::source_path("configs/demo/calib-demo");
  const Tensor a = read_token_file(demo + ".h5", 0, 0, 1024, kKey);
  const Tensor b = read_token_file(demo + ".safetensors", 0, 0, 1024, kKey);
  EXPECT_EQ(a.shape(), b.shape());
  EXPECT_GT(a.elements(), 1000);
  EXPECT_EQ(values(a), values(b));
}

TEST(TokensBadInput, FilesAndExtensions) {
  const TemporaryDirectory dir;
  expect_refused(dir.file("none.safetensors"), 0, 0, 9, {"No such file"});
  expect_refused(dir.file("none.h5"), 0, 0, 9, {"No such file"});
  expect_refused(dir.file("t.txt"), 0, 0, 9, {".h5, .hdf5 or .safetensors"});
  write_bytes(dir.file("t.h5"), "this is not HDF5");
  expect_refused(dir.file("t.h5"), 0, 0, 9, {"HDF5 signature"});
  write_bytes(dir.file("t.h5"), std::string("\x89HDF\r\n\x1a\n", 8) + std::string(50, 'x'));
  expect_refused(dir.file("t.h5"), 0, 0, 9, {"HDF5 cannot open"});
  write_bytes(dir.file("t.safetensors"), "short");
  expect_refused(dir.file("t.safetensors"), 0, 0, 9, {"has 5 bytes"});
}

TEST(TokensBadInput, TruncatedHdf5) {
  const TemporaryDirectory dir;
  std::filesystem::copy_file(testing::source_path("configs/demo/calib-demo.h5"), dir.file("t.h5"));
  std::filesystem::resize_file(dir.file("t.h5"), 100'000);
  expect_refused(dir.file("t.h5"), 0, 0, 4096, {"cut short"});
}

TEST(TokensBadInput, SafetensorsShapeAndType) {
  const TemporaryDirectory dir;
  const std::string path = dir.file("t.safetensors");
  write_tokens(path, {"tokens", "I32", {1, 1}, raw<int32_t>({0})});
  expect_refused(path, 0, 0, 9, {"has no tensor \"input_ids\""});
  write_tokens(path, {"input_ids", "I32", {2}, raw<int32_t>({0, 1})});
  expect_refused(path, 0, 0, 9, {"input_ids has shape [2]", "[samples, tokens]"});
  write_tokens(path, {"input_ids", "F32", {1, 1}, raw<float>({0})});
  expect_refused(path, 0, 0, 9, {"input_ids is F32", "I32 or I64"});
  write_tokens(path, {"input_ids", "I32", {0, 4}, ""});
  expect_refused(path, 0, 0, 9, {"has no samples"});
  write_tokens(path, {"input_ids", "I32", {4, 0}, ""});
  expect_refused(path, 0, 0, 9, {"has no tokens"});
}

TEST(TokensBadInput, Hdf5ShapeAndType) {
  const TemporaryDirectory dir;
  const std::string path = dir.file("t.h5");
  const int64_t ids[4] = {0, 1, 2, 3};
  const auto with = [&](const char* name, hid_t stored, std::vector<hsize_t> dims) {
    write_hdf5(path,
               [&](hid_t file) { add_dataset(file, name, stored, H5T_NATIVE_INT64, dims, ids); });
  };
  with("tokens", H5T_STD_I32LE, {2, 2});
  expect_refused(path, 0, 0, 9, {"has no dataset \"input_ids\""});
  with("input_ids", H5T_STD_I32LE, {4});
  expect_refused(path, 0, 0, 9, {"shape [4]"});
  with("input_ids", H5T_STD_I32LE, {2, 2, 1});
  expect_refused(path, 0, 0, 9, {"shape [2, 2, 1]"});
  with("input_ids", H5T_STD_I16LE, {2, 2});
  expect_refused(path, 0, 0, 9, {"32- or 64-bit integers"});
  with("input_ids", H5T_IEEE_F32LE, {2, 2});
  expect_refused(path, 0, 0, 9, {"32- or 64-bit integers"});
  write_hdf5(path, [](hid_t file) {
    H5Gclose(H5Gcreate2(file, "input_ids", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
  });
  expect_refused(path, 0, 0, 9, {"not a readable dataset"});
  write_hdf5(path, [](hid_t file) {
    H5Lcreate_external("/etc/other.h5", "input_ids", file, "input_ids", H5P_DEFAULT, H5P_DEFAULT);
  });
  expect_refused(path, 0, 0, 9, {"is a link"});
}

TEST(TokensBadInput, Hdf5ThatReachesOutsideOrClaimsTooMuch) {
  const TemporaryDirectory dir;
  const std::string path = dir.file("t.h5");
  const hid_t external = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_external(external, "/etc/passwd", 0, 16);
  write_hdf5(path, [&](hid_t file) {
    add_dataset(file, "input_ids", H5T_STD_I32LE, H5T_NATIVE_INT32, {2, 2}, nullptr, external);
  });
  H5Pclose(external);
  expect_refused(path, 0, 0, 9, {"stored in other files"});

  const hid_t chunked = H5Pcreate(H5P_DATASET_CREATE);  // nothing is written, so nothing is stored
  const hsize_t chunk[2] = {16, 16};
  H5Pset_chunk(chunked, 2, chunk);
  write_hdf5(path, [&](hid_t file) {
    add_dataset(file, "input_ids", H5T_STD_I32LE, H5T_NATIVE_INT32, {1 << 20, 1 << 20}, nullptr,
                chunked);
  });
  H5Pclose(chunked);
  expect_refused(path, 0, 0, 9, {"claims shape [1048576, 1048576]", "more than a file of"});
}

TEST(TokensBadInput, CountsAndVocabulary) {
  const TemporaryDirectory dir;
  const std::string tokens = dir.file("t.safetensors"), hdf5 = dir.file("t.h5");
  std::vector<int64_t> ids(64 * 20, 7);
  ids[3 * 20 + 17] = 5000;
  write_tokens(tokens, {"input_ids", "I64", {64, 20}, raw(ids)});
  write_hdf5(hdf5, [&](hid_t file) {
    add_dataset(file, "input_ids", H5T_STD_I64LE, H5T_NATIVE_INT64, {64, 20}, ids.data());
  });
  for (const std::string& path : {tokens, hdf5}) {
    expect_refused(path, 128, 0, 9, {"has 64 samples, 128 asked for"});
    expect_refused(path, 0, 21, 9, {"has 20 tokens per sample, 21 asked for"});
    expect_refused(path, 0, 0, 4096,
                   {"input_ids holds id 5000 at [3, 17], the model's vocabulary has 4096"});
    EXPECT_NO_THROW(read_token_file(path, 3, 0, 4096, kKey));
    EXPECT_NO_THROW(read_token_file(path, 0, 17, 4096, kKey));
    EXPECT_NO_THROW(read_token_file(path, 0, 0, 5001, kKey));
  }
}

TEST(TokensBadInput, NegativeAndHugeIds) {
  const TemporaryDirectory dir;
  write_tokens(dir.file("t.safetensors"), {"input_ids", "I32", {1, 2}, raw<int32_t>({0, -1})});
  expect_refused(dir.file("t.safetensors"), 0, 0, 9, {"id -1 at [0, 1]"});
  write_tokens(dir.file("t.safetensors"),
               {"input_ids", "I64", {1, 1}, raw<int64_t>({int64_t{1} << 32})});
  expect_refused(dir.file("t.safetensors"), 0, 0, 9, {"id 4294967296 at [0, 0]"});
  const uint64_t huge = ~uint64_t{0};
  write_hdf5(dir.file("t.h5"), [&](hid_t file) {
    add_dataset(file, "input_ids", H5T_STD_U64LE, H5T_NATIVE_UINT64, {1, 1}, &huge);
  });
  expect_refused(dir.file("t.h5"), 0, 0, 9, {"id 18446744073709551615 at [0, 0]"});
}

}  // namespace
}  // namespace bitmill
