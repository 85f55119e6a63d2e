// Safetensors files written by a background thread while the caller computes on: the layout is
// fixed first, tensors follow in any order, each at its place.
//
//   WriteBehind queue(limit);                       one per rank
//   ShardWriter shard(path, specs, queue);          temporary file, header, space on the disk
//   shard.write("a.qweight", std::move(packed));    returns at once, unless `limit` bytes wait
//   already PendingFile pending = shard.finish();           nothing waits for the disk here either
//   ... next block ...
//   if (pending.durable()) ...                      or pending.wait()
//
// Bytes and durability are those of write_safetensors: temporary name, write, fsync, rename, fsync
// of the directory. Any failure (full disk, quota, broken device) is Error(kOutput) with path and
// errno text. It ends the whole queue: no later write is tried, and every later call of its
// writers, pending files and drain() throws that same error.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "core/tensor.h"
#include "io/safetensors.h"

namespace bitmill {

// A thread that runs jobs in the order given, and a bound on the bytes that wait with them.
class WriteBehind {
 public:
  explicit WriteBehind(int64_t limit_bytes);
  // Finishes the jobs that are queued. Errors are lost here: call drain() first.
  ~WriteBehind();
  WriteBehind(const WriteBehind&) = delete;
  WriteBehind& operator=(const WriteBehind&) = delete;

  // Waits until every job given so far is done. Throws the queue's error.
  void drain();
  // Throws the queue's error, if there is one.
  void check();
  // The most bytes that waited at one time, the job being written included: at most the limit, or
  // one larger tensor.
  int64_t peak_bytes() const;

 private:
  friend class ShardWriter;
  friend class PendingFile;
  // Queues `job`, which keeps `bytes` of memory alive; waits for space first. Returns the job's
  // number.
  int64_t submit(int64_t bytes, std::function<void()> job);
  bool finished(int64_t job);
  void wait(int64_t job);
  void rethrow() const;
  void work();
  struct Job {
    int64_t bytes = 0;
    std::function<void()> run;
  };

  const int64_t limit_;
  mutable std::mutex mutex_;
  std::condition_variable wake_, changed_;
  std::deque<Job> jobs_;
  int64_t waiting_ = 0, peak_ = 0, submitted_ = 0, done_ = 0;
  std::optional<Error> error_;
  bool stop_ = false;
  std::thread thread_;  // last: it uses everything above
};

// A file on its way to the disk. Copies are the same file; the queue must outlive all of them.
class PendingFile {
 public:
  PendingFile() = default;
  // Is it under its final name, synced? Never waits. Throws the queue's error.
  bool durable() const { return queue_ == nullptr || queue_->finished(job_); }
  void wait() const {
    if (queue_ != nullptr) queue_->wait(job_);
  }

 private:
  friend class ShardWriter;
  WriteBehind* queue_ = nullptr;
  int64_t job_ = 0;
};

// One safetensors file. Not thread-safe; several writers may share a queue. Destroyed before
// finish(): the temporary file is removed, nothing appears.
class ShardWriter {
 public:
  // `specs`: name, dtype and shape of every tensor (data pointers unused). Creates and preallocates
  // the temporary file now, so that a full disk shows here.
  ShardWriter(const std::string& path, const std::vector<NamedView>& specs, WriteBehind& queue);
  ~ShardWriter();
  ShardWriter(ShardWriter&&) noexcept;
  ShardWriter& operator=(ShardWriter&&) = delete;

  bool holds(const std::string& name) const { return tensors_.contains(name); }
  // A whole tensor; dtype and shape must be those of its spec. Each name once.
  void write(const std::string& name, Tensor data);
  // Bytes [offset, offset + data.bytes()) of a tensor's data, whatever shape and dtype `data` has:
  // for tensors that are never whole in memory. Parts must not overlap; together they must be
  // complete before finish().
  void write_part(const std::string& name, int64_t offset, Tensor data);
  // After every byte of every tensor was handed over. At most once.
  PendingFile finish();
  int64_t file_bytes() const { return file_bytes_; }

 private:
  struct Target;  // the file, alive as long as a job needs it
  struct Place {
    DType dtype;
    Shape shape;
    int64_t offset = 0, bytes = 0, written = 0;
  };
  Place& place(const std::string& name);

  WriteBehind* queue_;
  std::shared_ptr<Target> target_;
  std::map<std::string, Place> tensors_;
  int64_t file_bytes_ = 0;
};

}  // namespace bitmill
