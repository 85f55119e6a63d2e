#include "pipeline/rates.h"

namespace bitmill {

Rates assumed_rates(bool gpu, DType compute) {
  Rates rates;
  rates.assumed = true;
  if (gpu) {
    rates.forward_flops = 790e12;
    rates.hessian_flops = 700e12;
    rates.factor_flops = 30e12;
    rates.factor_half_columns = 8192;
    rates.sweep_flops = 50e12;
    rates.grid_elements = 1e12;
    rates.read_bandwidth = rates.write_bandwidth = 7e9;
    rates.storage_bandwidth = 50e9;
    rates.link_bandwidth = 45e9;
    rates.latency = 10e-6;
  } else {
    rates.forward_flops = rates.hessian_flops = 400e9;
    rates.factor_flops = 220e9;
    rates.factor_half_columns = 550;
    rates.sweep_flops = 120e9;
    rates.grid_elements = 1e9;
    rates.read_bandwidth = rates.write_bandwidth = 1e9;
    rates.storage_bandwidth = 10e9;
    rates.link_bandwidth = 1e9;
    rates.latency = 20e-6;
  }
  if (compute == DType::kF32) rates.forward_flops = rates.hessian_flops = gpu ? 50e12 : 210e9;
  return rates;
}

Rates rates_of(const RunOptions::Machine& machine, bool gpu, DType compute) {
  Rates rates = assumed_rates(gpu, compute);
  rates.assumed = false;
  const auto take = [&](double given, double& rate) {
    if (given > 0)
      rate = given;
    else
      rates.assumed = true;
  };
  take(machine.forward_flops, rates.forward_flops);
  take(machine.hessian_flops, rates.hessian_flops);
  take(machine.factor_flops, rates.factor_flops);
  take(machine.sweep_flops, rates.sweep_flops);
  take(machine.grid_elements, rates.grid_elements);
  take(machine.read_bandwidth, rates.read_bandwidth);
  take(machine.write_bandwidth, rates.write_bandwidth);
  take(machine.link_bandwidth, rates.link_bandwidth);
  take(machine.storage_bandwidth, rates.storage_bandwidth);
  return rates;
}

double factor_rate(const Rates& rates, int64_t n) {
  const double columns = static_cast<double>(n);
  return rates.factor_flops * columns / (columns + rates.factor_half_columns);
}

double large_factor_rate(double measured, int64_t n, const Rates& rates) {
  const double columns = static_cast<double>(n);
  return measured * (columns + rates.factor_half_columns) / columns;
}

}  // namespace bitmill
