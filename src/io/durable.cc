#include "io/durable.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include "core/error.h"

namespace bitmill {
namespace {

constexpr int64_t kMaxCall = 1 << 30;  // write() takes just under 2 GiB
constexpr int kMaxTemporaries = 1000;  // leftovers of crashed runs with the same process id

std::string directory_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

// ": No space left on device (12345 bytes free)"
std::string reason(int error, const std::string& path) {
  std::string text = std::strerror(error);
  struct statvfs space;
  if ((error == ENOSPC || error == EDQUOT) && statvfs(directory_of(path).c_str(), &space) == 0)
    text += fmt::format(" ({} bytes free)", int64_t(space.f_bavail) * int64_t(space.f_frsize));
  return text;
}

[[noreturn]] void fail_output(const std::string& path, const char* action, int error) {
  fail(ExitCode::kOutput, "{}: cannot {}: {}", path, action, reason(error, path));
}

// Descriptor that closes itself; errors of that close are of no interest (its users have failed
// already or only read).
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

void write_all(int fd, const char* data, int64_t bytes, const std::string& path) {
  while (bytes > 0) {
    const ssize_t n = ::write(fd, data, static_cast<size_t>(std::min(bytes, kMaxCall)));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      const int error = n < 0 ? errno : EIO;
      fail(ExitCode::kOutput, "{}: cannot write {} more bytes: {}", path, bytes,
           reason(error, path));
    }
    data += n;
    bytes -= n;
  }
}

void write_all_at(int fd, int64_t offset, const char* data, int64_t bytes,
                  const std::string& path) {
  while (bytes > 0) {
    const ssize_t n = ::pwrite(fd, data, static_cast<size_t>(std::min(bytes, kMaxCall)), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      const int error = n < 0 ? errno : EIO;
      fail(ExitCode::kOutput, "{}: cannot write {} bytes at byte {}: {}", path, bytes, offset,
           reason(error, path));
    }
    data += n;
    offset += n;
    bytes -= n;
  }
}

// Close reports late write errors on network file systems; the descriptor is gone either way.
void close_checked(int fd, const std::string& path) {
  if (::close(fd) != 0 && errno != EINTR) fail_output(path, "close", errno);
}

void sync_directory(const std::string& directory) {
  const Descriptor fd(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd.get() < 0) fail_output(directory, "open the directory", errno);
  // Some network file systems have no directory sync: EINVAL there means "nothing to do", not a
  // lost write.
  if (::fsync(fd.get()) != 0 && errno != EINVAL)
    fail_output(directory, "sync the directory", errno);
}

}  // namespace

DurableFile::DurableFile(std::string path) : path_(std::move(path)) {
  for (int attempt = 0; attempt < kMaxTemporaries; ++attempt) {
    temporary_ = fmt::format("{}.tmp-{}-{}", path_, ::getpid(), attempt);
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd_ >= 0) return;
    if (errno != EEXIST) break;
  }
  const int error = errno;
  temporary_.clear();
  fail_output(path_, "create", error);
}

DurableFile::~DurableFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void DurableFile::write(const void* data, int64_t bytes) {
  BITMILL_CHECK(fd_ >= 0);
  write_all(fd_, static_cast<const char*>(data), bytes, path_);
}

void DurableFile::write_at(int64_t offset, const void* data, int64_t bytes) {
  BITMILL_CHECK(fd_ >= 0);
  write_all_at(fd_, offset, static_cast<const char*>(data), bytes, path_);
}

void DurableFile::reserve(int64_t bytes) {
  BITMILL_CHECK(fd_ >= 0);
  if (bytes == 0) return;
  int error = 0;
  do {
    // Not posix_fallocate, which writes to every block where the file system cannot reserve.
    error = ::fallocate(fd_, 0, 0, bytes) == 0 ? 0 : errno;
  } while (error == EINTR);
  if (error == 0 || error == EOPNOTSUPP || error == ENOSYS || error == EINVAL) return;
  fail(ExitCode::kOutput, "{}: cannot reserve {} bytes: {}", path_, bytes, reason(error, path_));
}

void DurableFile::commit() {
  BITMILL_CHECK(fd_ >= 0);
  // A failed fsync may have dropped the dirty pages: a second one could succeed and mean nothing,
  // so this is final.
  if (::fsync(fd_) != 0) fail_output(path_, "sync", errno);
  close_checked(std::exchange(fd_, -1), path_);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0)
    fail_output(path_, "rename into place", errno);
  temporary_.clear();
  sync_directory(directory_of(path_));
}

void write_file_durably(const std::string& path, const std::string& text) {
  DurableFile file(path);
  file.write(text.data(), static_cast<int64_t>(text.size()));
  file.commit();
}

void rename_durably(const std::string& from, const std::string& to) {
  if (::rename(from.c_str(), to.c_str()) != 0)
    fail(ExitCode::kOutput, "{}: cannot rename to {}: {}", from, to, reason(errno, to));
  sync_directory(directory_of(to));
}

void copy_file_durably(const std::string& from, const std::string& to) {
  const Descriptor source(
      ::open(from.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));  // a pipe must not block us
  if (source.get() < 0) fail_output(from, "open", errno);
  struct stat status;
  if (::fstat(source.get(), &status) != 0) fail_output(from, "stat", errno);
  if (!S_ISREG(status.st_mode)) fail(ExitCode::kOutput, "{}: not a regular file", from);
  DurableFile file(to);
  std::vector<char> buffer(1 << 20);
  while (true) {
    const ssize_t n = ::read(source.get(), buffer.data(), buffer.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_output(from, "read", errno);
    if (n == 0) break;
    file.write(buffer.data(), n);
  }
  file.commit();
}

void make_directories(const std::string& path) {
  struct stat status;
  if (path.empty() || (::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode))) return;
  std::string name = path;
  while (name.size() > 1 && name.back() == '/') name.pop_back();
  const std::string parent = directory_of(name);
  if (parent != name) make_directories(parent);
  if (::mkdir(name.c_str(), 0777) == 0) {
    sync_directory(parent);
    return;
  }
  const int error = errno;  // another rank may have been faster
  if (error != EEXIST || ::stat(name.c_str(), &status) != 0 || !S_ISDIR(status.st_mode))
    fail_output(name, "create the directory", error);
}

void probe_writable(const std::string& directory) {
  const std::string path = fmt::format("{}/.bitmill-probe-{}", directory, ::getpid());
  try {
    write_file_durably(path, "probe\n");
  } catch (const Error& error) {
    fail(ExitCode::kOutput, "{}: the directory is not writable ({})", directory, error.what());
  }
  // Ranks of several nodes may share a process id and thus the probe's name: gone already is fine.
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) fail_output(path, "remove", errno);
}

OutputLock::~OutputLock() {
  if (fd_ >= 0) ::close(fd_);
}

void OutputLock::take(const std::string& directory) {
  make_directories(directory);
  fd_ = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd_ < 0) fail(ExitCode::kOutput, "{}: cannot open: {}", directory, std::strerror(errno));
  if (::flock(fd_, LOCK_EX | LOCK_NB) == 0) return;
  if (errno == EWOULDBLOCK)
    fail(ExitCode::kOutput, "{}: another bitmill process is writing this directory", directory);
  // File systems without locks (some network mounts) must not stop a job: there the user keeps jobs apart.
}

}  // namespace bitmill
