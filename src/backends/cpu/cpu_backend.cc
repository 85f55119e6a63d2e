#include "backends/cpu/cpu_backend.h"

#include "backends/cpu/amx.h"

#include <cblas.h>
#include <dnnl.hpp>

#include <algorithm>
#include <sstream>

#include "backends/cpu/kernels.h"
#include "backends/cpu/matmul.h"

namespace bitmill {

namespace {
std::string_view isa_name(dnnl::cpu_isa isa) {
  switch (isa) {
    case dnnl::cpu_isa::sse41:
      return "sse41";
    case dnnl::cpu_isa::avx:
      return "avx";
    case dnnl::cpu_isa::avx2:
      return "avx2";
    case dnnl::cpu_isa::avx2_vnni:
      return "avx2_vnni";
    case dnnl::cpu_isa::avx512_core:
      return "avx512";
    case dnnl::cpu_isa::avx512_core_vnni:
      return "avx512_vnni";
    case dnnl::cpu_isa::avx512_core_bf16:
      return "avx512_bf16";
    case dnnl::cpu_isa::avx512_core_amx:
      return "amx_bf16";
    default:
      return "unknown";
  }
}

// "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH ..." -> "OpenBLAS 0.3.21"
std::string openblas_version() {
  std::istringstream words(openblas_get_config());
  std::string name, version;
  words >> name >> version;
  return name + " " + version;
}

// Elements per work item of an elementwise pass: large against the cost of handing out an item,
// small against the 2048 x 4096 elements of a micro-batch.
constexpr int64_t kChunk = 1 << 16;

template <typename In>
void convert_chunk(const In* in, TensorView out) {
  if (out.dtype == DType::kF32)
    dispatch<Convert<In, float>>(in, out.as<float>(), out.elements());
  else
    dispatch<Convert<In, BFloat16>>(in, out.as<BFloat16>(), out.elements());
}

// Same type, or one of the rare pairs: left to core. The pairs of the forward pass are vectorised
// here.
void convert_chunk(TensorView in, TensorView out) {
  const bool vectorised =
      (out.dtype == DType::kF32 || out.dtype == DType::kBF16) && in.dtype != out.dtype;
  if (vectorised && in.dtype == DType::kF16) return convert_chunk(in.as<Float16>(), out);
  if (vectorised && in.dtype == DType::kBF16) return convert_chunk(in.as<BFloat16>(), out);
  if (vectorised && in.dtype == DType::kF32) return convert_chunk(in.as<float>(), out);
  bitmill::convert(in, out);
}

// Exponent all ones: infinity or NaN.
template <typename Word>
int64_t first_with_exponent(const Word* words, int64_t count, Word exponent) {
  constexpr int64_t kBlock =
      1024;  // the branch-free scan finds the block, a second look the element
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    Word found = 0;
    for (int64_t i = begin; i < end; ++i)
      found |= (words[i] & exponent) == exponent ? Word{1} : Word{0};
    if (found == 0) continue;
    for (int64_t i = begin; i < end; ++i)
      if ((words[i] & exponent) == exponent) return i;
  }
  return -1;
}

int64_t first_non_finite_in(TensorView x) {
  const int64_t n = x.elements();
  switch (x.dtype) {
    case DType::kF16:
      return first_with_exponent<uint16_t>(x.as<uint16_t>(), n, 0x7C00);
    case DType::kBF16:
      return first_with_exponent<uint16_t>(x.as<uint16_t>(), n, 0x7F80);
    case DType::kF32:
      return first_with_exponent<uint32_t>(x.as<uint32_t>(), n, 0x7F800000);
    case DType::kF64:
      return first_with_exponent<uint64_t>(x.as<uint64_t>(), n, 0x7FF0000000000000);
    default:
      fail(ExitCode::kInternal, "first_non_finite: {} is not a float type", dtype_name(x.dtype));
  }
}

// Elements [begin, end) of x as a vector.
TensorView range(TensorView x, int64_t begin, int64_t end) {
  return x.reshaped({x.elements()}).slice(begin, end);
}
}  // namespace

CpuBackend::CpuBackend(DType compute, int threads)
    : compute_(compute),
      pool_(threads),
      // oneDNN's word counts too: its environment variable for a lower instruction set must hold for all of us.
      amx_(compute == DType::kBF16 && dnnl::get_effective_cpu_isa() == dnnl::cpu_isa::avx512_core_amx &&
           amx::available()) {
  BITMILL_CHECK(compute == DType::kBF16 || compute == DType::kF32);
  openblas_set_num_threads(
      1);  // tiles are the unit of parallelism, and a split inside a call would change bits
  for (int i = 0; i < pool_.size(); ++i) contexts_.push_back(std::make_unique<MatmulContext>());
}

CpuBackend::~CpuBackend() = default;

std::string CpuBackend::description() const {
  const dnnl_version_t* version = dnnl_version();
  return fmt::format("cpu: {}, oneDNN {}.{}.{}, {} ({})", isa_name(dnnl::get_effective_cpu_isa()),
                     version->major, version->minor, version->patch, openblas_version(),
                     openblas_get_corename());
}

void CpuBackend::convert(TensorView in, TensorView out) {
  BITMILL_CHECK(in.elements() == out.elements());
  const int64_t n = in.elements();
  pool_.parallel_for((n + kChunk - 1) / kChunk, [&](int64_t item, int) {
    const int64_t begin = item * kChunk, end = std::min(n, begin + kChunk);
    convert_chunk(range(in, begin, end), range(out, begin, end));
  });
}

int64_t CpuBackend::first_non_finite(TensorView x) {
  const int64_t n = x.elements();
  std::vector<int64_t> found((n + kChunk - 1) / kChunk, -1);
  pool_.parallel_for(static_cast<int64_t>(found.size()), [&](int64_t item, int) {
    const int64_t begin = item * kChunk;
    const int64_t at = first_non_finite_in(range(x, begin, std::min(n, begin + kChunk)));
    if (at >= 0) found[item] = begin + at;
  });
  const auto first = std::find_if(found.begin(), found.end(), [](int64_t at) { return at >= 0; });
  return first == found.end() ? -1 : *first;
}

bool cpu_has_bf16() {
  const auto isa = dnnl::get_effective_cpu_isa();
  return isa == dnnl::cpu_isa::avx512_core_bf16 || isa == dnnl::cpu_isa::avx512_core_amx;
}

}  // namespace bitmill
