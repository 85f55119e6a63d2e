// The simulated machine itself, on cases to be worked out by hand.
#include "support/simulated_machine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "pipeline/batch_flow.h"
#include "support/modelled_backend.h"

namespace bitmill {
namespace {
using testing::LinkModel;
using testing::SimulatedMachine;

Tensor bytes(int64_t count) {
  return Tensor::zeros(DType::kU8, {count});
}

// 10 bytes/s: 20 bytes leave from 0 to 2, 30 bytes from 2 to 5; each arrives a second later.
TEST(SimulatedMachine, MessagesOfOneSenderShareItsLink) {
  SimulatedMachine machine(3, {10, 1});
  machine.run([&](int rank) {
    const auto transport = machine.transport("all", {0, 1, 2}, rank);
    if (rank == 0) {
      const Tensor first = bytes(20), second = bytes(30);
      const auto one = transport->start_send(first, 1), two = transport->start_send(second, 2);
      EXPECT_EQ(machine.clock(0).now(), 0);
      one->wait();
      EXPECT_EQ(machine.clock(0).now(), 3);
      two->wait();
    } else {
      const Tensor target = bytes(rank == 1 ? 20 : 30);
      transport->receive(target, 0);
    }
  });
  EXPECT_EQ(machine.clock(0).now(), 6);
  EXPECT_EQ(machine.clock(0).waited(), 6);
  EXPECT_EQ(machine.clock(1).now(), 3);
  EXPECT_EQ(machine.clock(2).now(), 6);
  EXPECT_EQ(machine.seconds(), 6);
}

TEST(SimulatedMachine, DataArriveInOrderAndGroupsAreApart) {
  SimulatedMachine machine(2, LinkModel());
  machine.run([&](int rank) {
    const auto a = machine.transport("a", {0, 1}, rank);
    const auto b = machine.transport("b", {1, 0}, 1 - rank);  // rank 1 is the first here
    EXPECT_EQ(b->rank(), 1 - rank);
    Tensor one = bytes(1), two = bytes(1), three = bytes(1);
    if (rank == 0) {
      *one.as<uint8_t>() = 1, *two.as<uint8_t>() = 2, *three.as<uint8_t>() = 3;
      const auto x = b->start_send(three, 0), y = a->start_send(one, 1), z = a->start_send(two, 1);
      x->wait(), y->wait(), z->wait();
    } else {
      a->receive(one, 0);
      a->receive(two, 0);
      b->receive(three, 1);
      EXPECT_EQ(*one.as<uint8_t>() + 10 * *two.as<uint8_t>() + 100 * *three.as<uint8_t>(), 321);
    }
  });
}

// A send ends when the receiver has asked for it; the message itself was there before.
TEST(SimulatedMachine, ALateReceiverHoldsTheSenderOnly) {
  SimulatedMachine machine(2, {10, 0});
  machine.run([&](int rank) {
    const auto transport = machine.transport("all", {0, 1}, rank);
    const Tensor data = bytes(20);
    if (rank == 0) return transport->send(data, 1);
    machine.clock(1).spend(7);
    transport->receive(data, 0);
  });
  EXPECT_EQ(machine.clock(0).now(), 7);
  EXPECT_EQ(machine.clock(1).now(), 7);
  EXPECT_EQ(machine.clock(1).waited(), 0);
}

// Both ends of a batch flow hold a bounded number. The receiver takes a second for each of 12. It
// asks for 0 to 4 at once and for i > 4 at i - 4 seconds; the sender, who makes them in no time,
// gives the last away when 7 is asked for, after 3 seconds, and ends when 11 is, after 7. However
// slow the threads are.
TEST(SimulatedMachine, BatchFlowIsBounded) {
  for (const int slow : {0, 1}) {
    SimulatedMachine machine(2, LinkModel());
    machine.run([&](int rank) {
      const auto transport = machine.transport("all", {0, 1}, rank);
      testing::ModelledBackend backend(Rates(), DType::kF32, machine.clock(rank));
      BatchSender sender(*transport, 1, backend);
      BatchReceiver receiver(*transport, 0, backend, std::vector<BatchRange>(12, {0, 0, 1}), 1, 1,
                             1);
      for (int i = 0; i < 12; ++i) {
        if (rank == slow) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        if (rank == 0)
          sender.send(Tensor::zeros(DType::kF32, {1, 1}));
        else
          receiver.receive(), machine.clock(1).spend(1);
      }
      if (rank == 1) return;
      EXPECT_EQ(machine.clock(0).now(), 3);
      sender.finish();
    });
    EXPECT_EQ(machine.clock(0).now(), 7);
    EXPECT_EQ(machine.clock(1).now(), 12);
  }
}

TEST(SimulatedMachine, SaysWhoWaitsForWhomInADeadlock) {
  SimulatedMachine machine(3, LinkModel());
  const auto body = [&](int rank) {
    const auto transport = machine.transport("all", {0, 1, 2}, rank);
    const Tensor data = bytes(1);
    if (rank == 0) transport->receive(data, 1);
    if (rank == 1) transport->send(data, 2);
  };
  try {
    machine.run(body);
    FAIL() << "no error";
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "deadlock: rank 0 waits for sender 1, rank 1 waits for receiver 2");
  }
}

TEST(SimulatedMachine, AFailingRankEndsTheWaitOfTheOthers) {
  SimulatedMachine machine(2, LinkModel());
  const auto body = [&](int rank) {
    const auto transport = machine.transport("all", {0, 1}, rank);
    const Tensor data = bytes(1);
    if (rank == 1) fail(ExitCode::kOutput, "disk full");
    transport->receive(data, 1);
  };
  try {
    machine.run(body);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), ::testing::HasSubstr("disk full"));
  }
}

