// Reference words computed elsewhere: every case of the golden suite that stores gptq,
// compressed-tensors or AWQ words.
#include <gtest/gtest.h>

#include <map>

#include "formats/quantized_fixture.h"
#include "formats/stored_tensors.h"
#include "io/json.h"
#include "support/paths.h"

namespace bitmill {
namespace {

using testing::fixture_path;
using testing::same_bytes;

const std::map<std::string, std::string> kFormats = {
    {"gptq_v1", "gptq"}, {"gptq_v2", "gptq_v2"}, {"ct", "compressed-tensors"}, {"awq", "awq"}};

using Tensors = std::map<std::string, Tensor>;

Tensors read_all(const std::string& path) {
  Tensors tensors;
  const RangeReader reader(path);
  for (const TensorEntry& entry : read_safetensors_header(path)) {
    Tensor tensor(entry.dtype, entry.shape);
    reader.read(entry.offset, entry.bytes, tensor.data());
    tensors[entry.name] = std::move(tensor);
  }
  return tensors;
}

// The quantized linear of a case: of its input for pack cases, of its expected output for rtn and
// gptq cases.
std::optional<QuantizedLinear> linear_of(const Tensors& tensors, const std::string& prefix,
                                         const Json& options) {
  for (const char* name : {"codes", "scales", "zeros", "g_idx"})
    if (!tensors.contains(prefix + name)) return std::nullopt;
  QuantizedLinear q;
  q.bits = options.value("bits", 4);
  q.group_size = options.value("group_size", -1);
  q.symmetric = options.value("sym", true);
  q.codes = clone(tensors.at(prefix + "codes"));
  const Tensor& scales = tensors.at(prefix + "scales");
  q.scales = Tensor(DType::kF16, scales.shape());
  convert(scales, q.scales);
  const Tensor& zeros = tensors.at(prefix + "zeros");
  q.zeros = Tensor(DType::kU8, zeros.shape());
  for (int64_t i = 0; i < zeros.elements(); ++i)
    q.zeros.as<uint8_t>()[i] = zeros.dtype() == DType::kU8
                                   ? zeros.as<uint8_t>()[i]
                                   : static_cast<uint8_t>(zeros.as<int32_t>()[i]);
  q.g_idx = clone(tensors.at(prefix + "g_idx"));
  return q;
}

// Compares all expected tensors "out.TAG.*"; returns how many.
int compare(const std::string& name, const std::string& tag, const Tensors& expected,
            const QuantizedLinear& q) {
  int compared = 0;
  std::vector<NamedTensor> packed;
  for (const auto& [key, value] : expected) {
    const std::string prefix = "out." + tag + ".";
    if (!key.starts_with(prefix)) continue;
    if (packed.empty())
      packed = find_format(kFormats.at(tag)).pack({"m", q.out(), q.in(), false}, q, {});
    EXPECT_TRUE(same_bytes(testing::tensor_named(packed, "m." + key.substr(prefix.size())), value))
        << name << " " << key;
    ++compared;
  }
  return compared;
}

TEST(GoldenPack, StoredWordsEqualTheReference) {
  const std::string golden = fixture_path("golden");
  if (golden.empty())
    GTEST_SKIP() << "the golden suite is not beside the source tree (BITMILL_FIXTURES)";
  int compared = 0, refused = 0;
  const Json cases = read_json(golden + "/cases.json");
  for (const Json& item : cases["cases"]) {
    const std::string name = item["name"], kind = item["kind"];
    if (kind != "pack" && kind != "rtn" && kind != "gptq") continue;
    const std::string path = golden + "/expected/" + name + ".safetensors";
    const Tensors expected = item["expect"] == "rejected" ? Tensors() : read_all(path);
    auto q = kind == "pack" ? linear_of(read_all(golden + "/" + item["input"].get<std::string>()),
                                        "in.", item["options"])
                            : linear_of(expected, "out.", item["options"]);
    if (!q) continue;
    for (const auto& [tag, format] : kFormats)
      if (tag != "awq") compared += compare(name, tag, expected, *q);
    for (const Json& tag : item.value("refuse_formats", Json::array()))
      if (const auto at = kFormats.find(tag.get<std::string>()); at != kFormats.end()) {
        EXPECT_THROW(find_format(at->second).pack({"m", q->out(), q->in(), false}, *q, {}), Error)
            << name << " " << tag;
        ++refused;
      }
    // AWQ words have no g_idx and mean the groups of the options, from which the g_idx of one pack
    // case differs.
    if (kind == "pack") q->g_idx = make_group_index(q->in(), q->group_size);
    compared += compare(name, "awq", expected, *q);
  }
  EXPECT_GT(compared, 60);
  EXPECT_GT(refused, 2);
  RecordProperty("tensors", compared);
  std::cout << compared << " tensors compared, " << refused << " refusals\n";
}

}  // namespace
}  // namespace bitmill
