#include "golden/golden_runner.h"

#include <algorithm>

#include "algorithms/quantizer.h"
#include "formats/format.h"
#include "formats/stored_tensors.h"
#include "golden/awq_cases.h"
#include "io/json.h"
#include "io/safetensors.h"

namespace bitmill::golden {
namespace {

const char* const kModule = "layer";

Tensor converted(TensorView source, DType dtype) {
  Tensor out(dtype, source.shape);
  convert(source, out);
  return out;
}

template <typename T>
Tensor single(DType dtype, T value) {
  Tensor out(dtype, {1});
  *out.as<T>() = value;
  return out;
}

// Why a case cannot run here; empty if it can.
std::string unsupported(const Json& c) {
  const std::string kind = c.at("kind");
  if (is_awq_kind(kind)) return "";
  if (kind != "rtn" && kind != "gptq" && kind != "hessian" && kind != "pack") return "kind " + kind;
  return "";
}

bool wants(const Json& c, const char* output) {
  return c.contains("outputs") && c["outputs"].contains(output);
}

QuantizeSettings settings_of(const Json& options, const std::string& algorithm) {
  QuantizeSettings s;
  s.algorithm = algorithm;
  s.bits = options.value("bits", 4);
  s.group_size = options.value("group_size", -1);
  s.symmetric = options.value("sym", true);
  s.mse = options.value("mse", false);
  s.range_search = false;  // the reference has no such search
  s.block_size = options.value("blocksize", 128);
  s.damp = options.value("percdamp", 0.01);
  s.on_failed = OnFailed::kFail;
  if (!options.value("act_order", false)) {
    s.act_order = ActOrder::kNone;
  } else {
    s.act_order = options.value("static_groups", false) ? ActOrder::kStatic : ActOrder::kDynamic;
  }
  return s;
}

TensorView sequence(const Tensor& x, int64_t first, int64_t last) {
  return x.view().slice(first, last).reshaped({(last - first) * x.shape()[1], x.shape()[2]});
}

// in.x [sequences, length, columns]: one lane per sequence.
Hessian hessian_of(const Tensor& x, DType dtype, Backend& backend) {
  const Tensor inputs = converted(x, dtype);
  HessianAccumulator accumulator(x.shape()[2], dtype, backend);
  for (int64_t s = 0; s < x.shape()[0]; ++s)
    accumulator.add(sequence(inputs, s, s + 1), 1, static_cast<int>(s));
  return accumulator.finish();
}

// Calls body(i, j, packed index) for the stored elements of an n x n Hessian.
template <typename Body>
void over_packed(int64_t n, const Body& body) {
  const int64_t tile = hessian_tile(n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < std::min(n, (i / tile + 1) * tile); ++j) {
      const int64_t width = std::min(tile, n - j / tile * tile);
      body(i, j, hessian_tile_offset(n, i / tile, j / tile) + i % tile * width + j % tile);
    }
  }
}

// A normalised matrix [n, n] F64 as a sum over two samples, so that factor() is 1.
Hessian hessian_given(const Tensor& matrix, DType dtype) {
  const int64_t n = matrix.rows();
  Tensor sum(DType::kF64, {hessian_elements(n)});
  over_packed(n, [&](int64_t i, int64_t j, int64_t at) {
    sum.as<double>()[at] = matrix.as<double>()[i * n + j];
  });
  Hessian hessian{n, 2, 1, Tensor()};
  hessian.sum = converted(sum, dtype);
  return hessian;
}

void add_words(const Json& c, const std::string& prefix, const QuantizedLinear& linear,
               Outcome& outcome) {
  const std::vector<std::string> wanted = c.value("formats", std::vector<std::string>());
  const std::vector<std::string> refused = c.value("refuse_formats", std::vector<std::string>());
  std::vector<std::string> names = wanted;
  names.insert(names.end(), refused.begin(), refused.end());
  for (const std::string& name : names) {
    if (!format_name(name)) continue;
    const OutputFormat& format = find_format(*format_name(name));
    LinearSpec spec;
    spec.module = kModule;
    spec.out = linear.out();
    spec.in = linear.in();
    const QuantizeSettings settings = settings_of(c.at("options"), "rtn");
    try {
      // Packers can do more than the product lets through (ragged groups, asymmetric v1): wanted
      // words are packed without asking, refused ones must be stopped by the check or by the
      // packer.
      if (std::find(refused.begin(), refused.end(), name) != refused.end())
        format.check(spec, settings);
      for (NamedTensor& tensor : format.pack(spec, linear, TensorView())) {
        const std::string suffix = tensor.name.substr(std::string(kModule).size() + 1);
        outcome.tensors[prefix + name + "." + suffix] = std::move(tensor.data);
      }
    } catch (const Error&) {
      // A refusal: the case's outputs say whether the tensors should be there.
    }
  }
}

Tensor widened_zeros(const Tensor& zeros) {
  Tensor out(DType::kI32, zeros.shape());
  std::copy_n(zeros.as<uint8_t>(), zeros.elements(), out.as<int32_t>());
  return out;
}

// Scales and zero points, or the two values of a ternary grid, which the suite calls scales and
// neg.
void add_grids(const std::string& prefix, const QuantizedLinear& linear, DType dtype,
               Outcome& outcome) {
  outcome.tensors[prefix + "scales"] = converted(linear.scales, dtype);
  if (linear.kind == GridKind::kTernary)
    outcome.tensors[prefix + "neg"] = converted(linear.zeros, dtype);
  else
    outcome.tensors[prefix + "zeros"] = widened_zeros(linear.zeros);
}

void add_linear(const Json& c, const std::string& prefix, QuantizedLinear linear, DType dtype,
                Backend& backend, Outcome& outcome) {
  outcome.tensors[prefix + "dequant"] = Tensor(DType::kF32, linear.codes.shape());
  backend.dequantize(linear, outcome.tensors[prefix + "dequant"]);
  add_words(c, prefix, linear, outcome);
  add_grids(prefix, linear, dtype, outcome);
  outcome.tensors[prefix + "g_idx"] = std::move(linear.g_idx);
  outcome.tensors[prefix + "codes"] = std::move(linear.codes);
}

void add_result(const Json& c, QuantizeResult result, DType dtype, Backend& backend,
                Outcome& outcome) {
  const QuantizeRecord& record = result.record;
  add_linear(c, "out.", std::move(result.linear), dtype, backend, outcome);
  const bool gptq = c.at("kind") == "gptq";
  if (wants(c, "out.layer_error"))
    outcome.tensors["out.layer_error"] = single(DType::kF64, record.error);
  if (gptq && record.method == "gptq") {
    outcome.tensors["out.loss"] = single(DType::kF64, record.loss);
    outcome.tensors["out.damp"] = single(DType::kF64, record.damp);
  }
  outcome.fallback = gptq && record.method != "gptq";
  if (gptq) outcome.tensors["out.fallback"] = single(DType::kI32, int32_t{outcome.fallback});
}

void run_quantizer(const Json& c, const Tensors& inputs, DType dtype, Backend& backend,
                   Outcome& outcome) {
  const std::string algorithm = c.at("kind");
  LinearProblem problem;
  const Tensor weight = converted(inputs.at("in.weight"), dtype);
  problem.module = kModule;
  problem.weight = weight;
  problem.settings = settings_of(c.at("options"), algorithm);
  const Json& options = c.at("options");
  problem.kind = options.value("trits", false) ? GridKind::kTernary : GridKind::kUniform;
  if (options.value("sym_nonneg", "original") != std::string("mirror"))
    problem.range = GridRange::kUnmirrored;
  const bool stored = options.value("scale_f16", false) && problem.kind == GridKind::kUniform;
  problem.scale_dtype = stored ? DType::kF16 : DType::kF64;
  problem.static_groups = options.value("static_groups", false);
  std::optional<Hessian> hessian;
  if (inputs.contains("in.hessian")) {
    hessian = hessian_given(inputs.at("in.hessian"), dtype);
  } else if (algorithm == "gptq" || wants(c, "out.layer_error")) {
    hessian = hessian_of(inputs.at("in.x"), dtype, backend);
  }
  std::vector<QuantizeResult> results =
      find_quantizer(algorithm).quantize({&problem, 1}, hessian ? &*hessian : nullptr, backend);
  if (results[0].record.failed) {
    outcome.rejected = results[0].record.note;
  } else {
    add_result(c, std::move(results[0]), dtype, backend, outcome);
  }
}

// options.batches: sequences per call, 0 for one sequence handed over as a matrix, which counts as
// one sample.
void run_hessian(const Json& c, const Tensors& inputs, DType dtype, Backend& backend,
                 Outcome& outcome) {
  const Tensor x = converted(inputs.at("in.x"), dtype);
  const int64_t n = x.shape()[2];
  HessianAccumulator accumulator(n, dtype, backend);
  int64_t first = 0;
  int lane = 0;
  for (const Json& batch : c.at("options").at("batches")) {
    const int64_t count = std::max<int64_t>(1, batch.get<int64_t>());
    accumulator.add(sequence(x, first, first + count), count, lane++);
    first += count;
  }
  const Hessian hessian = accumulator.finish();
  const Tensor sum = converted(hessian.sum, DType::kF64);
  Tensor full(DType::kF64, {n, n});
  over_packed(n, [&](int64_t i, int64_t j, int64_t at) {
    full.as<double>()[i * n + j] = full.as<double>()[j * n + i] =
        hessian.factor() * sum.as<double>()[at];
  });
  outcome.tensors["out.hessian"] = std::move(full);
  outcome.tensors["out.count"] = single(DType::kI64, hessian.samples);
}

// A pack case may come with a g_idx of other groups than its options (pack_b4_ragged_blocks has 27,
// 27 and 26 columns instead of 32, 32 and 16). Only gptq words hold g_idx; AWQ words mean the
// options, so they are packed with the groups of the options.
void add_pack_words(const Json& c, QuantizedLinear& linear, Outcome& outcome) {
  Json sequential = c, given = c;
  for (const char* key : {"formats", "refuse_formats"}) {
    sequential[key] = given[key] = Json::array();
    for (const Json& name : c.value(key, Json::array()))
      (name == "awq" ? sequential : given)[key].push_back(name);
  }
  add_words(given, "out.", linear, outcome);
  linear.g_idx = make_group_index(linear.in(), linear.group_size);
  add_words(sequential, "out.", linear, outcome);
}

void run_pack(const Json& c, Tensors& inputs, Outcome& outcome) {
  QuantizedLinear linear;
  linear.bits = c.at("options").value("bits", 4);
  linear.group_size = c["options"].value("group_size", -1);
  linear.symmetric = c["options"].value("sym", true);
  linear.codes = std::move(inputs.at("in.codes"));
  linear.g_idx = std::move(inputs.at("in.g_idx"));
  linear.scales = converted(inputs.at("in.scales"), DType::kF16);
  linear.zeros = Tensor(DType::kU8, inputs.at("in.zeros").shape());
  std::copy_n(inputs.at("in.zeros").as<int32_t>(), linear.zeros.elements(),
              linear.zeros.as<uint8_t>());
  add_pack_words(c, linear, outcome);
}

// Does the tensor ("out.ct.weight_packed", "out.gate.awq.qweight") belong to a stored format that
// this version cannot write?
bool foreign_word(const Json& c, const std::string& output) {
  const size_t last = output.rfind('.'), before = output.rfind('.', last - 1);
  const std::string format = output.substr(before + 1, last - before - 1);
  const std::vector<std::string> formats = c.value("formats", std::vector<std::string>());
  return std::find(formats.begin(), formats.end(), format) != formats.end() && !format_name(format);
}

}  // namespace

