#include "io/checkpoint.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <filesystem>
#include <set>

#include "core/options.h"
#include "io/json.h"

namespace bitmill {
namespace {

constexpr const char* kIndexName = "model.safetensors.index.json";
constexpr const char* kSingleName = "model.safetensors";
constexpr size_t kShownNames = 10;  // missing tensors listed in a message

void require_directory(const std::string& directory) {
  struct stat status;
  if (::stat(directory.c_str(), &status) != 0) {
    if (errno == ENOENT) fail(ExitCode::kInput, "{}: no such directory", directory);
    fail(ExitCode::kInput, "{}: cannot open: {}", directory, std::strerror(errno));
  }
  if (!S_ISDIR(status.st_mode)) fail(ExitCode::kInput, "{}: not a directory", directory);
}

// ../../blobs/HEX: how a Hugging Face cache snapshot points at its files.
bool is_cache_link(const std::string& target) {
  constexpr std::string_view kPrefix = "../../blobs/";
  return target.starts_with(kPrefix) && target.size() > kPrefix.size() &&
         target.find_first_not_of("0123456789abcdef", kPrefix.size()) == std::string::npos;
}

}  // namespace

bool has_member(const std::string& directory, const std::string& name) {
  std::string path = directory + "/" + name;
  struct stat status;
  if (::lstat(path.c_str(), &status) != 0) {
    if (errno == ENOENT) return false;
    fail(ExitCode::kInput, "{}: cannot open: {}", path, std::strerror(errno));
  }
  if (S_ISLNK(status.st_mode)) {
    char target[PATH_MAX];
    const ssize_t length = ::readlink(path.c_str(), target, sizeof target);
    if (length < 0)
      fail(ExitCode::kInput, "{}: cannot read the link: {}", path, std::strerror(errno));
    const std::string to(target, static_cast<size_t>(length));
    if (!is_cache_link(to))
      fail(ExitCode::kInput,
           "{}: links to {}, only links to ../../blobs/HEX of a Hugging Face cache are followed",
           path, quote_name(to));
    const std::string blob = directory + "/" + to;
    if (::lstat(blob.c_str(), &status) != 0)
      fail(ExitCode::kInput, "{}: links to {}, which is not there", path, quote_name(to));
  }
  if (!S_ISREG(status.st_mode)) fail(ExitCode::kInput, "{}: not a regular file", path);
  return true;
}

namespace {

bool is_plain_name(const std::string& name) {
  constexpr std::string_view kSuffix = ".safetensors";
  return name.size() > kSuffix.size() && name.ends_with(kSuffix) &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') ||
                  c == '.' || c == '_' || c == '-';
         });
}

using WeightMap = std::map<std::string, std::string>;  // tensor -> file

// Shard names in sorted order.
std::vector<std::string> files_of(const WeightMap& weight_map) {
  std::set<std::string> names;
  for (const auto& [tensor, file] : weight_map) names.insert(file);
  return {names.begin(), names.end()};
}

// The index promises, the headers hold: both must say the same. Engines load every tensor of a
// named shard, so one that the index leaves out would be loaded there and ignored here.
void check_against_index(const std::string& directory, const WeightMap& weight_map,
                         const std::map<std::string, TensorEntry>& tensors,
                         const std::vector<std::string>& files) {
  for (const auto& [name, entry] : tensors) {
    const auto promised = weight_map.find(name);
    const std::string& file = files[static_cast<size_t>(entry.file)];
    if (promised == weight_map.end())
      fail(ExitCode::kInput, "{}/{}: holds tensor {}, which {} does not name", directory, file,
           quote_name(name), kIndexName);
    if (promised->second != file)
      fail(ExitCode::kInput, "{}/{}: says tensor {} is in {}, it is in {}", directory, kIndexName,
           quote_name(name), promised->second, file);
  }
  std::vector<std::string> missing;
  for (const auto& [name, file] : weight_map)
    if (!tensors.contains(name)) missing.push_back(fmt::format("{} of {}", quote_name(name), file));
  if (missing.empty()) return;
  const size_t shown = std::min(missing.size(), kShownNames);
  fail(ExitCode::kInput, "{}/{}: names {} tensors that their files do not hold: {}{}", directory,
       kIndexName, missing.size(), fmt::join(missing.begin(), missing.begin() + shown, ", "),
       shown < missing.size() ? ", ..." : "");
}

}  // namespace

