#include "core/log.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <mutex>

namespace bitmill {
namespace {

// Shared by lines and bars: a line must lift the bar out of the way and put it back.
struct LogState {
  std::mutex mutex;
  int rank = 0, ranks = 1;
  std::string bar;  // as drawn; empty: none
  std::chrono::steady_clock::time_point drawn;
};

LogState& state() {
  static LogState instance;
  return instance;
}

constexpr const char* kClearLine = "\r\x1b[K";

// One system call per line, so that lines of many ranks on one terminal do not mix.
void write_stderr(const std::string& text) {
  for (size_t done = 0; done < text.size();) {
    const ssize_t count = ::write(STDERR_FILENO, text.data() + done, text.size() - done);
    if (count < 0 && errno != EINTR) return;
    done += static_cast<size_t>(std::max<ssize_t>(count, 0));
  }
}

// With the lock held.
void write_line(const LogState& log, const std::string& line) {
  write_stderr(log.bar.empty() ? line + "\n" : kClearLine + line + "\n" + log.bar);
}

size_t terminal_width() {
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 20 ? size.ws_col : 80;
}

// Three significant digits.
std::string three_digits(double value) {
  return fmt::format("{:.{}f}", value, value < 9.995 ? 2 : value < 99.95 ? 1 : 0);
}

}  // namespace

void set_log_rank(int rank, int ranks) {
  std::lock_guard lock(state().mutex);
  state().rank = rank;
  state().ranks = ranks;
}

int log_rank() {
  std::lock_guard lock(state().mutex);
  return state().rank;
}

void log_line(const std::string& line) {
  LogState& log = state();
  std::lock_guard lock(log.mutex);
  if (log.rank == 0) write_line(log, line);
}

void log_error(const std::string& sentence, bool lone) {
  LogState& log = state();
  std::lock_guard lock(log.mutex);
  const std::string who = lone && log.ranks > 1 ? fmt::format(" [rank {}]", log.rank) : "";
  write_line(log, fmt::format("bitmill: error{}: {}", who, sentence));
}

void log_warning(const std::string& line) {
  LogState& log = state();
  std::lock_guard lock(log.mutex);
  const std::string tag = log.ranks > 1 ? fmt::format("[rank {}] ", log.rank) : "";
  write_line(log, fmt::format("{}bitmill: warning: {}", tag, line));
}

ProgressBar::ProgressBar(int64_t total, std::string unit)
    : total_(total),
      unit_(std::move(unit)),
      active_(isatty(STDERR_FILENO) == 1 && log_rank() == 0) {
  if (active_) draw("");
}

ProgressBar::~ProgressBar() {
  if (!active_) return;
  LogState& log = state();
  std::lock_guard lock(log.mutex);
  if (!log.bar.empty()) write_stderr(kClearLine);
  log.bar.clear();
}

void ProgressBar::advance(int64_t steps, const std::string& note) {
  if (done_ == 0) {
    first_ = steps;
    first_at_ = std::chrono::steady_clock::now();
  }
  done_ += steps;
  if (active_) draw(note);
}

void ProgressBar::draw(const std::string& note) {
  using namespace std::chrono_literals;
  constexpr int kCells = 24;
  LogState& log = state();
  std::lock_guard lock(log.mutex);
  const auto now = std::chrono::steady_clock::now();
  // Ten pictures a second are enough; the first and the last are always drawn.
  if (done_ < total_ && !log.bar.empty() && now - log.drawn < 100ms) return;
  log.drawn = now;
  const double elapsed = std::chrono::duration<double>(now - start_).count();
  const double share = total_ > 0 ? std::clamp(double(done_) / double(total_), 0.0, 1.0) : 1.0;
  const int filled = static_cast<int>(share * kCells);
  // At the pace since the first step: before it may lie a pass over all data that does not come again.
  const double pace = std::chrono::duration<double>(now - first_at_).count() / double(done_ - first_);
  const std::string left = done_ > first_ && done_ < total_
                               ? ", " + human_seconds(pace * double(total_ - done_)) + " left"
                               : "";
  std::string text = fmt::format("[{}{}] {}/{} {}, {}{}  {}", std::string(filled, '#'),
                                 std::string(kCells - filled, '.'), done_, total_, unit_,
                                 human_seconds(elapsed), left, note);
  text.resize(std::min(text.size(), terminal_width() - 1));
  log.bar = text;
  write_stderr(kClearLine + text);
}

std::string human_bytes(int64_t bytes) {
  constexpr std::array<const char*, 7> kUnits{"B", "KB", "MB", "GB", "TB", "PB", "EB"};
  double value = std::abs(static_cast<double>(bytes));
  size_t unit = 0;
  for (; value >= 999.5 && unit + 1 < kUnits.size(); ++unit) value /= 1000;
  const std::string number = unit == 0 ? fmt::format("{:.0f}", value) : three_digits(value);
  return fmt::format("{}{} {}", bytes < 0 ? "-" : "", number, kUnits[unit]);
}

std::string human_seconds(double seconds) {
  if (seconds < 59.95) return three_digits(seconds) + " s";
  const int64_t whole = std::llround(seconds);
  if (whole < 3600) return fmt::format("{}:{:02}", whole / 60, whole % 60);
  return fmt::format("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60);
}

}  // namespace bitmill
