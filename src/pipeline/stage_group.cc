#include "pipeline/stage_group.h"

#include <algorithm>
#include <cstring>

namespace bitmill {
namespace {

constexpr int64_t kTile = 256;

using Transfers = std::vector<std::unique_ptr<Transfer>>;

void wait_all(Transfers& transfers) {
  for (const std::unique_ptr<Transfer>& transfer : transfers) transfer->wait();
  transfers.clear();
}

// Elements [first, end) of a tensor as a flat view.
TensorView elements_of(TensorView tensor, int64_t first, int64_t end) {
  return tensor.reshaped({tensor.elements()}).slice(first, end);
}

RowRange slice_of(int64_t elements, int member, int members) {
  return {elements * member / members, elements * (member + 1) / members};
}

}  // namespace

std::vector<std::vector<RowRange>> share_rows(const std::vector<int64_t>& rows, int members) {
  int64_t tiles = 0;
  for (int64_t count : rows) tiles += (count + kTile - 1) / kTile;
  std::vector<std::vector<RowRange>> shares;
  int64_t before = 0;  // tiles of the linears before
  for (int64_t count : rows) {
    const int64_t own = (count + kTile - 1) / kTile;
    const auto row = [&](int64_t tile) {  // where the tile of the list begins in this linear
      return std::min(count, std::clamp<int64_t>(tile - before, 0, own) * kTile);
    };
    std::vector<RowRange>& members_rows = shares.emplace_back();
    for (int member = 0; member < members; ++member)
      members_rows.push_back({row(tiles * member / members), row(tiles * (member + 1) / members)});
    before += own;
  }
  return shares;
}

LaneRange share_lanes(int lanes, int member, int members) {
  const int64_t all = lanes;
  return {static_cast<int>(all * member / members), static_cast<int>(all * (member + 1) / members)};
}

bool StageGroup::any(bool mine) const {
  if (size() == 1) return mine;
  Tensor all = Tensor::zeros(DType::kU8, {size(), 1});
  all.as<uint8_t>()[member()] = mine;
  all_gather(all);
  return std::any_of(all.as<uint8_t>(), all.as<uint8_t>() + size(), [](uint8_t said) { return said != 0; });
}

void StageGroup::all_gather(TensorView all) const {
  std::vector<RowRange> shares;
  for (int member = 0; member < size(); ++member) shares.push_back({member, member + 1});
  gather_rows(all, shares);
}

void StageGroup::gather_rows(TensorView whole, const std::vector<RowRange>& shares) const {
  Transfers transfers;
  const auto rows = [&](int m) { return whole.slice(shares[m].first, shares[m].end); };
  for (int other = 0; other < size(); ++other)
    if (other != member() && shares[other].count() > 0)
      transfers.push_back(transport_.start_receive(rows(other), other));
  for (int other = 0; other < size(); ++other)
    if (other != member() && shares[member()].count() > 0)
      transfers.push_back(transport_.start_send(rows(member()), other));
  wait_all(transfers);
}

void StageGroup::broadcast(TensorView tensor, int root) const {
  Transfers transfers;
  if (member() != root) transfers.push_back(transport_.start_receive(tensor, root));
  for (int other = 0; member() == root && other < size(); ++other)
    if (other != root) transfers.push_back(transport_.start_send(tensor, other));
  wait_all(transfers);
}

void StageGroup::agree(const std::optional<Error>& mine) const {
  if (size() == 1) {
    if (mine) throw *mine;
    return;
  }
  Tensor all = Tensor::zeros(DType::kI32, {size(), 2});  // exit code and bytes of the message; 0: no error
  int32_t* const said = all.as<int32_t>();
  std::string text = mine ? mine->what() : "";
  if (mine) {
    said[2 * member()] = static_cast<int32_t>(mine->code());
    said[2 * member() + 1] = static_cast<int32_t>(text.size());
  }
  all_gather(all);
  for (int m = 0; m < size(); ++m) {
    if (said[2 * m] == 0) continue;
    Tensor message(DType::kU8, {said[2 * m + 1]});
    if (m == member()) std::memcpy(message.data(), text.data(), text.size());
    broadcast(message, m);
    throw Error(static_cast<ExitCode>(said[2 * m]),
                std::string(message.as<char>(), static_cast<size_t>(message.elements())));
  }
}

Tensor StageGroup::merge(LaneSum& mine) const {
  if (size() == 1) return mine.finish();
  // Who holds which parts: a count and the lanes.
  constexpr int64_t kMostParts = 63;
  std::vector<LanePart> parts = mine.take_parts();
  BITMILL_CHECK(static_cast<int64_t>(parts.size()) <= kMostParts);
  Tensor held = Tensor::zeros(DType::kI32, {size(), kMostParts + 1});
  const auto header = [&](int m) { return held.as<int32_t>() + m * (kMostParts + 1); };
  header(member())[0] = static_cast<int32_t>(parts.size());
  for (size_t i = 0; i < parts.size(); ++i) header(member())[1 + i] = parts[i].lane;
  all_gather(held);

  const int64_t elements = mine.shape().elements();
  const RowRange own = slice_of(elements, member(), size());
  std::vector<LanePart> slices;
  Transfers receives, sends;
  for (int m = 0; m < size(); ++m)
    for (int i = 0; i < header(m)[0]; ++i) {
      slices.push_back({header(m)[1 + i], Tensor(mine.dtype(), {own.count()})});
      if (m == member()) {
        const TensorView part = elements_of(parts[i].sum, own.first, own.end);
        std::memcpy(slices.back().sum.data(), part.data, static_cast<size_t>(part.bytes()));
      } else {
        receives.push_back(transport_.start_receive(slices.back().sum, m));
      }
    }
  for (int m = 0; m < size(); ++m) {
    const RowRange theirs = slice_of(elements, m, size());
    if (m == member()) continue;
    for (const LanePart& part : parts)
      sends.push_back(transport_.start_send(elements_of(part.sum, theirs.first, theirs.end), m));
  }
  wait_all(receives);
  wait_all(sends);
  if (slices.empty()) return Tensor();
  parts.clear();
  const Tensor folded = fold_parts(std::move(slices), backend_);

  Tensor whole = backend_.allocate(mine.dtype(), mine.shape());
  std::memcpy(elements_of(whole, own.first, own.end).data, folded.data(), static_cast<size_t>(folded.bytes()));
  std::vector<RowRange> shares;
  for (int m = 0; m < size(); ++m) shares.push_back(slice_of(elements, m, size()));
  gather_rows(whole.view().reshaped({elements}), shares);
  return whole;
}

Hessian StageGroup::merge(HessianAccumulator& mine) const {
  if (size() == 1) return mine.finish();
  Tensor counts = Tensor::zeros(DType::kF64, {size(), 2});  // exact far beyond any number of tokens
  counts.as<double>()[2 * member()] = static_cast<double>(mine.samples());
  counts.as<double>()[2 * member() + 1] = static_cast<double>(mine.tokens());
  all_gather(counts);
  Hessian whole;
  whole.columns = mine.columns();
  for (int m = 0; m < size(); ++m) {
    whole.samples += static_cast<int64_t>(counts.as<double>()[2 * m]);
    whole.tokens += static_cast<int64_t>(counts.as<double>()[2 * m + 1]);
  }
  whole.sum = merge(mine.sum());
  mine.finish();  // forgets the counts
  return whole;
}

InputMismatch StageGroup::merge(MismatchAccumulator& mine) const {
  if (size() == 1) return mine.finish();
  InputMismatch whole;
  whole.inputs = merge(mine.inputs());
  if (mine.residual().shape().elements() > 0) whole.residual = merge(mine.residual());
  return whole;
}

Tensor StageGroup::whole(Tensor mine, const std::vector<RowRange>& shares) const {
  if (size() == 1 || mine.empty()) return mine;
  std::vector<int64_t> dims = mine.shape().dims();
  dims[0] = shares.back().end;
  Tensor all(mine.dtype(), Shape(dims));
  std::memcpy(all.view().slice(shares[member()].first, shares[member()].end).data, mine.data(),
              static_cast<size_t>(mine.bytes()));
  gather_rows(all, shares);
  return all;
}

QuantizeResult StageGroup::join(QuantizeResult mine, const std::vector<RowRange>& shares) const {
  if (size() == 1) return mine;
  for (Tensor* tensor : {&mine.linear.codes, &mine.linear.scales, &mine.linear.zeros, &mine.rows.loss, &mine.rows.error,
                         &mine.rows.signal})
    *tensor = whole(std::move(*tensor), shares);
  mine.record.out = mine.linear.out();
  sum_rows(mine);
  return mine;
}

}  // namespace bitmill
