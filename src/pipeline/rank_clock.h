// RankClock: where the time of a rank goes, as sums by phase and as a timeline.
//
//   RankClock clock(most_spans);
//   clock.at_block(3);
//   { PhaseTimer timer(clock, Phase::kSolve); ... }   // a timer inside another one takes over: no
//   second counts twice clock.stop();                                     // seconds(), spans(),
//   elapsed() are final
//
// One thread uses a clock. What no timer covers is Phase::kOther, so the phases of a rank add up to
// its time.
#pragma once

#include <array>
#include <cstdint>
#include <numeric>
#include <string_view>
#include <utility>
#include <vector>

#include "core/log.h"

namespace bitmill {

enum class Phase {
  kRead,      // waiting for bytes of the source
  kForward,   // linear layers and attention, float or quantized
  kHessian,   // sums over the inputs of cuts
  kExchange,  // between the members of a stage: sums, results
  kSolve,     // grids, factorizations, sweeps
  kSearch,    // AWQ's pass over a block
  kPack,      // codes into the format's words
  kWrite,     // waiting for the disk
  kTransfer,  // handing activations to the next stage, until it takes them
  kWait,      // for activations, for slower members, for the others at the end
  kOther
};
constexpr int kPhases = 11;
std::string_view phase_name(Phase phase);
// Seconds per phase of one rank.
using PhaseSeconds = std::array<double, kPhases>;

// What a timeline tells apart: phases that alternate with every micro-batch or tensor are one.
enum class Activity {
  kRead,
  kCapture,
  kSolve,
  kSearch,
  kExchange,
  kTransfer,
  kWrite,
  kWait,
  kOther
};
constexpr int kActivities = 9;
std::string_view activity_name(Activity activity);
Activity activity_of(Phase phase);  // kForward and kHessian: kCapture; kPack: kWrite

// A rank did `what` from `start` to `end`, seconds since the run began. `block`: the one at work,
// or the first of a wave of propagation.mode=full; -1: before the first.
struct Span {
  Activity what = Activity::kOther;
  int64_t block = -1;
  double start = 0, end = 0;
};

// Keeps a sequence of spans short. Spans below a resolution become groups, each named for what took
// most of it; the resolution doubles whenever more than `most` spans are left, until it is the
// whole time.
class SpanRecorder {
 public:
  explicit SpanRecorder(size_t most) : most_(most) {}
  // Begins where the one before ended.
  void add(const Span& span);
  // All of them; the recorder is then empty.
  std::vector<Span> take();

 private:
  void put(const Span& span);
  void close_group();
  void coarsen();

  size_t most_;
  double resolution_ = 1e-4;
  std::vector<Span> spans_;
  bool open_ = false;
  Span group_;
  std::array<double, kActivities> inside_{};  // seconds of the group
};

class RankClock {
 public:
  // Starts now; all ranks should do so together.
  explicit RankClock(size_t most_spans = 64) : recorder_(most_spans) {}
  // The block that what follows belongs to.
  void at_block(int64_t block);
  // Returns the phase that was on until now.
  Phase enter(Phase phase);
  void stop() { enter(Phase::kOther); }

  const PhaseSeconds& seconds() const { return seconds_; }
  double elapsed() const { return std::accumulate(seconds_.begin(), seconds_.end(), 0.0); }
  std::vector<Span> take_spans() { return recorder_.take(); }

 private:
  Stopwatch watch_;
  Phase phase_ = Phase::kOther;
  int64_t block_ = -1;
  double since_ = 0;
  PhaseSeconds seconds_{};
  SpanRecorder recorder_;
};

// The time between construction and destruction belongs to one phase, but for that of timers
// inside.
class PhaseTimer {
 public:
  PhaseTimer(RankClock& clock, Phase phase) : clock_(clock), before_(clock.enter(phase)) {}
  ~PhaseTimer() { clock_.enter(before_); }
  PhaseTimer(const PhaseTimer&) = delete;

 private:
  RankClock& clock_;
  Phase before_;
};

}  // namespace bitmill
