// Large blocks of host memory, in whole pages straight from the kernel. The C library's heap is the
// wrong place for them: its arenas keep dead blocks between live ones, and its mapped blocks go
// back to the kernel on every release, so that a pipeline that allocates the same buffers per
// micro-batch faults their pages in again and again.
//
// Free ranges are kept, joined with free neighbours, and cut to serve requests of any size:
// activations of one cut reuse the pages of another's. Before the heap grows beyond what was ever
// in use at once (and a little more), it gives free ranges back, so its size follows the peak of
// what lives, not the history of sizes.
#pragma once

#include <cstdint>
#include <map>

namespace bitmill {

// Not thread-safe; freed pages that are still kept return to the kernel in the destructor, blocks
// in use do not.
class PageHeap {
 public:
  PageHeap() = default;
  ~PageHeap() { trim(); }
  PageHeap(const PageHeap&) = delete;
  PageHeap& operator=(const PageHeap&) = delete;

  // Page-aligned, uninitialised; nullptr when the kernel has none.
  void* allocate(int64_t bytes);
  // `bytes` as asked for.
  void release(void* pointer, int64_t bytes);
  // Gives all free ranges back.
  void trim();

  int64_t free_bytes() const { return free_bytes_; }

 private:
  using Ranges = std::map<char*, int64_t>;  // by address; no two touch

  void* take(
      int64_t size);  // from the smallest free range that fits, the lowest of equals; nullptr
  void* grow(int64_t size);  // new pages, behind the last ones where that is possible; nullptr
  void make_room(
      int64_t size);  // gives back ranges, largest first, before the heap grows by `size`
  void unmap(Ranges::iterator range);

  Ranges free_;
  char* next_ = nullptr;                          // end of the newest pages
  int64_t free_bytes_ = 0, used_ = 0, peak_ = 0;  // whole pages
};

}  // namespace bitmill
