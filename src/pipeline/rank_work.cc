#include "pipeline/rank_work.h"

#include <algorithm>
#include <deque>
#include <optional>
#include <set>

#include "pipeline/forward.h"
#include "pipeline/full_mode.h"
#include "pipeline/stage.h"

namespace bitmill {
namespace {

// Tensors that wait for the disk at most.
constexpr int64_t kQueueBytes = 64 << 20;

// A rank at work: what its steps share.
class RankWork {
 public:
  RankWork(QuantizeJob& job, const RankPlan& mine, Transport& pipe, Transport& stage, Backend& backend,
           const RankEvents& events, RankClock& phases)
      : job_(job),
        mine_(mine),
        pipe_(pipe),
        backend_(backend),
        events_(events),
        phases_(phases),
        group_(stage, backend),
        context_{job.options, job.source, job.format, backend, group_, phases, nullptr, nullptr, nullptr} {
    for (const ShardPlan& shard : job.plan.shards)
      if (shard.rank == mine.rank)
        for (const PackedSpec& tensor : shard.tensors) written_.insert(tensor.name);
    context_.writes = [this](const std::string& tensor) { return written_.contains(tensor); };
    context_.on_tensor = [this](NamedTensor tensor) {
      PhaseTimer timer(phases_, Phase::kWrite);
      shards_->write(std::move(tensor));
    };
    context_.on_record = [this](const QuantizeRecord& record) {
      if (mine_.member == 0) events_.linear(LinearEvent{block_, mine_.rank, record});
      tell_durable();  // a block may reach the disk long before the next one ends
    };
  }

  void run() {
    write_float_shards();
    const bool flows = job_.plan.job.calibrated;
    Activations activations = flows ? expected_activations() : Activations();
    if (flows) connect_inlet(activations);
    const Tensor rope =
        flows ? backend_.upload(rope_table(job_.source.spec().rope, job_.plan.job.length)) : Tensor();
    if (flows && job_.plan.full) run_full(activations, rope);
    else run_quantized(activations, rope);
    if (mine_.last && head_to_quantize(job_.options, job_.source.spec())) {
      block_ = mine_.blocks.end;  // its records carry the number behind the last block
      phases_.at_block(block_);
      start_shards("head");
      Stage(context_).run_head(activations);
      shards_->finish();
    }
    if (outlet_) {
      PhaseTimer timer(phases_, Phase::kTransfer);
      outlet_->finish();
    }
    PhaseTimer timer(phases_, Phase::kWrite);
    queue_.drain();
    tell_durable();
  }

 private:
  // A key whose tensors the output takes as they are: they pass through in pieces, never whole in memory. `check`: NaN and
  // infinity are refused.
  void copy_tensors(const std::string& key, const std::vector<std::string>& names, bool check) {
    KeyWriter writer = job_.output.start_shards(job_.plan, key, mine_.rank, queue_);
    for (const std::string& name : names)
      if (writer.holds(name))
        job_.source.read_pieces(name, check, backend_, [&](int64_t offset, Tensor piece) {
          writer.write_part(name, offset, std::move(piece));
        });
    writer.finish();
  }

  // Embedding, final norm, a head in float and unknown tensors: copied by the first and last stage.
  void write_float_shards() {
    PhaseTimer timer(phases_, Phase::kWrite);
    const ModelSpec& spec = job_.source.spec();
    if (mine_.embeds) copy_tensors("embedding", {spec.embedding.name}, true);
    if (!mine_.last) return;
    copy_tensors("norm", {spec.final_norm.name}, true);
    if (!spec.tied && !head_to_quantize(job_.options, spec)) copy_tensors("head", {spec.head.name}, true);
    std::vector<std::string> others;
    for (const PackedSpec& other : job_.plan.job.other) others.push_back(other.name);
    copy_tensors("other", others, false);  // masks may hold infinities
  }

  // The micro-batches of this rank's lanes.
  Activations expected_activations() const {
    const RunOptions::Run& run = job_.options.run;
    const PlanJob& shape = job_.plan.job;
    const LaneRange lanes = context_.lanes();
    Activations activations = make_activations(
        batches_of_lanes(plan_batches(shape.samples, shape.length, run.reduction_lanes, run.microbatch_tokens),
                         lanes.first, lanes.end),
        shape.length);
    if (needs_float_stream(job_.options, job_.source.spec())) expect_float_stream(activations);
    return activations;
  }