// 2 * 3 tokens * 4 * 5 at 10 FLOP/s; two of those; 6 weights tried on 31 grids at 1 per second.
TEST(ModelledBackend, OperationsTakeTheirTime) {
  SimulatedMachine machine(1, LinkModel());
  Rates rates{10, 20, 1e3, 50, 100, 1, 1, 1, 1, 1, 0, false};
  testing::VirtualClock& clock = machine.clock(0);
  testing::ModelledBackend backend(rates, DType::kF32, clock);
  double before = 0;
  const auto spent = [&] { return clock.now() - std::exchange(before, clock.now()); };
  const Tensor x = Tensor::zeros(DType::kF32, {3, 4}), w = Tensor::zeros(DType::kF32, {5, 4});
  const auto prepared = backend.prepare_linear(w);
  backend.linear(x, *prepared, {}, {}, {});
  EXPECT_NEAR(spent(), 12, 1e-9);
  backend.gated_linear(x, *prepared, {}, *prepared, {}, Activation::kSilu, {});
  EXPECT_NEAR(spent(), 24, 1e-9);
  const Tensor h = Tensor::zeros(DType::kF32, {16});
  backend.hessian_update(x, h);
  EXPECT_NEAR(spent(), 2 * 16 * 3 / 20.0, 1e-9);
  // At 50 columns half of the rate, 500.
  const Tensor a = Tensor::zeros(DType::kF32, {50, 50}), v = Tensor::zeros(DType::kF32, {50});
  EXPECT_TRUE(backend.factorize(a).ok);
  backend.feedback_variance(a, v);
  EXPECT_NEAR(spent(), 50.0 * 50 * 50 / 3 / 500 + 512.0 * 50 * 50 / 500, 1e-9);
  EXPECT_EQ(a.as<float>()[0] + a.as<float>()[49 * 50 + 49], 2);
  const Tensor scales = Tensor::zeros(DType::kF32, {5, 1}), zeros = clone(scales);
  backend.fit_grids(w, {}, -1, {v, v}, scales, zeros);
  EXPECT_NEAR(spent(), 31 * 20, 1e-9);
  EXPECT_EQ(zeros.as<float>()[0], 8);
  const Tensor errors = Tensor::zeros(DType::kF64, {5});
  backend.layer_errors(w, {}, h, 1, errors);
  EXPECT_NEAR(spent(), 5 * 4 * 4 / 100.0, 1e-9);
}

}  // namespace
}  // namespace bitmill
