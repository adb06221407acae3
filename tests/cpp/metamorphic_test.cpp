// Relations between calls that hold whatever the right answer is.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "support/target_test.h"

namespace onepass::test {
namespace {

class Metamorphic : public TargetTest {
 protected:
  // A few roundings of values of about `magnitude`.
  double roundings(double magnitude) const { return 4 * epsilon_of(dtype()) * magnitude + 1e-5 * magnitude; }
};
ONEPASS_FOR_EVERY_TARGET(Metamorphic);

double dot(const Values& a, const Values& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }

// Upper bound of the error of a sum of products a·b whose factors carry relative errors of `epsilon`.
double slack(const Values& a, const Values& b, double epsilon) {
  double squares = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) squares += a[i] * a[i] * b[i] * b[i];
  return 30 * epsilon * std::sqrt(squares) + 1e-4;
}

const std::vector<Case>& varied_cases() {
  static const std::vector<Case> cases{
      {.name = "plain"},
      {.name = "causal", .causal = true},
      {.name = "softcap", .softcap = 3.0},
      {.name = "alibi", .alibi = AlibiKind::kPerHead},
      {.name = "many_groups", .num_heads = 8, .num_heads_kv = 2, .causal = true, .left = 20, .sinks = true},
  };
  return cases;
}

TEST_P(Metamorphic, PowersOfTwoPassThroughValuesExactly) {
  for (const Case& definition : varied_cases()) {
    Instance made = instance(definition);
    Results want = run_here(made, false);
    for (double& x : made.v) x *= 8;
    for (double& x : want.out) x *= 8;
    const Results got = run_here(made, false);
    if (dtype() == DType::kFloat16) {  // results of the first run may have been subnormal
      EXPECT_TRUE(close(got.out, want.out, 8 * 0x1p-25)) << definition.name;
    } else {
      EXPECT_TRUE(identical(got.out, want.out)) << definition.name;
    }
    EXPECT_TRUE(identical(got.lse, want.lse)) << definition.name;
  }
}

TEST_P(Metamorphic, ValuesOfOneGiveOne) {
  for (Case definition : varied_cases()) {
    definition.sinks = false;
    Instance made = instance(definition);
    made.v.assign(made.v.size(), 1.0);
    EXPECT_TRUE(close(run_here(made, false).out, Values(made.dout.size(), 1.0), 2e-6 + epsilon_of(dtype()) / 2));
  }
}

TEST_P(Metamorphic, PermutedKeysGiveTheSame) {
  const Instance made = instance({});
  Instance permuted = made;
  const std::int64_t planes = 2 * 2, keys = 90, dim = 64;
  for (std::int64_t plane = 0; plane < planes; ++plane) {
    for (std::int64_t j = 0; j < keys; ++j) {
      const std::int64_t from = (plane * keys + j) * dim, to = (plane * keys + j * 37 % keys) * dim;  // gcd(37, 90) = 1
      std::copy_n(made.k.begin() + from, dim, permuted.k.begin() + to);
      std::copy_n(made.v.begin() + from, dim, permuted.v.begin() + to);
    }
  }
  const Results a = run_here(made), b = run_here(permuted);
  EXPECT_TRUE(close(a.out, b.out, roundings(1)));
  EXPECT_TRUE(close(a.lse, b.lse, 1e-5));
  EXPECT_TRUE(close(a.dq, b.dq, roundings(1)));
}

TEST_P(Metamorphic, SharedKeyHeadsEqualRepeatedOnes) {
  for (Case definition : varied_cases()) {
    const Instance grouped = instance(definition);
    const std::int64_t group = definition.num_heads / definition.num_heads_kv, plane = 90 * 64;
    definition.num_heads_kv = definition.num_heads;
    Instance repeated = instance(definition);
    repeated.q = grouped.q, repeated.dout = grouped.dout, repeated.sinks = grouped.sinks;
    for (std::int64_t head = 0; head < 2 * definition.num_heads; ++head) {
      std::copy_n(grouped.k.begin() + head / group * plane, plane, repeated.k.begin() + head * plane);
      std::copy_n(grouped.v.begin() + head / group * plane, plane, repeated.v.begin() + head * plane);
    }
    const Results a = run_here(grouped), b = run_here(repeated);
    EXPECT_TRUE(close(a.out, b.out, roundings(1))) << definition.name;
    EXPECT_TRUE(close(a.dq, b.dq, roundings(1))) << definition.name;
    Values sums(a.dk.size(), 0.0);
    for (std::size_t i = 0; i < b.dk.size(); ++i) sums[i / plane / group * plane + i % plane] += b.dk[i];
    EXPECT_TRUE(close(a.dk, sums, roundings(4 * static_cast<double>(group)))) << definition.name;
  }
}

TEST_P(Metamorphic, RaggedEqualsPadded) {
  const std::vector<std::int32_t> lengths{37, 90, 64};
  const Instance ragged = instance({.lengths_q = lengths, .lengths_k = lengths, .causal = true});
  Instance padded =
      instance({.batch = 3, .seqlen_q = 90, .seqlen_k = 90, .causal = true, .top_left = true, .key_end = lengths});
  for (std::int64_t b = 0; b < 3; ++b) {
    for (std::int64_t i = 0; i < lengths[b]; ++i) {
      for (std::int64_t h = 0; h < 4; ++h) {
        std::copy_n(&ragged.q[ragged.query_row(b, h, i) * 64], 64, &padded.q[padded.query_row(b, h, i) * 64]);
      }
      for (std::int64_t g = 0; g < 2; ++g) {
        std::copy_n(&ragged.k[ragged.key_row(b, g, i) * 64], 64, &padded.k[padded.key_row(b, g, i) * 64]);
        std::copy_n(&ragged.v[ragged.key_row(b, g, i) * 64], 64, &padded.v[padded.key_row(b, g, i) * 64]);
      }
    }
  }
  const Results a = run_here(ragged, false), b = run_here(padded, false);
  Values picked(a.out.size());
  for (std::int64_t s = 0; s < 3; ++s) {
    for (std::int64_t h = 0; h < 4; ++h) {
      for (std::int64_t i = 0; i < lengths[s]; ++i) {
        std::copy_n(&b.out[padded.query_row(s, h, i) * 64], 64, &picked[ragged.query_row(s, h, i) * 64]);
      }
    }
  }
  EXPECT_TRUE(close(a.out, picked, roundings(1)));
}

TEST_P(Metamorphic, AddingAVectorToAllKeysShiftsTheLseOnly) {
  Instance made = instance({.causal = true});
  for (double& x : made.k) x = std::clamp(std::round(8 * x), -24.0, 24.0) / 8;  // K + u is exact in every dtype
  const Results before = run_here(made, false);
  const auto u = [](std::int64_t d) { return 0.25 * static_cast<double>(d % 5 - 2); };
  for (std::size_t i = 0; i < made.k.size(); ++i) made.k[i] += u(static_cast<std::int64_t>(i) % 64);
  Results after = run_here(made, false);
  EXPECT_TRUE(close(after.out, before.out, 2e-5 + epsilon_of(dtype())));
  for (std::int64_t row = 0; row < static_cast<std::int64_t>(after.lse.size()); ++row) {
    double shift = 0.0;
    for (std::int64_t d = 0; d < 64; ++d) shift += made.q[row * 64 + d] * u(d);
    after.lse[row] -= made.scale() * shift;
  }
  EXPECT_TRUE(close(after.lse, before.lse, 2e-5));
}

TEST_P(Metamorphic, GradientsBalance) {
  for (const Case& definition : varied_cases()) {
    const Instance made = instance(definition);
    const Results r = run_here(made);
    const double epsilon = epsilon_of(dtype());
    EXPECT_NEAR(dot(r.dv, made.v), dot(made.dout, r.out),
                slack(r.dv, made.v, epsilon) + slack(made.dout, r.out, epsilon))
        << definition.name;
    EXPECT_NEAR(dot(r.dq, made.q), dot(r.dk, made.k), slack(r.dq, made.q, epsilon) + slack(r.dk, made.k, epsilon))
        << definition.name;
  }
}

TEST_P(Metamorphic, SplitAnywhereAndMerge) {
  if (!has_merge(GetParam())) GTEST_SKIP() << GetParam().backend << " lacks merge_states";
  Case definition{.sinks = false};
  const Results whole = run_here(instance(definition), false);
  for (std::int32_t at : {0, 1, 17, 64, 89, 90}) {
    definition.key_begin = {0, 0}, definition.key_end = {at, at};
    Instance first = instance(definition);
    Call a(first, dtype());
    a.forward(context());
    definition.key_begin = {at, at}, definition.key_end = {90, 90};
    Instance second = instance(definition);
    Call b(second, dtype());
    b.forward(context());
    merge_states(a.out, a.lse, b.out, b.lse, a.out, a.lse, context());  // in place
    EXPECT_TRUE(close(a.out.load(), whole.out, roundings(1))) << at;
    EXPECT_TRUE(close(a.lse.load(), whole.lse, 1e-5)) << at;
  }
}

TEST_P(Metamorphic, MergeWithAnEmptyPartIsExact) {
  if (!has_merge(GetParam())) GTEST_SKIP() << GetParam().backend << " lacks merge_states";
  const Shape shape{1, 2, 3, 4}, rows{1, 2, 3};
  const Device device = GetParam().device();
  const double infinity = HUGE_VAL;
  const Values x =
      rounded({1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, .1, .2, .3, .4, .5, .6, .7, .8, .9, 1, 2, 3}, dtype());
  const Values lse = rounded(Values{0.5, 1e4, -1e4, 3, -2, 1}, DType::kFloat32);
  const Tensor full(dtype(), shape, x, Layout::kPadded, device),
      full_lse(DType::kFloat32, rows, lse, Layout::kPadded, device);
  const Tensor empty(dtype(), shape, Values(24, NAN), Layout::kSwapped, device);
  const Tensor empty_lse(DType::kFloat32, rows, Values(6, -infinity), Layout::kSwapped, device);
  Tensor out(dtype(), shape, Layout::kPadded, device), out_lse(DType::kFloat32, rows, Layout::kPadded, device);
  merge_states(full, full_lse, empty, empty_lse, out, out_lse, context());
  EXPECT_TRUE(identical(out.load(), x));
  EXPECT_TRUE(identical(out_lse.load(), lse));
  merge_states(empty, empty_lse, full, full_lse, out, out_lse, context());
  EXPECT_TRUE(identical(out.load(), x));
  EXPECT_TRUE(identical(out_lse.load(), lse));
  merge_states(empty, empty_lse, empty, empty_lse, out, out_lse, context());
  EXPECT_TRUE(identical(out.load(), Values(24, 0.0)));
  EXPECT_TRUE(identical(out_lse.load(), Values(6, -infinity)));
  EXPECT_TRUE(out.canaries_intact() && out_lse.canaries_intact());
}

// Rows 36 and 38 of the reliability checklist.
TEST_P(Metamorphic, RepeatsGiveTheSameBits) {
  const Instance made = instance({.num_heads = 6,
                                  .num_heads_kv = 2,
                                  .seqlen_q = 130,
                                  .seqlen_k = 130,
                                  .head_dim = 32,
                                  .causal = true,
                                  .bias = "qk",
                                  .dropout = 0.2});
  Call call(made, dtype());
  AttentionOptions options = call.options();
  options.deterministic = true;
  const auto once = [&] {
    attention(call.q, call.k, call.v, {call.out, call.lse, call.total}, options, context());
    attention_backward(call.dout, call.q, call.k, call.v, call.out, call.lse, {call.dq, call.dk, call.dv, call.dbias},
                       options, context());
    return call.results();
  };
  const Results want = once();
  const int repeats = GetParam().backend == "reference" ? 3 : 100;
  for (int i = 1; i < repeats && !HasFailure(); ++i) expect_identical(once(), want);
}

TEST_P(Metamorphic, ASequenceAloneEqualsItselfInABatch) {  // 37
  const Instance batch = instance({.batch = 5, .causal = true});
  const Results all = run_here(batch, false);
  Instance alone = instance({.batch = 1, .causal = true});
  for (std::int64_t b = 0; b < 5; ++b) {
    const auto part = [b](const Values& values) {
      const auto size = static_cast<std::ptrdiff_t>(values.size()) / 5;
      return Values(values.begin() + b * size, values.begin() + (b + 1) * size);
    };
    alone.q = part(batch.q), alone.k = part(batch.k), alone.v = part(batch.v);
    const Results got = run_here(alone, false);
    EXPECT_TRUE(identical(got.out, part(all.out))) << b;
    EXPECT_TRUE(identical(got.lse, part(all.lse))) << b;
  }
}

}  // namespace
}  // namespace onepass::test
