// Tensor data plane: moves activations between ranks in queue order. Implementations: self (one rank), MPI; NCCL joins in
// transport.cc's factory. Both ends call in plan order, so no tags are negotiated.
#pragma once

#include <memory>
#include <string>

#include "comm/communicator.h"
#include "core/tensor.h"

namespace bitmill {

class Transport {
 public:
  virtual ~Transport() = default;
  virtual std::string name() const = 0;
  // Sends a host-visible tensor; returns when its memory may be reused.
  virtual void send(TensorView tensor, int to) = 0;
  // Receives into `tensor` (dtype and shape known to both ends by plan).
  virtual void receive(TensorView tensor, int from) = 0;
};

// kind: auto | mpi (self for one rank) | nccl (Error kDoesNotFit where the build or the device lacks it).
std::unique_ptr<Transport> make_transport(const std::string& kind, Communicator& comm);

}  // namespace bitmill
