// Workspace memory: where it comes from, and that its lack changes nothing. Numbers in comments are rows of the
// reliability checklist.
#include <memory>
#include <string>

#include "support/allocator.h"
#include "support/cache.h"
#include "support/target_test.h"

namespace onepass::test {
namespace {

class Allocation : public TargetTest {};
ONEPASS_FOR_EVERY_TARGET(Allocation);

TEST_P(Allocation, ComesFromTheAllocatorAndGoesBack) {
  const Instance made = instance(kBusy);
  StrictAllocator allocator;
  ExecutionContext with = context();
  with.allocator = &allocator;
  expect_identical(run(made, dtype(), with), run_here(made));
  EXPECT_TRUE(allocator.balanced());
}

std::vector<const Tensor*> outputs_of(const Call& call) {
  std::vector<const Tensor*> all{&call.out, &call.lse, &call.total, &call.dq, &call.dk, &call.dv};
  for (const Tensor* optional : {&call.dbias, &call.dsinks, &call.dq2, &call.dk2}) {
    if (optional->view().given()) all.push_back(optional);
  }
  return all;
}

// What a call may change: results and lengths. Tokens that are stored but not counted are no part of a cache.
std::vector<const Tensor*> outputs_of(const CacheInstance& cache) { return {&cache.out, &cache.lse, &cache.seqlens}; }

struct Merge {
  explicit Merge(const Target& target)
      : a(target.dtype, {2, 3, 40, 16}, Values(3840, 1.0), Layout::kContiguous, target.device()),
        lse(DType::kFloat32, {2, 3, 40}, Values(240, 0.5), Layout::kContiguous, target.device()),
        out(target.dtype, {2, 3, 40, 16}, Layout::kContiguous, target.device()),
        lse_out(DType::kFloat32, {2, 3, 40}, Layout::kContiguous, target.device()) {}
  Tensor a, lse, out, lse_out;
};
std::vector<const Tensor*> outputs_of(const Merge& merge) { return {&merge.out, &merge.lse_out}; }

// Fails the first, the second, … allocation of a call. `prepare` makes its tensors anew; `run` gets them.
template <class Prepare, class Run>
void expect_failing_allocations_write_nothing(const ExecutionContext& base, const Prepare& prepare, const Run& run) {
  for (int n = 1;; ++n) {
    ASSERT_LT(n, 100);
    auto subject = prepare();
    const std::vector<const Tensor*> outputs = outputs_of(*subject);
    std::vector<Values> before;
    for (const Tensor* output : outputs) before.push_back(output->load());
    StrictAllocator allocator;
    allocator.fail_at = n;
    ExecutionContext with = base;
    with.allocator = &allocator;
    bool failed = false;
    try {
      run(*subject, with);
    } catch (const Error& error) {
      failed = true;
      EXPECT_EQ(error.code(), ErrorCode::kOutOfMemory);
      EXPECT_NE(std::string(error.what()).find("allocator: got null; need "), std::string::npos) << error.what();
    }
    EXPECT_TRUE(allocator.balanced()) << n;
    if (!failed) {
      EXPECT_LT(allocator.count(), n);
      return;
    }
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      EXPECT_TRUE(identical(outputs[i]->load(), before[i])) << "output " << i << " after failed allocation " << n;
    }
  }
}

TEST_P(Allocation, FailuresOfAttentionWriteNothing) {  // 42, 47
  Case piecewise = kBusy, ragged{.lengths_q = {40, 1, 70}, .lengths_k = {40, 64, 5}, .tail = 7, .causal = true};
  piecewise.dist_threshold = 60;
  const Case few_rows{.batch = 1, .seqlen_q = 1, .seqlen_k = 1300};
  for (const Case& definition : {kBusy, piecewise, ragged, few_rows}) {
    if (!has_forward(GetParam(), definition) || !has_backward(GetParam(), definition)) continue;
    const Instance made = instance(definition);
    const auto fresh = [&] { return std::make_unique<Call>(made, dtype()); };
    const auto forward = [](Call& call, const ExecutionContext& with) { call.forward(with); };
    expect_failing_allocations_write_nothing(context(), fresh, forward);
    const auto without_lse = [&] {
      auto call = fresh();
      call->lse = Tensor();
      return call;
    };
    expect_failing_allocations_write_nothing(context(), without_lse, forward);
    const auto after_forward = [&] {
      auto call = fresh();
      call->forward(context());
      return call;
    };
    expect_failing_allocations_write_nothing(context(), after_forward,
                                             [](Call& call, const ExecutionContext& with) { call.backward(with); });
  }
}

TEST_P(Allocation, FailuresOfTotalAttentionWriteNothing) {  // 42, 47
  if (!has_total_attention(GetParam())) GTEST_SKIP() << GetParam().backend << " lacks the operation";
  const Instance made = instance(kBusy);
  const auto after_forward = [&] {
    auto call = std::make_unique<Call>(made, dtype());
    call->forward(context());
    call->total.store(Values(call->total.view().numel(), -1.0));
    return call;
  };
  expect_failing_allocations_write_nothing(context(), after_forward, [](Call& call, const ExecutionContext& with) {
    total_attention(call.q, call.k, call.lse, call.total, call.options(), with);
  });
}

TEST_P(Allocation, FailuresOfCachesWriteNothing) {  // 42, 47
  if (!has_cached(GetParam())) GTEST_SKIP() << GetParam().backend << " lacks the operation";
  const bool on_cpu = GetParam().device().type == DeviceType::kCpu;
  const CacheCase split{.name = "split", .lengths = {500, 31}, .queries = {1, 1}, .capacity = 512, .num_splits = 3};
  const CacheCase hybrid{.name = "hybrid", .lengths = {150, 1, 64}, .queries = {1, 1, 64}, .page_size = 16};
  const CacheCase appended{.name = "append", .queries = {4, 4, 4}, .rotary_pairs = 8, .append = true};
  for (const CacheCase& definition : {split, hybrid, appended}) {
    if (definition.append && !on_cpu) continue;  // lengths on the device grow before the queries attend
    expect_failing_allocations_write_nothing(
        context(), [&] { return std::make_unique<CacheInstance>(definition, GetParam()); },
        [](CacheInstance& cache, const ExecutionContext& with) { cache.attend(with); });
  }
  const CacheCase plain{.name = "plain",
                        .lengths = {100},
                        .queries = {1},
                        .storage = DType::kInt8,
                        .granularity = ScaleGranularity::kHead};
  expect_failing_allocations_write_nothing(
      context(), [&] { return std::make_unique<CacheInstance>(plain, GetParam()); },
      [&](CacheInstance& cache, const ExecutionContext& with) {
        const Tensor token(dtype(), {1, cache.c.num_heads_kv, 1, cache.c.head_dim},
                           Values(cache.c.num_heads_kv * cache.c.head_dim, 1.0), Layout::kContiguous,
                           GetParam().device());
        append_kv(cache.view(), token, token, {}, with);
      });
}

TEST_P(Allocation, FailuresOfMergeWriteNothing) {  // 42, 47
  if (!has_merge(GetParam())) GTEST_SKIP() << GetParam().backend << " lacks the operation";
  expect_failing_allocations_write_nothing(
      context(), [&] { return std::make_unique<Merge>(GetParam()); },
      [](Merge& m, const ExecutionContext& with) { merge_states(m.a, m.lse, m.a, m.lse, m.out, m.lse_out, with); });
}

}  // namespace
}  // namespace onepass::test
