// Files that are either wholly there or not there at all, also after a crash.
// Order: temporary name in the same directory -> write -> fsync -> close -> rename -> fsync of the directory.
// All errors are Error(kOutput) with path and errno text; the temporary file is removed.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace bitmill {

// Sequential writer of one file under a temporary name; nothing appears under `path` before commit().
class DurableFile {
 public:
  explicit DurableFile(std::string path);
  ~DurableFile();  // without commit: removes the temporary file
  DurableFile(const DurableFile&) = delete;
  DurableFile& operator=(const DurableFile&) = delete;

  void write(const void* data, int64_t bytes);  // loops over short writes and EINTR
  // At a place of its own, in any order and from any thread, one at a time. Not to be mixed with write().
  void write_at(int64_t offset, const void* data, int64_t bytes);
  // Reserves the disk space of a file of `bytes`, where the file system can: a full disk shows now, not at the end.
  void reserve(int64_t bytes);
  void commit();                                // fsync, close, rename, fsync directory
  const std::string& path() const { return path_; }

 private:
  std::string path_, temporary_;
  int fd_ = -1;
};

void write_file_durably(const std::string& path, const std::string& text);
// rename + fsync of the target's directory.
void rename_durably(const std::string& from, const std::string& to);
// Byte-for-byte copy.
void copy_file_durably(const std::string& from, const std::string& to);
// Creates the directory and its parents.
void make_directories(const std::string& path);
// Writes, syncs, renames and removes a small file in `directory`: is it writable? Throws Error(kOutput) if not.
void probe_writable(const std::string& directory);
// An advisory lock on DIR that dies with its process: two jobs must not write one directory. `take` creates DIR and
// throws Error(kOutput) when another process holds it.
class OutputLock {
 public:
  OutputLock() = default;
  ~OutputLock();
  OutputLock(const OutputLock&) = delete;
  OutputLock& operator=(const OutputLock&) = delete;
  void take(const std::string& directory);

 private:
  int fd_ = -1;
};

}  // namespace bitmill
