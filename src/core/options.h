// RunOptions: every knob of bitmill. One table (options_table.cc) gives each key its name, default, unit and help text;
// parsing, --help, validation and the echo at the start of a run all read that table. Names are part of the interface:
// add, never rename.
#pragma once

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace bitmill {

enum class ActOrder { kNone, kStatic, kDynamic };
enum class OnFailed { kRtn, kFail };
enum class Compute { kAuto, kFloat32, kBFloat16 };

std::string_view act_order_name(ActOrder order);  // "none" | "static" | "dynamic"
std::string_view compute_name(Compute compute);   // "auto" | "float32" | "bfloat16"

// How one linear is quantized: [quantize] without the rules, or what a rule made of it.
struct QuantizeSettings {
  std::string algorithm = "gptq";
  int bits = 4;
  int64_t group_size = 128;  // -1: one group per row
  bool symmetric = true;
  ActOrder act_order = ActOrder::kStatic;
  bool mse = false;
  bool range_search = true;  // group ranges by expected error under the Hessian; mse goes before it
  int64_t block_size = 128;  // columns per lazy update of the sweep
  double damp = 0.002;       // fraction of mean(diag H)
  double damp_step = 10;     // ladder factor after a failed factorization
  double damp_max = 1;
  OnFailed on_failed = OnFailed::kRtn;
  bool skip = false;  // leave the module in float (rules only)
};

// One `rule=REGEX key=value ...`. The regex is ECMAScript and must match the whole module name without `.weight`.
struct QuantizeRule {
  std::string text;  // as written, blanks folded to one
  std::function<bool(const std::string& module)> matches;
  std::vector<std::pair<std::string, std::string>> settings;
};

struct RunOptions {
  struct Model {
    std::string path;
  } model;
  struct Calibration {
    std::string tokens;
    int64_t samples = 128;        // 0: all
    int64_t sequence_length = 0;  // tokens; 0: as stored
  } calibration;
  struct Quantize : QuantizeSettings {
    bool true_sequential = true;
    int64_t min_expert_tokens = 16;
    bool lm_head = false;
    bool untie = false;
    std::vector<QuantizeRule> rules;  // the command line's come first
  } quantize;
  struct Awq {
    int64_t tokens = 16384;  // calibration tokens the search looks at, whole micro-batches from the first
    int ratios = 20;         // exponents i/ratios, i = 0 .. ratios-1, tried in both kinds of scales
    bool clip = true;        // search clipping limits after scaling
  } awq;
  struct Propagation {
    std::string mode = "quantized";
  } propagation;
  struct Output {
    std::string path;
    std::string format = "gptq";
    int64_t shard_size = 5'000'000'000;  // bytes
    bool overwrite = false;
  } output;
  struct Run {
    std::string backend = "auto";
    std::string transport = "auto";
    std::string stage_width = "auto";
    int64_t microbatch_tokens = 2048;  // tokens per micro-batch at most (at least one sample)
    Compute compute = Compute::kAuto;
    std::string threads = "auto";  // per rank
    std::string device_memory = "auto";
    std::string max_time;  // H:MM:SS or 30s, 5m, 2h; empty: none
    std::string resume = "auto";
    std::string checkpoint = "60s";
    double watchdog = 300;  // seconds
    int reduction_lanes = 32;
    bool share_gpu = false;
    bool break_lock = false;
    std::string verify_input = "fast";
  } run;
  struct Evaluate {
    std::string tokens;
    int64_t samples = 0;  // 0: all
    std::string reference;
    bool before = false;
    bool after = false;
  } evaluate;
  struct Report {
    bool html = true;
  } report;
  // Rates of one rank, for the plan's estimate; 0: what the plan assumes (pipeline/rates.h). `doctor
  // --benchmark` measures them. They change no result.
  struct Machine {
    double forward_flops = 0, hessian_flops = 0, factor_flops = 0, sweep_flops = 0;
    double grid_elements = 0;
    double read_bandwidth = 0, write_bandwidth = 0, link_bandwidth = 0;
    double storage_bandwidth = 0;  // of all ranks together
  } machine;

  // Command-line options that belong to one command rather than to the configuration.
  struct Extra {
    std::string json;         // --json FILE
    std::string dump_logits;  // eval --dump-logits FILE
    std::string against;      // verify --against SRC
    bool strict = false;      // verify --strict
    std::string tensor;       // inspect --tensor NAME: print a few codes
    int ranks = 0;            // plan --ranks N: hypothetical machine
    int ranks_per_node = 0;   // plan --ranks_per_node M
    bool benchmark = false;   // doctor --benchmark: measure the rates of [machine]
  } extra;

  // Settings of one module: the first matching rule over [quantize]. `module` is the tensor name without ".weight".
  QuantizeSettings settings_for(const std::string& module) const;
};

// What the command line asks for.
struct CommandLine {
  std::string command;      // "quantize", ...; empty: general help
  std::string config_file;  // empty: none
  std::string directory;    // inspect DIR, verify DIR
  bool help = false;
  bool version = false;
  RunOptions options;
};

// Parses argv: `bitmill COMMAND [CONFIG|DIR] [--section.key=value ...]`. INI file first, command line over it; abbreviations
// and short options are off; `--key value` and `--key=value` both work, also for negative values.
// Throws Error(kUsage) naming the key, the value found, what is allowed, and for unknown keys the nearest known one.
// `takes_directory`: the command's positional argument is a directory, not a config file.
CommandLine parse_command_line(int argc, const char* const* argv, const std::vector<std::string>& commands,
                               const std::vector<std::string>& directory_commands);

// Writes every key with default, unit and meaning (COMMAND --help).
void print_option_help(std::ostream& out, const std::string& command);

// "key = value" lines of all effective settings in table order. `numeric_only`: just the keys that change the numbers
// or the files of the result (the fingerprint's part), not paths, ranks, threads or display.
std::string effective_config(const RunOptions& options, bool numeric_only);

// "5GB", "16GiB", "1024" -> bytes; KB..TB are powers of 1000, KiB..TiB of 1024. Throws kUsage naming `key`.
int64_t parse_size(const std::string& text, const std::string& key);
// "60s", "5m", "2h", "1:30:00" -> seconds. Throws kUsage naming `key`.
double parse_duration(const std::string& text, const std::string& key);
// The candidate with the smallest edit distance to `word`.
std::string nearest_name(const std::string& word, const std::vector<std::string>& candidates);

}  // namespace bitmill
