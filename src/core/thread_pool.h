// Our own pool of worker threads. All parallelism of bitmill is a parallel_for over fixed-shape tiles whose bodies call
// libraries single-threaded; which thread runs a tile therefore never changes a result.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace bitmill {

class ThreadPool {
 public:
  // `threads` >= 1 including the caller, which works too. Each thread runs OpenMP regions (oneDNN's) with one thread.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs body(item, thread) for every item in [0, count), thread in [0, size()); returns when all are done. Items are
  // handed out in ascending order. An exception stops further items and is rethrown here. Not reentrant; one caller.
  void parallel_for(int64_t count, const std::function<void(int64_t item, int thread)>& body);

 private:
  void work(int thread);
  void run_items(int thread);

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable start_, finished_;
  uint64_t generation_ = 0;
  int running_ = 0;
  bool stop_ = false;
  const std::function<void(int64_t, int)>* body_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  std::exception_ptr error_;
};

// CPUs in this process's affinity mask.
int available_cpus();

}  // namespace bitmill
