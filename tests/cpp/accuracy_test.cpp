// Every present backend against the oracle, over the table of cases.
#include <gtest/gtest.h>

#include "core/backend.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/naive.h"

namespace onepass::test {
namespace {

using Parameter = std::tuple<Target, Case>;

class Accuracy : public testing::TestWithParam<Parameter> {};

TEST_P(Accuracy, WithinTwiceTheNaiveError) {
  const auto& [target, definition] = GetParam();
  if (!has_forward(target)) GTEST_SKIP() << target.backend << " lacks the operation";
  Instance instance(definition, target.dtype);
  instance.device = target.device();
  Call call(instance, target.dtype);
  call.deterministic = false;
  try {
    call.forward(target.context());
  } catch (const Error& error) {  // the one backend that leaves shapes and layouts to the next
    if (target.backend != kHopperBackend.name || error.code() != ErrorCode::kUnsupported) throw;
    GTEST_SKIP() << error.what();
  }
  if (has_backward(target)) call.backward(target.context());
  Results got = call.results(), want = oracle(instance), yardstick = naive(instance, target.dtype);
  if (!has_backward(target)) {
    got.dq = want.dq, got.dk = want.dk, got.dv = want.dv, got.dbias = want.dbias, got.dsinks = want.dsinks;
  }
  expect_accurate(got, want, yardstick, target.dtype);
  if (has_backward(target) && instance.device.type == DeviceType::kCuda) {  // kernels of its own
    call.deterministic = true;
    call.backward(target.context());
    expect_accurate(call.results(), want, yardstick, target.dtype);
  }
  for (const Tensor* output : call.outputs()) EXPECT_TRUE(output->canaries_intact());
}

std::string name_of_parameter(const testing::TestParamInfo<Parameter>& info) {
  return name_of_target(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(Features, Accuracy,
                         testing::Combine(testing::ValuesIn(targets()), testing::ValuesIn(feature_cases())),
                         name_of_parameter);
INSTANTIATE_TEST_SUITE_P(Shapes, Accuracy,
                         testing::Combine(testing::ValuesIn(targets()), testing::ValuesIn(shape_cases())),
                         name_of_parameter);

}  // namespace
}  // namespace onepass::test
