#include "pipeline/rank_clock.h"

#include <algorithm>

namespace bitmill {

std::string_view phase_name(Phase phase) {
  static constexpr std::array<std::string_view, kPhases> kNames{
      "read", "forward", "hessian",  "exchange", "solve", "search",
      "pack", "write",   "transfer", "wait",     "other"};
  return kNames[static_cast<size_t>(phase)];
}

std::string_view activity_name(Activity activity) {
  static constexpr std::array<std::string_view, kActivities> kNames{
      "read", "capture", "solve", "search", "exchange", "transfer", "write", "wait", "other"};
  return kNames[static_cast<size_t>(activity)];
}

Activity activity_of(Phase phase) {
  static constexpr std::array<Activity, kPhases> kActivity{
      Activity::kRead,     Activity::kCapture, Activity::kCapture, Activity::kExchange,
      Activity::kSolve,    Activity::kSearch,  Activity::kWrite,   Activity::kWrite,
      Activity::kTransfer, Activity::kWait,    Activity::kOther};
  return kActivity[static_cast<size_t>(phase)];
}

void SpanRecorder::add(const Span& span) {
  put(span);
  while (spans_.size() > most_ && resolution_ < span.end) coarsen();
}

std::vector<Span> SpanRecorder::take() {
  close_group();
  return std::exchange(spans_, {});
}

void SpanRecorder::put(const Span& span) {
  const double length = span.end - span.start;
  if (open_ && (group_.block != span.block || length >= resolution_)) close_group();
  if (!open_) {
    group_ = span;
    inside_ = {};
    open_ = true;
  }
  inside_[static_cast<size_t>(span.what)] += length;
  group_.end = span.end;
  if (group_.end - group_.start >= resolution_) close_group();
}

void SpanRecorder::close_group() {
  if (!open_) return;
  open_ = false;
  group_.what =
      static_cast<Activity>(std::max_element(inside_.begin(), inside_.end()) - inside_.begin());
  Span* before = spans_.empty() || spans_.back().block != group_.block ? nullptr : &spans_.back();
  // What a longer span cut off before it was long enough to count is a moment of the one before.
  const bool moment = group_.end - group_.start < resolution_;
  if (before != nullptr && (moment || before->what == group_.what))
    before->end = group_.end;
  else
    spans_.push_back(group_);
}

void SpanRecorder::coarsen() {
  close_group();
  resolution_ *= 2;
  for (const Span& span : std::exchange(spans_, {})) put(span);
}

void RankClock::at_block(int64_t block) {
  enter(phase_);
  block_ = block;
}

Phase RankClock::enter(Phase phase) {
  const double now = watch_.seconds();
  seconds_[static_cast<size_t>(phase_)] += now - since_;
  if (now > since_) recorder_.add({activity_of(phase_), block_, since_, now});
  since_ = now;
  return std::exchange(phase_, phase);
}

}  // namespace bitmill
