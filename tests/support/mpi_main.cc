// main() of distributed tests: starts MPI, prints on rank 0 only, and fails the program when any rank failed.
#include <gtest/gtest.h>

#include <iostream>

#include "support/mpi_main.h"

namespace bitmill::testing {

Communicator*& world_slot() {
  static Communicator* world = nullptr;
  return world;
}

Communicator& world() { return *world_slot(); }

}  // namespace bitmill::testing

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  bitmill::Communicator comm = bitmill::Communicator::start(&argc, &argv);
  bitmill::testing::world_slot() = &comm;
  if (comm.rank() != 0) {
    auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
  }
  const int failed = RUN_ALL_TESTS();
  const int worst = static_cast<int>(comm.max(failed));
  if (worst != 0 && failed != 0) std::cerr << "rank " << comm.rank() << " failed" << std::endl;
  return worst;
}
