#include "io/write_behind.h"

#include <algorithm>
#include <utility>

#include "io/durable.h"

namespace bitmill {

WriteBehind::WriteBehind(int64_t limit_bytes) : limit_(limit_bytes), thread_([this] { work(); }) {}

WriteBehind::~WriteBehind() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void WriteBehind::rethrow() const {
  if (error_) throw Error(*error_);
}

void WriteBehind::check() {
  std::lock_guard lock(mutex_);
  rethrow();
}

int64_t WriteBehind::submit(int64_t bytes, std::function<void()> job) {
  std::unique_lock lock(mutex_);
  changed_.wait(
      lock, [&] { return error_ || bytes == 0 || waiting_ == 0 || waiting_ + bytes <= limit_; });
  rethrow();
  waiting_ += bytes;
  peak_ = std::max(peak_, waiting_);
  jobs_.push_back({bytes, std::move(job)});
  wake_.notify_all();
  return ++submitted_;
}

bool WriteBehind::finished(int64_t job) {
  std::lock_guard lock(mutex_);
  rethrow();
  return done_ >= job;
}

void WriteBehind::wait(int64_t job) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return done_ >= job; });
  rethrow();
}

void WriteBehind::drain() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return done_ == submitted_; });
  rethrow();
}

int64_t WriteBehind::peak_bytes() const {
  std::lock_guard lock(mutex_);
  return peak_;
}

void WriteBehind::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stop_ || !jobs_.empty(); });
    if (jobs_.empty()) return;
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    const bool skip = error_.has_value();
    lock.unlock();
    std::optional<Error> error;
    try {
      if (!skip) job.run();
    } catch (const Error& met) {
      error.emplace(met.code(), met.what());
    } catch (const std::exception& met) {
      error.emplace(ExitCode::kInternal, met.what());
    }
    job.run = nullptr;  // frees the data before its bytes stop counting
    lock.lock();
    if (error && !error_) error_.emplace(error->code(), error->what());
    waiting_ -= job.bytes;
    ++done_;
    changed_.notify_all();
  }
}

struct ShardWriter::Target {
  explicit Target(const std::string& path) : file(path) {}
  DurableFile file;
};

ShardWriter::ShardWriter(const std::string& path, const std::vector<NamedView>& specs,
                         WriteBehind& queue)
    : queue_(&queue), target_(std::make_shared<Target>(path)) {
  const SafetensorsLayout layout = safetensors_layout(specs);
  file_bytes_ = layout.file_bytes;
  for (const TensorEntry& entry : layout.tensors)
    tensors_[entry.name] = {entry.dtype, entry.shape, entry.offset, entry.bytes, 0};
  target_->file.reserve(file_bytes_);
  target_->file.write_at(0, layout.header.data(), static_cast<int64_t>(layout.header.size()));
}

ShardWriter::ShardWriter(ShardWriter&&) noexcept = default;
ShardWriter::~ShardWriter() = default;

ShardWriter::Place& ShardWriter::place(const std::string& name) {
  const auto found = tensors_.find(name);
  BITMILL_CHECK(found != tensors_.end());
  return found->second;
}

void ShardWriter::write(const std::string& name, Tensor data) {
  const Place& spec = place(name);
  BITMILL_CHECK(spec.written == 0 && data.dtype() == spec.dtype && data.shape() == spec.shape);
  write_part(name, 0, std::move(data));
}

void ShardWriter::write_part(const std::string& name, int64_t offset, Tensor data) {
  BITMILL_CHECK(target_ != nullptr);
  Place& to = place(name);
  const int64_t bytes = data.bytes();
  BITMILL_CHECK(offset >= 0 && offset + bytes <= to.bytes && to.written + bytes <= to.bytes);
  to.written += bytes;
  // Shared, because a std::function must be copyable.
  const auto kept = std::make_shared<Tensor>(std::move(data));
  queue_->submit(bytes, [target = target_, kept, at = to.offset + offset, bytes] {
    target->file.write_at(at, kept->data(), bytes);
  });
}

PendingFile ShardWriter::finish() {
  BITMILL_CHECK(target_ != nullptr);
  for (const auto& [name, to] : tensors_) BITMILL_CHECK(to.written == to.bytes);
  PendingFile pending;
  pending.queue_ = queue_;
  pending.job_ =
      queue_->submit(0, [target = std::exchange(target_, nullptr)] { target->file.commit(); });
  return pending;
}

}  // namespace bitmill