  // Where micro-batches come from: the embedding, or the same member of the stage before.
  void connect_inlet(Activations& activations) {
    if (!mine_.embeds)
      return receive_from(activations, job_.source.spec().hidden, mine_.rank - job_.plan.width, pipe_, backend_,
                          phases_);
    const PlanJob& shape = job_.plan.job;
    if (mine_.member != 0) job_.ids = Tensor(DType::kI32, {shape.samples, shape.length});
    group_.broadcast(job_.ids.view().slice(0, shape.samples));
    PhaseTimer timer(phases_, Phase::kForward);
    embed_tokens(job_.source, job_.ids, activations, backend_);
    if (!activations.float_batches.empty()) start_float_stream(activations);
    job_.ids.reset();
  }

  void connect_outlet(Activations& activations) {
    if (!mine_.last) outlet_ = send_to(activations, mine_.rank + job_.plan.width, pipe_, backend_, phases_);
  }

  // Opens this rank's shards of a key: what is packed from now on goes there.
  void start_shards(const std::string& key) {
    PhaseTimer timer(phases_, Phase::kWrite);
    shards_.emplace(job_.output.start_shards(job_.plan, key, mine_.rank, queue_));
  }

  // One block from `quantize` into its shards; the disk may still be busy with it when the next begins.
  template <typename Quantize>
  void quantize_block(Quantize&& quantize) {
    const Stopwatch watch;
    const std::string key = fmt::format("block-{:05}", block_);
    start_shards(key);
    quantize();
    PhaseTimer timer(phases_, Phase::kWrite);
    Unfinished done{{block_, mine_.rank, 0, watch.seconds()}, shards_->finish()};
    for (const ShardPlan& shard : job_.plan.shards)
      if (shard_key(shard) == key) done.event.bytes += shard.tensor_bytes;
    unfinished_.push_back(std::move(done));
    tell_durable();
  }

  // Blocks are told of in order, once this rank's part of them is on the disk.
  void tell_durable() {
    while (!unfinished_.empty()) {
      const std::vector<PendingFile>& files = unfinished_.front().files;
      if (!std::all_of(files.begin(), files.end(), [](const PendingFile& file) { return file.durable(); })) return;
      if (mine_.member == 0) events_.block(unfinished_.front().event);
      unfinished_.pop_front();
    }
  }

  void run_quantized(Activations& activations, const Tensor& rope) {
    Stage stage(context_);
    for (block_ = mine_.blocks.first; block_ < mine_.blocks.end; ++block_) {
      const auto graph = activations.length > 0
                             ? job_.source.family().graph(job_.source.spec(), block_, rope)
                             : nullptr;
      phases_.at_block(block_);
      if (graph && block_ + 1 == mine_.blocks.end) connect_outlet(activations);
      const bool final_block = mine_.last && block_ + 1 == mine_.blocks.end;
      quantize_block([&] { stage.run(block_, graph.get(), activations, !final_block || output_needed()); });
    }
  }

  // Does anything follow the stage's last block?
  bool output_needed() const { return !mine_.last || head_to_quantize(job_.options, job_.source.spec()).has_value(); }

  void run_full(Activations& activations, const Tensor& rope) {
    connect_outlet(activations);
    for (const BlockRange& wave : mine_.waves) {
      phases_.at_block(wave.first);
      FullWave full(context_, wave, rope);
      full.capture(activations, wave.end == mine_.blocks.end, output_needed());
      for (block_ = wave.first; block_ < wave.end; ++block_) {
        phases_.at_block(block_);
        quantize_block([&] { full.solve(block_); });
      }
    }
  }

  QuantizeJob& job_;
  const RankPlan& mine_;
  Transport& pipe_;
  Backend& backend_;
  const RankEvents& events_;
  RankClock& phases_;
  StageGroup group_;
  BlockContext context_;
  std::set<std::string> written_;  // tensors of this rank's shards
  std::shared_ptr<BatchSender> outlet_;
  struct Unfinished {
    BlockEvent event;
    std::vector<PendingFile> files;
  };
  WriteBehind queue_{kQueueBytes};
  std::optional<KeyWriter> shards_;  // of the block being quantized
  std::deque<Unfinished> unfinished_;
  int64_t block_ = 0;
};

}  // namespace

void run_rank(QuantizeJob& job, const RankPlan& mine, Transport& pipe, Transport& stage, Backend& backend,
              const RankEvents& events, RankClock& phases) {
  RankWork(job, mine, pipe, stage, backend, events, phases).run();
}

}  // namespace bitmill
