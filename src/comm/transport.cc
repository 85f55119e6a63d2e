#include "comm/transport.h"

namespace bitmill {
namespace {

constexpr int kActivationTag = 2;

// One rank: there is nobody to send to, and a plan that tries is a defect.
class SelfTransport final : public Transport {
 public:
  std::string name() const override { return "self"; }
  void send(TensorView, int to) override { refuse(to); }
  void receive(TensorView, int from) override { refuse(from); }

 private:
  [[noreturn]] static void refuse(int peer) {
    fail(ExitCode::kInternal, "the plan of a one-rank run names rank {}", peer);
  }
};

class MpiTransport final : public Transport {
 public:
  explicit MpiTransport(Communicator& comm) : comm_(comm) {}
  std::string name() const override { return "mpi"; }
  void send(TensorView t, int to) override { comm_.send(t.data, t.bytes(), to, kActivationTag); }
  void receive(TensorView t, int from) override { comm_.receive(t.data, t.bytes(), from, kActivationTag); }

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
