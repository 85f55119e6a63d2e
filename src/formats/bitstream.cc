#include "formats/bitstream.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/error.h"

namespace bitmill {
namespace {

static_assert(std::endian::native == std::endian::little, "words are stored as they lie in memory");

// A unit is the smallest run of values that fills whole words for every width: 32 values, `bits`
// words.
constexpr int64_t kUnit = 32;
// Tile of the transposed forms: 16 streams make one cache line of words, 16 units keep a tile
// inside the first-level cache.
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileUnits = 16;

constexpr uint64_t spread_mask(int lane_bits, int used_bits) {
  uint64_t mask = 0;
  for (int shift = 0; shift < 64; shift += lane_bits)
    mask |= (used_bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << used_bits) - 1) << shift;
  return mask;
}

// Eight bytes of `bits` significant bits -> one run of 8 * bits bits. Halving steps: neighbours
// join in lanes of 16, then 32, then 64 bits. No branches, so that a loop over it vectorises.
template <int bits>
inline uint64_t join8(uint64_t x) {
  x &= spread_mask(8, bits);
  if constexpr (bits == 8) return x;
  x = (x | x >> (8 - bits)) & spread_mask(16, 2 * bits);
  x = (x | x >> (16 - 2 * bits)) & spread_mask(32, 4 * bits);
  return (x | x >> (32 - 4 * bits)) & spread_mask(64, 8 * bits);
}

// Inverse of join8; bits above 8 * bits are ignored.
template <int bits>
inline uint64_t split8(uint64_t x) {
  if constexpr (bits == 8) return x;
  x &= spread_mask(64, 8 * bits);
  x = (x | x << (32 - 4 * bits)) & spread_mask(32, 4 * bits);
  x = (x | x << (16 - 2 * bits)) & spread_mask(16, 2 * bits);
  return (x | x << (8 - bits)) & spread_mask(8, bits);
}

// One unit: 32 values <-> `bits` words.
template <int bits>
inline void pack_unit(const uint8_t* values, int32_t* words) {
  uint64_t in[4], run[4];
  std::memcpy(in, values, sizeof in);
  for (int i = 0; i < 4; ++i) run[i] = join8<bits>(in[i]);
  if constexpr (bits == 8) {
    std::memcpy(words, run, sizeof run);
  } else if constexpr (bits == 4) {
    for (int i = 0; i < 4; ++i) words[i] = static_cast<int32_t>(run[i]);
  } else if constexpr (bits == 2) {
    words[0] = static_cast<int32_t>(run[0] | run[1] << 16);
    words[1] = static_cast<int32_t>(run[2] | run[3] << 16);
  } else {
    words[0] = static_cast<int32_t>(run[0] | run[1] << 24);
    words[1] = static_cast<int32_t>(run[1] >> 8 | run[2] << 16);
    words[2] = static_cast<int32_t>(run[2] >> 16 | run[3] << 8);
  }
}

template <int bits>
inline void unpack_unit(const int32_t* words, uint8_t* values) {
  uint32_t w[bits];
  std::memcpy(w, words, sizeof w);
  uint64_t run[4];
  for (int i = 0; i < 4; ++i) {
    const int first = i * 8 * bits, at = first / 32, shift = first % 32;
    uint64_t x = w[at];
    if (at + 1 < bits) x |= uint64_t{w[at + 1]} << 32;
    run[i] = split8<bits>(x >> shift);
  }
  std::memcpy(values, run, sizeof run);
}

template <int bits>
void pack_stream(const uint8_t* values, int64_t count, int32_t* words) {
  const int64_t units = count / kUnit;
  for (int64_t u = 0; u < units; ++u) pack_unit<bits>(values + u * kUnit, words + u * bits);
  const int64_t rest = count - units * kUnit;
  if (rest == 0) return;
  uint8_t tail[kUnit] = {};
  int32_t tail_words[bits];
  std::memcpy(tail, values + units * kUnit, static_cast<size_t>(rest));
  pack_unit<bits>(tail, tail_words);
  std::copy_n(tail_words, packed_words(rest, bits), words + units * bits);
}

template <int bits>
void unpack_stream(const int32_t* words, int64_t count, uint8_t* values) {
  const int64_t units = count / kUnit;
  for (int64_t u = 0; u < units; ++u) unpack_unit<bits>(words + u * bits, values + u * kUnit);
  const int64_t rest = count - units * kUnit;
  if (rest == 0) return;
  uint8_t tail[kUnit];
  int32_t tail_words[bits] = {};
  std::copy_n(words + units * bits, packed_words(rest, bits), tail_words);
  unpack_unit<bits>(tail_words, tail);
  std::memcpy(values + units * kUnit, tail, static_cast<size_t>(rest));
}

// The transposed forms work on tiles of kTileRows streams x kTileUnits units, through a buffer that
// holds each stream of the tile in one row of kTileWords words.
template <int bits>
constexpr int64_t kTileWords = kTileUnits* bits;

struct TileRange {
  int64_t row, rows;      // streams
  int64_t value, values;  // of each stream
  int64_t word, words;
};

template <typename Body>
void for_each_tile(int64_t rows, int64_t count, int bits, Body&& body) {
  for (int64_t row = 0; row < rows; row += kTileRows)
    for (int64_t at = 0; at < count; at += kTileUnits * kUnit) {
      const int64_t values = std::min(count - at, kTileUnits * kUnit);
      body(TileRange{row, std::min(rows - row, kTileRows), at, values, at / kUnit * bits,
                     packed_words(values, bits)});
    }
}

// body(word of the tile, the same word of the matrix) for all words of a tile.
template <int bits, typename Word, typename Body>
void for_each_word(const TileRange& t, int32_t* tile, Word* words, int64_t rows, Body&& body) {
  for (int64_t w = 0; w < t.words; ++w) {
    Word* line = words + (t.word + w) * rows + t.row;
    for (int64_t r = 0; r < t.rows; ++r) body(tile[r * kTileWords<bits> + w], line[r]);
  }
}

template <int bits>
void pack_transposed(const uint8_t* values, int64_t rows, int64_t count, int32_t* words) {
  int32_t tile[kTileRows * kTileWords<bits>];
  for_each_tile(rows, count, bits, [&](const TileRange& t) {
    for (int64_t r = 0; r < t.rows; ++r)
      pack_stream<bits>(values + (t.row + r) * count + t.value, t.values,
                        tile + r * kTileWords<bits>);
    for_each_word<bits>(t, tile, words, rows, [](int32_t from, int32_t& to) { to = from; });
  });
}

template <int bits>
void unpack_transposed(const int32_t* words, int64_t rows, int64_t count, uint8_t* values) {
  int32_t tile[kTileRows * kTileWords<bits>];
  for_each_tile(rows, count, bits, [&](const TileRange& t) {
    for_each_word<bits>(t, tile, words, rows, [](int32_t& to, int32_t from) { to = from; });
    for (int64_t r = 0; r < t.rows; ++r)
      unpack_stream<bits>(tile + r * kTileWords<bits>, t.values,
                          values + (t.row + r) * count + t.value);
  });
}

// Calls body(std::integral_constant<int, bits>) for the run-time width.
template <typename Body>
void with_bits(int bits, Body&& body) {
  switch (bits) {
    case 2:
      return body(std::integral_constant<int, 2>());
    case 3:
      return body(std::integral_constant<int, 3>());
    case 4:
      return body(std::integral_constant<int, 4>());
    case 8:
      return body(std::integral_constant<int, 8>());
    default:
      fail(ExitCode::kInternal, "bit streams hold 2, 3, 4 or 8 bits, not {}", bits);
  }
}

}  // namespace

void pack_rows(const uint8_t* values, int64_t rows, int64_t count, int bits, int32_t* words) {
  const int64_t stride = packed_words(count, bits);
  with_bits(bits, [&](auto width) {
    for (int64_t r = 0; r < rows; ++r)
      pack_stream<width()>(values + r * count, count, words + r * stride);
  });
}

void pack_rows_transposed(const uint8_t* values, int64_t rows, int64_t count, int bits,
                          int32_t* words) {
  with_bits(bits, [&](auto width) { pack_transposed<width()>(values, rows, count, words); });
}

void unpack_rows(const int32_t* words, int64_t rows, int64_t count, int bits, uint8_t* values) {
  const int64_t stride = packed_words(count, bits);
  with_bits(bits, [&](auto width) {
    for (int64_t r = 0; r < rows; ++r)
      unpack_stream<width()>(words + r * stride, count, values + r * count);
  });
}

void unpack_rows_transposed(const int32_t* words, int64_t rows, int64_t count, int bits,
                            uint8_t* values) {
  with_bits(bits, [&](auto width) { unpack_transposed<width()>(words, rows, count, values); });
}

}  // namespace bitmill
