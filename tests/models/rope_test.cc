// Rope tables against numbers computed outside: row 7 of the table of 8 dims is a * cos(7 f_j), a *
// sin(7 f_j).
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <string>

#include "models/family.h"
#include "io/json.h"

namespace bitmill {
namespace {

constexpr int64_t kHeadDim = 8;

void expect_row7(const RopeSpec& rope, int64_t length, const std::array<double, 8>& expected) {
  const Tensor table = rope_table(rope, length);
  ASSERT_EQ(table.shape(), (Shape{length, 8}));
  for (int i = 0; i < 8; ++i)
    EXPECT_NEAR(table.as<float>()[7 * 8 + i], expected[i], 1.5e-7) << "column " << i;
}

RopeSpec parse(const std::string& text, int64_t max_positions = 64) {
  return parse_rope(Json::parse(text), kHeadDim, max_positions);
}

std::string refusal(const std::string& text) {
  try {
    parse(text);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kInput);
    return error.what();
  }
  return "accepted";
}

// f = 10000^(-2j/8) = 1, 0.1, 0.01, 0.001
constexpr std::array<double, 8> kPlain = {0.753902254, 0.764842187, 0.997551,     0.9999755,
                                          0.656986599, 0.644217687, 0.0699428473, 0.00699994283};

TEST(Rope, DefaultFromMissingNullAndBothSpellings) {
  for (const char* text :
       {R"({})", R"({"rope_theta": 10000, "rope_scaling": null})",
        R"({"rope_scaling": {"type": "default"}})",
        R"({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}})"})
    expect_row7(parse(text), 9, kPlain);
}

TEST(Rope, FirstRowIsCosineOneSineZero) {
  const Tensor table = rope_table(parse("{}"), 2);
  for (int i = 0; i < 8; ++i) EXPECT_EQ(table.as<float>()[i], i < 4 ? 1.0f : 0.0f);
}

// f = plain / 4
TEST(Rope, Linear) {
  const std::array<double, 8> expected = {-0.178246056, 0.984726539, 0.999846879,  0.999998469,
                                          0.983985947,  0.174108138, 0.0174991068, 0.00174999911};
  expect_row7(parse(R"({"rope_scaling": {"type": "linear", "factor": 4.0}})"), 9, expected);
  expect_row7(parse(R"({"rope_parameters": {"rope_type": "linear", "factor": 4}})"), 9, expected);
}

// Past max_positions 16 the base is 10000 * (2 * 40 / 16 - 1)^(8/6) = 63496.042; up to there it is
// plain.
TEST(Rope, DynamicDependsOnLength) {
  const RopeSpec rope = parse(R"({"rope_scaling": {"rope_type": "dynamic", "factor": 2}})", 16);
  expect_row7(rope, 16, kPlain);
  expect_row7(rope, 40,
              {0.753902254, 0.904337066, 0.999614174, 0.999998469, 0.656986599, 0.426819015,
               0.0277759456, 0.00174999911});
}

// theta 100: wavelengths 6.3 (below 32/4: kept), 19.9 (blended), 62.8 and 198.7 (above 32: divided
// by 8).
TEST(Rope, Llama3HasThreeRanges) {
  expect_row7(parse(R"({"rope_theta": 100, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
                        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 32}})"),
              9,
              {0.753902254, 0.783274956, 0.996174317, 0.999617212, 0.656986599, 0.621675432,
               0.0873883891, 0.0276663989});
}

std::string yarn(const std::string& extra) {
  return R"({"rope_theta": 100, "rope_scaling": {"rope_type": "yarn", "factor": 4,)"
         R"("original_max_position_embeddings": 256)" +
         extra + "}}";
}

// theta 100, original 256: the ramp runs from floor(0.2098) = 0 to ceil(3.2201) = 4; a = 0.1 ln 4 +
// 1 = 1.138629.
TEST(Rope, Yarn) {
  expect_row7(parse(yarn("")), 9,
              {0.858415299, -0.257085806, 1.03138612, 1.13329406, 0.74806428, 1.1092267,
               0.482410258, 0.110097999});
}

// Betas 16 and 2 without rounding: the ramp runs from 0.81188 to 2.61806.
TEST(Rope, YarnWithoutTruncation) {
  expect_row7(parse(yarn(R"(, "beta_fast": 16, "beta_slow": 2, "truncate": false)")), 9,
              {0.858415299, -0.515550892, 1.06777005, 1.13688635, 0.74806428, 1.01522622,
               0.395403738, 0.0629794353});
}