std::map<std::string, std::string> read_weight_map(const Json& index, const std::string& where) {
  if (!index.is_object() || !index.contains("weight_map"))
    fail(ExitCode::kInput, "{}: has no \"weight_map\"", where);
  const Json& map = index["weight_map"];
  if (!map.is_object())
    fail(ExitCode::kInput, "{}: \"weight_map\" is of type {}, an object is expected", where,
         map.type_name());
  if (map.empty()) fail(ExitCode::kInput, "{}: \"weight_map\" names no tensors", where);
  WeightMap out;
  for (const auto& [name, file] : map.items()) {
    if (!file.is_string())
      fail(ExitCode::kInput, "{}: the file of tensor {} is of type {}, a string is expected", where,
           quote_name(name), file.type_name());
    const std::string& text = file.get_ref<const std::string&>();
    if (!is_plain_name(text))
      fail(ExitCode::kInput,
           "{}: the file of tensor {} is {}, a plain name like model-00001-of-00002.safetensors is "
           "expected",
           where, quote_name(name), quote_name(text));
    out[name] = text;
  }
  return out;
}

Checkpoint Checkpoint::open(const std::string& directory) {
  require_directory(directory);
  Checkpoint checkpoint;
  checkpoint.directory_ = directory;
  WeightMap weight_map;
  const bool indexed = has_member(directory, kIndexName);
  if (indexed) {
    const std::string index = directory + "/" + kIndexName;
    weight_map = read_weight_map(read_json(index), index);
    checkpoint.files_ = files_of(weight_map);
  } else if (has_member(directory, kSingleName)) {
    checkpoint.files_ = {kSingleName};
  } else {
    fail(ExitCode::kInput, "{}: holds neither {} nor {}", directory, kIndexName, kSingleName);
  }
  for (size_t i = 0; i < checkpoint.files_.size(); ++i) {
    const std::string& file = checkpoint.files_[i];
    if (!has_member(directory, file))
      fail(ExitCode::kInput, "{}/{}: names {}, which is not there", directory, kIndexName,
           quote_name(file));
    for (TensorEntry& entry : read_safetensors_header(directory + "/" + file)) {
      entry.file = static_cast<int>(i);
      const auto [at, is_new] = checkpoint.tensors_.try_emplace(entry.name, entry);
      if (!is_new)
        fail(ExitCode::kInput, "{}: tensor {} is in {} and in {}", directory,
             quote_name(entry.name), checkpoint.files_[static_cast<size_t>(at->second.file)], file);
    }
  }
  if (indexed) check_against_index(directory, weight_map, checkpoint.tensors_, checkpoint.files_);
  return checkpoint;
}

// {"files": [...], "tensors": {name: [dtype, file, offset, bytes, dim, ...]}} '\n' DIRECTORY. The
// path stands outside the JSON because it may be any bytes.
namespace {

// Bytes of a file, -1 when it cannot be looked at.
int64_t size_of(const std::string& path) {
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  return error ? -1 : static_cast<int64_t>(size);
}

}  // namespace

std::string Checkpoint::directory_text() const {
  Json tensors = Json::object();
  for (const auto& [name, entry] : tensors_) {
    Json row = {dtype_name(entry.dtype), entry.file, entry.offset, entry.bytes};
    for (const int64_t dim : entry.shape.dims()) row.push_back(dim);
    tensors[name] = std::move(row);
  }
  std::vector<int64_t> sizes;
  for (const std::string& file : files_) sizes.push_back(size_of(directory_ + "/" + file));
  return Json{{"files", files_}, {"sizes", sizes}, {"tensors", std::move(tensors)}}.dump() + '\n' + directory_;
}

void Checkpoint::check_same(const std::string& text, bool headers) {
  const size_t line_end = text.find('\n');
  BITMILL_CHECK(line_end != std::string::npos);
  const std::string directory = text.substr(line_end + 1);
  const Json json = parse_json(text.substr(0, line_end), "checkpoint directory text");
  for (size_t i = 0; i < json.at("files").size(); ++i) {
    const std::string path = directory + "/" + json.at("files")[i].get<std::string>();
    const int64_t expected = json.at("sizes")[i], found = size_of(path);
    if (found != expected)
      fail(ExitCode::kInput, "{}: {} on this host, {} bytes on rank 0's: all ranks must see the same files", path,
           found < 0 ? "missing" : fmt::format("{} bytes", found), expected);
  }
  if (headers && open(directory).directory_text() != text)
    fail(ExitCode::kInput, "{}: the headers of its files are not those that rank 0 sees: all ranks must see the same files",
         directory);
}

Checkpoint Checkpoint::from_text(const std::string& text) {
  const size_t line_end = text.find('\n');
  BITMILL_CHECK(line_end != std::string::npos);
  const Json json = parse_json(text.substr(0, line_end), "checkpoint directory text");
  Checkpoint checkpoint;
  checkpoint.directory_ = text.substr(line_end + 1);
  checkpoint.files_ = json.at("files").get<std::vector<std::string>>();
  for (const auto& [name, row] : json.at("tensors").items()) {
    const std::optional<DType> dtype = dtype_from_name(row.at(0).get<std::string>());
    BITMILL_CHECK(dtype.has_value());
    std::vector<int64_t> dims;
    for (size_t i = 4; i < row.size(); ++i) dims.push_back(row[i].get<int64_t>());
    checkpoint.tensors_[name] = {name,
                                 *dtype,
                                 Shape(dims),
                                 row.at(2).get<int64_t>(),
                                 row.at(3).get<int64_t>(),
                                 row.at(1).get<int>()};
  }
  return checkpoint;
}

