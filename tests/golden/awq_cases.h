// The suite's AWQ kinds (awq_quantize, awq_search, awq_clip, awq_group) as calls of the product's
// search, folding, clipping and rounding.
#pragma once

#include "algorithms/awq.h"
#include "golden/golden_runner.h"

namespace bitmill::golden {

bool is_awq_kind(const std::string& kind);

// Quantized linears by prefix of their output tensors ("out.", "out.gate."), for the runner to
// write.
using AwqLinears = std::map<std::string, QuantizedLinear>;

// Runs one case; everything but the linears goes into outcome.tensors.
AwqLinears run_awq(const Json& golden_case, const Tensors& inputs, DType dtype, Backend& backend,
                   Outcome& outcome);

}  // namespace bitmill::golden
