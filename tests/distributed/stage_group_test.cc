// The ranks of a stage meet: sums of lanes, rows of linears.
#include "pipeline/stage_group.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "support/mpi_main.h"

namespace bitmill {
namespace {

using testing::world;

class StageGroupTest : public ::testing::Test {
 protected:
  bool same(TensorView a, TensorView b) const {
    return a.bytes() == b.bytes() && std::memcmp(a.data, b.data, static_cast<size_t>(a.bytes())) == 0;
  }
  LaneRange mine(int lanes) const { return share_lanes(lanes, group_.member(), group_.size()); }

  std::unique_ptr<Backend> backend_ = make_backend({"cpu", DType::kF32, 1});
  std::unique_ptr<Transport> transport_ = make_transport("auto", world());
  StageGroup group_{*transport_, *backend_};
};

TEST_F(StageGroupTest, RowsAreSharedInTilesOf256) {
  const auto shares = share_rows({700, 256}, 2);  // tiles 0 1 2 | 0
  ASSERT_EQ(shares.size(), 2u);
  EXPECT_EQ(shares[0][0].first, 0);
  EXPECT_EQ(shares[0][0].end, 512);
  EXPECT_EQ(shares[0][1].first, 512);
  EXPECT_EQ(shares[0][1].end, 700);
  EXPECT_EQ(shares[1][0].count(), 0);
  EXPECT_EQ(shares[1][1].first, 0);
  EXPECT_EQ(shares[1][1].end, 256);
  // More members than tiles: every row has one owner all the same.
  for (int members = 1; members <= 9; ++members) {
    const auto all = share_rows({300, 64, 1}, members);
    const int64_t rows[] = {300, 64, 1};
    for (int linear = 0; linear < 3; ++linear) {
      int64_t next = 0;
      for (const RowRange& range : all[linear]) {
        EXPECT_EQ(range.first, next);
        EXPECT_TRUE(range.count() == 0 || range.first % 256 == 0);
        next = range.end;
      }
      EXPECT_EQ(next, rows[linear]);
    }
  }
}

TEST_F(StageGroupTest, AnySaysWhatOneSays) {
  EXPECT_FALSE(group_.any(false));
  for (int who = 0; who < group_.size(); ++who) EXPECT_TRUE(group_.any(who == group_.member()));
}

TEST_F(StageGroupTest, AllThrowTheErrorOfTheLowestMember) {
  group_.agree(std::nullopt);
  std::optional<Error> mine;
  if (group_.member() >= group_.size() / 2) mine = Error(ExitCode::kInput, fmt::format("member {}", group_.member()));
  try {
    group_.agree(mine);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kInput);
    EXPECT_EQ(std::string(error.what()), fmt::format("member {}", group_.size() / 2));
  }
}

TEST_F(StageGroupTest, BroadcastGivesTheFirstMembersTensor) {
  Tensor values = Tensor::zeros(DType::kI32, {1000});
  if (group_.member() == 0)
    for (int32_t i = 0; i < 1000; ++i) values.as<int32_t>()[i] = i * i;
  group_.broadcast(values);
  EXPECT_EQ(values.as<int32_t>()[999], 999 * 999);
}

// Sums of 11 lanes, some without samples: the bits are those of one holder of all lanes.
TEST_F(StageGroupTest, MergedSumsHaveTheBitsOfOneHolder) {
  std::mt19937_64 random(5);
  for (int round = 0; round < 20; ++round) {
    const int64_t n = 1 + static_cast<int64_t>(random() % 70);
    HessianAccumulator alone(n, DType::kF32, *backend_), part(n, DType::kF32, *backend_, mine(11));
    int64_t tokens = 0;
    for (int lane = 0; lane < 11; ++lane) {
      if (random() % 4 == 0) continue;
      Tensor x(DType::kF32, {1 + static_cast<int64_t>(random() % 9), n});
      for (int64_t i = 0; i < x.elements(); ++i)
        x.as<float>()[i] = std::ldexp(static_cast<float>(random() % 2001) - 1000, static_cast<int>(random() % 20) - 10);
      tokens += x.rows();
      alone.add(x, 2, lane);
      if (lane >= mine(11).first && lane < mine(11).end) part.add(x, 2, lane);
    }
    const Hessian whole = alone.finish(), merged = group_.merge(part);
    EXPECT_EQ(merged.tokens, tokens);
    EXPECT_EQ(merged.samples, whole.samples);
    EXPECT_EQ(merged.columns, n);
    ASSERT_TRUE(same(whole.sum, merged.sum)) << "round " << round << ", " << n << " columns";
    EXPECT_EQ(part.tokens(), 0) << "merged sums are gone";
  }
}

TEST_F(StageGroupTest, MergeOfNothingIsNothing) {
  HessianAccumulator none(8, DType::kF32, *backend_, mine(4));
  const Hessian merged = group_.merge(none);
  EXPECT_EQ(merged.tokens, 0);
  EXPECT_TRUE(merged.sum.empty());
}

// What the members solve in rows is what one solves alone, records included.
TEST_F(StageGroupTest, JoinedRowsAreTheWholeLinear) {
  constexpr int64_t kRows = 700, kCols = 64;
  std::mt19937_64 random(9);
  Tensor weight(DType::kF32, {kRows, kCols}), x(DType::kF32, {100, kCols});
  for (Tensor* t : {&weight, &x})
    for (int64_t i = 0; i < t->elements(); ++i)
      t->as<float>()[i] = static_cast<float>(static_cast<int64_t>(random() % 2001) - 1000) / 1000;
  HessianAccumulator accumulator(kCols, DType::kF32, *backend_);
  accumulator.add(x, 4, 0);
  const Hessian hessian = accumulator.finish();
  for (const char* algorithm : {"gptq", "rtn"}) {
    LinearProblem problem;
    problem.module = "m";
    problem.settings.group_size = 32;
    problem.settings.bits = 3;
    problem.weight = weight;
    const Quantizer& quantizer = find_quantizer(algorithm);
    const QuantizeResult alone = std::move(quantizer.quantize({&problem, 1}, &hessian, *backend_)[0]);
    const auto shares = share_rows({kRows}, group_.size())[0];
    const RowRange rows = shares[group_.member()];
    problem.first_row = rows.first;
    problem.weight = weight.view().slice(rows.first, rows.end);
    QuantizeResult joined = std::move(quantizer.quantize({&problem, 1}, &hessian, *backend_, group_)[0]);
    joined = group_.join(std::move(joined), shares);
    EXPECT_TRUE(same(alone.linear.codes, joined.linear.codes)) << algorithm;
    EXPECT_TRUE(same(alone.linear.scales, joined.linear.scales)) << algorithm;
    EXPECT_TRUE(same(alone.linear.zeros, joined.linear.zeros)) << algorithm;
    EXPECT_EQ(alone.record.out, joined.record.out);
    EXPECT_EQ(alone.record.loss, joined.record.loss) << algorithm;
    EXPECT_EQ(alone.record.error, joined.record.error) << algorithm;
    EXPECT_EQ(alone.record.relative_error, joined.record.relative_error) << algorithm;
    EXPECT_GT(joined.record.relative_error, 0);
  }
}

}  // namespace
}  // namespace bitmill
