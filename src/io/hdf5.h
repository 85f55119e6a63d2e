// Reading one integer dataset of an HDF5 file, row by row. HDF5 keeps global state: use from one
// thread at a time.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace bitmill {

// Move-only owner of an HDF5 identifier (hid_t), closed on destruction. Negative: nothing owned.
class Hdf5Handle {
 public:
  using Close = int (*)(int64_t);
  Hdf5Handle() = default;
  Hdf5Handle(int64_t id, Close close) : id_(id), close_(close) {}
  Hdf5Handle(Hdf5Handle&& other) noexcept
      : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Hdf5Handle& operator=(Hdf5Handle&& other) noexcept {
    std::swap(id_, other.id_);
    std::swap(close_, other.close_);
    return *this;
  }
  ~Hdf5Handle() {
    if (id_ >= 0) close_(id_);
  }
  int64_t id() const { return id_; }

 private:
  int64_t id_ = -1;
  Close close_ = nullptr;
};

// A dataset of 32- or 64-bit integers stored in the file itself (external and virtual storage are
// refused: a file must not make us read others). Errors are Error(kInput) and begin with the file's
// path.
class Hdf5Integers {
 public:
  // Opens the file without locking it (shared file systems often cannot) and checks the dataset's
  // type.
  Hdf5Integers(const std::string& path, const std::string& dataset);
  const std::vector<int64_t>& dims() const { return dims_; }
  bool is_signed() const { return is_signed_; }
  // Of a rank-2 dataset: columns [0, columns) of rows [begin, begin + rows) into out[rows *
  // columns]. Unsigned datasets fill it with uint64_t values.
  void read_rows(int64_t begin, int64_t rows, int64_t columns, int64_t* out) const;

 private:
  std::string path_, name_;
  Hdf5Handle file_, dataset_;
  std::vector<int64_t> dims_;
  bool is_signed_ = true;
};

}  // namespace bitmill