std::optional<std::string> format_name(const std::string& golden_format) {
  if (golden_format == "gptq_v1") return "gptq";
  if (golden_format == "gptq_v2") return "gptq_v2";
  if (golden_format == "ct") return "compressed-tensors";
  if (golden_format == "awq") return "awq";
  return std::nullopt;
}

Tensors load_tensors(const std::string& path) {
  Tensors tensors;
  const RangeReader reader(path);
  for (const TensorEntry& entry : read_safetensors_header(path)) {
    Tensor tensor(entry.dtype, entry.shape);
    reader.read(entry.offset, entry.bytes, tensor.data());
    tensors[entry.name] = std::move(tensor);
  }
  return tensors;
}

Outcome run_case(const Json& golden_case, const std::string& directory, DType dtype,
                 Backend& backend) {
  Outcome outcome;
  outcome.skipped = unsupported(golden_case);
  if (!outcome.skipped.empty()) return outcome;
  Tensors inputs = load_tensors(directory + "/" + golden_case.at("input").get<std::string>());
  try {
    const std::string kind = golden_case.at("kind");
    if (kind == "hessian") {
      run_hessian(golden_case, inputs, dtype, backend, outcome);
    } else if (kind == "pack") {
      run_pack(golden_case, inputs, outcome);
    } else if (is_awq_kind(kind)) {
      for (auto& [prefix, linear] : run_awq(golden_case, inputs, dtype, backend, outcome))
        add_linear(golden_case, prefix, std::move(linear), dtype, backend, outcome);
    } else {
      run_quantizer(golden_case, inputs, dtype, backend, outcome);
    }
  } catch (const Error& error) {
    if (error.code() != ExitCode::kInput) throw;
    outcome.rejected = error.what();
    outcome.tensors.clear();
  }
  return outcome;
}

Json supported_cases(const std::string& directory) {
  Json suite = read_json(directory + "/cases.json");
  Json kept = Json::array();
  for (Json c : suite.at("cases")) {
    if (!unsupported(c).empty()) continue;
    const Json given = c;
    Json formats = Json::array();
    for (const Json& name : c.value("formats", Json::array())) {
      if (format_name(name)) formats.push_back(name);
    }
    if (c.contains("formats")) c["formats"] = formats;
    if (c.contains("outputs")) {
      Json outputs = Json::object();
      for (const auto& [name, entry] : c["outputs"].items()) {
        if (!foreign_word(given, name)) outputs[name] = entry;
      }
      c["outputs"] = outputs;
    }
    kept.push_back(c);
  }
  suite["cases"] = kept;
  return suite;
}

}  // namespace bitmill::golden
