// Shapes, views, ownership and the byte counters that the memory plan is checked against.
#include "core/tensor.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <thread>

namespace bitmill {
namespace {

TEST(Shape, CountsAndPrints) {
  EXPECT_EQ(Shape().elements(), 1) << "a scalar";
  EXPECT_EQ(Shape().rank(), 0);
  const Shape shape{2, 3, 4};
  EXPECT_EQ(shape.elements(), 24);
  EXPECT_EQ(shape.rank(), 3);
  EXPECT_EQ(shape[1], 3);
  EXPECT_EQ(shape.text(), "[2, 3, 4]");
  EXPECT_EQ(shape, Shape(std::vector<int64_t>{2, 3, 4}));
  EXPECT_FALSE(shape == Shape({2, 3}));
  EXPECT_FALSE(Shape({2}) == Shape({2, 0}));
  EXPECT_EQ((Shape{0, 5}).elements(), 0);
  EXPECT_THROW(Shape({1, 2, 3, 4, 5}), Error);
}

TEST(TensorView, SlicesRows) {
  Tensor tensor(DType::kF32, {4, 3});
  for (int i = 0; i < 12; ++i) tensor.as<float>()[i] = static_cast<float>(i);
  const TensorView middle = tensor.view().slice(1, 3);
  EXPECT_EQ(middle.shape, Shape({2, 3}));
  EXPECT_EQ(middle.as<float>()[0], 3);
  EXPECT_EQ(middle.as<float>()[5], 8);
  EXPECT_EQ(middle.bytes(), 24);
  EXPECT_EQ(tensor.view().slice(4, 4).elements(), 0);
  EXPECT_THROW(tensor.view().slice(3, 5), Error);
  EXPECT_THROW(tensor.view().slice(3, 2), Error);
  EXPECT_THROW((TensorView{nullptr, DType::kF32, {}}.slice(0, 0)), Error);
}

TEST(TensorView, ReshapesOnlyEqualCounts) {
  const Tensor tensor(DType::kU8, {4, 3});
  EXPECT_EQ(tensor.view().reshaped({2, 6}).rows(), 2);
  EXPECT_EQ(tensor.view().reshaped({2, 6}).data, tensor.data());
  EXPECT_THROW(tensor.view().reshaped({5}), Error);
}

TEST(Tensor, MovesWithoutCopying) {
  HostAllocator allocator;
  Tensor first(DType::kF32, {8}, allocator);
  void* data = first.data();
  Tensor second(std::move(first));
  EXPECT_EQ(second.data(), data);
  EXPECT_TRUE(first.empty());
  EXPECT_EQ(allocator.current_bytes(), 32);
  Tensor third(DType::kF32, {100}, allocator);
  third = std::move(second);
  EXPECT_EQ(third.data(), data);
  EXPECT_EQ(allocator.current_bytes(), 32) << "the overwritten tensor is released";
  Tensor& alias = third;
  third = std::move(alias);
  EXPECT_EQ(third.data(), data) << "self-move keeps the tensor";
  third.reset();
  third.reset();
  EXPECT_EQ(allocator.current_bytes(), 0);
}

TEST(Tensor, ZerosCloneAndReshape) {
  Tensor zeros = Tensor::zeros(DType::kI32, {2, 2});
  for (int i = 0; i < 4; ++i) EXPECT_EQ(zeros.as<int32_t>()[i], 0);
  zeros.as<int32_t>()[3] = 7;
  Tensor copy = clone(zeros);
  EXPECT_NE(copy.data(), zeros.data());
  EXPECT_EQ(copy.as<int32_t>()[3], 7);
  copy.reshape({4});
  EXPECT_EQ(copy.shape(), Shape({4}));
  EXPECT_EQ(clone(Tensor(DType::kF32, {0, 3})).elements(), 0);
}

TEST(HostAllocator, CountsCurrentAndPeak) {
  HostAllocator allocator;
  void* a = allocator.allocate(100);
  void* b = allocator.allocate(200);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(a) % 64, 0u);
  EXPECT_EQ(allocator.current_bytes(), 300);
  allocator.release(a, 100);
  EXPECT_EQ(allocator.current_bytes(), 200);
  void* c = allocator.allocate(50);
  EXPECT_EQ(allocator.peak_bytes(), 300);
  allocator.release(b, 200);
  allocator.release(c, 50);
  EXPECT_EQ(allocator.current_bytes(), 0);
}

TEST(HostAllocator, ReusesLargeBlocks) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer gets every block from the C library";
#endif
  constexpr int64_t kLarge = 64 << 10;
  HostAllocator allocator;
  void* first = allocator.allocate(kLarge);
  allocator.release(first, kLarge);
  EXPECT_EQ(allocator.current_bytes(), 0) << "kept blocks are not in use";
  void* again = allocator.allocate(kLarge);
  EXPECT_EQ(again, first);
  void* second = allocator.allocate(kLarge);
  EXPECT_NE(second, first) << "a block is handed out once";
  for (void* block : {again, second}) allocator.release(block, kLarge);
  allocator.trim();
  EXPECT_EQ(allocator.peak_bytes(), kLarge * 2);
}

TEST(HostAllocator, RefusesWhatTheMachineDoesNotHave) {
  HostAllocator allocator;
  try {
    allocator.allocate(int64_t{1} << 55);
    FAIL() << "32 PiB were handed out";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kDoesNotFit);
  }
  EXPECT_EQ(allocator.current_bytes(), 0);
}

TEST(HostAllocator, CountsRightFromSeveralThreads) {
  HostAllocator allocator;
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 200; ++i) Tensor(DType::kU8, {i % 2 == 0 ? 1000 : 70000}, allocator);
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(allocator.current_bytes(), 0);
  EXPECT_LE(allocator.peak_bytes(), 3 * 70000);
}

TEST(Convert, BetweenAllFloatTypes) {
  const float values[] = {0.0f, 1.0f, -2.5f, 0.15625f, 448.0f};  // exact in every type
  const DType types[] = {DType::kF16, DType::kBF16, DType::kF32, DType::kF64};
  const TensorView source{const_cast<float*>(values), DType::kF32, {5}};
  for (DType from : types)
    for (DType to : types) {
      Tensor a(from, {5}), b(to, {5}), back(DType::kF32, {5});
      convert(source, a);
      convert(a, b);
      convert(b, back);
      for (int i = 0; i < 5; ++i)
        EXPECT_EQ(back.as<float>()[i], values[i]) << dtype_name(from) << " " << dtype_name(to);
    }
}

TEST(Convert, RoundsDoublesOnceToHalf) {
  Tensor source(DType::kF64, {2}), out(DType::kF16, {2});
  source.as<double>()[0] = 1 + 0x1p-11;                                  // tie: down to even
  source.as<double>()[1] = std::nextafter(source.as<double>()[0], 2.0);  // a hair above it
  convert(source, out);
  EXPECT_EQ(out.as<uint16_t>()[0], 0x3C00);
  EXPECT_EQ(out.as<uint16_t>()[1], 0x3C01);
}

TEST(Convert, RefusesIntegersAndOtherCounts) {
  Tensor ints = Tensor::zeros(DType::kI32, {2}), floats = Tensor::zeros(DType::kF32, {2});
  EXPECT_THROW(convert(ints, floats), Error);
  EXPECT_THROW(convert(floats, ints), Error);
  EXPECT_THROW(convert(floats, Tensor(DType::kF32, {3})), Error);
}

}  // namespace
}  // namespace bitmill
