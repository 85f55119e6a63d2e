#include "pipeline/output.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <regex>

#include "io/checkpoint.h"
#include "io/durable.h"
#include "io/safetensors.h"

namespace bitmill {
namespace fs = std::filesystem;

namespace {

void remove_file(const std::string& path) {
  std::error_code error;
  fs::remove(path, error);
  if (error) fail(ExitCode::kOutput, "{} cannot be removed: {}", path, error.message());
}

// The named files and temporary copies of them that a killed writer left, config.json first: without it nothing passes
// for a checkpoint.
void remove_placed(const std::string& path, const std::vector<std::string>& files) {
  for (auto file = files.rbegin(); file != files.rend(); ++file) remove_file(path + "/" + *file);
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(path, error)) {
    const std::string name = entry.path().filename().string();
    const size_t mark = name.find(".tmp-");
    if (mark != std::string::npos && std::find(files.begin(), files.end(), name.substr(0, mark)) != files.end())
      remove_file(entry.path().string());
  }
}

// Only what an earlier run of ours left: the files its manifest names, and its shards.
void remove_leftovers(const std::string& path) {
  std::error_code error;
  if (!fs::exists(manifest_path(path), error)) return;
  const Manifest manifest = read_manifest(path);
  remove_placed(path, manifest.files);
  fs::remove_all(path + "/bitmill/shards", error);
  if (error) fail(ExitCode::kOutput, "{}/bitmill/shards cannot be removed: {}", path, error.message());
  for (const char* name : {"layers.csv", "report.json", "report.html", "status.json"})
    remove_file(path + "/bitmill/" + name);
}

}  // namespace

std::string shard_key(const ShardPlan& shard) { return shard.key.substr(0, shard.key.find(".part-")); }

void OutputDirectory::prepare(const Plan& plan, const Fingerprint& fingerprint,
                              const std::vector<std::string>& text_files) const {
  make_directories(path_);
  probe_writable(path_);
  remove_leftovers(path_);
  make_directories(path_ + "/bitmill");
  Manifest manifest{"running", fingerprint, plan.files, Json::array(), {}};
  manifest.files.insert(manifest.files.end(), text_files.begin(), text_files.end());
  write_manifest(path_, manifest);  // first of all: from here on the directory is known as ours
  make_directories(path_ + "/bitmill/shards");
}

ShardWriter& KeyWriter::shard_of(const std::string& name) {
  for (ShardWriter& shard : shards_)
    if (shard.holds(name)) return shard;
  fail(ExitCode::kInternal, "internal error: tensor {} is in no shard of the plan", name);
}

bool KeyWriter::holds(const std::string& name) const {
  return std::any_of(shards_.begin(), shards_.end(),
                     [&](const ShardWriter& shard) { return shard.holds(name); });
}

void KeyWriter::write(std::vector<NamedTensor> tensors) {
  for (NamedTensor& tensor : tensors) write(std::move(tensor));
}

std::vector<PendingFile> KeyWriter::finish() {
  std::vector<PendingFile> files;
  for (ShardWriter& shard : shards_) files.push_back(shard.finish());
  return files;
}

int64_t KeyWriter::file_bytes() const {
  int64_t bytes = 0;
  for (const ShardWriter& shard : shards_) bytes += shard.file_bytes();
  return bytes;
}

KeyWriter OutputDirectory::start_shards(const Plan& plan, const std::string& key, int rank,
                                        WriteBehind& queue) const {
  KeyWriter writer;
  for (const ShardPlan& shard : plan.shards) {
    if (shard.rank != rank || shard_key(shard) != key) continue;
    std::vector<NamedView> specs;
    for (const PackedSpec& spec : shard.tensors)
      specs.push_back({spec.name, {nullptr, spec.dtype, spec.shape}});
    writer.shards_.emplace_back(shard_path(shard.key), specs, queue);
  }
  return writer;
}

int64_t OutputDirectory::write_shard(const ShardPlan& shard, const std::vector<NamedTensor>& tensors) const {
  std::map<std::string, const NamedTensor*> by_name;
  for (const NamedTensor& tensor : tensors) by_name[tensor.name] = &tensor;
  std::vector<NamedView> views;
  for (const PackedSpec& spec : shard.tensors) {
    const auto found = by_name.find(spec.name);
    BITMILL_CHECK(found != by_name.end() && found->second->data.dtype() == spec.dtype &&
                  found->second->data.shape() == spec.shape);
    views.push_back({spec.name, found->second->data});
  }
  const int64_t bytes = safetensors_file_bytes(views);
  write_safetensors(shard_path(shard.key), std::move(views));
  return bytes;
}

