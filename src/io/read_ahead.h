// Reads byte ranges before they are asked for, on one thread, into host buffers under a byte bound.
//
//   request(ranges of the next cut)      the thread starts reading
//   ... compute ...
//   read(...)                            takes the buffered bytes, or reads the file itself
//
// Whether bytes were read ahead changes nothing but time: `read` gives the same bytes or the same
// Error either way. Nothing fails in the thread; a range that it cannot read is met again by the
// `read` that wants it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "core/tensor.h"
#include "io/safetensors.h"

namespace bitmill {

class ReadAhead {
 public:
  // Bytes [offset, offset + bytes) of a file, which must outlive this object.
  struct Range {
    const RangeReader* file = nullptr;
    int64_t offset = 0, bytes = 0;
  };

  ReadAhead() = default;
  ~ReadAhead();  // ends the thread, after the system call it is in
  ReadAhead(const ReadAhead&) = delete;
  ReadAhead& operator=(const ReadAhead&) = delete;

  // Queues ranges behind those requested before, to be read in this order, and sets the bound for
  // all buffers together. Two requests may wait at a time (this and the previous one): what is left
  // of older ones is dropped when space is needed. limit_bytes <= 0: nothing is read ahead.
  void request(const std::vector<Range>& ranges, int64_t limit_bytes);
  // Exactly [offset, offset + bytes) of `file`, like RangeReader::read. Buffered bytes are given
  // once: each buffer is freed when all of it was taken.
  void read(const RangeReader& file, int64_t offset, int64_t bytes, void* out);
  // Drops every request and every buffer.
  void forget();

  // Bytes that `read` took from buffers since the start, and the most that all buffers held at one
  // time.
  int64_t taken_bytes() const;
  int64_t peak_bytes() const;
  // Blocks until everything requested is read, dropped, or waits for space.
  void wait_idle();

 private:
  struct Piece;  // what is read at once
  using Key = std::pair<const RangeReader*, int64_t>;
  using Pieces = std::map<Key, std::shared_ptr<Piece>>;

  void work();
  void add_piece(const Range& range);
  Pieces::iterator piece_at(const RangeReader& file, int64_t offset);
  int64_t gap_after(const RangeReader& file, int64_t offset, int64_t bytes) const;
  void take(const std::shared_ptr<Piece>& piece, int64_t offset, int64_t bytes, void* out,
            std::unique_lock<std::mutex>& lock);
  void erase(Pieces::iterator at);
  void erase(const std::shared_ptr<Piece>& piece);
  bool make_space(int64_t bytes);
  std::shared_ptr<Piece> next_piece();

  mutable std::mutex mutex_;
  std::condition_variable wake_, changed_;
  Pieces pieces_;                             // not yet taken: queued, being read, ready
  std::deque<std::shared_ptr<Piece>> queue_;  // to be read, in order
  int64_t limit_ = 0, held_ = 0, peak_ = 0, taken_ = 0, request_ = 0;
  bool idle_ = false, stop_ = false;  // idle: nothing to read, or nothing that fits
  std::thread thread_;
};

}  // namespace bitmill
