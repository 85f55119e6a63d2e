// Micro-batches on their way between stages: both ends are asynchronous and hold a bounded number of them, so that a stage
// computes one while the next arrives and the one before leaves.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "comm/transport.h"
#include "pipeline/calibration.h"
#include "models/family.h"

namespace bitmill {

// Micro-batches in flight at most, at each end.
constexpr size_t kBatchesInFlight = 4;

// Takes a sequence of activations from one rank. The sender sends the same sequence of shapes.
class BatchReceiver {
 public:
  // `shapes`: sequences and length of each tensor to come, in order, [tokens, hidden] in the compute type.
  BatchReceiver(Transport& transport, int from, Backend& backend, std::vector<BatchRange> ranges, int64_t length,
                int64_t hidden, int streams);
  // The next one. Waits for it.
  MicroBatch receive();

 private:
  struct Arriving {
    Tensor host;
    std::unique_ptr<Transfer> transfer;
  };
  void post();

  Transport& transport_;
  int from_;
  Backend& backend_;
  std::vector<BatchRange> ranges_;
  int64_t length_, hidden_;
  size_t streams_, posted_ = 0, received_ = 0;  // counted in tensors: streams per range
  std::deque<Arriving> arriving_;
};

class BatchSender {
 public:
  BatchSender(Transport& transport, int to, Backend& backend) : transport_(transport), to_(to), backend_(backend) {}
  // Takes the tensor and frees it once it has left. Waits while kBatchesInFlight are on their way.
  void send(Tensor hidden);
  // Waits for all.
  void finish();

 private:
  struct Leaving {
    Tensor host;
    std::unique_ptr<Transfer> transfer;
  };

  Transport& transport_;
  int to_;
  Backend& backend_;
  std::deque<Leaving> leaving_;
};

// The micro-batches of one rank between two blocks: those of its lanes, all at hand or still arriving.
struct Activations {
  int64_t length = 0;  // tokens per sample
  std::vector<BatchRange> ranges;
  std::vector<MicroBatch> batches;
  // The same tokens as the float model has them, for gptaq; empty when nothing compares with it.
  std::vector<MicroBatch> float_batches;
  // Puts micro-batch i (of both streams) in its place and waits for it if it must; empty: all are there. Asked for in
  // ascending order.
  std::function<void(size_t)> arrive;
  // Takes micro-batch i away once the stage's last block has made it; empty: they stay.
  std::function<void(size_t)> leave;

  void await(size_t i) {
    if (arrive) arrive(i);
  }
};

}  // namespace bitmill
