#include "core/thread_pool.h"

#include <omp.h>
#include <sched.h>

#include "core/error.h"

namespace bitmill {

ThreadPool::ThreadPool(int threads) {
  BITMILL_CHECK(threads >= 1);
  omp_set_num_threads(1);
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  start_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::work(int thread) {
  omp_set_num_threads(1);  // a per-thread setting
  uint64_t seen = 0;
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      start_.wait(lock, [&] { return stop_ || generation_ != seen; });
      if (stop_) return;
      seen = generation_;
    }
    run_items(thread);
    std::lock_guard lock(mutex_);
    if (--running_ == 0) finished_.notify_one();
  }
}

void ThreadPool::run_items(int thread) {
  for (int64_t item; (item = next_.fetch_add(1)) < count_;) {
    try {
      (*body_)(item, thread);
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
      next_ = count_;
    }
  }
}

void ThreadPool::parallel_for(int64_t count, const std::function<void(int64_t, int)>& body) {
  if (count <= 0) return;
  body_ = &body;
  count_ = count;
  next_ = 0;
  const bool alone = workers_.empty() || count == 1;
  if (!alone) {
    std::lock_guard lock(mutex_);
    running_ = static_cast<int>(workers_.size());
    ++generation_;
  }
  if (!alone) start_.notify_all();
  run_items(0);
  if (!alone) {
    std::unique_lock lock(mutex_);
    finished_.wait(lock, [&] { return running_ == 0; });
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

int available_cpus() {
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) != 0) return 1;
  return CPU_COUNT(&mask);
}

}  // namespace bitmill
