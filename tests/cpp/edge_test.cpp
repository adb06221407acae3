// Empty rows, special values and extreme sizes. Numbers in comments are rows of the reliability checklist.
#include <cmath>
#include <limits>

#include "support/naive.h"
#include "support/target_test.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace onepass::test {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

class Edge : public TargetTest {};
ONEPASS_FOR_EVERY_TARGET(Edge);

bool all_equal(const Values& values, double x) {
  return std::all_of(values.begin(), values.end(), [x](double y) { return y == x; });
}

void expect_empty(const Results& results) {
  EXPECT_TRUE(all_equal(results.out, 0.0));
  EXPECT_TRUE(all_equal(results.lse, -kInfinity));
  for (const auto& [name, values] : {std::pair{"total", &results.total},
                                     {"dq", &results.dq},
                                     {"dk", &results.dk},
                                     {"dv", &results.dv},
                                     {"dbias", &results.dbias},
                                     {"dsinks", &results.dsinks}}) {
    EXPECT_TRUE(all_equal(*values, 0.0)) << name;
  }
}

TEST_P(Edge, EveryKeyMasked) {  // 1
  expect_empty(run_here(instance({.key_begin = {90, 40}, .key_end = {90, 40}, .bias = "hqk", .sinks = true})));
  expect_empty(run_here(instance({.causal = true, .key_begin = {20, 90}, .key_end = {10, 0}, .dropout = 0.5})));
}

TEST_P(Edge, EveryLogitMinusInfinity) {  // 1, by way of the bias
  Instance made = instance({.bias = "hqk"});
  made.bias.assign(made.bias.size(), -kInfinity);
  expect_empty(run_here(made));
}

TEST_P(Edge, LeadingRowsOfCausalWithMoreQueriesThanKeys) {  // 3
  const Instance made = instance({.batch = 1, .seqlen_q = 150, .seqlen_k = 10, .causal = true});
  const Results results = run_here(made);
  for (std::int64_t i = 0; i < 150; ++i) {
    EXPECT_EQ(results.lse[made.lse_at(0, 0, i)] == -kInfinity, i < 140) << i;
    EXPECT_EQ(results.out[made.query_row(0, 0, i) * 64] == 0.0, i < 140) << i;
    const double dq = results.dq[made.query_row(0, 0, i) * 64];
    if (i == 140) {
      EXPECT_NEAR(dq, 0.0, 1e-5);  // one key: no gradient, but for the rounding of out and lse
    } else {
      EXPECT_EQ(dq == 0.0, i < 140) << i;
    }
  }
}

TEST_P(Edge, NoKeys) {  // 5
  expect_empty(run_here(instance({.seqlen_k = 0})));
  expect_empty(run_here(instance({.lengths_q = {5, 3}, .lengths_k = {0, 0}, .causal = true})));
}

TEST_P(Edge, NoQueries) {  // 5
  expect_empty(run_here(instance({.seqlen_q = 0, .bias = "hk", .sinks = true})));
  expect_empty(run_here(instance({.lengths_q = {0, 0}, .lengths_k = {7, 9}})));
}

TEST_P(Edge, NoBatchAndNoSequences) {  // 5, 6
  expect_empty(run_here(instance({.batch = 0})));
  Instance made = instance({.lengths_q = {4}, .lengths_k = {4}});
  Call call(made, dtype());
  call.cu_seqlens_q.view().shape[0] = call.cu_seqlens_k.view().shape[0] = 1;  // only the leading 0
  call.forward(context());
  call.backward(context());
  expect_empty(call.results());
}

