// Rotary embedding: reading its keys and computing its table. Formulas: docs/models.md.
#include <algorithm>
#include <cmath>
#include <numbers>

#include "models/config_keys.h"
#include "models/family.h"
#include "io/json.h"

namespace bitmill {

// ---- reading
// ------------------------------------------------------------------------------------------------

namespace {

// Spellings of the rope types; "su" is what the first longrope checkpoints called it.
struct KindName {
  const char* name;
  RopeKind kind;
};
constexpr KindName kKinds[] = {
    {"default", RopeKind::kDefault}, {"linear", RopeKind::kLinear},
    {"dynamic", RopeKind::kDynamic}, {"llama3", RopeKind::kLlama3},
    {"yarn", RopeKind::kYarn},       {"longrope", RopeKind::kLongRope},
    {"su", RopeKind::kLongRope},
};

RopeKind parse_kind(const ConfigKeys& keys) {
  const std::string key = keys.has("rope_type") ? "rope_type" : "type";
  const std::string name = keys.text_or(key, "default");
  for (const KindName& known : kKinds)
    if (name == known.name) return known.kind;
  fail(ExitCode::kInput,
       "config.json: {} is {}; known: default, linear, dynamic, llama3, yarn, longrope",
       keys.label(key), quote_name(name));
}

// The object that holds the scaling keys; newer files may nest one per layer type, which these
// models use alike.
ConfigKeys scaling_keys(const ConfigKeys& config, const Json& none) {
  if (config.has("rope_parameters")) {
    const ConfigKeys all = config.object("rope_parameters");
    const Json* first = nullptr;
    std::string first_type;
    for (const char* type : {"full_attention", "sliding_attention"}) {
      if (!all.has(type)) continue;
      if (first != nullptr && *first != all.json().at(type))
        fail(ExitCode::kInput,
             "config.json: rope_parameters differ between {} and {} layers, expected equal ones",
             first_type, type);
      first = &all.json().at(type);
      first_type = type;
    }
    return first == nullptr ? all : all.object(first_type);
  }
  if (config.has("rope_scaling")) return config.object("rope_scaling");
  return ConfigKeys(none);
}

void parse_llama3(const ConfigKeys& keys, RopeSpec& rope) {
  rope.factor = keys.positive("factor");
  rope.low_freq_factor = keys.positive("low_freq_factor");
  rope.high_freq_factor = keys.positive("high_freq_factor");
  rope.original_max_positions = keys.size("original_max_position_embeddings");
  if (rope.low_freq_factor >= rope.high_freq_factor)
    fail(ExitCode::kInput, "config.json: {} is {}, expected more than {} {}",
         keys.label("high_freq_factor"), rope.high_freq_factor, keys.label("low_freq_factor"),
         rope.low_freq_factor);
}

// `factor`, or the ratio of the lengths it stands for.
double factor_or_ratio(const ConfigKeys& keys, const RopeSpec& rope) {
  return keys.positive_or("factor", static_cast<double>(rope.max_positions) /
                                        static_cast<double>(rope.original_max_positions));
}

void parse_yarn(const ConfigKeys& keys, RopeSpec& rope) {
  if (!keys.has("original_max_position_embeddings"))
    keys.positive("factor");  // one of the two must be there
  rope.factor = factor_or_ratio(keys, rope);
  rope.beta_fast = keys.positive_or("beta_fast", rope.beta_fast);
  rope.beta_slow = keys.positive_or("beta_slow", rope.beta_slow);
  rope.attention_factor = keys.positive_or("attention_factor", 0);
  // Zero means absent, so that a file may switch them off.
  const auto optional = [&](const char* key) {
    const bool zero = keys.has(key) && keys.json().at(key).is_number() && keys.json().at(key) == 0;
    return zero ? 0.0 : keys.positive_or(key, 0);
  };
  rope.mscale = optional("mscale");
  rope.mscale_all_dim = optional("mscale_all_dim");
  rope.truncate = keys.flag_or("truncate", true);
  if (rope.beta_slow > rope.beta_fast)
    fail(ExitCode::kInput, "config.json: {} is {}, expected at most {} {}", keys.label("beta_slow"),
         rope.beta_slow, keys.label("beta_fast"), rope.beta_fast);
}

void parse_longrope(const ConfigKeys& keys, RopeSpec& rope) {
  rope.factor = factor_or_ratio(keys, rope);
  rope.attention_factor = keys.positive_or("attention_factor", 0);
  rope.short_factor = keys.positives("short_factor");
  rope.long_factor = keys.positives("long_factor");
  for (const auto& [key, list] :
       {std::pair{"short_factor", &rope.short_factor}, std::pair{"long_factor", &rope.long_factor}})
    if (static_cast<int64_t>(list->size()) != rope.dims / 2)
      fail(ExitCode::kInput,
           "config.json: {} has {} numbers, expected {}, one per rotated pair of dims",
           keys.label(key), list->size(), rope.dims / 2);
}

int64_t rotated_dims(const ConfigKeys& config, const ConfigKeys& keys, int64_t head_dim) {
  const ConfigKeys& owner = keys.has("partial_rotary_factor") ? keys : config;
  const double part = owner.positive_or("partial_rotary_factor", 1);
  const int64_t dims = static_cast<int64_t>(std::min(part, 2.0) * static_cast<double>(head_dim));
  if (part > 1 || dims < 2 || dims % 2 != 0)
    fail(ExitCode::kInput,
         "config.json: head_dim {} with partial_rotary_factor {} rotates {} dims, expected an even "
         "number from 2 to "
         "head_dim",
         head_dim, part, dims);
  return dims;
}

}  // namespace

RopeSpec parse_rope(const Json& config, int64_t head_dim, int64_t max_positions) {
  const Json none = Json::object();
  const ConfigKeys top(config);
  const ConfigKeys keys = scaling_keys(top, none);
  RopeSpec rope;
  rope.kind = parse_kind(keys);
  rope.theta = (keys.has("rope_theta") ? keys : top).positive_or("rope_theta", 10000);
  if (rope.theta <= 1)
    fail(ExitCode::kInput, "config.json: rope_theta is {}, expected more than 1", rope.theta);
  rope.dims = rotated_dims(top, keys, head_dim);
  rope.max_positions = max_positions;
  const char* original = "original_max_position_embeddings";
  rope.original_max_positions = (keys.has(original) ? keys : top).size_or(original, max_positions);
  switch (rope.kind) {
    case RopeKind::kDefault:
      break;
    case RopeKind::kLinear:
    case RopeKind::kDynamic:
      rope.factor = keys.positive("factor");
      break;
    case RopeKind::kLlama3:
      parse_llama3(keys, rope);
      break;
    case RopeKind::kYarn:
      parse_yarn(keys, rope);
      break;
    case RopeKind::kLongRope:
      parse_longrope(keys, rope);
      break;
  }
  if (rope.kind == RopeKind::kDynamic && rope.dims == 2)
    fail(ExitCode::kInput,
         "config.json: dynamic rope rotates 2 dims per head, expected at least 4");
  return rope;
}

// ---- computing
// ----------------------------------------------------------------------------------------------

namespace {

constexpr double kTwoPi = 2 * std::numbers::pi;

std::vector<double> plain_frequencies(double theta, int64_t dims) {
  std::vector<double> frequencies(dims / 2);
  for (int64_t j = 0; j < dims / 2; ++j)
    frequencies[j] = std::pow(theta, -2.0 * static_cast<double>(j) / static_cast<double>(dims));
  return frequencies;
}

// NTK: the base grows with what the sequence has beyond the trained length, so short sequences are
// untouched.
double dynamic_theta(const RopeSpec& rope, int64_t length) {
  const double trained = static_cast<double>(rope.max_positions);
  const double seen = std::max(static_cast<double>(length), trained);
  const double dims = static_cast<double>(rope.dims);
  return rope.theta * std::pow(rope.factor * seen / trained - (rope.factor - 1), dims / (dims - 2));
}

// Long wavelengths are interpolated, short ones kept, those between blended.
double llama3_frequency(const RopeSpec& rope, double frequency) {
  const double wavelength = kTwoPi / frequency;
  const double original = static_cast<double>(rope.original_max_positions);
  if (wavelength > original / rope.low_freq_factor) return frequency / rope.factor;
  if (wavelength < original / rope.high_freq_factor) return frequency;
  const double keep = (original / wavelength - rope.low_freq_factor) /
                      (rope.high_freq_factor - rope.low_freq_factor);
  return (1 - keep) * frequency / rope.factor + keep * frequency;
}

// Interpolates the pairs that turn less than beta_slow times over the trained length, keeps those
// above beta_fast.
void apply_yarn(const RopeSpec& rope, std::vector<double>& frequencies) {
  const double dims = static_cast<double>(rope.dims);
  const auto pair_of = [&](double turns) {
    return dims * std::log(static_cast<double>(rope.original_max_positions) / (turns * kTwoPi)) /
           (2 * std::log(rope.theta));
  };
  double low = pair_of(rope.beta_fast), high = pair_of(rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dims - 1);
  if (low == high) high += 0.001;  // the ramp becomes a step
  for (size_t j = 0; j < frequencies.size(); ++j) {
    const double ramp = std::clamp((static_cast<double>(j) - low) / (high - low), 0.0, 1.0);
    frequencies[j] = frequencies[j] / rope.factor * ramp + frequencies[j] * (1 - ramp);
  }
}

std::vector<double> frequencies_of(const RopeSpec& rope, int64_t length) {
  const double theta = rope.kind == RopeKind::kDynamic ? dynamic_theta(rope, length) : rope.theta;
  std::vector<double> frequencies = plain_frequencies(theta, rope.dims);
  switch (rope.kind) {
    case RopeKind::kDefault:
    case RopeKind::kDynamic:
      break;
    case RopeKind::kLinear:
      for (double& f : frequencies) f /= rope.factor;
      break;
    case RopeKind::kLlama3:
      for (double& f : frequencies) f = llama3_frequency(rope, f);
      break;
    case RopeKind::kYarn:
      apply_yarn(rope, frequencies);
      break;
    case RopeKind::kLongRope: {
      const auto& stretch =
          length > rope.original_max_positions ? rope.long_factor : rope.short_factor;
      BITMILL_CHECK(stretch.size() == frequencies.size());
      for (size_t j = 0; j < frequencies.size(); ++j) frequencies[j] /= stretch[j];
      break;
    }
  }
  return frequencies;
}

// What cos and sin are multiplied with.
double attention_factor_of(const RopeSpec& rope) {
  if (rope.attention_factor > 0) return rope.attention_factor;
  const auto yarn_scale = [&](double weight) {
    return rope.factor <= 1 ? 1.0 : 0.1 * weight * std::log(rope.factor) + 1;
  };
  if (rope.kind == RopeKind::kYarn) {
    if (rope.mscale != 0 && rope.mscale_all_dim != 0)
      return yarn_scale(rope.mscale) / yarn_scale(rope.mscale_all_dim);
    return yarn_scale(1);
  }
  if (rope.kind == RopeKind::kLongRope && rope.factor > 1)
    return std::sqrt(1 + std::log(rope.factor) /
                             std::log(static_cast<double>(rope.original_max_positions)));
  return 1;
}

}  // namespace

Tensor rope_table(const RopeSpec& rope, int64_t length) {
  const std::vector<double> frequencies = frequencies_of(rope, length);
  const double factor = attention_factor_of(rope);
  const int64_t pairs = rope.dims / 2;
  Tensor table(DType::kF32, {length, rope.dims});
  for (int64_t position = 0; position < length; ++position) {
    float* row = table.as<float>() + position * rope.dims;
    for (int64_t j = 0; j < pairs; ++j) {
      const double angle = static_cast<double>(position) * frequencies[j];
      row[j] = static_cast<float>(std::cos(angle) * factor);
      row[pairs + j] = static_cast<float>(std::sin(angle) * factor);
    }
  }
  return table;
}

}  // namespace bitmill
