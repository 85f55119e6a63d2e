// Header reader, range reader and writer; the layout is drawn in docs/formats/safetensors.md.
#include "io/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <optional>
#include <set>
#include <tuple>
#include <unordered_set>

#include "io/json.h"

namespace bitmill {
namespace {

static_assert(std::endian::native == std::endian::little,
              "tensors are stored little-endian and written as they lie");

constexpr int64_t kLengthBytes = 8;
constexpr int64_t kMaxHeader = 100'000'000;                // the format's own limit
constexpr uint64_t kMaxInteger = (uint64_t{1} << 48) - 1;  // of its schema
constexpr int64_t kMaxCall = 1 << 30;                      // pread() takes just under 2 GiB
constexpr int kMaxRank = 4;

// ---- header
// -------------------------------------------------------------------------------------------------

// Checks the header while it is parsed: no tree is built, so memory follows the number of tensors.
// Data offsets stay relative to the buffer here.
class HeaderReader final : public JsonEvents {
 public:
  explicit HeaderReader(const std::string& path) : JsonEvents(path, kLengthBytes) {}
  std::vector<TensorEntry> entries;
  std::map<std::string, std::string> metadata;

  bool null() override { unexpected("null"); }
  bool boolean(bool) override { unexpected("a boolean"); }
  bool number_integer(number_integer_t value) override {
    unexpected(fmt::format("the negative number {}", value));
  }
  bool number_float(number_float_t, const string_t& text) override {
    unexpected(
        fmt::format("the number {} (whole numbers up to 2^48-1 without exponent are allowed)",
                    quote_name(text)));
  }
  bool binary(binary_t&) override { unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (at_ != At::kShape && at_ != At::kOffsets) unexpected(fmt::format("the number {}", value));
    if (value > kMaxInteger) unexpected(fmt::format("the number {} (above 2^48-1)", value));
    if (at_ == At::kShape && dims_.size() == kMaxRank)
      refuse(fmt::format("tensor {} has more than {} dimensions", quote_name(name_), kMaxRank));
    if (at_ == At::kOffsets && offsets_.size() == 2) unexpected("a third data offset");
    (at_ == At::kShape ? dims_ : offsets_).push_back(static_cast<int64_t>(value));
    return true;
  }

  bool string(string_t& value) override {
    if (at_ == At::kMetadata) {
      metadata[name_] = std::move(value);
    } else if (at_ == At::kEntry && field_ == "dtype") {
      dtype_ = dtype_from_name(value);
      if (!dtype_)
        refuse(fmt::format("tensor {} has unknown dtype {}", quote_name(name_), quote_name(value)));
    } else {
      unexpected("the string " + quote_name(value));
    }
    return true;
  }

  bool start_object(size_t) override {
    if (at_ == At::kNothing) {
      at_ = At::kTop;
    } else if (at_ == At::kTop) {
      at_ = in_metadata_ ? At::kMetadata : At::kEntry;
      dtype_.reset();
      seen_.clear();
      dims_.clear();
      offsets_.clear();
    } else {
      unexpected("an object");
    }
    return true;
  }

  bool key(string_t& name) override {
    if (name.find('\0') != std::string::npos) refuse("NUL character in name " + quote_name(name));
    if (at_ == At::kTop) {
      in_metadata_ = name == "__metadata__";
      name_ = name;
      if (!names_.insert(name).second) refuse("duplicate tensor name " + quote_name(name));
    } else if (at_ == At::kMetadata) {
      name_ = name;
      if (metadata.contains(name)) refuse("duplicate key " + quote_name(name) + " in __metadata__");
    } else {
      if (name != "dtype" && name != "shape" && name != "data_offsets")
        refuse(fmt::format("tensor {} has unknown field {}", quote_name(name_), quote_name(name)));
      if (!seen_.insert(name).second)
        refuse(
            fmt::format("tensor {} has duplicate field {}", quote_name(name_), quote_name(name)));
      field_ = name;
    }
    return true;
  }

  bool start_array(size_t) override {
    if (at_ != At::kEntry || field_ == "dtype") unexpected("an array");
    at_ = field_ == "shape" ? At::kShape : At::kOffsets;
    return true;
  }
  bool end_array() override {
    at_ = At::kEntry;
    return true;
  }

  bool end_object() override {
    if (at_ == At::kEntry) finish_entry();
    at_ = at_ == At::kTop ? At::kNothing : At::kTop;
    return true;
  }

 private:
  enum class At { kNothing, kTop, kMetadata, kEntry, kShape, kOffsets };

  [[noreturn]] void unexpected(const std::string& what) const {
    if (at_ == At::kNothing || name_.empty()) refuse("unexpected " + what + " in the header");
    const char* kind = at_ == At::kMetadata ? "__metadata__ entry" : "tensor";
    refuse(fmt::format("{} {} holds {} where it may not", kind, quote_name(name_), what));
  }

