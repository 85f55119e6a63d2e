// The JSON types by name only: headers that merely pass them on need not pay for the whole library.
#pragma once

#include <nlohmann/json_fwd.hpp>

namespace bitmill {

using Json = nlohmann::json;                 // object keys sorted: deterministic text
using OrderedJson = nlohmann::ordered_json;  // keys in the order written

}  // namespace bitmill