const TensorEntry* Checkpoint::find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

const TensorEntry& Checkpoint::at(const std::string& name) const {
  if (const TensorEntry* entry = find(name)) return *entry;
  std::vector<std::string> names;
  for (const auto& [present, entry] : tensors_) names.push_back(present);
  const std::string nearest = names.empty() ? std::string() : nearest_name(name, names);
  fail(ExitCode::kInput, "{}: tensor {} is missing{}", directory_, quote_name(name),
       nearest.empty() ? std::string() : fmt::format(" (nearest: {})", quote_name(nearest)));
}

const RangeReader& Checkpoint::reader(int file) const {
  std::lock_guard lock(readers_->mutex);
  auto found = readers_->open.find(file);
  if (found == readers_->open.end())
    found = readers_->open
                .emplace(file, RangeReader(directory_ + "/" + files_.at(static_cast<size_t>(file))))
                .first;
  return found->second;
}

Tensor Checkpoint::read(const std::string& name) const {
  const TensorEntry& entry = at(name);
  const RangeReader& file = reader(entry.file);  // a missing file is told before memory is asked for
  Tensor tensor(entry.dtype, entry.shape);
  readers_->ahead.read(file, entry.offset, entry.bytes, tensor.data());
  return tensor;
}

void Checkpoint::read_bytes(const TensorEntry& entry, int64_t begin, int64_t end, void* out) const {
  BITMILL_CHECK(0 <= begin && begin <= end && end <= entry.bytes);
  readers_->ahead.read(reader(entry.file), entry.offset + begin, end - begin, out);
}

int64_t Checkpoint::row_bytes(const TensorEntry& entry) const {
  const int64_t rows = std::max<int64_t>(entry.shape[0], 1);
  if (entry.bytes % rows != 0)
    fail(ExitCode::kInput, "{}: rows of tensor {} ({} {}) are not whole bytes", directory_,
         quote_name(entry.name), dtype_name(entry.dtype), entry.shape.text());
  return entry.bytes / rows;
}

void Checkpoint::prefetch(const std::vector<Rows>& rows, int64_t limit_bytes) const {
  std::vector<ReadAhead::Range> ranges;
  for (const Rows& wanted : rows) {
    const TensorEntry* entry = find(wanted.name);
    if (entry == nullptr) continue;
    BITMILL_CHECK(entry->shape.rank() >= 1 && 0 <= wanted.begin && wanted.begin <= wanted.end &&
                  wanted.end <= entry->shape[0]);
    try {
      const int64_t bytes = row_bytes(*entry);
      ranges.push_back({&reader(entry->file), entry->offset + wanted.begin * bytes,
                        (wanted.end - wanted.begin) * bytes});
    } catch (const Error&) {
      // A file that is not there: the read that wants it says so.
    }
  }
  readers_->ahead.request(ranges, limit_bytes);
}

void Checkpoint::forget_prefetched() const { readers_->ahead.forget(); }

void Checkpoint::wait_prefetched() const { readers_->ahead.wait_idle(); }

int64_t Checkpoint::prefetched_bytes() const { return readers_->ahead.taken_bytes(); }

Tensor Checkpoint::read_rows(const std::string& name, int64_t begin, int64_t end) const {
  const TensorEntry& entry = at(name);
  BITMILL_CHECK(entry.shape.rank() >= 1 && 0 <= begin && begin <= end && end <= entry.shape[0]);
  const int64_t bytes = row_bytes(entry);
  std::vector<int64_t> dims = entry.shape.dims();
  dims[0] = end - begin;
  Tensor tensor(entry.dtype, Shape(dims));
  read_bytes(entry, begin * bytes, end * bytes, tensor.data());
  return tensor;
}

int64_t Checkpoint::total_bytes() const {
  int64_t bytes = 0;
  for (const auto& [name, entry] : tensors_) bytes += entry.bytes;
  return bytes;
}

Json read_model_config(const std::string& directory) {
  require_directory(directory);
  if (!has_member(directory, "config.json"))
    fail(ExitCode::kInput, "{}: holds no config.json", directory);
  const std::string path = directory + "/config.json";
  Json config = read_json(path);
  if (!config.is_object())
    fail(ExitCode::kInput, "{}: is of type {}, an object is expected", path, config.type_name());
  return config;
}

}  // namespace bitmill
