// Plan: what would run where. Pure arithmetic over the model's shapes; no MPI, no files, deterministic, testable for any
// number of ranks.
#pragma once

#include <array>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/options.h"
#include "formats/format.h"
#include "models/family.h"
#include "pipeline/calibration.h"
#include "pipeline/cost.h"
#include "pipeline/partition.h"

namespace bitmill {

// The machine a plan is for.
struct PlanMachine {
  int ranks = 1;
  int ranks_per_node = 1;
  int64_t memory_per_rank = 0;  // bytes a rank may use; 0: unlimited
  std::string memory_name;      // "host memory" or "device memory", for messages
  bool device = false;          // ranks compute on GPUs; memory_per_rank is a GPU's
  int threads = 1;              // of a rank: each sweeps a tile of its own
};

// The shape of a job.
struct PlanJob {
  int64_t samples = 128, length = 2048;
  DType compute = DType::kBF16;
  bool calibrated = true;  // false: no module needs activations (rtn everywhere)
  std::vector<PackedSpec> other;  // tensors the family does not know; copied as they are
};

// What lives in memory at a rank's worst moment.
enum class MemoryKind {
  kActivations, kScratch, kWeights, kHessians, kFactor, kPacked, kEmbedding, kExchange
};
constexpr int kMemoryKinds = 8;
std::string_view memory_kind_name(MemoryKind kind);
using MemoryBytes = std::array<int64_t, kMemoryKinds>;
int64_t total(const MemoryBytes& bytes);

// Ranks sD .. sD+D-1 are stage s of width D: they own the same blocks and share the work on each.
struct RankPlan {
  int rank = 0, node = 0;
  int stage = 0, member = 0;  // rank = stage * width + member; idle ranks have no stage
  BlockRange blocks;          // of the stage; empty for an idle rank
  bool embeds = false;        // first stage
  bool last = false;          // last stage: final norm and head
  // propagation.mode=full: runs of the stage's blocks whose Hessians live at the same time. Each wave
  // streams all micro-batches through its blocks, then solves them; their outputs are kept for the
  // next. Equal for all members. Empty in mode quantized.
  std::vector<BlockRange> waves;
  double cost = 0;         // share of the whole work, 0..1
  CostSeconds seconds{};   // estimate by phase, waiting included: the sum is Plan::seconds
  MemoryBytes peak{};      // by kind, at the moment of the largest sum: what the machine limits
  MemoryBytes host_peak{}; // with a device: what lies in host memory beside it
  std::string peak_at;     // "block 3, solve gate_up"
};

// One file of tensors that one rank writes.
struct ShardPlan {
  std::string key;  // "embedding", "block-00003", "block-00003.part-2", "norm", "head", "other"
  int rank = 0;
  std::vector<PackedSpec> tensors;  // sorted by name
  int64_t tensor_bytes = 0;
};

struct Plan {
  PlanMachine machine;
  PlanJob job;
  int stages = 1, width = 1;       // stages * width ranks work
  bool full = false;               // propagation.mode=full
  Rates rates;                     // what the seconds are made of
  double seconds = 0;              // estimate for the whole run (pipeline/cost.h says what is in it)
  CostSeconds phases{};            // mean over working ranks; the sum is `seconds`
  std::vector<RankPlan> ranks;     // one per rank, idle ones too
  std::vector<ShardPlan> shards;   // in final order
  std::vector<std::string> files;  // names of the finished checkpoint's tensor files
  int64_t source_bytes = 0;        // float tensors read
  int64_t output_bytes = 0;        // tensors written
  int64_t quantized_weights = 0;   // elements
  double bits_per_weight = 0;      // of quantized linears, scales and zero points included
  int64_t micro_batches = 0;
  bool joined = false;             // everything fits one model.safetensors
  std::vector<LoadWarning> load_warnings;
  std::vector<std::string> notes;  // idle ranks and the like
  std::vector<std::string> hints;  // another width or mode that the estimate finds faster

  int active_ranks() const { return stages * width; }
};

// Throws kUsage for settings that cannot be stored (format.check on every linear), kDoesNotFit when a rank's peak exceeds
// the machine, naming rank, kind, numbers and changes of options or ranks with which it fits. run.stage_width=auto takes
// the width with the least estimated time among those that fit. `dtypes` gives the stored dtype of float tensors.
Plan make_plan(const RunOptions& options, const ModelSpec& spec, const OutputFormat& format, const PlanMachine& machine,
               const PlanJob& job, const std::function<DType(const std::string&)>& dtypes);

// The head, if it is to be quantized: quantize.lm_head is true and no rule skips module lm_head.
// Error(kUsage) where the model's head is tied and quantize.untie does not allow it a weight of its
// own, or quantize.untie alone is given.
std::optional<LinearSpec> head_to_quantize(const RunOptions& options, const ModelSpec& spec);
// The head as one more block behind the last: one cut of one linear, no norms.
BlockSpec head_block(const ModelSpec& spec);

// Checks every module's settings against algorithm and format and returns what each becomes. Throws kUsage.
std::vector<ModuleChoice> choose_modules(const RunOptions& options, const ModelSpec& spec, const OutputFormat& format);

// Splits tensors (sorted by name) greedily into files of at most `limit` bytes; a larger tensor gets its own file.
// Returns the index ranges [first, end).
std::vector<std::pair<size_t, size_t>> cut_shards(const std::vector<PackedSpec>& tensors, int64_t limit);
int64_t packed_bytes(const PackedSpec& spec);

// Tables for people (long runs of equal lines are shortened), and the same as JSON, which lists the ranks that work.
std::string plan_text(const Plan& plan, const ModelSpec& spec);
Json plan_json(const Plan& plan);

}  // namespace bitmill
