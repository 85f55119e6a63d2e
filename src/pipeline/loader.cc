#include "pipeline/loader.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "formats/stored_tensors.h"

namespace bitmill {
namespace {

// What is read and converted at once: whole elements of any type, large enough for the disk's rate.
constexpr int64_t kPieceBytes = 16 << 20;

int64_t elements_per_row(const TensorEntry& entry) {
  return entry.shape.elements() / std::max<int64_t>(entry.shape[0], 1);
}

// Rows of about kPieceBytes.
int64_t piece_rows(const TensorEntry& entry) {
  const int64_t row_bytes = elements_per_row(entry) * dtype_bits(entry.dtype) / 8;
  return std::max<int64_t>(1, kPieceBytes / std::max<int64_t>(row_bytes, 1));
}

// Columns [first, end) of a matrix.
void copy_columns(TensorView matrix, int64_t first, int64_t end, TensorView out) {
  const int64_t element = dtype_bits(matrix.dtype) / 8;
  for (int64_t row = 0; row < matrix.rows(); ++row)
    std::memcpy(out.as<char>() + row * (end - first) * element,
                matrix.as<char>() + (row * matrix.cols() + first) * element,
                static_cast<size_t>((end - first) * element));
}

// Rows [first, end) of a packed linear: dequantized, they are rows of the whole.
QuantizedLinear rows_of(const QuantizedLinear& linear, int64_t first, int64_t end) {
  QuantizedLinear rows;
  rows.bits = linear.bits;
  rows.group_size = linear.group_size;
  rows.symmetric = linear.symmetric;
  rows.kind = linear.kind;
  rows.codes = clone(linear.codes.view().slice(first, end));
  rows.scales = clone(linear.scales.view().slice(first, end));
  rows.zeros = clone(linear.zeros.view().slice(first, end));
  rows.g_idx = clone(linear.g_idx);
  return rows;
}

}  // namespace

ModelSource::ModelSource(Json config, Checkpoint checkpoint)
    : config_(std::move(config)),
      checkpoint_(std::move(checkpoint)),
      family_(&find_family(config_)),
      spec_(family_->describe(config_)),
      format_(format_of(config_)) {
  // A config without a dtype leaves it to the tensors; the embedding is the one that no format packs.
  const TensorEntry* embedding = checkpoint_.find(spec_.embedding.name);
  if (!spec_.dtype_given && embedding != nullptr) spec_.dtype = embedding->dtype;
}

ModelSource ModelSource::open(const std::string& directory) {
  ModelSource source(read_model_config(directory), Checkpoint::open(directory));
  std::set<std::string> packed;  // modules whose weight exists only in packed form
  if (source.format_ != nullptr) {
    for (const BlockSpec& block : source.spec_.blocks)
      for (const LinearSpec& linear : block.linears)
        if (source.format_->holds(source.checkpoint_, linear)) packed.insert(linear.module);
    if (source.head_packed()) packed.insert(source.spec_.head_linear().module);
  }
  source.unknown_ = check_tensors(source.spec_, source.checkpoint_,
                                  [&](const std::string& module) { return packed.contains(module); });
  return source;
}

ModelSource ModelSource::open(const std::string& directory, Communicator& comm) {
  if (comm.size() == 1) return open(directory);
  std::string facts, headers;
  on_rank_zero(comm, [&] {
    const ModelSource checked = open(directory);
    facts = Json{{"config", checked.config_}, {"unknown", checked.unknown_}}.dump();
    headers = checked.checkpoint_.directory_text();
  });
  const Json shared = parse_json(comm.broadcast(facts), directory + "/config.json");
  const std::string text = comm.broadcast(headers);
  together(comm, [&] {
    if (comm.rank() == 0) return;
    // One rank of a node reads the headers: a thousand ranks would hammer the file system.
    Checkpoint::check_same(text, comm.local_rank() == 0);
    if (read_model_config(directory) != shared.at("config"))
      fail(ExitCode::kInput, "{}/config.json: rank {} sees another one than rank 0", directory, comm.rank());
  });
  ModelSource source(shared.at("config"), Checkpoint::from_text(text));
  shared.at("unknown").get_to(source.unknown_);
  return source;
}

void ModelSource::refuse_non_finite(const std::string& name, TensorView piece,
                                    int64_t first_element, Backend& backend) const {
  const int64_t bad = backend.first_non_finite(piece);
  if (bad < 0) return;
  const TensorEntry& entry = checkpoint_.at(name);
  fail(ExitCode::kInput, "{}/{}: tensor {} holds a NaN or infinity at element {} of {}",
       directory(), checkpoint_.files()[entry.file], name, first_element + bad,
       entry.shape.text());
}

Tensor ModelSource::read_float(const std::string& name, Backend& backend) const {
  Tensor tensor = checkpoint_.read(name);
  refuse_non_finite(name, tensor, 0, backend);
  return tensor;
}

void ModelSource::read_float_rows(const std::string& name, int64_t first, TensorView out,
                                  Backend& backend) const {
  const TensorEntry& entry = checkpoint_.at(name);
  BITMILL_CHECK(out.dtype == entry.dtype);
  const int64_t before = first * elements_per_row(entry);
  const int64_t begin = before * dtype_bits(entry.dtype) / 8;
  checkpoint_.read_bytes(entry, begin, begin + out.bytes(), out.data);
  refuse_non_finite(name, out, before, backend);
}

void ModelSource::read_pieces(const std::string& name, bool check, Backend& backend,
                              const TakePiece& take) const {
  const TensorEntry& entry = checkpoint_.at(name);
  const int64_t element_bits = dtype_bits(entry.dtype);
  check = check && is_source_float(entry.dtype);
  for (int64_t at = 0; at < entry.bytes; at += kPieceBytes) {
    const int64_t bytes = std::min(kPieceBytes, entry.bytes - at);
    Tensor piece(DType::kU8, {bytes});
    checkpoint_.read_bytes(entry, at, at + bytes, piece.data());
    if (check)
      refuse_non_finite(name, {piece.data(), entry.dtype, {bytes * 8 / element_bits}},
                        at * 8 / element_bits, backend);
    take(at, std::move(piece));
  }
}

bool ModelSource::head_packed() const {
  return format_ != nullptr && !spec_.tied && format_->holds(checkpoint_, spec_.head_linear());
}

bool ModelSource::is_packed(const LinearSpec& linear) const {
  if (linear.module == spec_.head_linear().module) return head_packed();
  return format_ != nullptr && format_->holds(checkpoint_, linear);
}

// Name of a linear's float weight.
std::string ModelSource::weight_tensor(const LinearSpec& linear) const {
  return linear.module == spec_.head_linear().module ? spec_.head.name : linear.weight_name();
}

Tensor ModelSource::read_weight(const LinearSpec& linear, DType dtype, Backend& backend) const {
  return read_weight_rows(linear, 0, linear.out, dtype, backend);
}

Tensor ModelSource::read_weight_rows(const LinearSpec& linear, int64_t first, int64_t end,
                                     DType dtype, Backend& backend) const {
  BITMILL_CHECK(0 <= first && first <= end && end <= linear.out);
  if (is_packed(linear)) return read_packed_rows(linear, first, end, dtype, backend);
  if (linear.transposed) return read_turned_rows(linear, first, end, dtype, backend);
  const std::string name = weight_tensor(linear);
  const TensorEntry& entry = checkpoint_.at(name);
  if (entry.dtype == dtype) {
    Tensor stored(dtype, {end - first, linear.in});
    read_float_rows(name, first, stored, backend);
    return stored;
  }
  Tensor dense = backend.allocate(dtype, {end - first, linear.in});
  for_pieces(name, first, end, backend, [&](int64_t row, TensorView piece) {
    backend.convert(piece, dense.view().slice(row - first, row - first + piece.rows()));
  });
  return dense;
}

// Calls `take` with rows [first, end) of a float matrix, a piece after the other in one buffer.
void ModelSource::for_pieces(const std::string& name, int64_t first, int64_t end, Backend& backend,
                             const std::function<void(int64_t, TensorView)>& take) const {
  const TensorEntry& entry = checkpoint_.at(name);
  const int64_t step = std::min(piece_rows(entry), end - first);
  const Tensor buffer(entry.dtype, {step, entry.shape[1]});
  for (int64_t row = first; row < end; row += step) {
    const TensorView piece = buffer.view().slice(0, std::min(step, end - row));
    read_float_rows(name, row, piece, backend);
    take(row, piece);
  }
}

Tensor ModelSource::read_packed_rows(const LinearSpec& linear, int64_t first, int64_t end,
                                     DType dtype, Backend& backend) const {
  const QuantizedLinear packed =
      format_->unpack(checkpoint_, linear, config_.at("quantization_config"));
  Tensor dense = backend.allocate(dtype, {end - first, linear.in});
  if (first == 0 && end == linear.out) backend.dequantize(packed, dense);
  else backend.dequantize(rows_of(packed, first, end), dense);
  return dense;
}

// Rows of the weight are columns of what is stored, so all of it is read, a piece at a time.
Tensor ModelSource::read_turned_rows(const LinearSpec& linear, int64_t first, int64_t end,
                                     DType dtype, Backend& backend) const {
  const std::string name = weight_tensor(linear);
  const TensorEntry& entry = checkpoint_.at(name);
  Tensor columns(entry.dtype, {linear.in, end - first});
  for_pieces(name, 0, linear.in, backend, [&](int64_t row, TensorView piece) {
    copy_columns(piece, first, end, columns.view().slice(row, row + piece.rows()));
  });
  Tensor turned = transposed(columns);
  if (turned.dtype() == dtype) return turned;
  columns.reset();
  Tensor dense = backend.allocate(dtype, turned.shape());
  backend.convert(turned, dense);
  return dense;
}

void ModelSource::prefetch(const std::vector<LinearRows>& rows, int64_t limit_bytes) const {
  std::vector<Checkpoint::Rows> wanted;
  for (const LinearRows& part : rows) {
    if (is_packed(part.linear)) continue;
    const bool turned = part.linear.transposed;
    wanted.push_back({weight_tensor(part.linear), turned ? 0 : part.first,
                      turned ? part.linear.in : part.end});
  }
  checkpoint_.prefetch(wanted, limit_bytes);
}

void ModelSource::prefetch_cut(const BlockSpec& block, int cut, int64_t limit_bytes) const {
  std::vector<LinearRows> rows;
  for (const int linear : block.cuts[cut].linears)
    rows.push_back({block.linears[linear], 0, block.linears[linear].out});
  prefetch(rows, limit_bytes);
}

Tensor ModelSource::read_bias(const LinearSpec& linear, Backend& backend) const {
  return linear.bias ? read_float(linear.bias_name(), backend) : Tensor();
}

BlockWeights ModelSource::read_block_floats(const BlockSpec& block, Backend& backend) const {
  BlockWeights weights(block);
  for (const TensorSpec& norm : block.norms) weights.set_float(norm.name, read_float(norm.name, backend), backend);
  for (const LinearSpec& linear : block.linears)
    if (linear.bias) weights.set_float(linear.bias_name(), read_bias(linear, backend), backend);
  return weights;
}

BlockWeights ModelSource::read_block(const BlockSpec& block, Backend& backend) const {
  BlockWeights weights = read_block_floats(block, backend);
  for (size_t i = 0; i < block.linears.size(); ++i)
    weights.set_linear(static_cast<int>(i), read_weight(block.linears[i], backend.compute(), backend), backend);
  return weights;
}

DType resolve_compute(Compute wanted, const ModelSpec& spec, Communicator& comm) {
  if (wanted == Compute::kFloat32) return DType::kF32;
  if (wanted == Compute::kBFloat16) return DType::kBF16;
  const bool everywhere = comm.max(cpu_has_bf16() ? 0.0 : 1.0) == 0.0;
  return everywhere && spec.dtype == DType::kBF16 ? DType::kBF16 : DType::kF32;
}

}  // namespace bitmill
