#include "commands/benchmark.h"

#include <unistd.h>

#include <algorithm>
#include <functional>
#include <random>

#include "backends/backend.h"
#include "comm/transport.h"
#include "core/log.h"
#include "io/durable.h"
#include "io/safetensors.h"
#include "pipeline/rates.h"

namespace bitmill {
namespace {

constexpr int64_t kColumns = 1024, kRows = 1024, kTokens = 2048, kGroup = 128;
constexpr double kSecondsEach = 0.3;

// The shortest of several calls, one after another for a third of a second; one call goes before.
double shortest(const std::function<void()>& prepare, const std::function<void()>& call) {
  double best = 0;
  const Stopwatch all;
  for (int i = 0; i < 2 || all.seconds() < kSecondsEach; ++i) {
    prepare();
    const Stopwatch watch;
    call();
    if (i == 1 || (i > 1 && watch.seconds() < best)) best = watch.seconds();
  }
  return std::max(best, 1e-9);
}

Tensor noise(Shape shape, uint64_t seed) {
  std::mt19937_64 generator(seed);
  Tensor out(DType::kF32, shape);
  for (int64_t i = 0; i < out.elements(); ++i)
    out.as<float>()[i] = static_cast<float>(static_cast<double>(generator() >> 11) * 0x1p-53 - 0.5);
  return out;
}

// Diagonally dominant, so positive definite.
Tensor positive_matrix(int64_t n) {
  Tensor a = noise({n, n}, 1);
  for (int64_t i = 0; i < n; ++i) a.as<float>()[i * (n + 1)] = static_cast<float>(n);
  return a;
}

// One rank's arithmetic.
class Arithmetic {
 public:
  explicit Arithmetic(Backend& backend)
      : backend_(backend),
        weight_(noise({kRows, kColumns}, 2)),
        x_(in_compute(noise({kTokens, kColumns}, 3))) {}

  double forward() {
    const auto prepared = backend_.prepare_linear(weight_);
    const Tensor out = backend_.allocate(DType::kF32, {kTokens, kRows});
    return 2.0 * kTokens * kRows * kColumns /
           shortest([] {},
                    [&] {
                      backend_.linear(x_, *prepared, {}, {}, out);
                      backend_.synchronize();
                    });
  }

  double hessian() {
    const int64_t elements = hessian_elements(kColumns);
    const Tensor h = backend_.allocate(DType::kF32, {elements});
    std::fill_n(h.as<float>(), elements, 0.0F);
    return 2.0 * static_cast<double>(elements) * kTokens /
           shortest([] {},
                    [&] {
                      backend_.hessian_update(x_, h);
                      backend_.synchronize();
                    });
  }

  // Of a large matrix, from one of kColumns.
  double factorization(const Rates& shape) {
    const Tensor matrix = positive_matrix(kColumns);
    factor_ = backend_.allocate(DType::kF32, {kColumns, kColumns});
    const double n = kColumns;
    const double rate = n * n * n / 3 /
                        shortest([&] { backend_.convert(matrix, factor_); },
                                 [&] {
                                   backend_.factorize(factor_);
                                   backend_.synchronize();
                                 });
    return large_factor_rate(rate, kColumns, shape);
  }

  double grids() {
    Tensor importance(DType::kF32, {kColumns}), spread(DType::kF32, {kColumns});
    std::fill_n(importance.as<float>(), kColumns, 1.0F);
    std::fill_n(spread.as<float>(), kColumns, 0.5F);
    scales_ = Tensor(DType::kF32, {kRows, kColumns / kGroup});
    zeros_ = Tensor(DType::kF32, {kRows, kColumns / kGroup});
    return 31.0 * kRows * kColumns /
           shortest([] {},
                    [&] {
                      backend_.fit_grids(weight_, GridOptions(), kGroup, {importance, spread},
                                         scales_, zeros_);
                    });
  }