// What poison in `poisoned` elements of k and v does: rows that see such a key get NaN, all others the bits that they
// have with zeros there.
void expect_poison_contained(const Instance& clean, Instance poisoned, const std::vector<std::int64_t>& keys,
                             double poison, const ExecutionContext& context) {
  Instance zeroed = clean;
  for (std::int64_t b = 0; b < clean.c.batch; ++b) {
    for (std::int64_t g = 0; g < clean.c.num_heads_kv; ++g) {
      for (std::int64_t j : keys) {
        const std::int64_t row = clean.key_row(b, g, j);
        std::fill_n(zeroed.k.begin() + row * clean.c.head_dim, clean.c.head_dim, 0.0);
        std::fill_n(zeroed.v.begin() + row * clean.c.head_dim_v, clean.c.head_dim_v, 0.0);
        std::fill_n(poisoned.k.begin() + row * clean.c.head_dim, clean.c.head_dim, poison);
        std::fill_n(poisoned.v.begin() + row * clean.c.head_dim_v, clean.c.head_dim_v, poison);
      }
    }
  }
  const Results want = run(zeroed, clean.dtype, context), got = run(poisoned, clean.dtype, context);
  for (std::int64_t b = 0; b < clean.c.batch; ++b) {
    for (std::int64_t h = 0; h < clean.c.num_heads; ++h) {
      for (std::int64_t i = 0; i < clean.length_q(b); ++i) {
        const bool sees = std::any_of(keys.begin(), keys.end(), [&](auto j) { return clean.visible(b, i, j); });
        const std::int64_t row = clean.query_row(b, h, i);
        for (std::int64_t d = 0; d < clean.c.head_dim_v; ++d) {
          const std::int64_t at = row * clean.c.head_dim_v + d;
          ASSERT_TRUE(sees ? std::isnan(got.out[at]) : got.out[at] == want.out[at])
              << "out of batch " << b << " head " << h << " query " << i << " is " << got.out[at] << ", expected "
              << want.out[at];
        }
        for (std::int64_t d = 0; d < clean.c.head_dim; ++d) {
          const std::int64_t at = row * clean.c.head_dim + d;
          ASSERT_TRUE(sees ? std::isnan(got.dq[at]) : got.dq[at] == want.dq[at])
              << "dq of batch " << b << " head " << h << " query " << i << " is " << got.dq[at] << ", expected "
              << want.dq[at];
        }
      }
    }
  }
}

TEST_P(Edge, PoisonBeyondTheKeyBoundsIsNeverSeen) {  // 11
  const Instance clean = instance({.key_begin = {9, 12}, .key_end = {70, 66}});
  for (double poison : {kNaN, kInfinity}) {
    expect_poison_contained(clean, clean, {0, 8, 70, 77, 89}, poison, context());
  }
}

TEST_P(Edge, PoisonInMaskedKeysReachesOnlyTheRowsThatSeeIt) {  // 12, 13
  for (const Case& definition : {Case{.seqlen_q = 90, .causal = true}, Case{.left = 10, .right = 4},
                                 Case{.seqlen_q = 130, .seqlen_k = 130, .head_dim = 40, .causal = true, .left = 33},
                                 Case{.seqlen_q = 150, .seqlen_k = 150, .head_dim = 128, .causal = true},
                                 Case{.seqlen_q = 90, .causal = true, .softcap = 5.0}}) {
    const Instance clean = instance(definition);
    expect_poison_contained(clean, clean, {50, 69}, kNaN, context());
  }
}

TEST_P(Edge, PoisonInTheTailOfARaggedTensor) {  // 11
  Instance made = instance({.lengths_q = {11, 30}, .lengths_k = {30, 11}, .tail = 3, .causal = true});
  const Results want = run_here(made);
  for (Values* values : {&made.q, &made.k, &made.v, &made.dout}) {
    const std::size_t tail =
        values->size() / (values == &made.q || values == &made.dout ? made.total_q : made.total_k) * 3;
    std::fill(values->end() - tail, values->end(), kNaN);
  }
  expect_identical(run_here(made), want);
}

TEST_P(Edge, NaNInAQueryStaysInItsRow) {  // 13
  Instance made = instance({.batch = 1, .num_heads = 2});
  const Results want = run_here(made, false);
  const std::int64_t row = made.query_row(0, 1, 33);
  made.q[row * 64 + 5] = kNaN;
  const Results got = run_here(made, false);
  for (std::size_t at = 0; at < got.out.size(); ++at) {
    const bool poisoned = static_cast<std::int64_t>(at) / 64 == row;
    ASSERT_TRUE(poisoned ? std::isnan(got.out[at]) : got.out[at] == want.out[at]) << at;
  }
  EXPECT_TRUE(std::isnan(got.lse[made.lse_at(0, 1, 33)]));
}

