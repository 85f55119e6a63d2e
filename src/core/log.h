// Lines for people. Rank 0 talks on stderr; results meant for scripts go to --json files and stdout tables.
#pragma once

#include <fmt/format.h>

#include <chrono>
#include <string>
#include <utility>

namespace bitmill {

// Process-wide setting of who talks; set once in main. Rank 0 prints info, every rank prints warnings tagged "[rank N]".
void set_log_rank(int rank, int ranks);
int log_rank();

void log_line(const std::string& line);     // rank 0 only, one line to stderr
// The sentence a command ends with, "bitmill: error: ...", in one write: several ranks may fail at the same time. `lone`: only
// this rank failed, so the line says which.
void log_error(const std::string& sentence, bool lone);
void log_warning(const std::string& line);  // any rank, "bitmill: warning: ..." tagged with the rank when ranks > 1

template <typename... Args>
void info(fmt::format_string<Args...> text, Args&&... args) {
  log_line(fmt::format(text, std::forward<Args>(args)...));
}
template <typename... Args>
void warn(fmt::format_string<Args...> text, Args&&... args) {
  log_warning(fmt::format(text, std::forward<Args>(args)...));
}

// Progress of rank 0: a bar redrawn in place on a terminal, nothing otherwise (the log lines carry the progress then).
class ProgressBar {
 public:
  // `total` steps named `unit`, e.g. (24, "linears").
  ProgressBar(int64_t total, std::string unit);
  ~ProgressBar();  // clears the bar
  void advance(int64_t steps, const std::string& note);

 private:
  void draw(const std::string& note);
  int64_t total_, done_ = 0, first_ = 0;
  std::string unit_;
  bool active_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now(), first_at_;
};

// Seconds since construction (steady clock).
class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// "1.50 GB", "37.2 MB": decimal units, three digits.
std::string human_bytes(int64_t bytes);
// "12.3 s", "4:05", "2:10:07"
std::string human_seconds(double seconds);

}  // namespace bitmill
