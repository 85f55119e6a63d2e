#include "support/simulated_machine.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <thread>

namespace bitmill::testing {

struct SimulatedMachine::Message {
  Channel channel;
  TensorView source, target;
  bool sent = false, awaited = false;
  double arrival = 0, asked_for = 0;
  bool matched() const { return sent && awaited; }
  int from() const { return std::get<1>(channel); }
  int to() const { return std::get<2>(channel); }
};

class SimulatedTransfer final : public Transfer {
 public:
  using Message = SimulatedMachine::Message;
  SimulatedTransfer(SimulatedMachine& machine, std::shared_ptr<Message> message, bool sends)
      : machine_(machine), message_(std::move(message)), sends_(sends) {}
  ~SimulatedTransfer() override {
    if (message_) machine_.cancel(*message_);
  }
  // Whether a message has arrived is known once its receiver has come far enough, which real time
  // decides; "not yet" is an answer that is always allowed and that real time does not change. A
  // caller who then waits for a message that had arrived loses no virtual time.
  bool done() override { return false; }
  void wait() override {
    if (!message_) return;
    machine_.wait(*message_, sends_);
    message_.reset();
  }

 private:
  SimulatedMachine& machine_;
  std::shared_ptr<Message> message_;
  bool sends_;
};

class SimulatedTransport final : public Transport {
 public:
  SimulatedTransport(SimulatedMachine& machine, std::string group, std::vector<int> members,
                     int mine)
      : machine_(machine), group_(std::move(group)), members_(std::move(members)), mine_(mine) {}
  std::string name() const override { return "simulated"; }
  int rank() const override { return mine_; }
  int size() const override { return static_cast<int>(members_.size()); }
  std::unique_ptr<Transfer> start_send(TensorView tensor, int to) override {
    const auto message = machine_.start_send({group_, members_.at(mine_), members_.at(to)}, tensor);
    return std::make_unique<SimulatedTransfer>(machine_, message, true);
  }
  std::unique_ptr<Transfer> start_receive(TensorView tensor, int from) override {
    const auto message =
        machine_.start_receive({group_, members_.at(from), members_.at(mine_)}, tensor);
    return std::make_unique<SimulatedTransfer>(machine_, message, false);
  }

 private:
  SimulatedMachine& machine_;
  std::string group_;
  std::vector<int> members_;
  int mine_;
};

SimulatedMachine::SimulatedMachine(int ranks, LinkModel link)
    : link_(link),
      clocks_(ranks),
      link_free_(ranks),
      wake_(ranks),
      waits_for_(ranks),
      returned_(ranks) {}

std::unique_ptr<Transport> SimulatedMachine::transport(const std::string& group,
                                                       std::vector<int> members, int mine) {
  return std::make_unique<SimulatedTransport>(*this, group, std::move(members), mine);
}

double SimulatedMachine::seconds() const {
  double latest = 0;
  for (const VirtualClock& clock : clocks_) latest = std::max(latest, clock.now());
  return latest;
}

std::shared_ptr<SimulatedMachine::Message> SimulatedMachine::start_send(const Channel& channel,
                                                                        TensorView tensor) {
  std::lock_guard lock(mutex_);
  Queue& queue = queues_[channel];
  std::shared_ptr<Message> message;
  if (queue.receives.empty()) {
    message = queue.sends.emplace_back(std::make_shared<Message>(Message{channel, {}, {}}));
  } else {
    message = queue.receives.front();
    queue.receives.pop_front();
  }
  double& free = link_free_[message->from()];
  free = std::max(free, clock(message->from()).now()) +
         static_cast<double>(tensor.bytes()) / link_.bytes_per_second;
  message->arrival = free + link_.latency;
  message->source = tensor;
  message->sent = true;
  if (message->matched()) match(*message);
  return message;
}

std::shared_ptr<SimulatedMachine::Message> SimulatedMachine::start_receive(const Channel& channel,
                                                                           TensorView tensor) {
  std::lock_guard lock(mutex_);
  Queue& queue = queues_[channel];
  std::shared_ptr<Message> message;
  if (queue.sends.empty()) {
    message = queue.receives.emplace_back(std::make_shared<Message>(Message{channel, {}, {}}));
  } else {
    message = queue.sends.front();
    queue.sends.pop_front();
  }
  message->asked_for = clock(message->to()).now();
  message->target = tensor;
  message->awaited = true;
  if (message->matched()) match(*message);
  return message;
}

void SimulatedMachine::match(Message& message) {
  BITMILL_CHECK(message.source.bytes() == message.target.bytes());
  std::memcpy(message.target.data, message.source.data,
              static_cast<size_t>(message.source.bytes()));
  wake_[message.from()].notify_one();
  wake_[message.to()].notify_one();
}

void SimulatedMachine::wait(Message& message, bool sends) {
  const int rank = sends ? message.from() : message.to();
  std::unique_lock lock(mutex_);
  waits_for_[rank] = &message;
  refuse_deadlock();
  wake_[rank].wait(lock, [&] { return message.matched() || error_; });
  waits_for_[rank] = nullptr;
  if (!message.matched()) throw std::runtime_error("another simulated rank failed");
  clock(rank).wait_until(sends ? std::max(message.arrival, message.asked_for) : message.arrival);
}

void SimulatedMachine::cancel(const Message& message) {
  std::lock_guard lock(mutex_);
  Queue& queue = queues_[message.channel];
  const auto is_this = [&](const std::shared_ptr<Message>& other) {
    return other.get() == &message;
  };
  std::erase_if(queue.sends, is_this);
  std::erase_if(queue.receives, is_this);
}

void SimulatedMachine::stop(std::exception_ptr error) {
  if (!error_) error_ = error;
  for (std::condition_variable& wake : wake_) wake.notify_one();
}

void SimulatedMachine::refuse_deadlock() {
  std::string waits;
  for (int rank = 0; rank < ranks(); ++rank) {
    const Message* message = waits_for_[rank];
    if (returned_[rank]) continue;
    if (message == nullptr || message->matched()) return;
    waits += fmt::format("{}rank {} waits for {} {}", waits.empty() ? "" : ", ", rank,
                         message->sent ? "receiver" : "sender",
                         message->sent ? message->to() : message->from());
  }
  if (!waits.empty()) stop(std::make_exception_ptr(std::runtime_error("deadlock: " + waits)));
}

void SimulatedMachine::run(const std::function<void(int)>& body) {
  const auto work = [&](int rank) {
    std::exception_ptr error;
    try {
      body(rank);
    } catch (...) {
      error = std::current_exception();
    }
    std::lock_guard lock(mutex_);
    returned_[rank] = true;
    if (error) stop(error);
    refuse_deadlock();
  };
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks(); ++rank) threads.emplace_back(work, rank);
  for (std::thread& thread : threads) thread.join();
  if (error_) std::rethrow_exception(error_);
}

}  // namespace bitmill::testing
