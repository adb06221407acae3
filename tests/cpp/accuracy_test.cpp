// Every present backend against the oracle, over the table of cases.
#include <gtest/gtest.h>

#include <functional>
#include <optional>
#include <string>

#include "core/backend.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/naive.h"

namespace onepass::test {
namespace {

using Parameter = std::tuple<Target, Case>;

// Runs a pass. Of a refusal by the one backend that leaves calls to the next, the message.
std::optional<std::string> refusal(const Target& target, const std::function<void(const ExecutionContext&)>& pass) {
  try {
    pass(target.context());
  } catch (const Error& error) {
    if (target.backend != kHopperBackend.name || error.code() != ErrorCode::kUnsupported) throw;
    return error.what();
  }
  return std::nullopt;
}
std::optional<std::string> refusal(Call& call, const Target& target) {
  return refusal(target, [&](const ExecutionContext& context) { call.forward(context); });
}

class Accuracy : public testing::TestWithParam<Parameter> {};

TEST_P(Accuracy, WithinTwiceTheNaiveError) {
  const auto& [target, definition] = GetParam();
  if (!has_forward(target, definition)) GTEST_SKIP() << target.backend << " lacks the operation";
  Instance instance(definition, target.dtype);
  instance.device = target.device();
  Call call(instance, target.dtype);
  call.deterministic = false;
  if (const auto refused = refusal(call, target)) GTEST_SKIP() << *refused;
  const auto backward = [&] {
    return has_backward(target, definition) &&
           !refusal(target, [&](const ExecutionContext& context) { call.backward(context); });
  };
  const bool with_backward = backward();
  Results got = call.results(), want = oracle(instance), yardstick = naive(instance, target.dtype);
  if (!with_backward) {
    got.dq = want.dq, got.dk = want.dk, got.dv = want.dv, got.dbias = want.dbias, got.dsinks = want.dsinks;
    got.dq2 = want.dq2, got.dk2 = want.dk2;
  }
  expect_accurate(got, want, yardstick, target.dtype);
  if (with_backward && instance.device.type == DeviceType::kCuda) {  // kernels of its own
    call.deterministic = true;
    if (backward()) expect_accurate(call.results(), want, yardstick, target.dtype);
  }
  for (const Tensor* output : call.outputs()) EXPECT_TRUE(output->canaries_intact());
}

// From the LSE of the forward pass the same sums as beside it.
class TotalAttention : public Accuracy {};
TEST_P(TotalAttention, FromTheLse) {
  const auto& [target, definition] = GetParam();
  if (!has_total_attention(target)) GTEST_SKIP() << target.backend << " lacks the operation";
  if (definition.ragged()) GTEST_SKIP() << "dense only";
  Instance instance(definition, target.dtype);
  instance.device = target.device();
  Call call(instance, target.dtype);
  if (const auto refused = refusal(call, target)) GTEST_SKIP() << *refused;
  const Values want = call.total.load();
  call.total.store(Values(want.size(), -1.0));
  total_attention(call.q, call.k, call.lse, call.total, call.options(), target.context());
  EXPECT_TRUE(close(call.total.load(), want, target.backend == "reference" ? 1e-5 * instance.c.seqlen_q : 0.0));
  EXPECT_TRUE(call.total.canaries_intact());
}

std::string name_of_parameter(const testing::TestParamInfo<Parameter>& info) {
  return name_of_target(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(Features, Accuracy,
                         testing::Combine(testing::ValuesIn(targets()), testing::ValuesIn(feature_cases())),
                         name_of_parameter);
INSTANTIATE_TEST_SUITE_P(Features, TotalAttention,
                         testing::Combine(testing::ValuesIn(targets()), testing::ValuesIn(feature_cases())),
                         name_of_parameter);
INSTANTIATE_TEST_SUITE_P(Shapes, Accuracy,
                         testing::Combine(testing::ValuesIn(targets()), testing::ValuesIn(shape_cases())),
                         name_of_parameter);
INSTANTIATE_TEST_SUITE_P(Piecewise, Accuracy,
                         testing::Combine(testing::ValuesIn(targets()), testing::ValuesIn(piecewise_cases())),
                         name_of_parameter);
INSTANTIATE_TEST_SUITE_P(PiecewiseShapes, Accuracy,
                         testing::Combine(testing::ValuesIn(targets()), testing::ValuesIn(piecewise_shape_cases())),
                         name_of_parameter);

}  // namespace
}  // namespace onepass::test
