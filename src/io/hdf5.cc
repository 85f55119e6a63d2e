#include "io/hdf5.h"

#include <hdf5.h>

#include <cstring>
#include <type_traits>

#include "core/error.h"
#include "io/json.h"
#include "io/safetensors.h"

namespace bitmill {
namespace {

static_assert(std::is_same_v<hid_t, int64_t> && std::is_same_v<herr_t, int>,
              "Hdf5Handle holds hid_t as int64_t");

constexpr int64_t kSignatureBytes = 8;
// Deflate shrinks at most 1032 times: a file that claims more holds no such data, whatever its
// dimensions say.
constexpr int64_t kMaxShrink = 1032;

// Checks what the library would only report as "cannot open", and gives the file's size.
int64_t check_file(const std::string& path) {
  const RangeReader file(path);
  char signature[kSignatureBytes] = {};
  if (file.file_bytes() >= kSignatureBytes) file.read(0, kSignatureBytes, signature);
  if (std::memcmp(signature, "\x89HDF\r\n\x1a\n", kSignatureBytes) != 0)
    fail(ExitCode::kInput, "{}: does not start with the HDF5 signature", path);
  return file.file_bytes();
}

Hdf5Handle open_file(const std::string& path) {
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);  // errors become our sentences, not stack prints
  const Hdf5Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  if (access.id() < 0 || H5Pset_file_locking(access.id(), false, true) < 0)
    fail(ExitCode::kInternal, "{}: HDF5 does not accept its file access settings", path);
  Hdf5Handle file(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.id()), H5Fclose);
  if (file.id() < 0)
    fail(ExitCode::kInput, "{}: HDF5 cannot open the file (damaged or cut short?)", path);
  return file;
}

Hdf5Handle open_dataset(const Hdf5Handle& file, const std::string& name, const std::string& path) {
  H5L_info_t link;
  if (H5Lget_info(file.id(), name.c_str(), &link, H5P_DEFAULT) < 0)
    fail(ExitCode::kInput, "{}: has no dataset {}", path, quote_name(name));
  if (link.type != H5L_TYPE_HARD)
    fail(ExitCode::kInput, "{}: {} is a link, a dataset is expected", path, quote_name(name));
  Hdf5Handle dataset(H5Dopen2(file.id(), name.c_str(), H5P_DEFAULT), H5Dclose);
  if (dataset.id() < 0)
    fail(ExitCode::kInput, "{}: {} is not a readable dataset", path, quote_name(name));
  const Hdf5Handle creation(H5Dget_create_plist(dataset.id()), H5Pclose);
  if (creation.id() < 0 || H5Pget_layout(creation.id()) == H5D_VIRTUAL ||
      H5Pget_external_count(creation.id()) != 0)
    fail(ExitCode::kInput, "{}: dataset {} is stored in other files, which is not supported", path,
         quote_name(name));
  return dataset;
}

}  // namespace

Hdf5Integers::Hdf5Integers(const std::string& path, const std::string& dataset)
    : path_(path), name_(dataset) {
  const int64_t file_bytes = check_file(path);
  file_ = open_file(path);
  dataset_ = open_dataset(file_, name_, path);

  const Hdf5Handle type(H5Dget_type(dataset_.id()), H5Tclose);
  const size_t bytes = H5Tget_size(type.id());
  if (H5Tget_class(type.id()) != H5T_INTEGER || (bytes != 4 && bytes != 8))
    fail(ExitCode::kInput, "{}: dataset {} does not hold 32- or 64-bit integers", path,
         quote_name(name_));
  is_signed_ = H5Tget_sign(type.id()) != H5T_SGN_NONE;

  const Hdf5Handle space(H5Dget_space(dataset_.id()), H5Sclose);
  const int rank = H5Sget_simple_extent_ndims(space.id());
  std::vector<hsize_t> dims(rank > 0 ? static_cast<size_t>(rank) : 0);
  if (rank > 0) H5Sget_simple_extent_dims(space.id(), dims.data(), nullptr);
  int64_t claimed = static_cast<int64_t>(bytes);
  bool overflow = false;
  for (const hsize_t dim : dims) {
    dims_.push_back(static_cast<int64_t>(dim));
    overflow |= __builtin_mul_overflow(claimed, dim, &claimed);
  }
  if (overflow || claimed / kMaxShrink > file_bytes)
    fail(ExitCode::kInput,
         "{}: dataset {} claims shape [{}], more than a file of {} bytes can hold", path,
         quote_name(name_), fmt::join(dims_, ", "), file_bytes);
}

void Hdf5Integers::read_rows(int64_t begin, int64_t rows, int64_t columns, int64_t* out) const {
  BITMILL_CHECK(dims_.size() == 2 && begin >= 0 && rows >= 0 && begin + rows <= dims_[0] &&
                columns <= dims_[1]);
  if (rows == 0 || columns == 0) return;
  const hsize_t start[2] = {static_cast<hsize_t>(begin), 0};
  const hsize_t count[2] = {static_cast<hsize_t>(rows), static_cast<hsize_t>(columns)};
  const Hdf5Handle in_file(H5Dget_space(dataset_.id()), H5Sclose);
  const Hdf5Handle in_memory(H5Screate_simple(2, count, nullptr), H5Sclose);
  const bool read =
      in_file.id() >= 0 && in_memory.id() >= 0 &&
      H5Sselect_hyperslab(in_file.id(), H5S_SELECT_SET, start, nullptr, count, nullptr) >= 0 &&
      H5Dread(dataset_.id(), is_signed_ ? H5T_NATIVE_INT64 : H5T_NATIVE_UINT64, in_memory.id(),
              in_file.id(), H5P_DEFAULT, out) >= 0;
  if (!read)
    fail(ExitCode::kInput, "{}: HDF5 cannot read rows {} to {} of {} (damaged or cut short?)",
         path_, begin, begin + rows - 1, quote_name(name_));
}

}  // namespace bitmill
