// Attention of every backend against the definition.
#include "conformance/backend_test.h"

namespace bitmill::testing {
namespace {

class Attention : public BackendTest {
 protected:
  Values run(const AttentionShape& s, const Values& q, const Values& k, const Values& v) {
    const int64_t tokens = s.sequences * s.length;
    Tensor qs = up(DType::kF32, {tokens, s.heads * s.head_dim}, q);
    Tensor ks = up(DType::kF32, {tokens, s.kv_heads * s.head_dim}, k);
    Tensor vs = up(DType::kF32, {tokens, s.kv_heads * s.head_dim}, v);
    Tensor out = backend().allocate(compute(), {tokens, s.heads * s.head_dim});
    backend().attention(qs, ks, vs, s, out);
    return down(std::move(out));
  }

  void check(const AttentionShape& s) {
    const int64_t tokens = s.sequences * s.length;
    const Values q = random(tokens * s.heads * s.head_dim, 1),
                 k = random(tokens * s.kv_heads * s.head_dim, 2);
    const Values v = random(tokens * s.kv_heads * s.head_dim, 3);
    const Values expected = naive_attention(
        q, k, v,
        {s.sequences, s.length, s.heads, s.kv_heads, s.head_dim, s.scale, s.sliding_window});
    // A score is off by at most head_dim roundings, which is its relative effect on a probability;
    // bf16 rounds the probabilities (they sum to 1) and the output.
    const double score = max_magnitude(q) * max_magnitude(k) * s.scale;
    const double magnitude = max_magnitude(v);
    const double slack = tolerance(s.head_dim, score * magnitude) + tolerance(4, magnitude) +
                         (compute() == DType::kBF16 ? 2 * kHalf * magnitude : 0);
    EXPECT_LE(max_difference(run(s, q, k, v), expected), slack)
        << s.sequences << " x " << s.length << ", heads " << s.heads << "/" << s.kv_heads << " x "
        << s.head_dim << ", window " << s.sliding_window;
  }
};
BITMILL_EVERY_BACKEND(Attention);

TEST_P(Attention, HandChecked) {
  // Equal scores: the first token sees only itself, the second the mean of both.
  const AttentionShape shape{
      .sequences = 1, .length = 2, .heads = 1, .kv_heads = 1, .head_dim = 2, .scale = 1};
  EXPECT_EQ(run(shape, {1, 0, 1, 0}, {1, 0, 1, 0}, {2, 4, 6, 8}), (Values{2, 4, 4, 6}));
}

TEST_P(Attention, LargeScoresDoNotOverflow) {
  const AttentionShape shape{
      .sequences = 1, .length = 2, .heads = 1, .kv_heads = 1, .head_dim = 1, .scale = 1};
  EXPECT_EQ(run(shape, {1000, 1000}, {-1000, 1000}, {3, 5}), (Values{3, 5}));
}

TEST_P(Attention, ShapesAroundTileEdges) {
  check({.sequences = 3, .length = 1, .heads = 2, .kv_heads = 1, .head_dim = 5, .scale = 0.4f});
  check({.sequences = 2, .length = 64, .heads = 2, .kv_heads = 2, .head_dim = 16, .scale = 0.25f});
  check({.sequences = 2, .length = 131, .heads = 6, .kv_heads = 2, .head_dim = 24, .scale = 0.2f});
  check({.sequences = 1, .length = 200, .heads = 4, .kv_heads = 1, .head_dim = 7, .scale = 0.37f});
}

TEST_P(Attention, HeadsAreSplitForLongSequences) {
  check({.sequences = 1, .length = 2100, .heads = 6, .kv_heads = 1, .head_dim = 4, .scale = 0.5f});
}

TEST_P(Attention, SlidingWindow) {
  for (int64_t window : {1, 7, 64, 65, 150, 1000})
    check({.sequences = 2,
           .length = 195,
           .heads = 4,
           .kv_heads = 2,
           .head_dim = 8,
           .scale = 0.35f,
           .sliding_window = window});
}

}  // namespace
}  // namespace bitmill::testing
