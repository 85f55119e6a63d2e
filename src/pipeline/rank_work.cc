#include "pipeline/rank_work.h"

#include <set>

#include "pipeline/forward.h"
#include "pipeline/full_mode.h"
#include "pipeline/stage.h"

namespace bitmill {
namespace {

constexpr int64_t kCopyQueueBytes = 64 << 20;  // a few pieces of ModelSource::read_pieces

// A rank at work: what its steps share.
class RankWork {
 public:
  RankWork(QuantizeJob& job, const RankPlan& mine, Transport& pipe, Transport& stage, Backend& backend,
           const RankEvents& events, PhaseSeconds& phases)
      : job_(job),
        mine_(mine),
        pipe_(pipe),
        backend_(backend),
        events_(events),
        phases_(phases),
        group_(stage, backend),
        context_{job.options, job.source, job.format, backend, group_, phases, nullptr, nullptr} {
    for (const ShardPlan& shard : job.plan.shards)
      if (shard.rank == mine.rank)
        for (const PackedSpec& tensor : shard.tensors) written_.insert(tensor.name);
    context_.writes = [this](const std::string& tensor) { return written_.contains(tensor); };
    context_.on_record = [this](const QuantizeRecord& record) {
      if (mine_.member == 0) events_.linear(LinearEvent{block_, mine_.rank, record});
    };
  }

  void run() {
    write_float_shards();
    const bool flows = job_.plan.job.calibrated;
    Activations activations = flows ? expected_activations() : Activations();
    if (flows) connect_inlet(activations);
    const Tensor rope =
        flows ? backend_.upload(rope_table(job_.source.spec().rope, job_.plan.job.length)) : Tensor();
    if (flows && job_.options.propagation.mode == "full") run_full(activations, rope);
    else run_quantized(activations, rope);
    if (mine_.last && head_to_quantize(job_.options, job_.source.spec())) {
      block_ = mine_.blocks.end;  // its records carry the number behind the last block
      write("head", Stage(context_).run_head(activations));
    }
    if (outlet_) {
      PhaseTimer timer(phases_, Phase::kTransfer);
      outlet_->finish();
    }
  }

 private:
  // A key whose tensors the output takes as they are: they pass through in pieces, never whole in memory. `check`: NaN and
  // infinity are refused.
  void copy_tensors(const std::string& key, const std::vector<std::string>& names, bool check, WriteBehind& queue) {
    KeyWriter writer = job_.output.start_shards(job_.plan, key, mine_.rank, queue);
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
    WriteBehind queue(kCopyQueueBytes);
    if (mine_.embeds) copy_tensors("embedding", {spec.embedding.name}, true, queue);
    if (mine_.last) {
      copy_tensors("norm", {spec.final_norm.name}, true, queue);
      if (!spec.tied && !head_to_quantize(job_.options, spec)) copy_tensors("head", {spec.head.name}, true, queue);
      std::vector<std::string> others;
      for (const PackedSpec& other : job_.plan.job.other) others.push_back(other.name);
      copy_tensors("other", others, false, queue);  // masks may hold infinities
    }
    queue.drain();
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

  // Writes what of the key's tensors is this rank's.
  void write(const std::string& key, const PackedBlock& packed) {
    PhaseTimer timer(phases_, Phase::kWrite);
    for (const ShardPlan& shard : job_.plan.shards)
      if (shard.rank == mine_.rank && shard_key(shard) == key) job_.output.write_shard(shard, packed.tensors);
  }

  void finish_block(int64_t block, const PackedBlock& packed, double seconds) {
    const std::string key = fmt::format("block-{:05}", block);
    write(key, packed);
    if (mine_.member != 0) return;
    int64_t bytes = 0;
    for (const ShardPlan& shard : job_.plan.shards)
      if (shard_key(shard) == key) bytes += shard.tensor_bytes;
    events_.block(BlockEvent{block, mine_.rank, bytes, seconds});
  }

  void run_quantized(Activations& activations, const Tensor& rope) {
    Stage stage(context_);
    for (block_ = mine_.blocks.first; block_ < mine_.blocks.end; ++block_) {
      const Stopwatch watch;
      const auto graph = activations.length > 0
                             ? job_.source.family().graph(job_.source.spec(), block_, rope)
                             : nullptr;
      if (graph && block_ + 1 == mine_.blocks.end) connect_outlet(activations);
      finish_block(block_, stage.run(block_, graph.get(), activations), watch.seconds());
    }
  }

  void run_full(Activations& activations, const Tensor& rope) {
    connect_outlet(activations);
    const bool output_needed = !mine_.last || head_to_quantize(job_.options, job_.source.spec());
    for (const BlockRange& wave : waves()) {
      FullWave full(context_, wave, rope);
      full.capture(activations, wave.end == mine_.blocks.end, output_needed);
      for (block_ = wave.first; block_ < wave.end; ++block_) {
        const Stopwatch watch;
        finish_block(block_, full.solve(block_), watch.seconds());
      }
    }
  }

  std::vector<BlockRange> waves() const {
    bool awq = false;
    for (int64_t b = mine_.blocks.first; b < mine_.blocks.end; ++b)
      awq |= uses_awq(job_.options, job_.source.spec().blocks[b]);
    if (!awq) return {mine_.blocks};
    std::vector<BlockRange> singles;
    for (int64_t b = mine_.blocks.first; b < mine_.blocks.end; ++b) singles.push_back({b, b + 1});
    return singles;
  }

  QuantizeJob& job_;
  const RankPlan& mine_;
  Transport& pipe_;
  Backend& backend_;
  const RankEvents& events_;
  PhaseSeconds& phases_;
  StageGroup group_;
  BlockContext context_;
  std::set<std::string> written_;  // tensors of this rank's shards
  std::shared_ptr<BatchSender> outlet_;
  int64_t block_ = 0;
};

}  // namespace

void run_rank(QuantizeJob& job, const RankPlan& mine, Transport& pipe, Transport& stage, Backend& backend,
              const RankEvents& events, PhaseSeconds& phases) {
  RankWork(job, mine, pipe, stage, backend, events, phases).run();
}

}  // namespace bitmill
