#include "comm/communicator.h"

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

}  // namespace
}  // namespace bitmill
