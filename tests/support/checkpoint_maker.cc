#include "support/checkpoint_maker.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>
#include <stdexcept>

#include "core/dtype.h"

namespace bitmill::testing {
namespace {

template <typename T>
void append(std::string& bytes, T value) {
  char raw[sizeof(T)];
  std::memcpy(raw, &value, sizeof value);
  bytes.append(raw, sizeof raw);
}

}  // namespace

RawTensor float_tensor(std::string name, const std::string& dtype, std::vector<int64_t> shape,
                       const std::vector<float>& values) {
  RawTensor tensor{std::move(name), dtype, std::move(shape), {}};
  for (const float value : values) {
    if (dtype == "F32")
      append(tensor.bytes, value);
    else if (dtype == "F16")
      append(tensor.bytes, to_f16(value).bits);
    else if (dtype == "BF16")
      append(tensor.bytes, to_bf16(value).bits);
    else
      throw std::runtime_error("float_tensor knows F32, F16 and BF16");
  }
  return tensor;
}

RawTensor random_tensor(std::string name, const std::string& dtype, std::vector<int64_t> shape,
                        uint64_t seed) {
  for (const char c : name) seed = seed * 131 + static_cast<unsigned char>(c);
  std::mt19937_64 generator(seed);
  size_t count = 1;
  for (const int64_t dim : shape) count *= static_cast<size_t>(dim);
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(generator() >> 40) * 0x1p-23f - 1.0f;
  return float_tensor(std::move(name), dtype, std::move(shape), values);
}

std::string safetensors_header(const std::vector<RawTensor>& tensors) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  size_t offset = 0;
  for (const RawTensor& tensor : tensors) {
    const size_t end = offset + tensor.bytes.size();
    header[tensor.name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  return header.dump();
}

std::string safetensors_bytes(const std::string& header, const std::string& buffer) {
  std::string bytes;
  append(bytes, static_cast<uint64_t>(header.size()));
  return bytes + header + buffer;
}

std::string safetensors_bytes(const std::vector<RawTensor>& tensors) {
  std::string buffer;
  for (const RawTensor& tensor : tensors) buffer += tensor.bytes;
  return safetensors_bytes(safetensors_header(tensors), buffer);
}

void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

std::string read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

CheckpointMaker::CheckpointMaker(std::string directory) : directory_(std::move(directory)) {}

CheckpointMaker& CheckpointMaker::config(std::string json) {
  config_ = std::move(json);
  return *this;
}

CheckpointMaker& CheckpointMaker::add(RawTensor tensor, const std::string& file) {
  shards_[file].push_back(std::move(tensor));
  return *this;
}

CheckpointMaker& CheckpointMaker::with_index() {
  index_ = true;
  return *this;
}

CheckpointMaker& CheckpointMaker::index_says(const std::string& tensor, const std::string& file) {
  overrides_[tensor] = file;
  return with_index();
}

void CheckpointMaker::write() const {
  std::filesystem::create_directories(directory_);
  nlohmann::json weight_map = nlohmann::json::object();
  size_t total = 0;
  for (const auto& [file, tensors] : shards_) {
    write_bytes(directory_ + "/" + file, safetensors_bytes(tensors));
    for (const RawTensor& tensor : tensors) {
      weight_map[tensor.name] = file;
      total += tensor.bytes.size();
    }
  }
  for (const auto& [tensor, file] : overrides_) {
    if (file.empty())
      weight_map.erase(tensor);
    else
      weight_map[tensor] = file;
  }
  const nlohmann::json index = {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
  if (index_ || shards_.size() > 1)
    write_bytes(directory_ + "/model.safetensors.index.json", index.dump(2));
  if (!config_.empty()) write_bytes(directory_ + "/config.json", config_);
}

}  // namespace bitmill::testing
