// Strides, alignment and what surrounds the tensors. Numbers in comments are rows of the reliability checklist.
#include <sys/mman.h>

#include "core/backend.h"
#include "support/naive.h"
#include "support/target_test.h"

namespace onepass::test {
namespace {

class LayoutTest : public TargetTest {};
ONEPASS_FOR_EVERY_TARGET(LayoutTest);

// The same bits; on Hopper nearly, where the portable kernels take over what TMA cannot address.
void expect_same(const Target& target, const Results& got, const Results& want) {
  if (target.backend != kHopperBackend.name) return expect_identical(got, want);
  const double tolerance = 4 * epsilon_of(target.dtype);
  EXPECT_TRUE(close(got.out, want.out, tolerance)) << "out";
  EXPECT_TRUE(close(got.lse, want.lse, 1e-4)) << "lse";
  EXPECT_TRUE(close(got.total, want.total, 1e-4)) << "total_attention";
  EXPECT_TRUE(close(got.dq, want.dq, 4 * tolerance)) << "dq";
  EXPECT_TRUE(close(got.dk, want.dk, 8 * tolerance)) << "dk";
  EXPECT_TRUE(close(got.dv, want.dv, 8 * tolerance)) << "dv";
  EXPECT_TRUE(close(got.dbias, want.dbias, 8 * tolerance)) << "dbias";
}

TEST_P(LayoutTest, ResultsDoNotDependOnStrides) {  // 20, 23, 24, 25, 26
  for (Case definition : {Case{.head_dim = 33, .causal = true, .bias = "bhqk"},
                          Case{.lengths_q = {20, 33}, .lengths_k = {41, 30}, .causal = true}}) {
    const Results want = run_here(instance(definition));
    for (Layouts layouts : {Layouts::kSwapped, Layouts::kPadded, Layouts::kMixed}) {
      definition.layouts = layouts;
      const Instance made = instance(definition);
      Call call(made, dtype());
      call.forward(context());
      call.backward(context());
      expect_same(GetParam(), call.results(), want);
      for (const Tensor* output : call.outputs()) EXPECT_TRUE(output->canaries_intact());
    }
  }
}

TEST_P(LayoutTest, StridesOfSizeOneDimensionsDoNotMatter) {  // 24
  const Instance made = instance({.batch = 1, .num_heads = 1, .num_heads_kv = 1, .seqlen_q = 1, .head_dim = 1});
  const Results want = run_here(made);
  Call call(made, dtype());
  for (Tensor* tensor : {&call.q, &call.k, &call.v, &call.out, &call.lse, &call.dout, &call.dq, &call.dk, &call.dv}) {
    for (int i = 0; i < tensor->view().rank; ++i) {
      if (tensor->view().shape[i] == 1) tensor->view().strides[i] = i % 2 ? -7 : 1'000'003;
    }
  }
  call.forward(context());
  call.backward(context());
  for (Tensor* tensor : {&call.out, &call.lse, &call.dq, &call.dk, &call.dv}) {
    for (std::int64_t& stride : tensor->view().strides) stride = std::clamp<std::int64_t>(stride, 0, 100);
  }
  expect_same(GetParam(), call.results(), want);
}

TEST_P(LayoutTest, ExpandedKeysAndValues) {  // 22
  const Case definition{.batch = 3, .num_heads = 4, .num_heads_kv = 4};
  Instance made = instance(definition);
  for (Values* values : {&made.k, &made.v}) {  // every batch and head the same as the first
    const std::size_t plane = 90 * 64;
    for (std::size_t i = plane; i < values->size(); ++i) (*values)[i] = (*values)[i % plane];
  }
  const Results want = run_here(made);
  Call call(made, dtype());
  for (Tensor* tensor : {&call.k, &call.v}) tensor->view().strides[0] = tensor->view().strides[1] = 0;
  call.forward(context());
  call.backward(context());
  expect_same(GetParam(), call.results(), want);
}

TEST_P(LayoutTest, ExpandedOutputGradient) {  // 23: what sum().backward() passes
  Instance made = instance({.batch = 1});
  made.dout.assign(made.dout.size(), 1.0);
  const Results want = run_here(made);
  Call call(made, dtype());
  call.forward(context());
  call.dout.view().strides[0] = call.dout.view().strides[1] = call.dout.view().strides[2] = 0;
  call.backward(context());
  expect_same(GetParam(), call.results(), want);
}

// 28: two heads more than 2³¹ elements apart, in address space that is reserved but mostly never touched.
TEST_P(LayoutTest, StridesBeyond32Bits) {
  if (GetParam().device().type != DeviceType::kCpu) GTEST_SKIP() << "needs sparse memory";
  constexpr std::int64_t kStride = (std::int64_t{1} << 31) + 4096;
  const std::int64_t size = size_of(dtype());
  const std::size_t bytes = static_cast<std::size_t>((2 * kStride) * size);
  const Instance made = instance({.batch = 1, .num_heads = 2, .num_heads_kv = 2, .seqlen_q = 20, .seqlen_k = 30});
  const Results want = run_here(made);
  Call call(made, dtype());
  std::vector<void*> reserved;
  const auto spread = [&](Tensor& tensor) {
    void* block = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ASSERT_NE(block, MAP_FAILED);
    reserved.push_back(block);
    const Values values = tensor.load();
    tensor.view().data = block;
    tensor.view().strides[1] = kStride;
    tensor.store(values);
  };
  for (Tensor* tensor : {&call.q, &call.k, &call.v, &call.out, &call.dout, &call.dq, &call.dk, &call.dv})
    spread(*tensor);
  if (!HasFatalFailure()) {
    call.forward(context());
    call.backward(context());
    expect_same(GetParam(), call.results(), want);
  }
  for (void* block : reserved) munmap(block, bytes);
}

}  // namespace
}  // namespace onepass::test