  // Bytes of the current dtype and shape. Zero dimensions count as one for the overflow check, so
  // that the answer does not depend on their place.
  int64_t needed_bytes() const {
    int64_t bits = dtype_bits(*dtype_);
    bool zero = false, overflow = false;
    for (const int64_t dim : dims_) {
      zero |= dim == 0;
      overflow |= __builtin_mul_overflow(bits, std::max<int64_t>(dim, 1), &bits);
    }
    if (overflow)
      refuse(fmt::format("tensor {} has shape [{}], whose size overflows", quote_name(name_),
                         fmt::join(dims_, ", ")));
    if (zero) return 0;
    if (bits % 8 != 0)
      refuse(fmt::format("tensor {} has {} bits, not a whole number of bytes", quote_name(name_),
                         bits));
    return bits / 8;
  }

  void finish_entry() {
    for (const char* field : {"dtype", "shape", "data_offsets"})
      if (!seen_.contains(field))
        refuse(fmt::format("tensor {} has no {}", quote_name(name_), field));
    if (offsets_.size() != 2)
      refuse(fmt::format("tensor {} has {} data_offsets instead of 2", quote_name(name_),
                         offsets_.size()));
    const auto [begin, end] = std::pair(offsets_[0], offsets_[1]);
    if (begin > end)
      refuse(fmt::format("tensor {} has reversed data_offsets [{}, {}]", quote_name(name_), begin,
                         end));
    const int64_t bytes = needed_bytes();
    if (end - begin != bytes)
      refuse(
          fmt::format("tensor {} is {} [{}] and needs {} bytes, its data_offsets [{}, {}] hold {}",
                      quote_name(name_), dtype_name(*dtype_), fmt::join(dims_, ", "), bytes, begin,
                      end, end - begin));
    entries.push_back({name_, *dtype_, Shape(dims_), begin, bytes, 0});
  }

  At at_ = At::kNothing;
  bool in_metadata_ = false;
  std::string name_, field_;
  std::optional<DType> dtype_;
  std::vector<int64_t> dims_, offsets_;
  std::set<std::string> seen_;
  std::unordered_set<std::string> names_;
};

// Sorted by offset (empty tensors before the one that starts at their place), the tensors must
// follow each other without hole or overlap from 0 to the end of the buffer.
void check_tiling(std::vector<TensorEntry>& entries, int64_t buffer_bytes,
                  const std::string& path) {
  std::sort(entries.begin(), entries.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::tie(a.offset, a.bytes, a.name) < std::tie(b.offset, b.bytes, b.name);
  });
  int64_t end = 0;
  for (const TensorEntry& entry : entries) {
    if (entry.offset != end)
      fail(ExitCode::kInput,
           "{}: tensor {} begins at byte {} of the buffer, byte {} was expected ({})", path,
           quote_name(entry.name), entry.offset, end, entry.offset > end ? "a hole" : "an overlap");
    end += entry.bytes;
  }
  if (end != buffer_bytes)
    fail(ExitCode::kInput, "{}: header says {} bytes of tensors, the file has {}", path, end,
         buffer_bytes);
}

// ---- writer
// -------------------------------------------------------------------------------------------------

// The order in which the format's own writer lays tensors out: wide types first, so that each is
// aligned.
void sort_for_file(std::vector<NamedView>& tensors) {
  std::sort(tensors.begin(), tensors.end(), [](const NamedView& a, const NamedView& b) {
    return a.data.dtype != b.data.dtype ? a.data.dtype > b.data.dtype : a.name < b.name;
  });
}

// Length prefix and padded header of tensors in file order.
std::string header_text(const std::vector<NamedView>& sorted) {
  std::unordered_set<std::string_view> names;
  std::string text = R"({"__metadata__":{"format":"pt"})";
  int64_t offset = 0;
  for (const NamedView& tensor : sorted) {
    if (tensor.name == "__metadata__" || !names.insert(tensor.name).second)
      fail(ExitCode::kInternal, "internal error: tensor name {} is reserved or used twice",
           quote_name(tensor.name));
    const int64_t end = offset + tensor.data.bytes();
    text += fmt::format(R"(,{}:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})",
                        Json(tensor.name).dump(), dtype_name(tensor.data.dtype),
                        fmt::join(tensor.data.shape.dims(), ","), offset, end);
    offset = end;
  }
  text += '}';
  text.resize((text.size() + 7) / 8 * 8, ' ');
  BITMILL_CHECK(static_cast<int64_t>(text.size()) <= kMaxHeader);
  const uint64_t length = text.size();
  std::string prefix(kLengthBytes, '\0');
  std::memcpy(prefix.data(), &length, sizeof length);
  return prefix + text;
}

}  // namespace

// ---- reading
// ------------------------------------------------------------------------------------------------

