#include "core/options_table.h"

#include <algorithm>
#include <array>

#include "core/option_values.h"

namespace bitmill {

using namespace option_values;

std::string_view act_order_name(ActOrder order) {
  constexpr std::array<std::string_view, 3> kNames{"none", "static", "dynamic"};
  return kNames[static_cast<size_t>(order)];
}

std::string_view compute_name(Compute compute) {
  constexpr std::array<std::string_view, 3> kNames{"auto", "float32", "bfloat16"};
  return kNames[static_cast<size_t>(compute)];
}

namespace {

std::string_view on_failed_name(OnFailed policy) {
  return policy == OnFailed::kRtn ? "rtn" : "fail";
}

// ---- sizes and times ----

struct Unit {
  std::string_view name;
  int64_t bytes;
};

constexpr std::array<Unit, 9> kSizeUnits{{
    {"TB", 1'000'000'000'000},
    {"TiB", int64_t{1} << 40},
    {"GB", 1'000'000'000},
    {"GiB", int64_t{1} << 30},
    {"MB", 1'000'000},
    {"MiB", int64_t{1} << 20},
    {"KB", 1'000},
    {"KiB", int64_t{1} << 10},
    {"B", 1},
}};

// "H:MM:SS"
std::optional<double> parse_clock(std::string_view text) {
  const size_t first = text.find(':'), second = text.rfind(':');
  if (second != first + 3 || text.size() != second + 3) return std::nullopt;
  const auto hours = parse_number<uint32_t>(text.substr(0, first));
  const auto minutes = parse_number<uint32_t>(text.substr(first + 1, 2));
  const auto seconds = parse_number<uint32_t>(text.substr(second + 1));
  if (!hours || !minutes || !seconds || *minutes > 59 || *seconds > 59) return std::nullopt;
  return *hours * 3600.0 + *minutes * 60.0 + *seconds;
}

}  // namespace

std::string option_values::size_text(int64_t bytes) {
  for (const Unit& unit : kSizeUnits)
    if (bytes % unit.bytes == 0) return fmt::format("{}{}", bytes / unit.bytes, unit.name);
  return fmt::format("{}B", bytes);
}

int64_t parse_size(const std::string& text, const std::string& key) {
  const size_t digits = std::min(text.find_first_not_of("0123456789."), text.size());
  const std::string number = text.substr(0, digits), unit = text.substr(digits);
  int64_t factor = unit.empty() ? 1 : 0;
  for (const Unit& known : kSizeUnits)
    if (unit == known.name) factor = known.bytes;
  if (const auto whole = parse_number<int64_t>(number); whole && factor > 0) {
    if (*whole <= kMany / factor) return *whole * factor;
  } else if (const auto part = parse_number<double>(number); part && factor > 1) {
    if (*part * static_cast<double>(factor) < 9e18)
      return std::llround(*part * static_cast<double>(factor));
  }
  refuse(key, text, kSizeText);
}

double parse_duration(const std::string& text, const std::string& key) {
  if (const auto clock = parse_clock(text)) return *clock;
  const double factor = text.ends_with('s')   ? 1
                        : text.ends_with('m') ? 60
                        : text.ends_with('h') ? 3600
                                              : 0;
  const auto number =
      parse_number<double>(std::string_view(text).substr(0, text.size() - !text.empty()));
  if (factor == 0 || !number || *number < 0 || std::signbit(*number))
    refuse(key, text, kDurationText);
  return *number * factor;
}

namespace {

// ---- values of single keys ----

bool is_auto_or_count(const std::string&, const std::string& value) {
  const auto threads = parse_number<int>(value);
  return value == "auto" || (threads && *threads >= 1);
}

bool is_device_memory(const std::string& key, const std::string& value) {
  return value == "auto" || parse_size(value, key) > 0;
}

bool is_time_limit(const std::string& key, const std::string& value) {
  return value.empty() || parse_duration(value, key) > 0;
}

bool is_checkpoint_period(const std::string& key, const std::string& value) {
  const size_t blank = value.find(' ');
  if (value == "off") return true;
  if (blank == std::string::npos) return parse_duration(value, key) > 0;
  const auto blocks = parse_number<int64_t>(std::string_view(value).substr(0, blank));
  return value.substr(blank) == " blocks" && blocks && *blocks >= 1;
}

OptionValue rules() {
  auto set = [](RunOptions& o, const std::string&, const std::string& value) {
    o.quantize.rules.push_back(parse_rule(value));
  };
  auto get = [](const RunOptions& o) {
    std::vector<std::string> lines;
    for (const QuantizeRule& rule : o.quantize.rules) lines.push_back(rule.text);
    return fmt::format("{}", fmt::join(lines, "\n"));
  };
  return {"REGEX name=value ...", set, get};
}

// ---- the table ----

using Rows = std::vector<OptionRow>;
using Options = RunOptions;
constexpr OptionScope kConfig = OptionScope::kConfig, kBoth = OptionScope::kConfigAndRule;
constexpr bool kNumeric = true, kPlain = false;  // numeric: changes the numbers or the files
constexpr int64_t kManySamples = 100'000'000;    // and tokens of one: their product fits int64_t

void add_input_rows(Rows& rows) {
  const auto model = &Options::model;
  const auto calibration = &Options::calibration;
  using Calibration = Options::Calibration;
  rows.push_back({"model.path", path(at(model, &Options::Model::path), "a directory"), "-", kPlain,
                  kConfig, "the checkpoint to read, Hugging Face layout"});
  rows.push_back({"calibration.tokens",
                  path(at(calibration, &Calibration::tokens), "a .h5 or .safetensors file"), "-",
                  kPlain, kConfig, "calibration tokens: input_ids [samples, tokens]"});
  rows.push_back({"calibration.samples",
                  count_up_to(at(calibration, &Calibration::samples), 0, kManySamples), "samples",
                  kNumeric, kConfig, "how many samples to use, from the first; 0: all"});
  rows.push_back({"calibration.sequence_length",
                  count_up_to(at(calibration, &Calibration::sequence_length), 0, kManySamples),
                  "tokens", kNumeric, kConfig, "tokens of each sample to use; 0: as stored"});
}

void add_grid_rows(Rows& rows) {
  const auto q = &Options::quantize;
  using Settings = QuantizeSettings;
  rows.push_back({"quantize.algorithm", text(at(q, &Settings::algorithm), "an algorithm", false),
                  "-", kNumeric, kBoth, "how codes are chosen: gptq, gptaq, rtn, awq, awq+gptq, awq+gptaq"});
  rows.push_back({"quantize.bits", integer(at(q, &Settings::bits), 2, 8, "an integer from 2 to 8"),
                  "bits", kNumeric, kBoth, "bits per code; the output format offers some of them"});
  OptionValue group = integer(at(q, &Settings::group_size), -1, kMany, "-1 or an integer >= 1");
  group.set = [inner = group.set](RunOptions& o, const std::string& key, const std::string& given) {
    if (given == "0") refuse(key, given, "-1 or an integer >= 1");
    inner(o, key, given);
  };
  rows.push_back({"quantize.group_size", group, "columns", kNumeric, kBoth,
                  "columns that share one scale; -1: one scale per row"});
  rows.push_back({"quantize.symmetric", boolean(at(q, &Settings::symmetric)), "-", kNumeric, kBoth,
                  "the range is mirrored at 0 and the zero point is 2^(bits-1)"});
  rows.push_back({"quantize.act_order",
                  enumeration(at(q, &Settings::act_order),
                              {ActOrder::kNone, ActOrder::kStatic, ActOrder::kDynamic},
                              act_order_name),
                  "-", kNumeric, kBoth,
                  "static: columns with large activations first, groups stay where they are; "
                  "dynamic: groups follow that order (g_idx)"});
  rows.push_back({"quantize.mse", boolean(at(q, &Settings::mse)), "-", kNumeric, kBoth,
                  "search 80 shrunk ranges for the smallest rounding error of the weights"});
  rows.push_back({"quantize.range_search", boolean(at(q, &Settings::range_search)), "-", kNumeric,
                  kBoth,
                  "search 30 shrunk ranges for the smallest error expected under the Hessian"});
}

void add_solver_rows(Rows& rows) {
  const auto q = &Options::quantize;
  using Settings = QuantizeSettings;
  rows.push_back({"quantize.block_size", count(at(q, &Settings::block_size), 1), "columns",
                  kNumeric, kBoth, "columns solved before the rest of the matrix is updated"});
  rows.push_back({"quantize.damp", real(at(q, &Settings::damp), 0, true), "of mean diagonal",
                  kNumeric, kBoth, "added to the diagonal of the Hessian"});
  rows.push_back({"quantize.damp_step", real(at(q, &Settings::damp_step), 1, false), "factor",
                  kNumeric, kBoth, "damping grows by this after a failed factorization"});
  rows.push_back({"quantize.damp_max", real(at(q, &Settings::damp_max), 0, true),
                  "of mean diagonal", kNumeric, kBoth,
                  "largest damping tried, at least quantize.damp"});
  rows.push_back(
      {"quantize.on_failed",
       enumeration(at(q, &Settings::on_failed), {OnFailed::kRtn, OnFailed::kFail}, on_failed_name),
       "-", kNumeric, kBoth,
       "when no damping helps: rtn rounds to nearest, fail ends with exit code 5"});
  rows.push_back({"quantize.skip", boolean(at(q, &Settings::skip)), "-", kNumeric,
                  OptionScope::kRule, "leave the module in float"});
}

void add_model_wide_rows(Rows& rows) {
  const auto q = &Options::quantize;
  using Quantize = Options::Quantize;
  rows.push_back({"quantize.true_sequential", boolean(at(q, &Quantize::true_sequential)), "-",
                  kNumeric, kConfig,
                  "each linear sees inputs made by the quantized linears before it in its block"});
  rows.push_back({"quantize.min_expert_tokens", count(at(q, &Quantize::min_expert_tokens), 0),
                  "tokens", kNumeric, kConfig, "experts with fewer tokens are rounded to nearest"});
  rows.push_back({"quantize.lm_head", boolean(at(q, &Quantize::lm_head)), "-", kNumeric, kConfig,
                  "quantize the output head too"});
  rows.push_back({"quantize.untie", boolean(at(q, &Quantize::untie)), "-", kNumeric, kConfig,
                  "give a head that is tied to the embedding its own quantized weight"});
  rows.push_back({"quantize.rule", rules(), "-", kNumeric, kConfig,
                  "other settings for modules whose whole name matches; may be repeated", true});
  rows.push_back({"propagation.mode",
                  choice(at(&Options::propagation, &Options::Propagation::mode),
                         {"quantized", "full"}),
                  "-", kNumeric, kConfig,
                  "quantized: the inputs of a block come from the quantized blocks before it; full: "
                  "from the float model, so that all stages work at the same time"});
}

void add_awq_rows(Rows& rows) {
  const auto awq = &Options::awq;
  using Awq = Options::Awq;
  rows.push_back({"awq.tokens", count(at(awq, &Awq::tokens), 1), "tokens", kNumeric, kConfig,
                  "calibration tokens the scale search looks at, from the first sample"});
  rows.push_back({"awq.ratios", integer(at(awq, &Awq::ratios), 1, 1000, "an integer from 1 to 1000"),
                  "ratios", kNumeric, kConfig,
                  "exponents of mean activation magnitude tried per group of linears"});
  rows.push_back({"awq.clip", boolean(at(awq, &Awq::clip)), "-", kNumeric, kConfig,
                  "awq also searches a clipping limit per row and group, but for q and k"});
}

void add_output_rows(Rows& rows) {
  const auto output = &Options::output;
  using Output = Options::Output;
  rows.push_back({"output.path", path(at(output, &Output::path), "a directory"), "-", kPlain,
                  kConfig, "where the quantized checkpoint goes"});
  rows.push_back({"output.format", text(at(output, &Output::format), "a format", false), "-",
                  kNumeric, kConfig, "layout of the result: gptq, gptq_v2, compressed-tensors, awq"});
  rows.push_back({"output.shard_size", size(at(output, &Output::shard_size)), "bytes", kNumeric,
                  kConfig, "largest file of the result; a smaller model becomes one file"});
  rows.push_back({"output.overwrite", boolean(at(output, &Output::overwrite)), "-", kPlain, kConfig,
                  "replace a finished result of other settings"});
}

void add_machine_rows(Rows& rows) {
  const auto run = &Options::run;
  using Run = Options::Run;
  rows.push_back({"run.backend", choice(at(run, &Run::backend), {"auto", "cpu", "cuda"}), "-",
                  kPlain, kConfig, "where to compute; auto: a GPU when there is one"});
  rows.push_back({"run.transport", choice(at(run, &Run::transport), {"auto", "mpi", "nccl"}), "-",
                  kPlain, kConfig, "how tensors travel between ranks"});
  rows.push_back({"run.stage_width",
                  checked(at(run, &Run::stage_width), "auto or an integer >= 1", is_auto_or_count),
                  "ranks", kPlain, kConfig,
                  "ranks that share the blocks of one stage; auto: what the plan finds fastest"});
  rows.push_back({"run.microbatch_tokens", count(at(run, &Run::microbatch_tokens), 1), "tokens",
                  kNumeric, kConfig, "tokens computed together, at least one sample"});
  rows.push_back(
      {"run.compute",
       enumeration(at(run, &Run::compute), {Compute::kAuto, Compute::kFloat32, Compute::kBFloat16},
                   compute_name),
       "-", kNumeric, kConfig,
       "type of matmul inputs; auto: bfloat16 where model and hardware have it"});
  rows.push_back({"run.threads",
                  checked(at(run, &Run::threads), "auto or an integer >= 1", is_auto_or_count),
                  "threads", kPlain, kConfig, "per rank; auto: the CPUs it may use"});
  rows.push_back(
      {"run.device_memory",
       checked(at(run, &Run::device_memory), std::string("auto or ") + kSizeText, is_device_memory),
       "bytes", kPlain, kConfig, "memory of each device the plan may use"});
}

void add_run_rows(Rows& rows) {
  const auto run = &Options::run;
  using Run = Options::Run;
  rows.push_back({"run.max_time",
                  only_default(checked(at(run, &Run::max_time),
                                       std::string("empty or ") + kDurationText, is_time_limit),
                               "a clean stop after some time"),
                  "time", kPlain, kConfig,
                  "not in this version: stop cleanly before this time has passed"});
  rows.push_back({"run.resume",
                  choice(at(run, &Run::resume), {"auto", "never"}, {{"must", "resuming"}}), "-",
                  kPlain, kConfig, "not in this version: going on with an unfinished result; it is started over"});
  rows.push_back(
      {"run.checkpoint",
       only_default(checked(at(run, &Run::checkpoint),
                            std::string("off, N blocks or ") + kDurationText, is_checkpoint_period),
                    "saving activations"),
       "time", kPlain, kConfig, "not in this version: how often activations are saved"});
  rows.push_back({"run.watchdog",
                  only_default(duration(at(run, &Run::watchdog)), "watching for silent ranks"),
                  "time", kPlain, kConfig,
                  "not in this version: a rank that is silent for this long counts as lost"});
  rows.push_back({"run.reduction_lanes",
                  integer(at(run, &Run::reduction_lanes), 1, 4096, "an integer from 1 to 4096"),
                  "lanes", kNumeric, kConfig,
                  "fixed groups of samples that are summed one after the other"});
  rows.push_back({"run.share_gpu",
                  only_default(boolean(at(run, &Run::share_gpu)), "the choice to share a GPU"), "-",
                  kPlain, kConfig, "not in this version: several ranks may use one GPU"});
  rows.push_back(
      {"run.break_lock", only_default(boolean(at(run, &Run::break_lock)), "a lock on the output"),
       "-", kPlain, kConfig, "not in this version: take over the output directory of a dead job"});
  rows.push_back(
      {"run.verify_input", choice(at(run, &Run::verify_input), {"fast", "full"}), "-", kPlain,
       kConfig,
       "fast: every tensor is checked for NaN when it is read; full: all tensors are checked "
       "before any compute"});
}

void add_report_rows(Rows& rows) {
  const auto evaluate = &Options::evaluate;
  using Evaluate = Options::Evaluate;
  rows.push_back({"evaluate.tokens",
                  path(at(evaluate, &Evaluate::tokens), "a .h5 or .safetensors file"), "-", kPlain,
                  kConfig, "evaluation tokens: input_ids [samples, tokens]"});
  rows.push_back({"evaluate.samples", count(at(evaluate, &Evaluate::samples), 0), "samples", kPlain,
                  kConfig, "how many samples to evaluate, from the first; 0: all"});
  rows.push_back({"evaluate.reference",
                  path(at(evaluate, &Evaluate::reference), "a checkpoint directory"), "-", kPlain,
                  kConfig, "eval also measures KL divergence from this float checkpoint"});
  rows.push_back({"evaluate.before", boolean(at(evaluate, &Evaluate::before)), "-", kPlain, kConfig,
                  "quantize evaluates the float model first"});
  rows.push_back({"evaluate.after", boolean(at(evaluate, &Evaluate::after)), "-", kPlain, kConfig,
                  "quantize evaluates its result at the end"});
  rows.push_back({"report.html", boolean(at(&Options::report, &Options::Report::html)), "-", kPlain,
                  kConfig, "write report.html"});
}

// Rates that the plan's estimate of time is made of.
void add_rate_rows(Rows& rows) {
  using Machine = Options::Machine;
  const auto row = [&](const char* name, double Machine::*member, const char* unit,
                       const char* help) {
    rows.push_back({std::string("machine.") + name, real(at(&Options::machine, member), 0, true),
                    unit, kPlain, kConfig, help});
  };
  row("forward_flops", &Machine::forward_flops, "FLOP/s",
      "rate of a rank's linear layers; 0: an assumption, as for all rates");
  row("hessian_flops", &Machine::hessian_flops, "FLOP/s", "rate of a rank's Hessian updates");
  row("factor_flops", &Machine::factor_flops, "FLOP/s",
      "rate of a rank's factorizations of large matrices");
  row("sweep_flops", &Machine::sweep_flops, "FLOP/s", "rate of a rank's column sweeps");
  row("grid_elements", &Machine::grid_elements, "weights/s",
      "weights a rank tries on a grid, times the grids tried");
  row("read_bandwidth", &Machine::read_bandwidth, "bytes/s", "how fast one rank reads files");
  row("write_bandwidth", &Machine::write_bandwidth, "bytes/s", "how fast one rank writes files");
  row("link_bandwidth", &Machine::link_bandwidth, "bytes/s",
      "how fast one rank sends to another");
  row("storage_bandwidth", &Machine::storage_bandwidth, "bytes/s",
      "what the file system gives all ranks together");
}

}  // namespace

const std::vector<OptionRow>& option_table() {
  static const std::vector<OptionRow> table = [] {
    Rows rows;
    add_input_rows(rows);
    add_grid_rows(rows);
    add_solver_rows(rows);
    add_model_wide_rows(rows);
    add_awq_rows(rows);
    add_output_rows(rows);
    add_machine_rows(rows);
    add_run_rows(rows);
    add_report_rows(rows);
    add_rate_rows(rows);
    return rows;
  }();
  return table;
}

}  // namespace bitmill
