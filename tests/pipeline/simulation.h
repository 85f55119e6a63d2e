// Simulated runs of the real pipeline: run_rank on P x D threads, each with a modelled backend, a
// virtual clock and simulated links, against the estimate of the plan that it runs by. Checkpoints
// are read and written, which takes no virtual time.
//
// The model is small and its rates are low by as much: on one rank a block takes 4 s of forward, 3
// s of Hessians, 1.6 s of solving that splits in row tiles and 0.4 s of factorizations that does
// not.
#pragma once

#include <string>

#include "pipeline/loader.h"
#include "pipeline/plan.h"
#include "support/paths.h"

namespace bitmill::testing {

struct SimulatedRun {
  int stages = 1, width = 1;
  std::string mode = "quantized";  // propagation.mode
  bool true_sequential = true;
  std::string algorithm = "gptq";
  double link_bytes_per_second = 1e30, latency = 0;
  int64_t samples = 128;        // of 8 tokens, one per micro-batch, in 8 lanes
  int64_t memory_per_rank = 0;  // bytes; 0: unlimited. Little memory makes waves
};

struct SimulatedResult {
  double estimated_seconds = 0;     // Plan::seconds
  double simulated_seconds = 0;     // the latest clock
  double busy = 0;                  // mean over ranks: part of the time that was no waiting
  int64_t batches = 0;              // micro-batches of a rank
  int waves = 0;                    // most of any stage; full mode
  int64_t linears = 0, blocks = 0;  // quantized and durable, as the ranks told
  double difference() const { return simulated_seconds / estimated_seconds - 1; }
};

class Simulation {
 public:
  // A decoder of `blocks` equal blocks in a temporary folder: 4 linears [hidden, hidden], gate and
  // up [intermediate, hidden], down.
  explicit Simulation(int64_t blocks, int64_t hidden = 128, int64_t intermediate = 512);
  SimulatedResult run(const SimulatedRun& run) const;
  const Rates& rates() const { return rates_; }

 private:
  RunOptions options_of(const SimulatedRun& run) const;
  Plan plan_of(const SimulatedRun& run, const RunOptions& options) const;
  void set_rates();

  TemporaryDirectory directory_;
  ModelSource source_;
  Rates rates_;
};

}  // namespace bitmill::testing
