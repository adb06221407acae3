// The oracle against what it is not made of: a materialised implementation with its own mask, finite differences, and
// published test vectors.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "core/half.h"
#include "core/philox.h"
#include "reference/scalar.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/naive.h"

namespace onepass::test {
namespace {

class Oracle : public testing::TestWithParam<Case> {};

TEST_P(Oracle, EqualsMaterializedAttention) {
  const Instance instance(GetParam(), DType::kFloat64);
  const Results got = oracle(instance), want = naive(instance, DType::kFloat64);
  EXPECT_TRUE(close(got.out, want.out, 1e-12)) << "out";
  EXPECT_TRUE(close(got.lse, want.lse, 1e-12)) << "lse";
  EXPECT_TRUE(close(got.total, want.total, 1e-11)) << "total_attention";
  EXPECT_TRUE(close(got.dq, want.dq, 1e-10)) << "dq";
  EXPECT_TRUE(close(got.dk, want.dk, 1e-10)) << "dk";
  EXPECT_TRUE(close(got.dv, want.dv, 1e-10)) << "dv";
  EXPECT_TRUE(close(got.dbias, want.dbias, 1e-10)) << "dbias";
  EXPECT_TRUE(close(got.dsinks, want.dsinks, 1e-10)) << "dsinks";
  EXPECT_TRUE(close(got.dq2, want.dq2, 1e-10)) << "dq2";
  EXPECT_TRUE(close(got.dk2, want.dk2, 1e-10)) << "dk2";
}

double dot(const Values& a, const Values& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }

// d loss along a random direction of one input, by central differences and by the gradient, for loss = Σ dout·out.
void expect_derivative(Instance instance, Values Instance::*input, const Values& gradient, const char* name) {
  if (gradient.empty()) return;
  std::mt19937_64 generator(7);
  std::normal_distribution<double> normal;
  Values direction(gradient.size());
  for (double& x : direction) x = normal(generator);
  const Values center = instance.*input;
  constexpr double kStep = 1e-5;
  double loss[2];
  for (int side : {0, 1}) {
    for (std::size_t i = 0; i < center.size(); ++i) {
      (instance.*input)[i] = center[i] + (side ? kStep : -kStep) * direction[i];
    }
    loss[side] = dot(oracle(instance, /*with_backward=*/false).out, instance.dout);
  }
  const double want = (loss[1] - loss[0]) / (2 * kStep), got = dot(gradient, direction);
  EXPECT_NEAR(got, want, 1e-6 * (1.0 + std::abs(want))) << name;
}

TEST_P(Oracle, GradientsEqualFiniteDifferences) {
  const Instance instance(GetParam(), DType::kFloat64);
  const Results results = oracle(instance);
  expect_derivative(instance, &Instance::q, results.dq, "dq");
  expect_derivative(instance, &Instance::k, results.dk, "dk");
  expect_derivative(instance, &Instance::v, results.dv, "dv");
  expect_derivative(instance, &Instance::bias, results.dbias, "dbias");
  expect_derivative(instance, &Instance::sinks, results.dsinks, "dsinks");
  expect_derivative(instance, &Instance::q2, results.dq2, "dq2");
  expect_derivative(instance, &Instance::k2, results.dk2, "dk2");
}

INSTANTIATE_TEST_SUITE_P(Features, Oracle, testing::ValuesIn(feature_cases()),
                         [](const auto& parameter) { return parameter.param.name; });
INSTANTIATE_TEST_SUITE_P(Piecewise, Oracle, testing::ValuesIn(piecewise_cases()),
                         [](const auto& parameter) { return parameter.param.name; });

// Known answers published with Random123 (kat_vectors, philox4x32-10).
TEST(Philox, KnownAnswers) {
  const Philox4 zero = philox4x32_10({{0, 0, 0, 0}}, 0, 0);
  EXPECT_EQ(std::vector(zero.word, zero.word + 4),
            (std::vector<std::uint32_t>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  const Philox4 ones = philox4x32_10({{~0u, ~0u, ~0u, ~0u}}, ~0u, ~0u);
  EXPECT_EQ(std::vector(ones.word, ones.word + 4),
            (std::vector<std::uint32_t>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  const Philox4 pi = philox4x32_10({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0xa4093822, 0x299f31d0);
  EXPECT_EQ(std::vector(pi.word, pi.word + 4),
            (std::vector<std::uint32_t>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, DropsTheRequestedShare) {
  for (double p : {0.0, 0.1, 0.5, 0.9}) {
    int dropped = 0;
    for (std::uint32_t quad = 0; quad < 10000; ++quad) {
      const Philox4 bits = dropout_bits(5, 6, 7, 8, quad);
      for (std::uint32_t word : bits.word) dropped += word < dropout_threshold(p);
    }
    EXPECT_NEAR(dropped / 40000.0, p, 4 * std::sqrt(p * (1 - p) / 40000.0)) << p;
  }
}

TEST(Philox, EveryPartOfTheKeyMatters) {
  const std::uint32_t word = dropout_bits(1, 1, 1, 1, 1).word[0];
  EXPECT_NE(word, dropout_bits(2, 1, 1, 1, 1).word[0]);
  EXPECT_NE(word, dropout_bits(1ull << 32 | 1, 1, 1, 1, 1).word[0]);
  EXPECT_NE(word, dropout_bits(1, 2, 1, 1, 1).word[0]);
  EXPECT_NE(word, dropout_bits(1, 1ull << 32 | 1, 1, 1, 1).word[0]);
  EXPECT_NE(word, dropout_bits(1, 1, 2, 1, 1).word[0]);
  EXPECT_NE(word, dropout_bits(1, 1, 1, 2, 1).word[0]);
  EXPECT_NE(word, dropout_bits(1, 1, 1, 1, 2).word[0]);
}

// Values of every bit pattern, by the definition of the format.
double value_of(std::uint16_t bits, int mantissa_bits, int bias) {
  const int mantissa = bits & ((1 << mantissa_bits) - 1), exponent_max = (1 << (15 - mantissa_bits)) - 1;
  const int exponent = (bits >> mantissa_bits) & exponent_max;
  const double sign = bits >> 15 ? -1.0 : 1.0, fraction = std::ldexp(mantissa, -mantissa_bits);
  if (exponent == exponent_max) return mantissa ? std::nan("") : sign * HUGE_VAL;
  return sign * (exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1.0 + fraction, exponent - bias));
}

template <class T>
void expect_conversions(int mantissa_bits, int bias) {
  for (std::uint32_t pattern = 0; pattern < 0x10000; ++pattern) {
    const auto bits = static_cast<std::uint16_t>(pattern);
    const double want = value_of(bits, mantissa_bits, bias);
    const float got = to_float(T{bits});
    if (std::isnan(want)) {
      ASSERT_TRUE(std::isnan(got)) << pattern;
      ASSERT_TRUE(std::isnan(to_float(from_float<T>(got)))) << pattern;
      continue;
    }
    ASSERT_EQ(got, want) << pattern;
    ASSERT_EQ(from_float<T>(got).bits, bits);
    // Nearest, ties to even, on both sides of the middle to the next value away from zero.
    const auto next = static_cast<std::uint16_t>(bits + 1);
    const double limit = value_of(next, mantissa_bits, bias);
    if (std::isinf(want) || std::isnan(limit)) continue;
    const double step =
        want - value_of(static_cast<std::uint16_t>((bits & 0x7FFF) ? bits - 1 : bits), mantissa_bits, bias);
    const double middle = std::isinf(limit) ? want + step / 2 : want / 2 + limit / 2;
    const double outward = want + 2 * (middle - want), above = std::nextafter(middle, outward),
                 below = std::nextafter(middle, want);
    ASSERT_EQ(reference::round_to<T>(above).bits, next) << pattern;
    ASSERT_EQ(reference::round_to<T>(below).bits, bits) << pattern;
    ASSERT_EQ(reference::round_to<T>(middle).bits, bits & 1 ? next : bits) << pattern;
  }
}

TEST(Conversion, HalfRoundsOnce) { expect_conversions<Half>(10, 15); }
TEST(Conversion, BFloat16RoundsOnce) { expect_conversions<BFloat16>(7, 127); }

TEST(Alibi, SlopesOfPowersOfTwoAndBetween) {
  EXPECT_DOUBLE_EQ(alibi_slope(0, 8), 0.5);
  EXPECT_DOUBLE_EQ(alibi_slope(7, 8), 0x1p-8);
  // 12 heads: those of 8, then the first, third, … of 16 (Press et al.).
  EXPECT_DOUBLE_EQ(alibi_slope(7, 12), 0x1p-8);
  EXPECT_DOUBLE_EQ(alibi_slope(8, 12), std::exp2(-0.5));
  EXPECT_DOUBLE_EQ(alibi_slope(11, 12), std::exp2(-3.5));
  EXPECT_DOUBLE_EQ(alibi_slope(11, 12, /*geometric=*/true), 0x1p-8);
  EXPECT_THROW(alibi_slope(8, 8), Error);
  EXPECT_THROW(alibi_slope(-1, 8), Error);
  EXPECT_THROW(alibi_slope(0, 0), Error);
}

TEST(Info, NamesEveryBackend) {
  const std::string text = info();
  for (const char* word : {version(), "hopper", "cuda", "cpu", "reference", "threads"}) {
    EXPECT_NE(text.find(word), std::string::npos) << word << " in\n" << text;
  }
}

}  // namespace
}  // namespace onepass::test