std::vector<TensorEntry> parse_safetensors_header(std::string_view text, int64_t file_bytes,
                                                  const std::string& path,
                                                  std::map<std::string, std::string>* metadata) {
  const int64_t base = kLengthBytes + static_cast<int64_t>(text.size());
  if (!text.starts_with('{'))
    fail(ExitCode::kInput, "{}: the header does not start with '{{'", path);
  text = text.substr(0, text.find_last_not_of(' ') + 1);
  if (text.back() != '}')
    fail(ExitCode::kInput, "{}: the header does not end with '}}' and blanks (byte {})", path,
         kLengthBytes + static_cast<int64_t>(text.size()) - 1);
  HeaderReader reader(path);
  reader.parse(text);
  check_tiling(reader.entries, file_bytes - base, path);
  for (TensorEntry& entry : reader.entries) entry.offset += base;
  if (metadata != nullptr) *metadata = std::move(reader.metadata);
  return std::move(reader.entries);
}

std::vector<TensorEntry> read_safetensors_header(const std::string& path,
                                                 std::map<std::string, std::string>* metadata) {
  const RangeReader file(path);
  if (file.file_bytes() < kLengthBytes)
    fail(ExitCode::kInput, "{}: has {} bytes, a safetensors file has at least {}", path,
         file.file_bytes(), kLengthBytes);
  uint64_t length = 0;
  file.read(0, kLengthBytes, &length);
  if (length > static_cast<uint64_t>(kMaxHeader))
    fail(ExitCode::kInput, "{}: header length {} is above the limit of {}", path, length,
         kMaxHeader);
  if (const int64_t rest = file.file_bytes() - kLengthBytes; static_cast<int64_t>(length) > rest)
    fail(ExitCode::kInput, "{}: header length {} is beyond the file, which has {} bytes after it",
         path, length, rest);
  std::string text(length, '\0');
  file.read(kLengthBytes, static_cast<int64_t>(length), text.data());
  return parse_safetensors_header(text, file.file_bytes(), path, metadata);
}

RangeReader::RangeReader(std::string path) : path_(std::move(path)) {
  fd_ = ::open(path_.c_str(),
               O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // opening a pipe must not wait for its writer
  if (fd_ < 0) fail(ExitCode::kInput, "{}: cannot open: {}", path_, std::strerror(errno));
  struct stat status;
  const int error = ::fstat(fd_, &status) != 0 ? errno : 0;
  if (error == 0 && S_ISREG(status.st_mode)) {
    file_bytes_ = status.st_size;
    return;
  }
  ::close(fd_);
  if (error != 0) fail(ExitCode::kInput, "{}: cannot stat: {}", path_, std::strerror(error));
  fail(ExitCode::kInput, "{}: not a regular file", path_);
}

RangeReader::RangeReader(RangeReader&& other) noexcept
    : path_(std::move(other.path_)),
      fd_(std::exchange(other.fd_, -1)),
      file_bytes_(other.file_bytes_) {}

RangeReader::~RangeReader() {
  if (fd_ >= 0) ::close(fd_);
}

void RangeReader::read(int64_t offset, int64_t bytes, void* out) const {
  char* to = static_cast<char*>(out);
  const int64_t end = offset + bytes;
  while (offset < end) {
    const ssize_t n =
        ::pread(fd_, to, static_cast<size_t>(std::min(end - offset, kMaxCall)), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0)
      fail(ExitCode::kInput, "{}: cannot read at byte {}: {}", path_, offset, std::strerror(errno));
    if (n == 0)
      fail(ExitCode::kInput, "{}: ends at byte {}, bytes up to {} were expected", path_, offset,
           end);
    to += n;
    offset += n;
  }
}

// ---- writing
// ------------------------------------------------------------------------------------------------

SafetensorsLayout safetensors_layout(std::vector<NamedView> specs) {
  sort_for_file(specs);
  SafetensorsLayout layout;
  layout.header = header_text(specs);
  layout.file_bytes = static_cast<int64_t>(layout.header.size());
  for (const NamedView& spec : specs) {
    layout.tensors.push_back({spec.name, spec.data.dtype, spec.data.shape, layout.file_bytes,
                              spec.data.bytes(), 0});
    layout.file_bytes += spec.data.bytes();
  }
  return layout;
}

int64_t safetensors_file_bytes(const std::vector<NamedView>& tensors) {
  return safetensors_layout(tensors).file_bytes;
}

void write_safetensors(const std::string& path, std::vector<NamedView> tensors) {
  SafetensorsStream stream(path, std::move(tensors));
  for (const NamedView& tensor : stream.order())
    stream.append(tensor.data.data, tensor.data.bytes());
  stream.commit();
}

SafetensorsStream::SafetensorsStream(const std::string& path, std::vector<NamedView> specs)
    : file_(path), order_(std::move(specs)) {
  sort_for_file(order_);
  const SafetensorsLayout layout = safetensors_layout(order_);
  const auto header_bytes = static_cast<int64_t>(layout.header.size());
  file_.write(layout.header.data(), header_bytes);
  expected_ = layout.file_bytes - header_bytes;
}

void SafetensorsStream::append(const void* data, int64_t bytes) {
  BITMILL_CHECK(bytes >= 0 && bytes <= expected_ - written_);
  file_.write(data, bytes);
  written_ += bytes;
}

void SafetensorsStream::commit() {
  BITMILL_CHECK(written_ == expected_);
  file_.commit();
}

}  // namespace bitmill
