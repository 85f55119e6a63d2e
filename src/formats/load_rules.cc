// What the usual engines say about a quantized model at tensor parallelism 1, 2, 4 and 8. The rules
// are arithmetic on shapes: an engine splits q, k, v, gate and up along their output, o and down
// along their input, and each part must still consist of whole groups, whole words and whole kernel
// tiles. Sources: docs/formats/gptq.md, "Who loads it".
#include <algorithm>
#include <map>
#include <set>

#include "formats/module_names.h"

namespace bitmill {
namespace {

constexpr int kParallel[] = {1, 2, 4, 8};
// Tile of the Marlin kernel, which most engines prefer on NVIDIA GPUs.
constexpr int64_t kMarlinIn = 128, kMarlinOut = 64;

// One linear at one split.
struct Part {
  const LinearSpec& linear;
  const ModuleChoice& choice;
  bool splits_input;  // o_proj, down_proj: row-parallel
  int64_t pieces;  // of the split dimension; k and v are replicated beyond the number of kv heads
  int64_t out() const { return splits_input ? linear.out : linear.out / pieces; }
  int64_t in() const { return splits_input ? linear.in / pieces : linear.in; }
};

bool row_parallel(const std::string& module) {
  for (const char* leaf : {".o_proj", ".down_proj", ".out_proj", ".fc2", ".dense", ".c_proj"})
    if (module.ends_with(leaf)) return true;
  return false;
}

Part part_of(const ModelSpec& spec, const LinearSpec& linear, const ModuleChoice& choice,
             int parallel) {
  int64_t pieces = parallel;
  if ((linear.module.ends_with(".k_proj") || linear.module.ends_with(".v_proj")) &&
      spec.kv_heads > 0)
    pieces = std::min<int64_t>(parallel, spec.kv_heads);
  return {linear, choice, row_parallel(linear.module), pieces};
}

// Collects one warning per (tensor parallelism, kind of reason); the first module is the example.
class Findings {
 public:
  void add(int parallel, const std::string& kind, const std::string& module,
           const std::string& reason) {
    if (seen_.insert({parallel, kind}).second) warnings_.push_back({parallel, module, reason});
  }
  std::vector<LoadWarning> take() { return std::move(warnings_); }

 private:
  std::set<std::pair<int, std::string>> seen_;
  std::vector<LoadWarning> warnings_;
};

// Rules that no split changes; reported under tensor parallelism 1.
void check_scheme(const std::string& format, const ModuleChoice& choice, Findings& findings) {
  const bool gptq = format == "gptq" || format == "gptq_v2";
  if (gptq && (!choice.symmetric || (choice.bits != 4 && choice.bits != 8)))
    findings.add(1, "scheme", choice.module,
                 fmt::format("vLLM reads {} only with 4 or 8 bits and symmetric=true, this has {}",
                             format, scheme_text(choice)));
  if (format == "compressed-tensors" && !choice.symmetric && choice.bits == 2)
    findings.add(1, "scheme", choice.module,
                 "vLLM reads asymmetric compressed-tensors only with 4 or 8 bits, this has 2");
  if (choice.act_order == ActOrder::kDynamic && choice.group_size != -1)
    findings.add(1, "order", choice.module,
                 "vLLM refuses desc_act=true with groups; use quantize.act_order=static");
  const int64_t g = choice.group_size;
  if (g != -1 && g != 32 && g != 64 && g != 128)
    findings.add(
        1, "group", choice.module,
        fmt::format("group_size={} has no fast GPU kernel, expected -1, 32, 64 or 128", g));
}

// A quantized head is rare, and some loaders look for lm_head.weight whatever the config says.
// Sources: vLLM pull request 37291, SGLang pull request 28130, optimum's gptq quantizer.
void check_head(const std::string& format, const LinearSpec& head, Findings& findings) {
  findings.add(1, "head", head.module,
               format == "compressed-tensors" ? "vLLM before March 2026 and SGLang take a packed "
                                                "lm_head of compressed-tensors for a float one"
                                              : "optimum (transformers' loader of gptq) packs "
                                                "block linears only and leaves a quantized lm_head "
                                                "uninitialised; GPTQModel and vLLM read it");
}

void check_split(int parallel, const Part& part, Findings& findings) {
  const LinearSpec& linear = part.linear;
  const int64_t whole = part.splits_input ? linear.in : linear.out;
  const char* side = part.splits_input ? "input columns" : "output rows";
  if (whole % part.pieces != 0) {
    findings.add(parallel, part.splits_input ? "divide in" : "divide out", linear.module,
                 fmt::format("{} {} do not divide by {}", whole, side, part.pieces));
    return;
  }
  const int64_t g = part.choice.group_size;
  if (g != -1 && part.in() % g != 0)
    findings.add(parallel, "straddle", linear.module,
                 fmt::format("a group of {} columns straddles the split: {} columns per rank", g,
                             part.in()));
  if (part.in() % kMarlinIn != 0)
    findings.add(parallel, "marlin in", linear.module,
                 fmt::format("{} input columns per rank are no multiple of {}: the Marlin kernel "
                             "pads or refuses them",
                             part.in(), kMarlinIn));
  if (part.out() % kMarlinOut != 0)
    findings.add(
        parallel, "marlin out", linear.module,
        fmt::format(
            "{} output rows per rank are no multiple of {}: the Marlin kernel pads or refuses them",
            part.out(), kMarlinOut));
}

}  // namespace

std::vector<LoadWarning> check_load(const ModelSpec& spec, const OutputFormat& format,
                                    const std::vector<ModuleChoice>& modules) {
  std::map<std::string, const ModuleChoice*> choices;
  for (const ModuleChoice& module : modules) choices[module.module] = &module;
  Findings findings;
  for (int parallel : kParallel) {
    const auto check = [&](const LinearSpec& linear) {
      const auto choice = choices.find(linear.module);
      if (choice == choices.end() || !choice->second->quantized) return false;
      if (parallel == 1) check_scheme(format.name(), *choice->second, findings);
      check_split(parallel, part_of(spec, linear, *choice->second, parallel), findings);
      return true;
    };
    for (const BlockSpec& block : spec.blocks)
      for (const LinearSpec& linear : block.linears) check(linear);
    if (check(spec.head_linear()) && parallel == 1)
      check_head(format.name(), spec.head_linear(), findings);
  }
  return findings.take();
}

}  // namespace bitmill