  // After factorization() and grids().
  double sweep() {
    Tensor loss(DType::kF64, {kRows}), codes(DType::kU8, {kRows, kColumns});
    Tensor column_group(DType::kI32, {kColumns}), order(DType::kI32, {kColumns});
    for (int64_t c = 0; c < kColumns; ++c) {
      column_group.as<int32_t>()[c] = static_cast<int32_t>(c / kGroup);
      order.as<int32_t>()[c] = static_cast<int32_t>(c);
    }
    SweepItem item;
    item.weight = weight_, item.scales = scales_, item.zeros = zeros_;
    item.column_group = column_group, item.codes = codes, item.row_loss = loss;
    return 1.0 * kRows * kColumns * (kColumns + 128) /
           shortest([] {},
                    [&] {
                      backend_.sweep(factor_, order, 128, {&item, 1});
                    });
  }

 private:
  Tensor in_compute(Tensor x) {
    Tensor out = backend_.allocate(backend_.compute(), x.shape());
    backend_.convert(x, out);
    return out;
  }

  Backend& backend_;
  Tensor weight_, x_, factor_, scales_, zeros_;
};

constexpr int64_t kFileBytes = 64 << 20;

// Bytes per second of one durable file, written and then read.
std::pair<double, double> file_rates(const std::string& directory, int rank) {
  const std::string path = fmt::format("{}/.bitmill-rate-{}-{}", directory, getpid(), rank);
  std::string piece(4 << 20, 'x');
  double write = 0, read = 0;
  {
    const Stopwatch watch;
    DurableFile file(path);
    for (int64_t at = 0; at < kFileBytes; at += static_cast<int64_t>(piece.size()))
      file.write(piece.data(), static_cast<int64_t>(piece.size()));
    file.commit();
    write = kFileBytes / std::max(1e-9, watch.seconds());
  }
  {
    const RangeReader reader(path);
    const Stopwatch watch;
    for (int64_t at = 0; at < kFileBytes; at += static_cast<int64_t>(piece.size()))
      reader.read(at, static_cast<int64_t>(piece.size()), piece.data());
    read = kFileBytes / std::max(1e-9, watch.seconds());
  }
  unlink(path.c_str());
  return {read, write};
}

// 16 messages of 4 MiB from rank 0 to rank 1, and an answer.
double link_rate(Transport& transport, int rank) {
  constexpr int kMessages = 16;
  const Tensor message(DType::kF32, {1 << 20}), answer(DType::kF32, {1});
  double rate = 0;
  for (int round = 0; round < 2; ++round) {  // the first one connects
    const Stopwatch watch;
    for (int i = 0; i < kMessages; ++i) {
      if (rank == 0)
        transport.send(message, 1);
      else
        transport.receive(message, 0);
    }
    if (rank == 0)
      transport.receive(answer, 1);
    else
      transport.send(answer, 0);
    rate = kMessages * static_cast<double>(message.bytes()) / std::max(1e-9, watch.seconds());
  }
  return rate;
}

}  // namespace

MeasuredRates measure_rates(const RunOptions& options, const std::string& directory, int threads,
                            Communicator& comm) {
  const Compute wanted = options.run.compute;
  const DType compute = wanted == Compute::kFloat32 || (wanted == Compute::kAuto && !cpu_has_bf16())
                            ? DType::kF32
                            : DType::kBF16;
  MeasuredRates rates;
  comm.barrier();
  together(comm, [&] {
    const auto backend = make_backend({options.run.backend, compute, threads});
    Arithmetic arithmetic(*backend);
    rates.emplace_back("forward_flops", arithmetic.forward());
    rates.emplace_back("hessian_flops", arithmetic.hessian());
    const Rates shape = assumed_rates(backend->name() != "cpu", compute);
    const double factor = arithmetic.factorization(shape), grids = arithmetic.grids();
    rates.emplace_back("factor_flops", factor);
    rates.emplace_back("sweep_flops", arithmetic.sweep());
    rates.emplace_back("grid_elements", grids);
    if (directory.empty()) return;
    const auto [read, write] = file_rates(directory, comm.rank());
    rates.emplace_back("read_bandwidth", read);
    rates.emplace_back("write_bandwidth", write);
  });
  for (auto& [name, value] : rates) value = -comm.max(-value);  // the slowest rank's
  if (comm.size() == 1) return rates;
  double link = 0;
  together(comm, [&] {
    const auto transport = make_transport(options.run.transport, comm);
    if (comm.rank() < 2) link = link_rate(*transport, comm.rank());
  });
  rates.emplace_back("link_bandwidth", comm.max(link));
  return rates;
}

}  // namespace bitmill
