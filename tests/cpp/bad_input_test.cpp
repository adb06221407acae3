// Every refusal: what it says, and that nothing was written. Validation comes before any backend, so one is enough.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "support/case.h"

namespace onepass::test {
namespace {

constexpr std::int64_t kHuge = std::int64_t{1} << 40;

// A valid call, to be spoilt in one place.
struct Arguments {
  Instance instance;
  Call call;
  AttentionOptions options;
  VarlenShape shape;
  AttentionOutputs outputs;
  AttentionGradients gradients;
  ExecutionContext context = {.backend = "reference"};

  explicit Arguments(const Case& definition)
      : instance(definition, DType::kFloat32),
        call(instance, DType::kFloat32),
        options(call.options()),
        shape{call.cu_seqlens_q, call.cu_seqlens_k},
        outputs{call.out, call.lse, call.total},
        gradients{call.dq, call.dk, call.dv, call.dbias, call.dsinks} {}

  TensorView& q() { return call.q.view(); }
  TensorView& k() { return call.k.view(); }
  TensorView& v() { return call.v.view(); }
};

struct Refusal {
  const char* name;
  std::function<void(Arguments&)> spoil;
  const char* argument;  // the message names it …
  const char* received;  // … and says what came
  const char* required;  // … and what is allowed
  ErrorCode code = ErrorCode::kInvalidArgument;
};

template <class Operation>
void expect_refused(Arguments& arguments, const char* name, const Refusal& refusal, Operation&& operation) {
  try {
    operation();
    ADD_FAILURE() << "accepted";
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(message.find(std::string(name) + ": " + refusal.argument + ": got "), 0u) << message;
    EXPECT_NE(message.find(refusal.received), std::string::npos) << message;
    EXPECT_NE(message.find("; need "), std::string::npos) << message;
    EXPECT_NE(message.find(refusal.required, message.find("; need ")), std::string::npos) << message;
    EXPECT_EQ(error.code(), refusal.code) << message;
  }
  for (const Tensor* output : arguments.call.outputs()) EXPECT_TRUE(output->untouched());
}

void expect_forward_refused(Arguments& a, const Refusal& refusal) {
  expect_refused(a, "attention", refusal,
                 [&] { attention(a.call.q, a.call.k, a.call.v, a.outputs, a.options, a.context); });
}
void expect_backward_refused(Arguments& a, const Refusal& refusal) {
  expect_refused(a, "attention_backward", refusal, [&] {
    attention_backward(a.call.dout, a.call.q, a.call.k, a.call.v, a.outputs.out, a.outputs.lse, a.gradients, a.options,
                       a.context);
  });
}
void expect_varlen_refused(Arguments& a, const Refusal& refusal) {
  expect_refused(a, "varlen_attention", refusal,
                 [&] { varlen_attention(a.call.q, a.call.k, a.call.v, a.shape, a.outputs, a.options, a.context); });
  expect_refused(a, "varlen_attention_backward", refusal, [&] {
    varlen_attention_backward(a.call.dout, a.call.q, a.call.k, a.call.v, a.shape, a.outputs.out, a.outputs.lse,
                              a.gradients, a.options, a.context);
  });
}

std::string name_of_refusal(const testing::TestParamInfo<Refusal>& parameter) { return parameter.param.name; }

// Of the inputs and options: refused by the forward and by the backward pass of dense attention alike.
class DenseInput : public testing::TestWithParam<Refusal> {};

TEST_P(DenseInput, Refused) {
  Arguments arguments({.bias = "hqk", .sinks = true});
  GetParam().spoil(arguments);
  expect_forward_refused(arguments, GetParam());
  expect_backward_refused(arguments, GetParam());
}

const Refusal kDenseInputs[] = {
    {"null_q", [](Arguments& a) { a.q().data = nullptr; }, "q", "null data", "memory"},
    {"null_k", [](Arguments& a) { a.k().data = nullptr; }, "k", "null data", "memory"},
    {"missing_v", [](Arguments& a) { a.v() = {}; }, "v", "float32 ()", "4 dimensions"},
    {"rank_3", [](Arguments& a) { a.q().rank = 3; }, "q", "float32 (2, 4, 70)", "4 dimensions"},
    {"rank_negative", [](Arguments& a) { a.q().rank = -1; }, "q", "rank -1", "4 dimensions"},
    {"rank_99", [](Arguments& a) { a.v().rank = 99; }, "v", "rank 99", "4 dimensions"},
    {"unknown_dtype", [](Arguments& a) { a.q().dtype = static_cast<DType>(77); }, "q", "77", "a known dtype",
     ErrorCode::kInvalidType},
    {"integer_dtype", [](Arguments& a) { a.q().dtype = DType::kInt64; }, "q", "int64",
     "float32 or float16 or bfloat16 or float64", ErrorCode::kInvalidType},
    {"mixed_dtypes", [](Arguments& a) { a.k().dtype = DType::kFloat16; }, "k", "float16", "the dtype of q, float32",
     ErrorCode::kInvalidType},
    {"unknown_device", [](Arguments& a) { a.k().device.type = static_cast<DeviceType>(9); }, "k", "device type 9",
     "cpu or cuda", ErrorCode::kInvalidType},
    {"mixed_devices",
     [](Arguments& a) {
       a.v().device = {DeviceType::kCuda, 1};
     },
     "v", "cuda:1", "cpu", ErrorCode::kInvalidType},
    {"negative_size", [](Arguments& a) { a.q().shape[2] = -1; }, "q", "-1", "at least 0"},
    {"overflowing_size",
     [](Arguments& a) {
       a.k().shape = {kHuge, kHuge, 90, 64};
     },
     "k", "1099511627776", "64 bits"},
    {"overflowing_stride", [](Arguments& a) { a.q().strides[0] = std::numeric_limits<std::int64_t>::max() / 2; }, "q",
     "float32", "64 bits"},
    {"most_negative_stride", [](Arguments& a) { a.q().strides[0] = std::numeric_limits<std::int64_t>::min(); }, "q",
     "float32", "64 bits"},
    {"inner_stride", [](Arguments& a) { a.k().strides[3] = 2; }, "k", "stride 2", "stride 1"},
    {"batch_differs", [](Arguments& a) { a.k().shape[0] = 1; }, "k", "(1, 2, 90, 64)", "(2, 2, 90, 64)"},
    {"head_dim_differs", [](Arguments& a) { a.k().shape[3] = 32; }, "k", "(2, 2, 90, 32)", "(2, 2, 90, 64)"},
    {"key_heads_differ", [](Arguments& a) { a.v().shape[1] = 1; }, "v", "(2, 1, 90, 64)", "(2, 2, 90, 64)"},
    {"key_lengths_differ", [](Arguments& a) { a.v().shape[2] = 89; }, "v", "(2, 2, 89, 64)", "(2, 2, 90, 64)"},
    {"heads_not_divisible", [](Arguments& a) { a.k().shape[1] = a.v().shape[1] = 3; }, "q",
     "4 heads with 3 key/value heads", "divisible"},
    {"no_key_heads", [](Arguments& a) { a.k().shape[1] = a.v().shape[1] = 0; }, "q", "4 heads with 0", "divisible"},
    {"head_dim_0", [](Arguments& a) { a.q().shape[3] = a.k().shape[3] = 0; }, "q", "head_dim 0", "1 to 256"},
    {"head_dim_257", [](Arguments& a) { a.q().shape[3] = a.k().shape[3] = 257; }, "q", "head_dim 257", "1 to 256"},
    {"head_dim_v_300", [](Arguments& a) { a.v().shape[3] = 300; }, "v", "head_dim 300", "1 to 256"},
    {"too_many_tokens",
     [](Arguments& a) {
       a.k().shape[2] = a.v().shape[2] = kHuge;
       a.k().strides[2] = a.v().strides[2] = 0;
     },
     "k", "1099511627776", "at most"},
    {"too_many_planes",
     [](Arguments& a) {
       for (TensorView* view : {&a.q(), &a.k(), &a.v()}) {
         view->shape[0] = 1 << 30;
         view->strides[0] = 0;
       }
     },
     "q", "batch 1073741824 with 4 heads", "at most"},
    {"scale_nan", [](Arguments& a) { a.options.softmax_scale = std::nan(""); }, "softmax_scale", "nan", "finite"},
    {"scale_infinite", [](Arguments& a) { a.options.softmax_scale = HUGE_VAL; }, "softmax_scale", "inf", "finite"},
    {"scale_beyond_float32", [](Arguments& a) { a.options.softmax_scale = 1e300; }, "softmax_scale", "1", "float32"},
    {"softcap_negative", [](Arguments& a) { a.options.softcap = -1.0; }, "softcap", "-1", "0 (none) or more"},
    {"softcap_nan", [](Arguments& a) { a.options.softcap = std::nan(""); }, "softcap", "nan", "finite"},
    {"window_left", [](Arguments& a) { a.options.window.left = -2; }, "window.left", "-2", "0 or more"},
    {"window_right", [](Arguments& a) { a.options.window.right = -1; }, "window.right", "-1", "0 or more"},
    {"alignment", [](Arguments& a) { a.options.alignment = static_cast<CausalAlignment>(2); }, "alignment", "2",
     "bottom-right (0) or top-left (1)"},
    {"dropout_1", [](Arguments& a) { a.options.dropout.p = 1.0; }, "dropout.p", "1", "[0, 1)"},
    {"dropout_negative", [](Arguments& a) { a.options.dropout.p = -0.1; }, "dropout.p", "-0.1", "[0, 1)"},
    {"dropout_nan", [](Arguments& a) { a.options.dropout.p = std::nan(""); }, "dropout.p", "nan", "[0, 1)"},
    {"bias_rank", [](Arguments& a) { a.options.bias.rank = 3; }, "bias", "float32 (1, 4, 70)", "4 dimensions"},
    {"bias_shape", [](Arguments& a) { a.options.bias.shape[3] = 89; }, "bias", "(1, 4, 70, 89)", "(2, 4, 70, 90)"},
    {"bias_dtype", [](Arguments& a) { a.options.bias.dtype = DType::kBFloat16; }, "bias", "bfloat16", "float32",
     ErrorCode::kInvalidType},
    {"bias_null", [](Arguments& a) { a.options.bias.data = nullptr; }, "bias", "null data", "memory"},
    {"bias_device", [](Arguments& a) { a.options.bias.device.type = DeviceType::kCuda; }, "bias", "cuda:0", "cpu",
     ErrorCode::kInvalidType},
    {"sinks_shape", [](Arguments& a) { a.options.sinks.shape[0] = 2; }, "sinks", "(2,)", "(4,)"},
    {"sinks_dtype", [](Arguments& a) { a.options.sinks.dtype = DType::kInt32; }, "sinks", "int32", "float32",
     ErrorCode::kInvalidType},
    {"alibi_shape",
     [](Arguments& a) {
       a.options.alibi.slopes = {a.v().data, DType::kFloat32, {5}};
     },
     "alibi_slopes", "(5,)", "(4,)"},
    {"alibi_shape_batch",
     [](Arguments& a) {
       a.options.alibi.slopes = {a.v().data, DType::kFloat32, {3, 4}};
     },
     "alibi_slopes", "(3, 4)", "(2, 4)"},
    {"alibi_dtype",
     [](Arguments& a) {
       a.options.alibi.slopes = {a.v().data, DType::kFloat16, {4}};
     },
     "alibi_slopes", "float16", "float32", ErrorCode::kInvalidType},
    {"key_begin_shape",
     [](Arguments& a) {
       a.options.key_begin = {a.v().data, DType::kInt32, {3}};
     },
     "key_begin", "(3,)", "(2,)"},
    {"key_end_dtype",
     [](Arguments& a) {
       a.options.key_end = {a.v().data, DType::kInt64, {2}};
     },
     "key_end", "int64", "int32", ErrorCode::kInvalidType},
};
INSTANTIATE_TEST_SUITE_P(BadInput, DenseInput, testing::ValuesIn(kDenseInputs), name_of_refusal);

class ForwardOutput : public testing::TestWithParam<Refusal> {};

TEST_P(ForwardOutput, Refused) {
  Arguments arguments({.bias = "hqk", .sinks = true});
  GetParam().spoil(arguments);
  expect_forward_refused(arguments, GetParam());
}

const Refusal kForwardOutputs[] = {
    {"missing", [](Arguments& a) { a.outputs.out = {}; }, "out", "float32 ()", "4 dimensions"},
    {"null", [](Arguments& a) { a.outputs.out.data = nullptr; }, "out", "null data", "memory"},
    {"shape", [](Arguments& a) { a.outputs.out.shape[3] = 63; }, "out", "(2, 4, 70, 63)", "(2, 4, 70, 64)"},
    {"dtype", [](Arguments& a) { a.outputs.out.dtype = DType::kBFloat16; }, "out", "bfloat16", "the dtype of q",
     ErrorCode::kInvalidType},
    {"overlaps_q", [](Arguments& a) { a.outputs.out = a.q(); }, "out", "overlaps q", "apart"},
    {"overlaps_end_of_q",
     [](Arguments& a) { a.outputs.out.data = static_cast<float*>(a.q().data) + a.q().numel() - 1; }, "out",
     "overlaps q", "apart"},
    {"shared_elements", [](Arguments& a) { a.outputs.out.strides[1] = 0; }, "out", "strides", "do not share"},
    {"lse_dtype", [](Arguments& a) { a.outputs.lse.dtype = DType::kFloat64; }, "lse", "float64", "float32",
     ErrorCode::kInvalidType},
    {"lse_shape", [](Arguments& a) { a.outputs.lse.shape[2] = 71; }, "lse", "(2, 4, 71)", "(2, 4, 70)"},
    {"lse_shared", [](Arguments& a) { a.outputs.lse.strides[0] = 1; }, "lse", "strides", "do not share"},
    {"total_shape", [](Arguments& a) { a.outputs.total_attention.shape[2] = 70; }, "total_attention", "(2, 4, 70)",
     "(2, 4, 90)"},
    {"total_overlaps_bias", [](Arguments& a) { a.outputs.total_attention.data = a.options.bias.data; },
     "total_attention", "overlaps bias", "apart"},
};
INSTANTIATE_TEST_SUITE_P(BadInput, ForwardOutput, testing::ValuesIn(kForwardOutputs), name_of_refusal);

class BackwardArgument : public testing::TestWithParam<Refusal> {};

TEST_P(BackwardArgument, Refused) {
  Arguments arguments({.bias = "hqk", .sinks = true});
  GetParam().spoil(arguments);
  expect_backward_refused(arguments, GetParam());
}

const Refusal kBackwardArguments[] = {
    {"dout_shape", [](Arguments& a) { a.call.dout.view().shape[2] = 69; }, "dout", "(2, 4, 69, 64)", "(2, 4, 70, 64)"},
    {"dout_dtype", [](Arguments& a) { a.call.dout.view().dtype = DType::kFloat64; }, "dout", "float64",
     "the dtype of q", ErrorCode::kInvalidType},
    {"out_missing", [](Arguments& a) { a.outputs.out = {}; }, "out", "float32 ()", "4 dimensions"},
    {"lse_missing", [](Arguments& a) { a.outputs.lse = {}; }, "lse", "float32 ()", "3 dimensions"},
    {"dq_missing", [](Arguments& a) { a.gradients.dq = {}; }, "dq", "float32 ()", "4 dimensions"},
    {"dk_shape", [](Arguments& a) { a.gradients.dk.shape[1] = 4; }, "dk", "(2, 4, 90, 64)", "(2, 2, 90, 64)"},
    {"dv_overlaps_v", [](Arguments& a) { a.gradients.dv.data = a.v().data; }, "dv", "overlaps v", "apart"},
    {"dq_overlaps_dout", [](Arguments& a) { a.gradients.dq.data = a.call.dout.view().data; }, "dq", "overlaps dout",
     "apart"},
    {"dk_expanded", [](Arguments& a) { a.gradients.dk.strides[1] = 0; }, "dk", "strides", "do not share"},
    {"dbias_without_bias", [](Arguments& a) { a.options.bias = {}; }, "dbias", "a tensor", "none without a bias"},
    {"dbias_shape", [](Arguments& a) { a.gradients.dbias.shape[1] = 1; }, "dbias", "(1, 1, 70, 90)", "(1, 4, 70, 90)"},
    {"dbias_dtype", [](Arguments& a) { a.gradients.dbias.dtype = DType::kFloat16; }, "dbias", "float16", "float32",
     ErrorCode::kInvalidType},
    {"dsinks_without_sinks", [](Arguments& a) { a.options.sinks = {}; }, "dsinks", "a tensor", "none without sinks"},
    {"dsinks_shape", [](Arguments& a) { a.gradients.dsinks.shape[0] = 3; }, "dsinks", "(3,)", "(4,)"},
};
INSTANTIATE_TEST_SUITE_P(BadInput, BackwardArgument, testing::ValuesIn(kBackwardArguments), name_of_refusal);

class Ragged : public testing::TestWithParam<Refusal> {};

TEST_P(Ragged, Refused) {
  Arguments arguments({.lengths_q = {4, 0, 6}, .lengths_k = {5, 1, 7}});
  GetParam().spoil(arguments);
  expect_varlen_refused(arguments, GetParam());
}

std::int32_t* bounds(TensorView& view) { return static_cast<std::int32_t*>(view.data); }

const Refusal kRagged[] = {
    {"missing", [](Arguments& a) { a.shape.cu_seqlens_q = {}; }, "cu_seqlens_q", "()", "1 dimensions"},
    {"no_element", [](Arguments& a) { a.shape.cu_seqlens_q.shape[0] = 0; }, "cu_seqlens_q", "no element", "batch + 1"},
    {"dtype", [](Arguments& a) { a.shape.cu_seqlens_k.dtype = DType::kInt64; }, "cu_seqlens_k", "int64", "int32",
     ErrorCode::kInvalidType},
    {"batches_differ", [](Arguments& a) { a.shape.cu_seqlens_k.shape[0] = 3; }, "cu_seqlens_k", "(3,)", "(4,)"},
    {"first_not_0", [](Arguments& a) { bounds(a.shape.cu_seqlens_q)[0] = 1; }, "cu_seqlens_q", "first element 1", "0"},
    {"decreasing", [](Arguments& a) { bounds(a.shape.cu_seqlens_k)[2] = 4; }, "cu_seqlens_k", "4 after 5",
     "non-decreasing"},
    {"beyond_total", [](Arguments& a) { bounds(a.shape.cu_seqlens_k)[3] = 14; }, "cu_seqlens_k", "last element 14",
     "13 tokens"},
    {"negative_max", [](Arguments& a) { a.shape.max_seqlen_q = -3; }, "max_seqlen_q", "-3", "0 (unknown) or more"},
    {"bias",
     [](Arguments& a) {
       a.options.bias = {a.v().data, DType::kFloat32, {1, 1, 1, 1}};
     },
     "bias", "a tensor", "none: a ragged batch"},
    {"rank", [](Arguments& a) { a.k().rank = 4; }, "k", "float32", "3 dimensions"},
};
INSTANTIATE_TEST_SUITE_P(BadInput, Ragged, testing::ValuesIn(kRagged), name_of_refusal);

class Merge : public testing::TestWithParam<Refusal> {};

TEST_P(Merge, Refused) {
  Arguments a({});
  TensorView& out = a.outputs.out;
  TensorView& lse = a.outputs.lse;
  // As inputs: q for out_a, dout for out_b, total attention's memory for the LSEs.
  a.outputs.total_attention = {a.k().data, DType::kFloat32, {2, 4, 70}};
  GetParam().spoil(a);
  expect_refused(a, "merge_states", GetParam(), [&] {
    merge_states(a.call.q, a.outputs.total_attention, a.call.dout, a.outputs.total_attention, out, lse, a.context);
  });
}

const Refusal kMerges[] = {
    {"dtype", [](Arguments& a) { a.q().dtype = DType::kInt8; }, "out_a", "int8", "float32", ErrorCode::kInvalidType},
    {"dtypes_differ", [](Arguments& a) { a.call.dout.view().dtype = DType::kFloat16; }, "out_b", "float16", "float32",
     ErrorCode::kInvalidType},
    {"shape", [](Arguments& a) { a.outputs.out.shape[1] = 3; }, "out", "(2, 3, 70, 64)", "(2, 4, 70, 64)"},
    {"lse_shape", [](Arguments& a) { a.outputs.lse.shape[2] = 64; }, "lse", "(2, 4, 64)", "(2, 4, 70)"},
    {"lse_dtype", [](Arguments& a) { a.outputs.total_attention.dtype = DType::kBFloat16; }, "lse_a", "bfloat16",
     "float32", ErrorCode::kInvalidType},
    {"null", [](Arguments& a) { a.outputs.lse.data = nullptr; }, "lse", "null data", "memory"},
    {"shared_elements", [](Arguments& a) { a.outputs.out.strides[2] = 0; }, "out", "strides", "do not share"},
    {"shifted_overlap", [](Arguments& a) { a.outputs.out.data = static_cast<float*>(a.q().data) + 64; }, "out",
     "overlaps out_a", "out_a itself"},
};
INSTANTIATE_TEST_SUITE_P(BadInput, Merge, testing::ValuesIn(kMerges), name_of_refusal);

TEST(BadInput, UnknownBackend) {
  Arguments a({});
  a.context.backend = "abacus";
  try {
    attention(a.call.q, a.call.k, a.call.v, a.outputs, a.options, a.context);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    EXPECT_NE(std::string(error.what()).find("abacus"), std::string::npos) << error.what();
  }
  for (const Tensor* output : a.call.outputs()) EXPECT_TRUE(output->untouched());
}

TEST(BadInput, CudaTensorsWithoutCuda) {
  Arguments a({});
  for (TensorView* view : {&a.q(), &a.k(), &a.v(), &a.outputs.out, &a.outputs.lse, &a.outputs.total_attention}) {
    view->device = {DeviceType::kCuda, 99};
  }
  a.context.backend = nullptr;
  EXPECT_THROW(attention(a.call.q, a.call.k, a.call.v, a.outputs, a.options, a.context), Error);
  for (const Tensor* output : a.call.outputs()) EXPECT_TRUE(output->untouched());
}

}  // namespace
}  // namespace onepass::test
