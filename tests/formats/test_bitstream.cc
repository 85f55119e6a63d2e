#include "formats/bitstream.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "core/error.h"

namespace bitmill {
namespace {

using Words = std::vector<uint32_t>;

Words pack_one(const std::vector<uint8_t>& values, int bits) {
  std::vector<int32_t> words(
      static_cast<size_t>(packed_words(static_cast<int64_t>(values.size()), bits)));
  pack_rows(values.data(), 1, static_cast<int64_t>(values.size()), bits, words.data());
  return Words(words.begin(), words.end());
}

std::vector<uint8_t> counting(int count, int modulus) {
  std::vector<uint8_t> values;
  for (int i = 0; i < count; ++i) values.push_back(static_cast<uint8_t>(i % modulus));
  return values;
}

// The definition, one bit at a time.
Words pack_by_bits(const std::vector<uint8_t>& values, int bits) {
  Words words((values.size() * static_cast<size_t>(bits) + 31) / 32);
  for (size_t i = 0; i < values.size(); ++i)
    for (int b = 0; b < bits; ++b) {
      const size_t at = i * static_cast<size_t>(bits) + static_cast<size_t>(b);
      words[at / 32] |= uint32_t{(values[i] >> b) & 1u} << (at % 32);
    }
  return words;
}

TEST(Bitstream, WordsOfTheFormatPage) {
  EXPECT_EQ(pack_one(counting(8, 8), 4), (Words{0x76543210}));
  EXPECT_EQ(pack_one(counting(16, 4), 2), (Words{0xE4E4E4E4}));
  EXPECT_EQ(pack_one({1, 2, 3, 4}, 8), (Words{0x04030201}));
  EXPECT_EQ(pack_one(counting(32, 8), 3), (Words{0x88FAC688, 0xC688FAC6, 0xFAC688FA}));
  EXPECT_EQ(pack_one(std::vector<uint8_t>(32, 3), 3), (Words{0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D}));
  EXPECT_EQ(pack_one(std::vector<uint8_t>(32, 4), 3), (Words{0x24924924, 0x49249249, 0x92492492}));
}

TEST(Bitstream, LastWordIsFilledWithZeros) {
  EXPECT_EQ(pack_one({15, 15, 15}, 4), (Words{0x00000FFF}));
  EXPECT_EQ(pack_one(std::vector<uint8_t>(11, 7), 3), (Words{0xFFFFFFFF, 0x00000001}));
}

TEST(Bitstream, HighBitsOfAValueDoNotReachItsNeighbour) {
  EXPECT_EQ(pack_one({0xF1, 2}, 4), (Words{0x21}));
}

TEST(Bitstream, RefusesOtherWidths) {
  uint8_t value = 0;
  int32_t words[2];
  EXPECT_THROW(pack_rows(&value, 1, 1, 5, words), Error);
}

// Lengths around units and tiles, rows around tiles: both layouts follow the definition, and both
// read back.
TEST(Bitstream, BothLayoutsFollowTheDefinitionAndReadBack) {
  std::mt19937 random(1);
  for (int bits : {2, 3, 4, 8})
    for (int64_t count : {1, 7, 31, 32, 33, 80, 512, 515, 1056})
      for (int64_t rows : {1, 15, 16, 19}) {
        std::vector<uint8_t> values(static_cast<size_t>(rows * count)), back(values.size());
        for (uint8_t& v : values) v = static_cast<uint8_t>(random() & ((1u << bits) - 1));
        const int64_t width = packed_words(count, bits);
        std::vector<int32_t> across(static_cast<size_t>(rows * width), -1), down(across);
        pack_rows(values.data(), rows, count, bits, across.data());
        pack_rows_transposed(values.data(), rows, count, bits, down.data());
        for (int64_t r = 0; r < rows; ++r) {
          const auto begin = values.begin() + r * count;
          const Words expected = pack_by_bits(std::vector<uint8_t>(begin, begin + count), bits);
          for (int64_t w = 0; w < width; ++w) {
            ASSERT_EQ(static_cast<uint32_t>(across[static_cast<size_t>(r * width + w)]),
                      expected[static_cast<size_t>(w)])
                << bits << " bits, row " << r << ", word " << w << " of " << count << " values";
            ASSERT_EQ(across[static_cast<size_t>(r * width + w)],
                      down[static_cast<size_t>(w * rows + r)]);
          }
        }
        unpack_rows(across.data(), rows, count, bits, back.data());
        ASSERT_EQ(values, back);
        back.assign(values.size(), 0xFF);
        unpack_rows_transposed(down.data(), rows, count, bits, back.data());
        ASSERT_EQ(values, back);
      }
}

}  // namespace
}  // namespace bitmill
