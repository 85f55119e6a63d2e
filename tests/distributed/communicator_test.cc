#include "comm/communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <thread>

#include "comm/transport.h"
#include "support/mpi_main.h"

namespace bitmill {
namespace {

using testing::world;

TEST(Communicator, BroadcastFromEveryRank) {
  for (int root = 0; root < world().size(); ++root) {
    const std::string text(100000, static_cast<char>('a' + root));
    EXPECT_EQ(world().broadcast(world().rank() == root ? text : "", root), text);
  }
  EXPECT_EQ(world().broadcast(""), "");
}

TEST(Communicator, GatherKeepsRankOrderAndLengths) {
  const auto all = world().gather(std::string(static_cast<size_t>(world().rank()), 'x'));
  if (world().rank() != 0) {
    EXPECT_TRUE(all.empty());
    return;
  }
  ASSERT_EQ(all.size(), static_cast<size_t>(world().size()));
  for (size_t rank = 0; rank < all.size(); ++rank) EXPECT_EQ(all[rank].size(), rank);
}

TEST(Communicator, MaxOverRanks) { EXPECT_EQ(world().max(world().rank()), world().size() - 1); }

TEST(Communicator, AgreeReturnsTheLowestFailingRanksError) {
  EXPECT_FALSE(world().agree(std::nullopt));
  std::optional<Error> mine;
  if (world().rank() >= world().size() / 2)
    mine = Error(ExitCode::kInput, "rank " + std::to_string(world().rank()) + " says: two words");
  const auto agreed = world().agree(mine);
  ASSERT_TRUE(agreed);
  EXPECT_EQ(agreed->code(), ExitCode::kInput);
  EXPECT_EQ(agreed->what(), "rank " + std::to_string(world().size() / 2) + " says: two words");
}

TEST(Communicator, TogetherThrowsEverywhere) {
  EXPECT_THROW(on_rank_zero(world(), [] { fail(ExitCode::kOutput, "disk {}", "full"); }), AgreedError);
  EXPECT_NO_THROW(together(world(), [] {}));
}

TEST(Communicator, PostsArriveInOrderPerSender) {
  constexpr int kNotes = 50;
  if (world().rank() != 0) {
    for (int i = 0; i < kNotes; ++i) world().post(std::to_string(world().rank()) + " " + std::to_string(i));
  } else {
    std::vector<int> next(static_cast<size_t>(world().size()), 0);
    int left = kNotes * (world().size() - 1);
    while (left > 0) {
      const auto note = world().poll_post();
      if (!note) {
        std::this_thread::yield();
        continue;
      }
      const size_t blank = note->find(' ');
      const size_t from = std::stoul(note->substr(0, blank));
      EXPECT_EQ(std::stoi(note->substr(blank + 1)), next[from]++);
      --left;
    }
  }
  world().barrier();
}

TEST(Transport, ARingOfTensors) {
  const auto transport = make_transport("auto", world());
  EXPECT_EQ(transport->name(), world().size() == 1 ? "self" : "mpi");
  if (world().size() == 1) {
    EXPECT_THROW(transport->send(Tensor(DType::kF32, {1}), 0), Error);
    return;
  }
  const int rank = world().rank(), size = world().size();
  Tensor out(DType::kF32, {1000, 3}), in(DType::kF32, {1000, 3});
  std::iota(out.as<float>(), out.as<float>() + 3000, static_cast<float>(rank));
  // A chain, as the pipeline uses it: receive from the left, send to the right.
  if (rank > 0) {
    transport->receive(in, rank - 1);
    EXPECT_EQ(in.as<float>()[0], static_cast<float>(rank - 1));
    EXPECT_EQ(in.as<float>()[2999], static_cast<float>(rank - 1 + 2999));
  }
  if (rank + 1 < size) transport->send(out, rank + 1);
}

TEST(Transport, UnknownKindsAreRefused) {
  EXPECT_THROW(make_transport("pigeon", world()), Error);
  EXPECT_THROW(make_transport("nccl", world()), Error);
}

// Ranks of one parity, in order.
TEST(Communicator, SplitsIntoIndependentParts) {
  const int rank = world().rank(), size = world().size();
  Communicator part = world().split(rank % 2);
  EXPECT_EQ(part.rank(), rank / 2);
  EXPECT_EQ(part.size(), rank % 2 == 0 ? (size + 1) / 2 : size / 2);
  // Both parts broadcast at the same time, from their last rank.
  const std::string text = part.broadcast(rank % 2 == 0 ? "even" : "odd", part.size() - 1);
  EXPECT_EQ(text, rank % 2 == 0 ? "even" : "odd");
  EXPECT_EQ(part.max(rank), (size - 1) % 2 == rank % 2 ? size - 1 : size - 2);
}

// Where ranks make different calls a run would hang: all are told instead.
TEST(Communicator, DifferentCallsAreNamed) {
  if (world().size() == 1) GTEST_SKIP() << "one rank cannot differ";
  Communicator checked = world().split(0);
  checked.check_calls(true);
  checked.barrier();
  try {
    if (checked.rank() == 1) checked.barrier();
    else checked.broadcast("text");
    ADD_FAILURE() << "nothing noticed";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kInternal);
    EXPECT_THAT(error.what(), ::testing::HasSubstr(checked.rank() == 1 ? "wait at a barrier" : "broadcast"));
  }
  EXPECT_EQ(checked.broadcast(checked.rank() == 0 ? "again" : ""), "again");
}

// Everybody sends to everybody before anybody waits; messages of one pair keep their order.
TEST(Transport, ManyMessagesAtOnce) {
  if (world().size() == 1) GTEST_SKIP() << "nobody to send to";
  const auto transport = make_transport("mpi", world());
  const int rank = world().rank(), size = world().size();
  constexpr int kEach = 20;
  constexpr int64_t kElements = 30000;  // beyond what MPI buffers by itself
  std::vector<Tensor> in, out;
  std::vector<std::unique_ptr<Transfer>> transfers;
  for (int k = 0; k < kEach; ++k)
    for (int peer = 0; peer < size; ++peer) {
      if (peer == rank) continue;
      in.emplace_back(DType::kI32, Shape{kElements});
      transfers.push_back(transport->start_receive(in.back(), peer));
      out.emplace_back(DType::kI32, Shape{kElements});
      std::fill_n(out.back().as<int32_t>(), kElements, rank * 1000 + k);
      transfers.push_back(transport->start_send(out.back(), peer));
    }
  for (const auto& transfer : transfers) transfer->wait();
  size_t at = 0;
  for (int k = 0; k < kEach; ++k)
    for (int peer = 0; peer < size; ++peer)
      if (peer != rank) {
        EXPECT_EQ(in[at].as<int32_t>()[0], peer * 1000 + k);
        EXPECT_EQ(in[at++].as<int32_t>()[kElements - 1], peer * 1000 + k);
      }
  for (const auto& transfer : transfers) EXPECT_TRUE(transfer->done());
}

// MPI counts are ints; a message of more than 2^31 bytes goes in pieces.
TEST(Transport, MoreBytesThanAnIntCounts) {
  if (world().size() != 2) GTEST_SKIP() << "needs 2 ranks and 5 GB";
  constexpr int64_t kBytes = (int64_t{1} << 31) + 12345;
  const auto transport = make_transport("mpi", world());
  Tensor large(DType::kU8, {kBytes});
  const auto pattern = [](int64_t i) { return static_cast<uint8_t>(i * 31 + (i >> 20)); };
  if (world().rank() == 0) {
    for (int64_t i = 0; i < kBytes; i += 4093) large.as<uint8_t>()[i] = pattern(i);
    transport->send(large, 1);
    return;
  }
  transport->receive(large, 0);
  int64_t wrong = 0;
  for (int64_t i = 0; i < kBytes; i += 4093) wrong += large.as<uint8_t>()[i] != pattern(i);
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace bitmill
