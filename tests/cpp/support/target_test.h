// support/target_test.h: the fixture of suites that run on every present backend in every dtype.
#pragma once

#include <gtest/gtest.h>

#include "core/backend.h"
#include "support/cases.h"
#include "support/compare.h"

namespace onepass::test {

class TargetTest : public testing::TestWithParam<Target> {
 protected:
  void SetUp() override {
    if (!has_forward(GetParam())) {
      GTEST_SKIP() << GetParam().backend << " lacks the operation";
    }
  }

  DType dtype() const { return GetParam().dtype; }
  // A backend that leaves calls to others is tested as it is used: as the dispatcher's first choice.
  ExecutionContext context() const {
    return GetParam().backend == kHopperBackend.name ? ExecutionContext{} : GetParam().context();
  }
  Instance instance(const Case& definition, std::uint64_t seed = 1) const {
    Instance made(definition, dtype(), seed);
    made.device = GetParam().device();
    return made;
  }
  Results run_here(const Instance& made, bool with_backward = true) const {
    return run(made, dtype(), context(), with_backward);
  }
};

#define ONEPASS_FOR_EVERY_TARGET(Suite)                                  \
  INSTANTIATE_TEST_SUITE_P(Targets, Suite, testing::ValuesIn(targets()), \
                           [](const auto& parameter) { return name_of_target(parameter.param); })

}  // namespace onepass::test
