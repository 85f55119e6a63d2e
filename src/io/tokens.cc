#include "io/tokens.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "core/error.h"
#include "io/hdf5.h"
#include "io/json.h"
#include "io/safetensors.h"

namespace bitmill {
namespace {

constexpr const char* kName = "input_ids";
constexpr int64_t kBatchTokens = 1 << 18;  // ids read at a time: 2 MiB of 64-bit integers

// A token file of either kind: its shape and how to read rows of it.
struct Source {
  std::vector<int64_t> dims;
  bool is_signed = true;  // else read_rows fills in uint64_t values
  // Columns [0, columns) of rows [begin, begin + rows).
  std::function<void(int64_t begin, int64_t rows, int64_t columns, int64_t* out)> read_rows;
};

Source open_hdf5(const std::string& path) {
  auto data = std::make_shared<Hdf5Integers>(path, kName);
  return {data->dims(), data->is_signed(),
          [data](int64_t begin, int64_t rows, int64_t columns, int64_t* out) {
            data->read_rows(begin, rows, columns, out);
          }};
}

Source open_safetensors(const std::string& path) {
  const std::vector<TensorEntry> entries = read_safetensors_header(path);
  const auto found = std::find_if(entries.begin(), entries.end(),
                                  [](const TensorEntry& entry) { return entry.name == kName; });
  if (found == entries.end())
    fail(ExitCode::kInput, "{}: has no tensor {}", path, quote_name(kName));
  if (found->dtype != DType::kI32 && found->dtype != DType::kI64)
    fail(ExitCode::kInput, "{}: {} is {}, I32 or I64 is expected", path, kName,
         dtype_name(found->dtype));
  auto file = std::make_shared<RangeReader>(path);
  const auto read_rows = [file, entry = *found](int64_t begin, int64_t rows, int64_t columns,
                                                int64_t* out) {
    const int64_t width = dtype_bits(entry.dtype) / 8;
    std::vector<int32_t> narrow(entry.dtype == DType::kI32 ? static_cast<size_t>(columns) : 0);
    for (int64_t row = 0; row < rows; ++row, out += columns) {
      const int64_t offset = entry.offset + (begin + row) * entry.shape[1] * width;
      file->read(offset, columns * width, narrow.empty() ? static_cast<void*>(out) : narrow.data());
      std::copy(narrow.begin(), narrow.end(), out);
    }
  };
  return {found->shape.dims(), true, read_rows};
}

Source open_source(const std::string& path) {
  const size_t dot = path.rfind('.');
  const std::string extension = dot == std::string::npos ? "" : path.substr(dot);
  if (extension == ".h5" || extension == ".hdf5") return open_hdf5(path);
  if (extension == ".safetensors") return open_safetensors(path);
  fail(ExitCode::kInput, "{}: token files end in .h5, .hdf5 or .safetensors, this one does not",
       path);
}

// What is to be read of `stored` (the file's count of `what`).
int64_t take(int64_t stored, int64_t asked, const char* what, const std::string& path) {
  if (stored == 0) fail(ExitCode::kInput, "{}: {} has no {}", path, kName, what);
  if (asked > stored)
    fail(ExitCode::kInput, "{}: has {} {}, {} asked for", path, stored, what, asked);
  return asked == 0 ? stored : asked;
}

[[noreturn]] void fail_id(const std::string& path, const Source& source, int64_t id, int64_t row,
                          int64_t column, int64_t vocab) {
  const std::string text =
      source.is_signed ? fmt::format("{}", id) : fmt::format("{}", static_cast<uint64_t>(id));
  fail(ExitCode::kInput, "{}: {} holds id {} at [{}, {}], the model's vocabulary has {}", path,
       kName, text, row, column, vocab);
}

Tensor read_source(const std::string& path, int64_t samples, int64_t length, int64_t vocab) {
  const Source source = open_source(path);
  if (source.dims.size() != 2)
    fail(ExitCode::kInput, "{}: {} has shape [{}], [samples, tokens] is expected", path, kName,
         fmt::join(source.dims, ", "));
  const int64_t rows = take(source.dims[0], samples, "samples", path);
  const int64_t columns = take(source.dims[1], length, "tokens per sample", path);
  Tensor out(DType::kI32, {rows, columns});
  const int64_t batch = std::clamp<int64_t>(kBatchTokens / columns, 1, rows);
  std::vector<int64_t> ids(static_cast<size_t>(batch * columns));
  for (int64_t begin = 0; begin < rows; begin += batch) {
    const int64_t count = std::min(batch, rows - begin);
    source.read_rows(begin, count, columns, ids.data());
    int32_t* to = out.as<int32_t>() + begin * columns;
    for (int64_t i = 0; i < count * columns; ++i) {
      const int64_t id = ids[static_cast<size_t>(i)];
      // Unsigned: negative ids and uint64_t ones above the signed range are out of the vocabulary
      // either way.
      if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(vocab))
        fail_id(path, source, id, begin + i / columns, i % columns, vocab);
      to[i] = static_cast<int32_t>(id);
    }
  }
  return out;
}

}  // namespace

Tensor read_token_file(const std::string& path, int64_t samples, int64_t length, int64_t vocab,
                       const std::string& key) {
  BITMILL_CHECK(samples >= 0 && length >= 0 && vocab > 0);
  try {
    return read_source(path, samples, length, vocab);
  } catch (const Error& error) {  // every message here begins with the path
    if (error.code() != ExitCode::kInput) throw;
    throw Error(error.code(), key + "=" + error.what());
  }
}

}  // namespace bitmill
