#include "core/page_heap.h"

#include <sys/mman.h>

#include <algorithm>
#include <iterator>

namespace bitmill {

namespace {
constexpr int64_t kPage = 4096;
// What may lie free beyond the peak of blocks in use, for ranges that no request happens to fit: at
// least this much, and this part of the peak.
constexpr int64_t kSlack = 16 << 20, kSlackPart = 16;
// Address space that the heap grows through where nothing else comes to lie in it, so that
// neighbours can be joined.
constexpr size_t kReach = size_t{1} << 40;

int64_t whole_pages(int64_t bytes) {
  return (std::max<int64_t>(bytes, 1) + kPage - 1) / kPage * kPage;
}
}  // namespace

void* PageHeap::allocate(int64_t bytes) {
  const int64_t size = whole_pages(bytes);
  void* block = take(size);
  if (block == nullptr) {
    make_room(size);
    block = grow(size);
    if (block == nullptr) return nullptr;
  }
  used_ += size;
  peak_ = std::max(peak_, used_);
  return block;
}

void PageHeap::release(void* pointer, int64_t bytes) {
  int64_t size = whole_pages(bytes);
  used_ -= size;
  free_bytes_ += size;
  auto* begin = static_cast<char*>(pointer);
  auto after = free_.lower_bound(begin);
  if (after != free_.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == begin) {
      begin = before->first;
      size += before->second;
      free_.erase(before);
    }
  }
  if (after != free_.end() && begin + size == after->first) {
    size += after->second;
    free_.erase(after);
  }
  free_.emplace(begin, size);
}

void PageHeap::trim() {
  while (!free_.empty()) unmap(free_.begin());
}

void* PageHeap::take(int64_t size) {
  auto best = free_.end();
  for (auto range = free_.begin(); range != free_.end(); ++range)
    if (range->second >= size && (best == free_.end() || range->second < best->second))
      best = range;
  if (best == free_.end()) return nullptr;
  char* const block = best->first;
  const int64_t left = best->second - size;
  free_.erase(best);
  if (left > 0) free_.emplace(block + size, left);
  free_bytes_ -= size;
  return block;
}

void* PageHeap::grow(int64_t size) {
  constexpr int kPrivate = MAP_PRIVATE | MAP_ANONYMOUS;
  if (next_ == nullptr) {  // a large gap: reserved and given back, for its address
    void* gap = mmap(nullptr, kReach, PROT_NONE, kPrivate | MAP_NORESERVE, -1, 0);
    if (gap != MAP_FAILED && munmap(gap, kReach) == 0) next_ = static_cast<char*>(gap);
  }
  void* block = mmap(next_, static_cast<size_t>(size), PROT_READ | PROT_WRITE, kPrivate, -1, 0);
  if (block == MAP_FAILED) return nullptr;
  next_ = static_cast<char*>(block) + size;
  return block;
}

void PageHeap::make_room(int64_t size) {
  const int64_t peak = std::max(peak_, used_ + size),
                limit = peak + std::max(kSlack, peak / kSlackPart);
  while (!free_.empty() && free_bytes_ + used_ + size > limit)
    unmap(std::max_element(free_.begin(), free_.end(),
                           [](const auto& a, const auto& b) { return a.second < b.second; }));
}

void PageHeap::unmap(Ranges::iterator range) {
  munmap(range->first, static_cast<size_t>(range->second));
  free_bytes_ -= range->second;
  free_.erase(range);
}

}  // namespace bitmill
