// Rates of the reader and the writers alone, one mode per call, for tests/bench/io.sh, which runs
// dd beside them:
//   bitmill_bench_io read FILE           plain reads in pieces of 16 MiB
//   bitmill_bench_io read-ahead FILE     the same through the read-ahead thread, bound 64 MiB
//   bitmill_bench_io weights MODEL       every linear of a checkpoint as F32, checked for NaN
//   bitmill_bench_io weights-ahead MODEL the same, each cut read ahead while the one before is
//   converted bitmill_bench_io write DIR BYTES     one safetensors file of BYTES, durably
//   bitmill_bench_io write-behind DIR BYTES
//                                        the same through the queue, bound 256 MiB; also the
//                                        seconds that the caller waits
// Prints "MODE SECONDS GB_PER_SECOND" (10^9 bytes), of stored bytes.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>

#include "io/read_ahead.h"
#include "io/write_behind.h"
#include "pipeline/loader.h"

namespace bitmill {
namespace {

constexpr int64_t kPiece = 16 << 20, kAhead = 64 << 20, kBehind = 256 << 20;

class Clock {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

int64_t read_file(const std::string& path, bool ahead) {
  const RangeReader file(path);
  ReadAhead reader;
  const Tensor buffer(DType::kU8, {kPiece});
  if (ahead) reader.request({{&file, 0, file.file_bytes()}}, kAhead);
  for (int64_t at = 0; at < file.file_bytes(); at += kPiece)
    reader.read(file, at, std::min(kPiece, file.file_bytes() - at), buffer.data());
  return file.file_bytes();
}

int64_t read_weights(const std::string& directory, bool ahead) {
  const ModelSource source = ModelSource::open(directory);
  const auto backend = make_backend({"cpu", DType::kF32, available_cpus()});
  int64_t bytes = 0;
  for (const BlockSpec& block : source.spec().blocks)
    for (size_t i = 0; i < block.linears.size(); ++i) {
      const LinearSpec& linear = block.linears[i];
      if (ahead && i + 1 < block.linears.size())
        source.prefetch({{block.linears[i + 1], 0, block.linears[i + 1].out}}, kAhead);
      (void)source.read_weight(linear, DType::kF32, *backend);
      bytes += source.checkpoint().at(linear.weight_name()).bytes;
    }
  return bytes;
}

// 64 tensors; every byte is written by the caller first, as a packer would.
int64_t write_file(const std::string& directory, int64_t bytes, bool behind, double& waited) {
  const std::string path = directory + "/bench.safetensors";
  const Shape shape{bytes / 64};
  std::vector<NamedView> specs;
  for (int i = 10; i < 74; ++i) specs.push_back({std::to_string(i), {nullptr, DType::kU8, shape}});
  const auto fill = [&](size_t i) {
    Tensor tensor(DType::kU8, shape);
    std::memset(tensor.data(), static_cast<int>(i), static_cast<size_t>(tensor.bytes()));
    return tensor;
  };
  if (behind) {
    WriteBehind queue(kBehind);
    ShardWriter shard(path, specs, queue);
    for (size_t i = 0; i < specs.size(); ++i) {
      Tensor tensor = fill(i);
      const Clock clock;
      shard.write(specs[i].name, std::move(tensor));
      waited += clock.seconds();
    }
    shard.finish();
    queue.drain();
  } else {
    SafetensorsStream stream(path, specs);
    for (size_t i = 0; i < specs.size(); ++i) {
      const Tensor tensor = fill(i);
      const Clock clock;
      stream.append(tensor.data(), tensor.bytes());
      waited += clock.seconds();
    }
    const Clock clock;
    stream.commit();
    waited += clock.seconds();
  }
  return shape[0] * 64;
}

int run(const std::string& mode, const std::string& path, int64_t bytes) {
  double waited = 0;
  int64_t moved = 0;
  const Clock clock;
  if (mode.starts_with("read"))
    moved = read_file(path, mode == "read-ahead");
  else if (mode.starts_with("weights"))
    moved = read_weights(path, mode == "weights-ahead");
  else
    moved = write_file(path, bytes, mode == "write-behind", waited);
  const double seconds = clock.seconds();
  std::printf("%s %.3f %.3f", mode.c_str(), seconds, static_cast<double>(moved) / seconds / 1e9);
  if (mode.starts_with("write")) std::printf(" caller waited %.3f s", waited);
  std::printf("\n");
  return 0;
}

}  // namespace
}  // namespace bitmill

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const bool writes = mode.starts_with("write");
  if (argc != (writes ? 4 : 3)) {
    std::fprintf(stderr, "usage: see the head of tests/bench/bench_io.cc\n");
    return 2;
  }
  try {
    return bitmill::run(mode, argv[2], writes ? std::stoll(argv[3]) : 0);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
