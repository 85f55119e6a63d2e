// The ranks that share the blocks of a stage. Each runs the samples of its lanes and solves its row tiles; here they meet.
//
//   merge        sums of each member's lanes -> the whole sum on every member, folded along the fixed tree: member m folds
//                the m-th slice of the elements, then the slices are gathered. Two members, one part each of 4 elements:
//                  a0 a1 a2 a3 | b0 b1 b2 b3   ->   a0+b0 a1+b1 | a2+b2 a3+b3   ->   all four on both
//   gather_rows  the rows each member has filled -> all rows on every member
//
// Every call is made by all members in the same order. With one member nothing moves.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "algorithms/quantizer.h"
#include "comm/transport.h"

namespace bitmill {

// Rows [first, end) of a linear; empty where a member has none.
struct RowRange {
  int64_t first = 0, end = 0;
  int64_t count() const { return end - first; }
};

// Row tiles of 256 rows of linears with `rows` rows each, shared out: member m of M gets the m-th part of the list of all
// tiles, linear by linear. shares[linear][member]. Example: rows 700 and 256, 2 members -> tiles 0 1 2 | 0
//   -> linear 0: [0, 512) [512, 700), linear 1: [0, 0) [0, 256).
std::vector<std::vector<RowRange>> share_rows(const std::vector<int64_t>& rows, int members);
// Lanes of member m of M: [m L / M, (m+1) L / M).
LaneRange share_lanes(int lanes, int member, int members);

class StageGroup final : public RowPeers {
 public:
  // `transport` reaches the members of the stage and no one else; both outlive the group.
  StageGroup(Transport& transport, Backend& backend) : transport_(transport), backend_(backend) {}
  int size() const { return transport_.size(); }
  int member() const { return transport_.rank(); }

  bool any(bool mine) const override;
  // Throws the error of the lowest member that brings one, on all of them.
  void agree(const std::optional<Error>& mine) const;
  // The whole of what the members' accumulators hold; they are then empty.
  Hessian merge(HessianAccumulator& mine) const;
  InputMismatch merge(MismatchAccumulator& mine) const;
  Tensor merge(LaneSum& mine) const;
  // `whole` [rows, ...] in host memory on every member, of which member m has filled `shares[m]`.
  void gather_rows(TensorView whole, const std::vector<RowRange>& shares) const;
  // The same from a tensor of this member's rows; alone: that tensor.
  Tensor whole(Tensor mine, const std::vector<RowRange>& shares) const;
  // The whole linear from the members' rows. Record fields that no row decides are the same everywhere.
  QuantizeResult join(QuantizeResult mine, const std::vector<RowRange>& shares) const;
  // Tensor of member `root` on every member; dtype and shape are known to all.
  void broadcast(TensorView tensor, int root = 0) const;

 private:
  // Row r of `all` [size, ...] is what member r brings.
  void all_gather(TensorView all) const;

  Transport& transport_;
  Backend& backend_;
};

}  // namespace bitmill
