// support/naive.h: attention as textbooks and eager frameworks compute it: every intermediate is stored in the dtype of
// the inputs. Its error against the oracle is the yardstick of the tests; in float64 it checks the oracle itself.
#pragma once

#include "support/case.h"

namespace onepass::test {

// In the instance's dtype, or in float64.
Results naive(const Instance& instance, DType dtype);

}  // namespace onepass::test
