// Tensor data plane: moves tensors between ranks. Implementations: self (one rank), MPI; NCCL joins in transport.cc's
// factory. Messages of one pair of ranks arrive in the order in which they were started, so no tags are negotiated: both
// ends call in plan order.
#pragma once

#include <memory>
#include <string>

#include "comm/communicator.h"
#include "core/tensor.h"

namespace bitmill {

// A tensor on its way: its memory must stay until `wait` has returned or `done` has said true. Destroyed before, it is
// cancelled.
class Transfer {
 public:
  virtual ~Transfer() = default;
  virtual bool done() = 0;  // never waits; also lets other transfers of this rank move on
  virtual void wait() = 0;
};

class Transport {
 public:
  virtual ~Transport() = default;
  virtual std::string name() const = 0;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // Host-visible tensors; dtype and shape are known to both ends by plan. `to` and `from` are other ranks.
  virtual std::unique_ptr<Transfer> start_send(TensorView tensor, int to) = 0;
  virtual std::unique_ptr<Transfer> start_receive(TensorView tensor, int from) = 0;

  void send(TensorView tensor, int to) { start_send(tensor, to)->wait(); }
  void receive(TensorView tensor, int from) { start_receive(tensor, from)->wait(); }
};

// kind: auto | mpi (self for one rank) | nccl (Error kDoesNotFit where the build or the device lacks it). `comm` outlives
// the transport.
std::unique_ptr<Transport> make_transport(const std::string& kind, Communicator& comm);

}  // namespace bitmill
