// A checkpoint that computes what another does, with a few input channels of its linears much
// louder: what large models look like, and what plain rounding handles badly.
#pragma once

#include <string>

namespace bitmill::testing {

// Copies the float checkpoint in `source` to `target` (made here). In every block, every
// `stride`-th channel of the two norms is multiplied by `factor` (a power of two, so that nothing
// is rounded) and the columns of q, k, v, gate and up that see it are divided by it.
void write_outlier_model(const std::string& source, const std::string& target, int stride,
                         float factor);

}  // namespace bitmill::testing