// a = (0.1 * 0.5 ln 4 + 1) / (0.1 * 2 ln 4 + 1) = 0.837195, or as given
TEST(Rope, YarnAttentionFactor) {
  expect_row7(parse(yarn(R"(, "mscale": 0.5, "mscale_all_dim": 2)")), 9,
              {0.631163184, -0.189026332, 0.75834267, 0.833272062, 0.550025883, 0.815576166,
               0.354699636, 0.0809512638});
  expect_row7(parse(yarn(R"(, "attention_factor": 1.25, "mscale": 0.5, "mscale_all_dim": 2)")), 9,
              {0.942377818, -0.282231643, 1.1322671, 1.24414276, 0.821233248, 1.21772136,
               0.529595322, 0.120866802});
  EXPECT_EQ(parse(yarn(R"(, "mscale": 0, "mscale_all_dim": 0)")).mscale, 0);
}

TEST(Rope, YarnFactorFromLengths) {
  const RopeSpec rope =
      parse(R"({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 16}})", 64);
  EXPECT_EQ(rope.factor, 4);
  EXPECT_NE(refusal(R"({"rope_scaling": {"type": "yarn"}})").find("rope_scaling.factor"),
            std::string::npos);
}

// max 64, original 16: factor 4, a = sqrt(1 + ln 4 / ln 16) = 1.224745; the list changes past 16
// tokens.
TEST(Rope, LongRopePicksItsListByLength) {
  const std::string lists = R"("short_factor": [1, 1.25, 1.5, 2], "long_factor": [1, 2, 4, 8])";
  for (
      const std::string& text :
      {R"({"original_max_position_embeddings": 16, "rope_scaling": {"type": "su", )" + lists + "}}",
       R"({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 16, )" +
           lists + "}}"}) {
    const RopeSpec rope = parse(text);
    expect_row7(rope, 16,
                {0.92333792, 1.03767135, 1.2234115, 1.22473737, 0.804640967, 0.650567572,
                 0.0571340179, 0.0042865983});
    expect_row7(rope, 17,
                {0.92333792, 1.15049191, 1.22455734, 1.2247444, 0.804640967, 0.419962331,
                 0.0214319413, 0.00107165163});
  }
}

// Half the head is rotated: 4 dims, f = 10000^(-2j/4) = 1, 0.01.
TEST(Rope, PartialRotation) {
  for (const char* text : {R"({"partial_rotary_factor": 0.5})",
                           R"({"rope_parameters": {"partial_rotary_factor": 0.5}})"}) {
    const RopeSpec rope = parse(text);
    ASSERT_EQ(rope.dims, 4);
    const Tensor table = rope_table(rope, 8);
    const double expected[] = {std::cos(7.0), std::cos(0.07), std::sin(7.0), std::sin(0.07)};
    for (int i = 0; i < 4; ++i) EXPECT_NEAR(table.as<float>()[28 + i], expected[i], 1e-7);
  }
}

TEST(Rope, NestedByLayerTypeMustAgree) {
  EXPECT_EQ(parse(R"({"rope_parameters": {"full_attention": {"rope_theta": 500}}})").theta, 500);
  EXPECT_NE(refusal(R"({"rope_parameters": {"full_attention": {"rope_theta": 500},
                        "sliding_attention": {"rope_theta": 600}}})")
                .find("rope_parameters differ"),
            std::string::npos);
}

TEST(Rope, RefusalsNameTheKey) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"rope_scaling": {"rope_type": "mrope"}})",
       "rope_scaling.rope_type is \"mrope\"; known: default, linear, dynamic, llama3, yarn, "
       "longrope"},
      {R"({"rope_scaling": {"type": "linear"}})", "the key rope_scaling.factor is missing"},
      {R"({"rope_scaling": {"type": "linear", "factor": -2}})",
       "rope_scaling.factor is -2, expected a positive number"},
      {R"({"rope_scaling": "linear"})", "rope_scaling is \"linear\", expected an object"},
      {R"({"rope_theta": 1})", "rope_theta is 1, expected more than 1"},
      {R"({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4,
           "high_freq_factor": 4, "original_max_position_embeddings": 32}})",
       "high_freq_factor is 4, expected more than"},
      {R"({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1, 1, 1, 1]
          }})",
       "rope_scaling.short_factor has 1 numbers, expected 4"},
      {R"({"rope_scaling": {"type": "longrope", "short_factor": [1, 1, 1, 0]}})",
       "short_factor is [1,1,1,0], expected a list of positive numbers"},
      {R"({"partial_rotary_factor": 0.4})", "rotates 3 dims"},
      {R"({"partial_rotary_factor": 1.5})", "partial_rotary_factor 1.5"},
  };
  for (const auto& [text, message] : cases)
    EXPECT_NE(refusal(text).find(message), std::string::npos) << text << "\n" << refusal(text);
}

}  // namespace
}  // namespace bitmill
