#include "comm/transport.h"

namespace bitmill {
namespace {

constexpr int kActivationTag = 2;

// One rank: there is nobody to send to, and a plan that tries is a defect.
class SelfTransport final : public Transport {
 public:
  std::string name() const override { return "self"; }
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::unique_ptr<Transfer> start_send(TensorView, int to) override { refuse(to); }
  std::unique_ptr<Transfer> start_receive(TensorView, int from) override { refuse(from); }

 private:
  [[noreturn]] static void refuse(int peer) {
    fail(ExitCode::kInternal, "the plan of a one-rank run names rank {}", peer);
  }
};

class MpiTransfer final : public Transfer {
 public:
  explicit MpiTransfer(Message message) : message_(std::move(message)) {}
  bool done() override { return message_.done(); }
  void wait() override { message_.wait(); }

 private:
  Message message_;
};

class MpiTransport final : public Transport {
 public:
  explicit MpiTransport(Communicator& comm) : comm_(comm) {}
  std::string name() const override { return "mpi"; }
  int rank() const override { return comm_.rank(); }
  int size() const override { return comm_.size(); }
  std::unique_ptr<Transfer> start_send(TensorView t, int to) override {
    return std::make_unique<MpiTransfer>(comm_.start_send(t.data, t.bytes(), to, kActivationTag));
  }
  std::unique_ptr<Transfer> start_receive(TensorView t, int from) override {
    return std::make_unique<MpiTransfer>(
        comm_.start_receive(t.data, t.bytes(), from, kActivationTag));
  }

 private:
  Communicator& comm_;
};

}  // namespace

std::unique_ptr<Transport> make_transport(const std::string& kind, Communicator& comm) {
  if (kind == "nccl")
    fail(ExitCode::kDoesNotFit, "run.transport=nccl: this build has no NCCL transport; use mpi or auto");
  if (kind != "auto" && kind != "mpi")
    fail(ExitCode::kUsage, "run.transport={} is unknown; known are auto, mpi, nccl", kind);
  if (comm.size() == 1) return std::make_unique<SelfTransport>();
  return std::make_unique<MpiTransport>(comm);
}

}  // namespace bitmill
