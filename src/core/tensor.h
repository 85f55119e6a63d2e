// Tensors: a view (pointer, dtype, shape; owns nothing) and an owner (move-only, frees through its allocator).
// Row-major and contiguous always. Sizes are signed 64-bit.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <mutex>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/error.h"
#include "core/page_heap.h"

namespace bitmill {

// Up to four dimensions, by value. An empty shape is a scalar (one element).
class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<int64_t> dims);
  explicit Shape(const std::vector<int64_t>& dims);
  int rank() const { return rank_; }
  int64_t operator[](int i) const { return dims_[i]; }
  int64_t elements() const;
  bool operator==(const Shape& other) const = default;
  std::vector<int64_t> dims() const { return {dims_.begin(), dims_.begin() + rank_}; }
  // "[32, 128]"
  std::string text() const;

 private:
  std::array<int64_t, 4> dims_{};
  int rank_ = 0;
};

// Where tensors live. Thread-safe. `current` and `peak` count live bytes as asked for, the plan's unit.
class Allocator {
 public:
  virtual ~Allocator() = default;
  virtual void* allocate(int64_t bytes) = 0;  // 64-byte aligned, uninitialised; throws kDoesNotFit
  virtual void release(void* pointer, int64_t bytes) noexcept = 0;
  virtual int64_t current_bytes() const = 0;
  virtual int64_t peak_bytes() const = 0;
};

// Host memory: small blocks from the C library, those of at least 64 KiB from a PageHeap, which keeps what is released for
// later requests of any size.
class HostAllocator final : public Allocator {
 public:
  void* allocate(int64_t bytes) override;
  void release(void* pointer, int64_t bytes) noexcept override;
  int64_t current_bytes() const override;
  int64_t peak_bytes() const override;
  // Gives what is kept back to the system.
  void trim() noexcept;
  // The process-wide instance.
  static HostAllocator& instance();

 private:
  mutable std::mutex mutex_;
  PageHeap heap_;
  int64_t current_ = 0, peak_ = 0;
};

// Non-owning view. Copy freely; valid while the owner lives.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  Shape shape;

  int64_t elements() const { return shape.elements(); }
  int64_t bytes() const { return elements() * dtype_bits(dtype) / 8; }
  int64_t rows() const { return shape[0]; }
  int64_t cols() const { return shape[1]; }
  // Typed pointer; the caller has checked dtype.
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
  // Rows [begin, end) of a tensor of rank >= 1.
  TensorView slice(int64_t begin, int64_t end) const;
  // Same bytes, another shape of equal element count.
  TensorView reshaped(Shape new_shape) const;
};

// Owner. Default-constructed: empty.
class Tensor {
 public:
  Tensor() = default;
  // Uninitialised memory of `allocator` (which must outlive the tensor).
  Tensor(DType dtype, Shape shape, Allocator& allocator = HostAllocator::instance());
  Tensor(Tensor&& other) noexcept;
  Tensor& operator=(Tensor&& other) noexcept;
  ~Tensor() { reset(); }

  static Tensor zeros(DType dtype, Shape shape);  // host only

  bool empty() const { return view_.data == nullptr; }
  void reset() noexcept;
  const TensorView& view() const { return view_; }
  operator TensorView() const { return view_; }
  DType dtype() const { return view_.dtype; }
  const Shape& shape() const { return view_.shape; }
  int64_t rows() const { return view_.rows(); }
  int64_t cols() const { return view_.cols(); }
  int64_t elements() const { return view_.elements(); }
  int64_t bytes() const { return view_.bytes(); }
  void* data() const { return view_.data; }
  template <typename T>
  T* as() const {
    return view_.as<T>();
  }
  // Reinterprets the shape in place (equal element count).
  void reshape(Shape shape);

 private:
  TensorView view_;
  Allocator* allocator_ = nullptr;
};

// Copies of host data.
Tensor clone(TensorView source);

// out[i] = source[i] in another float type; host memory; F16, BF16, F32, F64 both ways, round to nearest even.
void convert(TensorView source, TensorView out);

}  // namespace bitmill
