// Dense bit streams, the storage of every packed format: value i of a row occupies bits [i*bits,
// (i+1)*bits) of the row's stream, least significant bit first, and the stream is cut into 32-bit
// little-endian words. The last word is filled with zero bits. 3-bit values therefore straddle
// words: 32 values fill exactly 3 words.
//
//   4 bits, values 0..7            -> 0x76543210
//   2 bits, values 0,1,2,3 thrice.. -> 0xE4E4E4E4
//   3 bits, values i mod 8, 32 of them -> 0x88FAC688 0xC688FAC6 0xFAC688FA
//
// Formats differ only in which axis of the word matrix runs along the stream, so there are two
// functions each way. bits is 2, 3, 4 or 8; values above 2^bits - 1 are cut to their low bits.
// Single-threaded.
#pragma once

#include <cstdint>

namespace bitmill {

// Words of a row of `count` values: ceil(count * bits / 32).
constexpr int64_t packed_words(int64_t count, int bits) {
  return (count * bits + 31) / 32;
}

// words [rows, packed_words(count)]: row r holds the stream of values [rows, count] row r.
void pack_rows(const uint8_t* values, int64_t rows, int64_t count, int bits, int32_t* words);
// words [packed_words(count), rows]: column r holds the stream of values [rows, count] row r.
void pack_rows_transposed(const uint8_t* values, int64_t rows, int64_t count, int bits,
                          int32_t* words);

// Inverses: the first `count` values of each stream.
void unpack_rows(const int32_t* words, int64_t rows, int64_t count, int bits, uint8_t* values);
void unpack_rows_transposed(const int32_t* words, int64_t rows, int64_t count, int bits,
                            uint8_t* values);

}  // namespace bitmill
