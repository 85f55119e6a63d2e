// What plan and quantize work out alike: the machine, the job's shape, what is copied, and the fingerprint.
#pragma once

#include "comm/communicator.h"
#include "core/options.h"
#include "pipeline/loader.h"
#include "pipeline/plan.h"
#include "pipeline/run_state.h"

namespace bitmill {

// The machine this job runs on: its ranks, and the memory each may use.
PlanMachine machine_of(const RunOptions& options, Communicator& comm);

// Tensors of the source that the family does not know and that an output takes along. Buffers that every loader recomputes
// (rotary inverse frequencies) are left behind.
std::vector<PackedSpec> other_tensors(const ModelSource& source);

// Error(kInput) when the source is quantized already.
void refuse_quantized(const ModelSource& source);

// evaluate.tokens as ids [windows, tokens]. Error(kInput), also for windows that are too short to predict anything.
Tensor read_evaluation_tokens(const RunOptions& options, const ModelSpec& spec);

// Everything that changes the numbers or the files of the result.
Fingerprint fingerprint_of(const RunOptions& options, const ModelSource& source, DType compute, TensorView ids);

}  // namespace bitmill
