// A machine that only exists in virtual time: every rank is a thread of this process with a clock
// of its own, operations cost what a model says (support/modelled_backend.h), and messages take
// time on links. The code that runs on it is the product's; how long it took is a simulation.
//
// Time is deterministic: it follows from what ranks compute and send, never from how fast threads
// run or in which order they are scheduled.
//
//   message   leaves when the sender has started it and the sender's link is free, holds the link
//             for bytes / bytes_per_second, arrives `latency` later; links end at the receiver
//             without limit
//   receive   its `wait` sets the receiver's clock to the arrival, if that is later
//   send      its `wait` sets the sender's clock to the arrival or to the moment when the receive
//             was started, whichever is later: as with MPI's large messages, the sender's memory is
//             needed until the receiver has asked for the message
//
// Example, 10 bytes/s and latency 1: rank 0 starts 20 and 30 bytes at time 0; they leave at 0 and 2
// and arrive at 3 and 6.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "comm/transport.h"

namespace bitmill::testing {

// Seconds since the start of one rank's run; used by its thread alone.
class VirtualClock {
 public:
  double now() const { return now_; }
  double waited() const { return waited_; }  // of now(): time that only passed
  void spend(double seconds) { now_ += seconds; }
  void wait_until(double time) {
    if (time <= now_) return;
    waited_ += time - now_;
    now_ = time;
  }

 private:
  double now_ = 0, waited_ = 0;
};

struct LinkModel {
  double bytes_per_second = 1e30, latency = 0;
};

class SimulatedMachine {
 public:
  SimulatedMachine(int ranks, LinkModel link);
  int ranks() const { return static_cast<int>(clocks_.size()); }
  VirtualClock& clock(int rank) { return clocks_[static_cast<size_t>(rank)]; }

  // The end of rank `members[mine]`, to whom members[i] is rank i. Groups of equal members are one
  // group if they have one name; a rank's groups share its link. The machine outlives it.
  std::unique_ptr<Transport> transport(const std::string& group, std::vector<int> members,
                                       int mine);

  // body(rank) on a thread per rank. The first exception ends all waits and is rethrown; so does
  // std::runtime_error("deadlock: ...") once every rank that has not returned waits for a message
  // that nobody will start.
  void run(const std::function<void(int rank)>& body);
  // The latest clock.
  double seconds() const;

 private:
  friend class SimulatedTransport;
  friend class SimulatedTransfer;
  struct Message;
  using Channel = std::tuple<std::string, int, int>;  // group, from, to
  struct Queue {  // started by one end only; at most one of the two is not empty
    std::deque<std::shared_ptr<Message>> sends, receives;
  };

  std::shared_ptr<Message> start_send(const Channel& channel, TensorView tensor);
  std::shared_ptr<Message> start_receive(const Channel& channel, TensorView tensor);
  void wait(Message& message, bool sends);
  void cancel(const Message& message);
  void match(Message& message);
  void stop(std::exception_ptr error);
  void refuse_deadlock();

  const LinkModel link_;
  std::vector<VirtualClock> clocks_;
  std::mutex mutex_;  // of everything below
  std::map<Channel, Queue> queues_;
  std::vector<double> link_free_;
  std::vector<std::condition_variable> wake_;
  std::vector<const Message*> waits_for_;  // nullptr: the rank computes
  std::vector<bool> returned_;
  std::exception_ptr error_;
};

}  // namespace bitmill::testing
