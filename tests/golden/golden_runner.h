// Runs the cases of a golden suite (a cases.json with inputs/ and expected/ beside it) through the
// product's own quantizers and formats. Shared by the program bitmill_golden and by the tests;
// nothing is implemented twice.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "backends/backend.h"
#include "io/json.h"

namespace bitmill::golden {

using Tensors = std::map<std::string, Tensor>;

// All tensors of one file.
Tensors load_tensors(const std::string& path);

struct Outcome {
  std::string skipped;    // why the case cannot run (an option this version has not); empty: it ran
  std::string rejected;   // the refusal's sentence; empty: accepted
  bool fallback = false;  // rounded to nearest instead of the method asked for
  Tensors tensors;        // as the case's "outputs" name them; stored words only of known formats
};

// `dtype` kF64 or kF32: the type of all arithmetic. `directory` is where case["input"] is relative
// to.
Outcome run_case(const Json& golden_case, const std::string& directory, DType dtype,
                 Backend& backend);

// Our name of a format of the suite ("gptq_v1" -> "gptq"), nothing for one that this version cannot
// write.
std::optional<std::string> format_name(const std::string& golden_format);

// The cases of `directory`/cases.json that this version can run, without the outputs of formats it
// cannot write: what a checker may insist on.
Json supported_cases(const std::string& directory);

}  // namespace bitmill::golden
