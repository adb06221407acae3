#include "support/compare.h"

#include <algorithm>
#include <cmath>

namespace onepass::test {
namespace {

struct Errors {
  double largest = 0.0, mean = 0.0;
  std::size_t where = 0;
};

Errors errors(const Values& got, const Values& want) {
  Errors e;
  std::size_t count = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    if (!std::isfinite(want[i]) || !std::isfinite(got[i])) continue;
    const double error = std::abs(got[i] - want[i]);
    if (error > e.largest) e.largest = error, e.where = i;
    e.mean += error;
    ++count;
  }
  if (count > 0) e.mean /= static_cast<double>(count);
  return e;
}

bool same_special(double a, double b) {
  if (std::isnan(b)) return std::isnan(a);
  if (std::isinf(b)) return a == b;
  return std::isfinite(a);
}

testing::AssertionResult same_specials(const Values& got, const Values& want) {
  if (got.size() != want.size()) {
    return testing::AssertionFailure() << got.size() << " elements, expected " << want.size();
  }
  for (std::size_t i = 0; i < want.size(); ++i) {
    if (!same_special(got[i], want[i])) {
      return testing::AssertionFailure() << "element " << i << " of " << want.size() << " is " << got[i]
                                         << ", expected " << want[i];
    }
  }
  return testing::AssertionSuccess();
}

double largest_magnitude(const Values& values) {
  double largest = 0.0;
  for (double x : values) {
    if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
  }
  return largest;
}

}  // namespace

double epsilon_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 0x1p-52;
    case DType::kFloat16: return 0x1p-10;
    case DType::kBFloat16: return 0x1p-7;
    default: return 0x1p-23;
  }
}

testing::AssertionResult accurate(const Values& got, const Values& want, const Values& naive, DType dtype,
                                  int roundings) {
  if (const auto specials = same_specials(got, want); !specials) return specials;
  const Errors ours = errors(got, want), yardstick = errors(naive, want);
  const double accumulation = dtype == DType::kFloat64 ? 0x1p-48 : 8 * 0x1p-23;
  const double floor = (0.5 * roundings * epsilon_of(dtype) + accumulation) * largest_magnitude(want) + 1e-30;
  if (ours.largest > 2 * yardstick.largest + floor) {
    return testing::AssertionFailure() << "largest error " << ours.largest << " at element " << ours.where << " (got "
                                       << got[ours.where] << ", expected " << want[ours.where] << "), allowed 2·"
                                       << yardstick.largest << " + " << floor;
  }
  if (ours.mean > 2 * yardstick.mean + floor) {
    return testing::AssertionFailure() << "mean error " << ours.mean << ", allowed 2·" << yardstick.mean << " + "
                                       << floor;
  }
  return testing::AssertionSuccess();
}

// Three roundings: out, which is read back, the gradients of the scores, and the result. Where few rows carry the sum,
// one draw of the naive implementation's is too lucky a yardstick for them.
//
// A gradient that vanishes identically, as where every query sees one key or all keys of a row share a bias, is what
// the rounding of its addends leaves: the naive implementation may cancel them exactly, one that takes lse and out from
// memory cannot. Each of `rows` rows that are summed is off by some epsilon/3 (rounded out and weights at head_dim 64);
// √rows times epsilon is three standard deviations.
testing::AssertionResult accurate_gradient(const Values& got, const Values& want, const Values& naive, DType dtype,
                                           DType stored, double rows = 1.0) {
  const bool vanishes = dtype != DType::kFloat64 && largest_magnitude(want) < 1e-12;
  if (!vanishes) return accurate(got, want, naive, stored, 3);
  return close(got, want, std::max(8.0, std::sqrt(rows)) * epsilon_of(dtype) + 4e-5);
}

void expect_accurate(const Results& got, const Results& want, const Results& naive, DType dtype) {
  const DType statistic = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
  EXPECT_TRUE(accurate(got.out, want.out, naive.out, dtype)) << "out";
  EXPECT_TRUE(accurate(got.lse, want.lse, naive.lse, statistic)) << "lse";
  EXPECT_TRUE(accurate(got.total, want.total, naive.total, statistic)) << "total_attention";
  EXPECT_TRUE(accurate_gradient(got.dq, want.dq, naive.dq, dtype, dtype)) << "dq";
  EXPECT_TRUE(accurate_gradient(got.dk, want.dk, naive.dk, dtype, dtype)) << "dk";
  EXPECT_TRUE(accurate(got.dv, want.dv, naive.dv, dtype)) << "dv";
  EXPECT_TRUE(accurate_gradient(got.dq2, want.dq2, naive.dq2, dtype, dtype)) << "dq2";
  EXPECT_TRUE(accurate_gradient(got.dk2, want.dk2, naive.dk2, dtype, dtype)) << "dk2";
  const double rows_of_bias = static_cast<double>(want.lse.size()) / std::max<std::size_t>(want.dbias.size(), 1);
  EXPECT_TRUE(accurate_gradient(got.dbias, want.dbias, naive.dbias, dtype, statistic, rows_of_bias)) << "dbias";
  // float32, but through rowsum(dout∘out), whose out is rounded to the dtype.
  EXPECT_TRUE(accurate(got.dsinks, want.dsinks, naive.dsinks, dtype)) << "dsinks";
}

testing::AssertionResult close(const Values& got, const Values& want, double tolerance) {
  if (const auto specials = same_specials(got, want); !specials) return specials;
  const Errors e = errors(got, want);
  if (e.largest <= tolerance) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "error " << e.largest << " at element " << e.where << " (got " << got[e.where]
                                     << ", expected " << want[e.where] << "), allowed " << tolerance;
}

testing::AssertionResult identical(const Values& got, const Values& want) { return close(got, want, 0.0); }

void expect_identical(const Results& got, const Results& want) {
  EXPECT_TRUE(identical(got.out, want.out)) << "out";
  EXPECT_TRUE(identical(got.lse, want.lse)) << "lse";
  EXPECT_TRUE(identical(got.total, want.total)) << "total_attention";
  EXPECT_TRUE(identical(got.dq, want.dq)) << "dq";
  EXPECT_TRUE(identical(got.dk, want.dk)) << "dk";
  EXPECT_TRUE(identical(got.dv, want.dv)) << "dv";
  EXPECT_TRUE(identical(got.dbias, want.dbias)) << "dbias";
  EXPECT_TRUE(identical(got.dsinks, want.dsinks)) << "dsinks";
  EXPECT_TRUE(identical(got.dq2, want.dq2)) << "dq2";
  EXPECT_TRUE(identical(got.dk2, want.dk2)) << "dk2";
}

}  // namespace onepass::test