// A NaN or infinity in one row of q or dout: gradients of keys that the row sees are NaN, all others keep their bits.
TEST_P(Edge, PoisonInAQueryReachesOnlyTheKeysThatItSees) {  // 13
  for (const Case& definition : {Case{.seqlen_q = 90, .causal = true},
                                 Case{.seqlen_q = 130, .seqlen_k = 130, .head_dim = 40, .causal = true, .left = 33},
                                 Case{.seqlen_q = 70, .seqlen_k = 200, .head_dim = 72, .left = 20, .right = 15}}) {
    const Instance clean = instance(definition);
    const Results want = run_here(clean);
    for (std::int64_t i : {5, 64}) {
      for (Values Instance::*poisoned : {&Instance::q, &Instance::dout}) {
        Instance made = clean;
        const std::int64_t dim = clean.c.head_dim;
        std::fill_n((made.*poisoned).begin() + made.query_row(1, 3, i) * dim, dim, kNaN);
        const Results got = run_here(made);
        for (std::int64_t j = 0; j < clean.c.seqlen_k; ++j) {
          const bool seen = clean.visible(1, i, j);
          const std::int64_t row = clean.key_row(1, 1, j);  // of query head 3 of 4
          for (std::int64_t at = row * dim; at < (row + 1) * dim; ++at) {
            ASSERT_TRUE(seen ? std::isnan(got.dk[at]) : got.dk[at] == want.dk[at]) << "dk of key " << j;
            ASSERT_TRUE(seen ? std::isnan(got.dv[at]) : got.dv[at] == want.dv[at]) << "dv of key " << j;
          }
        }
      }
    }
  }
}

// A NaN in one query or one key: the totals of all keys that a poisoned row of weights reaches are NaN, all others keep
// their bits.
TEST_P(Edge, PoisonReachesOnlyTheTotalsOfKeysInItsRows) {  // 12, 13
  for (const Case& definition : {Case{.seqlen_q = 90, .causal = true},
                                 Case{.seqlen_q = 330, .seqlen_k = 400, .head_dim = 40, .causal = true, .left = 33},
                                 Case{.seqlen_q = 70, .seqlen_k = 200, .head_dim = 72, .left = 20, .right = 15},
                                 Case{.head_dim = 128, .lengths_q = {150, 140}, .lengths_k = {150, 200}, .left = 30},
                                 Case{.seqlen_q = 90, .causal = true, .softcap = 5.0}}) {
    const Instance clean = instance(definition);
    const std::int64_t h = 3, g = 1;  // of 4 and 2 heads
    for (std::int64_t b : {0, 1}) {
      for (bool in_query : {true, false}) {
        Instance made = clean;
        const std::int64_t at = in_query ? made.query_row(b, h, 37) : made.key_row(b, g, 41);
        (in_query ? made.q : made.k)[at * clean.c.head_dim + 5] = kNaN;
        const Results want = run_here(clean, false), got = run_here(made, false);
        std::vector<bool> poisoned(want.total.size(), false);
        for (std::int64_t i = 0; i < clean.length_q(b); ++i) {
          if (in_query ? i != 37 : !clean.visible(b, i, 41)) continue;
          for (std::int64_t j = 0; j < clean.length_k(b); ++j) {
            if (!clean.visible(b, i, j)) continue;
            for (std::int64_t head = in_query ? h : 2 * g; head < 2 * g + 2; ++head) {
              poisoned[clean.total_at(b, head, j)] = true;
            }
          }
        }
        for (std::size_t i = 0; i < want.total.size(); ++i) {
          ASSERT_TRUE(poisoned[i] ? std::isnan(got.total[i]) : got.total[i] == want.total[i])
              << (in_query ? "query" : "key") << " of batch " << b << ", total " << i << " is " << got.total[i]
              << ", expected " << want.total[i];
        }
      }
    }
  }
}

// Products so large that the rounding of the largest logit alone exceeds any exponent.
TEST_P(Edge, HugeLogitsStayFinite) {  // 14
  for (const Case& definition :
       {Case{.batch = 1, .scale = 1.0}, Case{.batch = 1, .scale = 1.0, .alibi = AlibiKind::kPerHead},
        Case{.batch = 1, .causal = true, .scale = 1.0, .sinks = true}}) {
    Instance made = instance(definition);
    const double huge = dtype() == DType::kFloat16 ? 8192.0 : 0x1p20;
    for (Values* values : {&made.q, &made.k}) {
      for (double& x : *values) x *= huge;
    }
    const Results got = run_here(made, false), want = oracle(made, false);
    EXPECT_TRUE(std::all_of(got.out.begin(), got.out.end(), [](double x) { return std::isfinite(x); }));
    EXPECT_TRUE(close(got.lse, want.lse, 1e-6 * huge * huge * 64));
  }
}

