#include "support/sparse_checkpoint.h"

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "core/dtype.h"
#include "support/checkpoint_maker.h"

namespace bitmill::testing {
namespace {

int64_t bytes_of(const SparseTensor& tensor) {
  int64_t bytes = dtype_bits(dtype_from_name(tensor.dtype).value()) / 8;
  for (const int64_t dim : tensor.shape) bytes *= dim;
  return bytes;
}

std::vector<SparseTensor> block_tensors(const SparseModel& model, int64_t block) {
  const std::string at = "model.layers." + std::to_string(block) + ".";
  const int64_t hidden = model.hidden, wide = model.intermediate;
  std::vector<SparseTensor> tensors;
  for (const char* norm : {"input_layernorm", "post_attention_layernorm"})
    tensors.push_back({at + norm + ".weight", "BF16", {hidden}});
  for (const char* name : {"q", "k", "v", "o"})
    tensors.push_back({at + "self_attn." + name + "_proj.weight", "BF16", {hidden, hidden}});
  for (const char* name : {"gate", "up"})
    tensors.push_back({at + "mlp." + name + "_proj.weight", "BF16", {wide, hidden}});
  tensors.push_back({at + "mlp.down_proj.weight", "BF16", {hidden, wide}});
  return tensors;
}

}  // namespace

void write_sparse_safetensors(const std::string& path, const std::vector<SparseTensor>& tensors) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  int64_t end = 0;
  for (const SparseTensor& tensor : tensors) {
    const int64_t begin = end;
    end += bytes_of(tensor);
    header[tensor.name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {begin, end}}};
  }
  const std::string start = safetensors_bytes(header.dump(), "");
  write_bytes(path, start);
  std::filesystem::resize_file(path, start.size() + static_cast<uint64_t>(end));
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  int64_t at = static_cast<int64_t>(start.size());
  for (const SparseTensor& tensor : tensors) {
    for (const SparseBytes& value : tensor.values) {
      file.seekp(at + value.offset);
      file.write(value.bytes.data(), static_cast<std::streamsize>(value.bytes.size()));
    }
    at += bytes_of(tensor);
  }
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

void write_sparse_model(const std::string& directory, const SparseModel& model,
                        const std::vector<SparseTensor>& values) {
  std::vector<SparseTensor> tensors{
      {"model.embed_tokens.weight", "BF16", {model.vocab, model.hidden}},
      {"lm_head.weight", "BF16", {model.vocab, model.hidden}},
      {"model.norm.weight", "BF16", {model.hidden}}};
  for (int64_t block = 0; block < model.blocks; ++block)
    for (SparseTensor& tensor : block_tensors(model, block)) tensors.push_back(std::move(tensor));
  for (SparseTensor& tensor : tensors)
    for (const SparseTensor& given : values)
      if (given.name == tensor.name) tensor.values = given.values;
  std::filesystem::create_directories(directory);
  write_sparse_safetensors(directory + "/model.safetensors", tensors);
  const nlohmann::json config = {{"model_type", "llama"},
                                 {"architectures", {"LlamaForCausalLM"}},
                                 {"torch_dtype", "bfloat16"},
                                 {"hidden_size", model.hidden},
                                 {"intermediate_size", model.intermediate},
                                 {"num_hidden_layers", model.blocks},
                                 {"num_attention_heads", model.hidden / 64},
                                 {"num_key_value_heads", model.hidden / 64},
                                 {"vocab_size", model.vocab},
                                 {"max_position_embeddings", 2048},
                                 {"rms_norm_eps", 1e-5},
                                 {"rope_theta", 10000.0},
                                 {"hidden_act", "silu"},
                                 {"tie_word_embeddings", false}};
  write_bytes(directory + "/config.json", config.dump(2));
}

}  // namespace bitmill::testing
