// What sets piecewise attention apart: either pair counts only where the distance says so.
#include <cmath>
#include <cstdint>
#include <limits>

#include "support/target_test.h"

namespace onepass::test {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

class Piecewise : public TargetTest {
 protected:
  void SetUp() override {
    if (!has_forward(GetParam(), {.dist_threshold = 0})) {
      GTEST_SKIP() << GetParam().backend << " lacks the operation";
    }
  }
};
ONEPASS_FOR_EVERY_TARGET(Piecewise);

// Key 60 holds NaN in one of the pairs: rows that take it from that pair get NaN, all others the bits that they have
// without it.
TEST_P(Piecewise, NaNReachesTheRowsThatTakeItFromItsPair) {
  constexpr std::int64_t kKey = 60;
  const Case definition{.num_heads_kv = 4, .seqlen_q = 150, .seqlen_k = 150, .dist_threshold = 33};
  const Instance clean = instance(definition);
  for (bool far : {false, true}) {
    Instance poisoned = clean, zeroed = clean;
    for (std::int64_t b = 0; b < 2; ++b) {
      for (std::int64_t g = 0; g < 4; ++g) {
        const std::int64_t at = clean.key_row(b, g, kKey) * 64;
        std::fill_n((far ? poisoned.k2 : poisoned.k).begin() + at, 64, kNaN);
        std::fill_n((far ? zeroed.k2 : zeroed.k).begin() + at, 64, 0.0);
      }
    }
    const Results got = run_here(poisoned), want = run_here(zeroed);
    for (std::int64_t i = 0; i < 150; ++i) {
      const std::int64_t row = clean.query_row(1, 2, i);
      const bool meets = (i - kKey >= 33) == far;
      EXPECT_EQ(std::isnan(got.lse[row]), meets) << i;
      for (const auto& [name, values, expected] :
           {std::tuple{"out", &got.out, &want.out}, {"dq", &got.dq, &want.dq}, {"dq2", &got.dq2, &want.dq2}}) {
        const bool empty = values == &got.dq2 && i < 33;  // no far key: 0 whatever the row's LSE
        EXPECT_EQ(std::isnan((*values)[row * 64]), meets && !empty) << name << " of query " << i;
        if (meets) continue;
        EXPECT_EQ((*values)[row * 64], (*expected)[row * 64]) << name << " of query " << i;
      }
    }
  }
}

// A row of q2 that no far key meets may hold anything.
TEST_P(Piecewise, UnusedQueriesDoNotLeak) {
  const Case definition{.seqlen_q = 100, .seqlen_k = 100, .causal = true, .dist_threshold = 40};
  const Instance clean = instance(definition);
  Instance poisoned = clean, zeroed = clean;
  for (std::int64_t b = 0; b < 2; ++b) {
    for (std::int64_t h = 0; h < 4; ++h) {
      for (std::int64_t i = 0; i < 40; ++i) {
        std::fill_n(poisoned.q2.begin() + clean.query_row(b, h, i) * 64, 64, kNaN);
        std::fill_n(zeroed.q2.begin() + clean.query_row(b, h, i) * 64, 64, 0.0);
      }
    }
  }
  expect_identical(run_here(poisoned), run_here(zeroed));
}

// A threshold that nothing reaches, or that everything does: plain attention with one pair, and no gradient of the
// other.
TEST_P(Piecewise, OnePairAloneIsPlainAttention) {
  for (const bool far : {false, true}) {
    const Instance split = instance({.seqlen_q = 130, .causal = true, .dist_threshold = far ? INT64_MIN : INT64_MAX});
    Instance plain = split;
    plain.c.dist_threshold.reset();
    if (far) plain.q = split.q2, plain.k = split.k2;
    const Results got = run_here(split), want = run_here(plain);
    const bool same_kernels = GetParam().device().type == DeviceType::kCpu;
    const double tolerance = same_kernels ? 0.0 : GetParam().dtype == DType::kFloat32 ? 2e-5 : 4 * epsilon_of(dtype());
    EXPECT_TRUE(close(got.out, want.out, tolerance));
    EXPECT_TRUE(close(got.lse, want.lse, same_kernels ? 0.0 : 1e-5));
    EXPECT_TRUE(close(far ? got.dq2 : got.dq, want.dq, 4 * tolerance));
    EXPECT_TRUE(close(far ? got.dk2 : got.dk, want.dk, 8 * tolerance));
    EXPECT_TRUE(close(got.dv, want.dv, 8 * tolerance));
    EXPECT_TRUE(identical(far ? got.dq : got.dq2, Values(got.dq.size(), 0.0)));
    EXPECT_TRUE(identical(far ? got.dk : got.dk2, Values(got.dk.size(), 0.0)));
  }
}

TEST_P(Piecewise, EqualPairsArePlainAttention) {
  for (std::int64_t threshold : {-5, 0, 1, 64, 99}) {
    Instance split = instance({.seqlen_q = 130, .seqlen_k = 130, .causal = true, .dist_threshold = threshold});
    split.q2 = split.q;
    split.k2 = split.k;
    Instance plain = split;
    plain.c.dist_threshold.reset();
    const Results got = run_here(split), want = run_here(plain);
    const double tolerance = GetParam().dtype == DType::kFloat32 ? 2e-5 : 4 * epsilon_of(dtype());
    EXPECT_TRUE(close(got.out, want.out, tolerance)) << threshold;
    EXPECT_TRUE(close(got.lse, want.lse, 1e-5)) << threshold;
    EXPECT_TRUE(close(got.total, want.total, 1e-4)) << threshold;
    EXPECT_TRUE(close(got.dv, want.dv, 8 * tolerance)) << threshold;
  }
}

}  // namespace
}  // namespace onepass::test