int64_t OutputDirectory::write_shards(const Plan& plan, const std::string& key,
                                      const std::vector<NamedTensor>& tensors) const {
  size_t written = 0;
  int64_t bytes = 0;
  for (const ShardPlan& shard : plan.shards) {
    if (shard_key(shard) != key) continue;
    bytes += write_shard(shard, tensors);
    written += shard.tensors.size();
  }
  BITMILL_CHECK(written == tensors.size());
  return bytes;
}

void OutputDirectory::join(const Plan& plan) const {
  struct Source {
    int file;
    TensorEntry entry;
  };
  std::vector<RangeReader> readers;
  std::map<std::string, Source> sources;
  std::vector<NamedView> specs;
  for (const ShardPlan& shard : plan.shards) {
    readers.emplace_back(shard_path(shard.key));
    for (const TensorEntry& entry : read_safetensors_header(shard_path(shard.key))) {
      specs.push_back({entry.name, {nullptr, entry.dtype, entry.shape}});
      sources[entry.name] = {static_cast<int>(readers.size()) - 1, entry};
    }
  }
  SafetensorsStream stream(path_ + "/" + plan.files.front(), specs);
  constexpr int64_t kChunk = 8 << 20;
  Tensor buffer(DType::kU8, {kChunk});
  for (const NamedView& tensor : stream.order()) {
    const Source& source = sources.at(tensor.name);
    for (int64_t at = 0; at < source.entry.bytes; at += kChunk) {
      const int64_t bytes = std::min(kChunk, source.entry.bytes - at);
      readers[source.file].read(source.entry.offset + at, bytes, buffer.data());
      stream.append(buffer.data(), bytes);
    }
  }
  stream.commit();
}

void OutputDirectory::rename(const Plan& plan) const {
  for (size_t i = 0; i < plan.shards.size(); ++i)
    rename_durably(shard_path(plan.shards[i].key), path_ + "/" + plan.files[i]);
}

void OutputDirectory::write_index(const Plan& plan) const {
  Json weight_map = Json::object();
  for (size_t i = 0; i < plan.shards.size(); ++i)
    for (const PackedSpec& tensor : plan.shards[i].tensors) weight_map[tensor.name] = plan.files[i];
  const Json index{{"metadata", {{"total_size", plan.output_bytes}}}, {"weight_map", weight_map}};
  write_file_durably(path_ + "/model.safetensors.index.json", index.dump(2) + "\n");
}

void OutputDirectory::commit(const Plan& plan, const Finish& finish) const {
  try {
    for (const std::string& name : finish.copied_files)
      copy_file_durably(finish.source_directory + "/" + name, path_ + "/" + name);
    for (const auto& [name, content] : finish.text_files) write_file_durably(path_ + "/" + name, content);
    if (plan.joined) {
      join(plan);
    } else {
      rename(plan);
      write_index(plan);
    }
    write_file_durably(path_ + "/config.json", finish.config_json);
  } catch (const Error&) {
    // Nothing partial stays visible. Shards that were renamed go back to where the next try looks for them.
    for (size_t i = 0; !plan.joined && i < plan.shards.size(); ++i) {
      std::error_code ignored;
      fs::rename(path_ + "/" + plan.files[i], shard_path(plan.shards[i].key), ignored);
    }
    remove_placed(path_, finish.manifest.files);
    throw;
  }
  write_manifest(path_, finish.manifest);
  std::error_code error;
  fs::remove_all(path_ + "/bitmill/shards", error);  // the checkpoint is whole; leftovers only cost space
}

std::vector<std::string> companion_files(const std::string& model_directory) {
  // Anchored, so that weights in other formats, code and notebooks stay behind.
  static const std::regex kWanted(
      "(tokenizer.*|special_tokens_map\\.json|added_tokens\\.json|vocab\\.(json|txt)|merges\\.txt|"
      ".*\\.(tiktoken|model)|generation_config\\.json|chat_template.*|preprocessor_config\\.json|"
      "(LICENSE|LICENCE|NOTICE|USE_POLICY).*)");
  std::vector<std::string> names;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(model_directory, error)) {
    const std::string name = entry.path().filename().string();
    if (!entry.is_directory(error) && std::regex_match(name, kWanted) && has_member(model_directory, name))
      names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace bitmill
