// support/compare.h: the tolerance rule of all tests.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "support/case.h"

namespace onepass::test {

// Where `want` is NaN, +inf or −inf, `got` is the same. Elsewhere the largest and the mean error are at most twice
// those of the naive implementation in the same dtype, plus a floor: `roundings` roundings of the largest value to
// `dtype`, and float32 accumulation.
testing::AssertionResult accurate(const Values& got, const Values& want, const Values& naive, DType dtype,
                                  int roundings = 1);

// The same for every result; statistics (lse, total, dbias, dsinks) are float32.
void expect_accurate(const Results& got, const Results& want, const Results& naive, DType dtype);

// At most `tolerance` apart everywhere, NaN and infinities in the same places.
testing::AssertionResult close(const Values& got, const Values& want, double tolerance);

// The same bits (NaN equal to NaN).
testing::AssertionResult identical(const Values& got, const Values& want);
void expect_identical(const Results& got, const Results& want);

double epsilon_of(DType dtype);  // distance from 1 to the next larger value

}  // namespace onepass::test
