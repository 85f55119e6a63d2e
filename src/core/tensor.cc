#include "core/tensor.h"

#include <cstdlib>
#include <cstring>
#include <utility>

namespace bitmill {

Shape::Shape(std::initializer_list<int64_t> dims) : Shape(std::vector<int64_t>(dims)) {}

Shape::Shape(const std::vector<int64_t>& dims) : rank_(static_cast<int>(dims.size())) {
  BITMILL_CHECK(dims.size() <= dims_.size());
  for (int i = 0; i < rank_; ++i) dims_[i] = dims[i];
}

int64_t Shape::elements() const {
  int64_t count = 1;
  for (int i = 0; i < rank_; ++i) count *= dims_[i];
  return count;
}

std::string Shape::text() const { return fmt::format("[{}]", fmt::join(dims(), ", ")); }

// ---- HostAllocator ------------------------------------------------------------------------------------------

namespace {
constexpr size_t kAlignment = 64;

// AddressSanitizer sees the bounds of blocks of the C library only.
bool from_heap([[maybe_unused]] int64_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  return false;
#else
  return bytes >= 64 << 10;
#endif
}
}  // namespace

HostAllocator& HostAllocator::instance() {
  static HostAllocator allocator;
  return allocator;
}

void* HostAllocator::allocate(int64_t bytes) {
  void* pointer = nullptr;
  std::lock_guard lock(mutex_);
  if (from_heap(bytes)) pointer = heap_.allocate(bytes);
  else if (posix_memalign(&pointer, kAlignment, static_cast<size_t>(bytes) + (bytes == 0)) != 0) pointer = nullptr;
  if (pointer == nullptr)
    fail(ExitCode::kDoesNotFit, "out of host memory: {} bytes asked for, {} bytes in use", bytes, current_);
  current_ += bytes;
  peak_ = std::max(peak_, current_);
  return pointer;
}

void HostAllocator::release(void* pointer, int64_t bytes) noexcept {
  std::lock_guard lock(mutex_);
  current_ -= bytes;
  if (from_heap(bytes)) heap_.release(pointer, bytes);
  else std::free(pointer);
}

int64_t HostAllocator::current_bytes() const {
  std::lock_guard lock(mutex_);
  return current_;
}

int64_t HostAllocator::peak_bytes() const {
  std::lock_guard lock(mutex_);
  return peak_;
}

void HostAllocator::trim() noexcept {
  std::lock_guard lock(mutex_);
  heap_.trim();
}

// ---- views and owners ---------------------------------------------------------------------------------------

TensorView TensorView::slice(int64_t begin, int64_t end) const {
  BITMILL_CHECK(shape.rank() >= 1 && 0 <= begin && begin <= end && end <= shape[0]);
  std::vector<int64_t> dims = shape.dims();
  const int64_t row_bytes = shape[0] == 0 ? 0 : bytes() / shape[0];
  dims[0] = end - begin;
  return {static_cast<char*>(data) + begin * row_bytes, dtype, Shape(dims)};
}

TensorView TensorView::reshaped(Shape new_shape) const {
  BITMILL_CHECK(new_shape.elements() == elements());
  return {data, dtype, new_shape};
}

Tensor::Tensor(DType dtype, Shape shape, Allocator& allocator)
    : view_{nullptr, dtype, shape}, allocator_(&allocator) {
  view_.data = allocator.allocate(view_.bytes());
}

Tensor::Tensor(Tensor&& other) noexcept
    : view_(std::exchange(other.view_, {})), allocator_(std::exchange(other.allocator_, nullptr)) {}

Tensor& Tensor::operator=(Tensor&& other) noexcept {
  if (this != &other) {
    reset();
    view_ = std::exchange(other.view_, {});
    allocator_ = std::exchange(other.allocator_, nullptr);
  }
  return *this;
}

void Tensor::reset() noexcept {
  if (allocator_ != nullptr) allocator_->release(view_.data, view_.bytes());
  view_ = {};
  allocator_ = nullptr;
}

Tensor Tensor::zeros(DType dtype, Shape shape) {
  Tensor tensor(dtype, shape);
  std::memset(tensor.data(), 0, tensor.bytes());
  return tensor;
}

void Tensor::reshape(Shape shape) { view_ = view_.reshaped(shape); }

Tensor clone(TensorView source) {
  Tensor copy(source.dtype, source.shape);
  std::memcpy(copy.data(), source.data, source.bytes());
  return copy;
}

// ---- conversion ---------------------------------------------------------------------------------------------

namespace {


template <typename Out>
Out narrow(double v) {
  if constexpr (std::is_same_v<Out, BFloat16>) return to_bf16(static_cast<float>(v));
  else if constexpr (std::is_same_v<Out, Float16>) return to_f16(v);
  else return static_cast<Out>(v);
}

// Single-precision sources never need the detour through double.
template <typename Out>
Out narrow(float v) {
  if constexpr (std::is_same_v<Out, BFloat16>) return to_bf16(v);
  else if constexpr (std::is_same_v<Out, Float16>) return to_f16(v);
  else return static_cast<Out>(v);
}

template <typename In, typename Out>
void convert_loop(const In* in, Out* out, int64_t count) {
  if constexpr (std::is_same_v<In, double>)
    for (int64_t i = 0; i < count; ++i) out[i] = narrow<Out>(in[i]);
  else if constexpr (std::is_same_v<In, float>)
    for (int64_t i = 0; i < count; ++i) out[i] = narrow<Out>(in[i]);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = narrow<Out>(to_float(in[i]));
}

template <typename In>
void convert_from(TensorView in, TensorView out) {
  const int64_t n = in.elements();
  switch (out.dtype) {
    case DType::kBF16: return convert_loop(in.as<In>(), out.as<BFloat16>(), n);
    case DType::kF16: return convert_loop(in.as<In>(), out.as<Float16>(), n);
    case DType::kF32: return convert_loop(in.as<In>(), out.as<float>(), n);
    case DType::kF64: return convert_loop(in.as<In>(), out.as<double>(), n);
    default: fail(ExitCode::kInternal, "no conversion to {}", dtype_name(out.dtype));
  }
}

}  // namespace

void convert(TensorView in, TensorView out) {
  BITMILL_CHECK(in.elements() == out.elements());
  if (in.dtype == out.dtype) {
    if (in.data != out.data) std::memcpy(out.data, in.data, in.bytes());
    return;
  }
  switch (in.dtype) {
    case DType::kBF16: return convert_from<BFloat16>(in, out);
    case DType::kF16: return convert_from<Float16>(in, out);
    case DType::kF32: return convert_from<float>(in, out);
    case DType::kF64: return convert_from<double>(in, out);
    default: fail(ExitCode::kInternal, "no conversion from {}", dtype_name(in.dtype));
  }
}

}  // namespace bitmill
