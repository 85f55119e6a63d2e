// How fast one rank computes and moves bytes: what the plan's estimate of time is made of.
#pragma once

#include "core/options.h"
#include "core/tensor.h"

namespace bitmill {

// FLOP/s, weights/s and bytes/s of one rank; `storage_bandwidth` of all ranks together.
struct Rates {
  double forward_flops = 0;  // linear layers and attention
  double hessian_flops = 0;  // updates of packed triangles
  // Cholesky factorization of a very large matrix; factor_rate() has the one at n columns.
  double factor_flops = 0;
  double factor_half_columns = 0;
  double sweep_flops = 0;
  double grid_elements = 0;  // weights tried on a grid, times the grids tried
  double read_bandwidth = 0, write_bandwidth = 0, link_bandwidth = 0;
  double storage_bandwidth = 0;
  double latency = 0;    // seconds per message
  bool assumed = false;  // some rate is an assumption, not a measurement
};

// Assumptions, to be replaced by what `bitmill doctor --benchmark` measures.
// GPU: 790 TFLOP/s bf16 matmul, of which a triangle's tiles get 700; 50 TFLOP/s fp32; factorization
//   30 TFLOP/s n/(n + 8192); 45 GB/s between ranks; 7 GB/s per rank to and from files and 50 GB/s
//   in all. Order of magnitude of an H100; none of it measured.
// CPU: two cores of a server: 400 GFLOP/s in bf16 and 210 in fp32, factorization 220 n/(n + 550),
//   sweep 120; 1 GB/s between ranks and 1 GB/s per rank to and from files, 10 GB/s in all.
Rates assumed_rates(bool gpu, DType compute);
// The rates of [machine], the assumption for each that is 0.
Rates rates_of(const RunOptions::Machine& machine, bool gpu, DType compute);

// FLOP/s of one factorization: factor_flops * n / (n + factor_half_columns). Small ones starve.
double factor_rate(const Rates& rates, int64_t n);
// The inverse: factor_flops of a machine that factorizes n columns at `measured` FLOP/s.
double large_factor_rate(double measured, int64_t n, const Rates& rates);

}  // namespace bitmill
