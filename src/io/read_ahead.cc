#include "io/read_ahead.h"

#include <algorithm>
#include <cstring>

namespace bitmill {
namespace {

// Large enough for the rate of a parallel file system, small enough that a bound of a few hundred
// MiB holds many.
constexpr int64_t kPieceBytes = 16 << 20;
constexpr int64_t kWaitingRequests = 2;  // the one in use and the next

}  // namespace

struct ReadAhead::Piece {
  Range range;
  int64_t request = 0;
  enum class State { kQueued, kReading, kReady, kGone } state = State::kQueued;
  int64_t taken = 0;
  Tensor buffer;
  int64_t end() const { return range.offset + range.bytes; }
};

ReadAhead::~ReadAhead() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void ReadAhead::request(const std::vector<Range>& ranges, int64_t limit_bytes) {
  if (ranges.empty() || limit_bytes <= 0) return;
  std::lock_guard lock(mutex_);
  limit_ = limit_bytes;
  ++request_;
  idle_ = false;
  // Two pieces must fit, or reading and taking could not overlap.
  const int64_t size = std::clamp<int64_t>(limit_bytes / 2, 1, kPieceBytes);
  for (const Range& range : ranges)
    for (int64_t at = 0; at < range.bytes; at += size)
      add_piece({range.file, range.offset + at, std::min(size, range.bytes - at)});
  if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
  wake_.notify_all();
}

// Bytes that are on their way already are not read a second time; they now belong to the newest
// request.
void ReadAhead::add_piece(const Range& range) {
  auto next = pieces_.upper_bound({range.file, range.offset + range.bytes - 1});
  if (next != pieces_.begin()) {
    const std::shared_ptr<Piece>& before = std::prev(next)->second;
    if (before->range.file == range.file && before->end() > range.offset) {
      before->request = request_;
      return;
    }
  }
  auto piece = std::make_shared<Piece>();
  piece->range = range;
  piece->request = request_;
  pieces_[{range.file, range.offset}] = piece;
  queue_.push_back(std::move(piece));
}

// The piece that holds the byte at `offset`.
ReadAhead::Pieces::iterator ReadAhead::piece_at(const RangeReader& file, int64_t offset) {
  auto next = pieces_.upper_bound({&file, offset});
  if (next == pieces_.begin()) return pieces_.end();
  const auto at = std::prev(next);
  return at->first.first == &file && at->second->end() > offset ? at : pieces_.end();
}

// How many of `bytes` bytes from `offset` on, which no piece holds, come before the next piece.
int64_t ReadAhead::gap_after(const RangeReader& file, int64_t offset, int64_t bytes) const {
  const auto next = pieces_.upper_bound({&file, offset});
  if (next == pieces_.end() || next->first.first != &file) return bytes;
  return std::min(bytes, next->first.second - offset);
}

void ReadAhead::read(const RangeReader& file, int64_t offset, int64_t bytes, void* out) {
  char* to = static_cast<char*>(out);
  std::unique_lock lock(mutex_);
  while (bytes > 0) {
    const auto at = piece_at(file, offset);
    int64_t n = 0;
    if (at == pieces_.end()) {
      n = gap_after(file, offset, bytes);
    } else {
      const std::shared_ptr<Piece> piece = at->second;
      if (piece->state == Piece::State::kReading) {  // it may be gone afterwards: look again
        changed_.wait(lock, [&] { return piece->state != Piece::State::kReading; });
        continue;
      }
      n = std::min(bytes, piece->end() - offset);
      if (piece->state == Piece::State::kReady) {
        take(piece, offset, n, to, lock);
        offset += n, to += n, bytes -= n;
        continue;
      }
      erase(at);  // still queued: faster than the thread
    }
    lock.unlock();
    file.read(offset, n, to);
    lock.lock();
    offset += n, to += n, bytes -= n;
  }
}

// Copies without the lock; the shared pointer keeps the buffer alive even when the piece is dropped
// meanwhile.
void ReadAhead::take(const std::shared_ptr<Piece>& piece, int64_t offset, int64_t bytes, void* out,
                     std::unique_lock<std::mutex>& lock) {
  lock.unlock();
  const char* from = static_cast<const char*>(piece->buffer.data());
  std::memcpy(out, from + (offset - piece->range.offset), static_cast<size_t>(bytes));
  lock.lock();
  taken_ += bytes;
  piece->taken += bytes;
  if (piece->taken >= piece->range.bytes) erase(piece);
}

void ReadAhead::erase(Pieces::iterator at) {
  const std::shared_ptr<Piece> piece = std::move(at->second);
  pieces_.erase(at);
  if (piece->state == Piece::State::kReady) held_ -= piece->range.bytes;
  if (piece->state != Piece::State::kReading) piece->state = Piece::State::kGone;
  idle_ = false;
  wake_.notify_all();
}

void ReadAhead::erase(const std::shared_ptr<Piece>& piece) {
  const auto at = pieces_.find({piece->range.file, piece->range.offset});
  if (at != pieces_.end() && at->second == piece) erase(at);
}

void ReadAhead::forget() {
  std::lock_guard lock(mutex_);
  while (!pieces_.empty()) erase(pieces_.begin());
  queue_.clear();
  changed_.notify_all();
}

// Drops ready pieces of old requests until `bytes` more fit.
bool ReadAhead::make_space(int64_t bytes) {
  for (auto at = pieces_.begin(); held_ + bytes > limit_ && at != pieces_.end();) {
    const auto here = at++;
    if (here->second->state == Piece::State::kReady &&
        here->second->request <= request_ - kWaitingRequests)
      erase(here);
  }
  return held_ + bytes <= limit_;
}

// The first queued piece, if it fits now. Pieces that a reader took, or of old requests, fall out.
std::shared_ptr<ReadAhead::Piece> ReadAhead::next_piece() {
  while (!queue_.empty()) {
    const std::shared_ptr<Piece> piece = queue_.front();
    if (piece->state == Piece::State::kQueued && piece->request <= request_ - kWaitingRequests)
      erase(piece);
    if (piece->state == Piece::State::kQueued) {
      if (!make_space(piece->range.bytes)) return nullptr;
      queue_.pop_front();
      return piece;
    }
    queue_.pop_front();
  }
  return nullptr;
}

void ReadAhead::work() {
  std::unique_lock lock(mutex_);
  while (!stop_) {
    const std::shared_ptr<Piece> piece = next_piece();
    if (piece == nullptr) {
      idle_ = true;
      changed_.notify_all();
      wake_.wait(lock);
      continue;
    }
    idle_ = false;
    piece->state = Piece::State::kReading;
    held_ += piece->range.bytes;
    peak_ = std::max(peak_, held_);
    lock.unlock();
    bool good = true;
    Tensor buffer;
    try {
      buffer = Tensor(DType::kU8, {piece->range.bytes});
      piece->range.file->read(piece->range.offset, piece->range.bytes, buffer.data());
    } catch (const std::exception&) {
      good = false;  // the read that wants these bytes will meet the same trouble and say so
      buffer.reset();
    }
    lock.lock();
    const auto at = pieces_.find({piece->range.file, piece->range.offset});
    const bool wanted = good && at != pieces_.end() && at->second == piece;
    piece->state = wanted ? Piece::State::kReady : Piece::State::kGone;
    if (wanted)
      piece->buffer = std::move(buffer);
    else
      held_ -= piece->range.bytes;
    if (!good && at != pieces_.end() && at->second == piece) pieces_.erase(at);
    changed_.notify_all();
  }
}

int64_t ReadAhead::taken_bytes() const {
  std::lock_guard lock(mutex_);
  return taken_;
}

int64_t ReadAhead::peak_bytes() const {
  std::lock_guard lock(mutex_);
  return peak_;
}

void ReadAhead::wait_idle() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !thread_.joinable() || idle_; });
}

}  // namespace bitmill