TEST_P(Edge, HugeValuesStayFinite) {  // 14, 17
  Instance made = instance({.batch = 1, .scale = 1.0});
  const double huge = dtype() == DType::kFloat16 ? 30000.0 : 133120.0;
  for (double& x : made.k) x = std::copysign(huge, x);
  const Results got = run_here(made), want = oracle(made);
  EXPECT_TRUE(std::all_of(got.out.begin(), got.out.end(), [](double x) { return std::isfinite(x); }));
  // Logits of some 10⁶ are known to about 0.1: enough for the one key that takes all weight, unless two are that close.
  EXPECT_TRUE(close(got.lse, want.lse, 1.0 + 1e-6 * huge * 64 * 3));
}

TEST_P(Edge, EveryLogitFarBelowZero) {  // 15
  Instance made = instance({.batch = 1, .scale = 1.0});
  for (double& x : made.q) x = rounded(30.0 + x / 8, dtype());
  for (double& x : made.k) x = rounded(-30.0 - x / 8, dtype());
  const Results got = run_here(made, false), want = oracle(made, false);
  EXPECT_LT(*std::max_element(want.lse.begin(), want.lse.end()), -5e4);
  EXPECT_TRUE(close(got.out, want.out, 0.05));
  EXPECT_TRUE(close(got.lse, want.lse, 0.05));
}

TEST_P(Edge, ManyKeysAccumulateInFloat32) {  // 17
  Instance made = instance({.batch = 1,
                            .num_heads = 1,
                            .num_heads_kv = 1,
                            .seqlen_q = 3,
                            .seqlen_k = 1 << 16,
                            .head_dim = 16,
                            .magnitude = 0.01});
  made.v.assign(made.v.size(), 2.0);
  EXPECT_TRUE(close(run_here(made, false).out, Values(3 * 16, 2.0), 1e-5));
}

TEST_P(Edge, Subnormals) {  // 18
  Instance made = instance({});
  const double tiny = dtype() == DType::kFloat16 ? 0x1p-22 : 0x1p-130;  // subnormal in the dtype
  for (double& x : made.v) x = rounded(x * tiny, dtype());
  const Results got = run_here(made, false), want = oracle(made, false);
  // Half's are normal in float32 and keep the usual accuracy; float32's may count as zero.
  EXPECT_TRUE(close(got.out, want.out, dtype() == DType::kFloat16 ? 0x1p-24 : 8 * tiny));
}

#if defined(__SSE__)
TEST_P(Edge, TheCallersFloatingPointModeIsUnchanged) {  // 18
  const Instance made = instance({.batch = 3});
  const unsigned before = _mm_getcsr();
  for (unsigned mode : {before & ~0x8040u, before | 0x8040u}) {
    _mm_setcsr(mode);
    run_here(made);
    const unsigned after = _mm_getcsr();
    _mm_setcsr(before);
    EXPECT_EQ(after & 0xFFC0u, mode & 0xFFC0u);  // all but the sticky exception flags
  }
}
#endif

TEST_P(Edge, ManyBatchesAndManyHeads) {  // 29
  for (const auto& [batch, heads] : {std::pair{70000, 1}, std::pair{1, 70000}}) {
    const Instance made = instance(
        {.batch = batch, .num_heads = heads, .num_heads_kv = heads, .seqlen_q = 2, .seqlen_k = 3, .head_dim = 4});
    expect_accurate(run_here(made), oracle(made), naive(made, dtype()), dtype());
  }
}

TEST_P(Edge, LeadingTilesMasked) {  // 2
  const Instance made = instance({.seqlen_q = 40, .seqlen_k = 400, .head_dim = 32, .key_begin = {333, 270}});
  expect_accurate(run_here(made), oracle(made), naive(made, dtype()), dtype());
}

TEST_P(Edge, DefaultScaleIsOneOverTheRootOfHeadDim) {
  Instance made = instance({.batch = 1});
  Call call(made, dtype());
  AttentionOptions options = call.options();
  options.softmax_scale.reset();
  attention(call.q, call.k, call.v, {call.out}, options, context());
  EXPECT_TRUE(identical(call.out.load(), run_here(made, false).out));
}

}  // namespace
}  // namespace onepass::test
