// The communicator of a distributed test program (support/mpi_main.cc).
#pragma once

#include "comm/communicator.h"

namespace bitmill::testing {
Communicator& world();
}  // namespace bitmill::testing
