// support/cached_test.h: the fixture of suites that run every case of a cache on every present backend in every dtype.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <tuple>

#include "support/cache.h"

namespace onepass::test {

class CachedTest : public testing::TestWithParam<std::tuple<Target, CacheCase>> {
 protected:
  void SetUp() override {
    if (!has_cached(std::get<0>(GetParam()))) GTEST_SKIP() << "the backend lacks the operation";
  }
};

#define ONEPASS_FOR_EVERY_CACHE_CASE(Suite)                                                            \
  INSTANTIATE_TEST_SUITE_P(                                                                            \
      Cases, Suite, testing::Combine(testing::ValuesIn(targets()), testing::ValuesIn(cache_cases())),  \
      [](const auto& parameter) {                                                                      \
        return name_of_target(std::get<0>(parameter.param)) + "_" + std::get<1>(parameter.param).name; \
      })

}  // namespace onepass::test
