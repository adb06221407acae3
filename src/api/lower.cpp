#include "api/lower.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

namespace onepass::api {
namespace {

constexpr std::int64_t kMaxHeadDim = 256;
constexpr std::int64_t kMaxTokens = std::numeric_limits<std::int32_t>::max();

// Host bounds are read and checked here; device bounds are checked by the kernels that read them.
std::int64_t longest_host_sequence(const Call& call, Named cu_seqlens, std::int64_t total) {
  const auto* bounds = static_cast<const std::int32_t*>(cu_seqlens.view.data);
  const std::int64_t batch = cu_seqlens.view.shape[0] - 1;
  if (bounds[0] != 0) refuse(call.operation, cu_seqlens.name, "first element " + std::to_string(bounds[0]), "0");
  std::int64_t longest = 0;
  for (std::int64_t i = 0; i < batch; ++i) {
    if (bounds[i + 1] < bounds[i]) {
      refuse(call.operation, cu_seqlens.name,
             std::to_string(bounds[i + 1]) + " after " + std::to_string(bounds[i]) + " at " + std::to_string(i + 1),
             "non-decreasing values");
    }
    longest = std::max<std::int64_t>(longest, bounds[i + 1] - bounds[i]);
  }
  if (bounds[batch] > total) {
    refuse(call.operation, cu_seqlens.name, "last element " + std::to_string(bounds[batch]),
           "at most the total of " + std::to_string(total) + " tokens");
  }
  return longest;
}

}  // namespace

void check_int32_vector(const Call& call, Named vector, std::int64_t size) {
  check_tensor(call.operation, vector, 1);
  check_dtype(call.operation, vector, {DType::kInt32});
  check_device(call.operation, vector, call.q.view.device);
  check_shape(call.operation, vector, {size});
}

std::int64_t longest_sequence(const Call& call, Named cu_seqlens, const char* max_name, std::int64_t max_seqlen,
                              std::int64_t total) {
  if (max_seqlen < 0) refuse(call.operation, max_name, std::to_string(max_seqlen), "0 (unknown) or more");
  if (call.q.view.device.type == DeviceType::kCpu) return longest_host_sequence(call, cu_seqlens, total);
  return max_seqlen == 0 ? total : std::min(max_seqlen, total);
}

namespace {

void lower_ragged_sizes(const Call& call, Problem& problem) {
  const VarlenShape& shape = *call.varlen;
  const Named cu_q{"cu_seqlens_q", shape.cu_seqlens_q}, cu_k{"cu_seqlens_k", shape.cu_seqlens_k};
  problem.total_q = call.q.view.shape[0];
  problem.total_k = call.k.view.shape[0];
  check_tensor(call.operation, cu_q, 1);
  if (cu_q.view.shape[0] < 1) refuse(call.operation, cu_q.name, "no element", "batch + 1 elements");
  problem.batch = cu_q.view.shape[0] - 1;
  check_int32_vector(call, cu_q, problem.batch + 1);
  check_int32_vector(call, cu_k, problem.batch + 1);
  problem.seqlen_q = longest_sequence(call, cu_q, "max_seqlen_q", shape.max_seqlen_q, problem.total_q);
  problem.seqlen_k = longest_sequence(call, cu_k, "max_seqlen_k", shape.max_seqlen_k, problem.total_k);
  problem.cu_seqlens_q = static_cast<const std::int32_t*>(cu_q.view.data);
  problem.cu_seqlens_k = static_cast<const std::int32_t*>(cu_k.view.data);
}

void lower_dense_sizes(const Call& call, Problem& problem) {
  problem.batch = call.q.view.shape[0];
  problem.seqlen_q = call.q.view.shape[2];
  problem.seqlen_k = call.k.view.shape[2];
  problem.total_q = problem.batch * problem.seqlen_q;
  problem.total_k = problem.batch * problem.seqlen_k;
}

void lower_inputs(const Call& call, Problem& problem) {
  const int dim = call.rank() - 1;
  for (const Named& input : {call.q, call.k, call.v}) check_tensor(call.operation, input, call.rank());
  check_dtype(call.operation, call.q, {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64});
  problem.operation = call.operation;
  problem.device = call.q.view.device;
  problem.dtype = call.q.view.dtype;
  problem.num_heads = call.q.view.shape[1];
  problem.num_heads_kv = call.k.view.shape[1];
  problem.head_dim = call.q.view.shape[dim];
  problem.head_dim_v = call.v.view.shape[dim];
  if (problem.num_heads_kv == 0 ? problem.num_heads != 0 : problem.num_heads % problem.num_heads_kv != 0) {
    refuse(
        call.operation, "q",
        std::to_string(problem.num_heads) + " heads with " + std::to_string(problem.num_heads_kv) + " key/value heads",
        "num_heads divisible by num_heads_kv");
  }
  for (const auto& [name, size] :
       {std::pair{call.q.name, problem.head_dim}, std::pair{call.v.name, problem.head_dim_v}}) {
    if (size >= 1 && size <= kMaxHeadDim) continue;
    refuse(call.operation, name, "head_dim " + std::to_string(size), "1 to " + std::to_string(kMaxHeadDim));
  }
  call.varlen ? lower_ragged_sizes(call, problem) : lower_dense_sizes(call, problem);
  for (const auto& [name, size] :
       {std::pair{call.q.name, problem.seqlen_q}, std::pair{call.k.name, problem.seqlen_k}}) {
    if (size > kMaxTokens) {
      refuse(call.operation, name, "seqlen " + std::to_string(size), "at most " + std::to_string(kMaxTokens));
    }
  }
  if (std::int64_t planes; __builtin_mul_overflow(problem.batch, problem.num_heads, &planes) || planes > kMaxTokens) {
    refuse(call.operation, call.q.name,
           "batch " + std::to_string(problem.batch) + " with " + std::to_string(problem.num_heads) + " heads",
           "batch·num_heads of at most " + std::to_string(kMaxTokens));
  }
  problem.q = lower_operand(call, problem, call.q, problem.num_heads, Tokens::kQuery, problem.head_dim);
  problem.k = lower_operand(call, problem, call.k, problem.num_heads_kv, Tokens::kKey, problem.head_dim);
  problem.v = lower_operand(call, problem, call.v, problem.num_heads_kv, Tokens::kKey, problem.head_dim_v);
}

std::int64_t lower_window_side(const Call& call, const char* name, std::optional<std::int64_t> side) {
  if (!side) return kUnbounded;
  if (*side < 0) refuse(call.operation, name, std::to_string(*side), "0 or more, or none for an unbounded side");
  return std::min(*side, kMaxTokens);
}

const std::int32_t* lower_key_bound(const Call& call, const Problem& problem, Named bound) {
  if (!bound.view.given()) return nullptr;
  check_int32_vector(call, bound, problem.batch);
  return static_cast<const std::int32_t*>(bound.view.data);
}

void lower_mask(const Call& call, Problem& problem) {
  const AttentionOptions& options = call.options;
  if (options.alignment != CausalAlignment::kBottomRight && options.alignment != CausalAlignment::kTopLeft) {
    refuse(call.operation, "alignment", std::to_string(static_cast<int>(options.alignment)),
           "bottom-right (0) or top-left (1)");
  }
  problem.top_left = options.alignment == CausalAlignment::kTopLeft;
  problem.window_left = lower_window_side(call, "window.left", options.window.left);
  problem.window_right = lower_window_side(call, "window.right", options.window.right);
  if (options.causal) problem.window_right = 0;
  problem.key_begin = lower_key_bound(call, problem, {"key_begin", options.key_begin});
  problem.key_end = lower_key_bound(call, problem, {"key_end", options.key_end});
}

// A tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k).
BiasOperand lower_bias(const Call& call, const Problem& problem, Named bias) {
  check_tensor(call.operation, bias, 4, /*any_inner_stride=*/true);
  check_device(call.operation, bias, problem.device);
  const std::int64_t full[] = {problem.batch, problem.num_heads, problem.seqlen_q, problem.seqlen_k};
  std::int64_t strides[4];
  for (int i = 0; i < 4; ++i) {
    const std::int64_t size = bias.view.shape[i];
    if (size != 1 && size != full[i]) {
      refuse(call.operation, bias.name, describe(bias.view), "sizes of 1 or of " + describe_shape(full));
    }
    strides[i] = size == 1 ? 0 : bias.view.strides[i];
  }
  return {bias.view.data, bias.view.dtype, strides[0], strides[1], strides[2], strides[3]};
}

void lower_alibi(const Call& call, Problem& problem) {
  const TensorView& slopes = call.options.alibi.slopes;
  if (!slopes.given()) return;
  const Named named{"alibi_slopes", slopes};
  check_tensor(call.operation, named, slopes.rank == 2 ? 2 : 1);
  check_dtype(call.operation, named, {DType::kFloat32});
  check_device(call.operation, named, problem.device);
  if (slopes.rank == 2) {
    check_shape(call.operation, named, {problem.batch, problem.num_heads});
  } else {
    check_shape(call.operation, named, {problem.num_heads});
  }
  problem.alibi_slopes = static_cast<const float*>(slopes.data);
  problem.alibi_batch_stride = slopes.rank == 2 ? slopes.strides[0] : 0;
  problem.alibi_zero_for_future = call.options.alibi.zero_for_future;
}

void lower_sinks(const Call& call, Problem& problem) {
  const Named sinks{"sinks", call.options.sinks};
  if (!sinks.view.given()) return;
  check_tensor(call.operation, sinks, 1);
  check_dtype(call.operation, sinks, {problem.dtype, row_dtype(problem)});
  check_device(call.operation, sinks, problem.device);
  check_shape(call.operation, sinks, {problem.num_heads});
  problem.sinks = sinks.view.data;
  problem.sinks_dtype = sinks.view.dtype;
}

void lower_score(const Call& call, Problem& problem) {
  const AttentionOptions& options = call.options;
  const double scale = options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(problem.head_dim)));
  if (!std::isfinite(static_cast<float>(scale))) {
    refuse(call.operation, "softmax_scale", std::to_string(scale), "a finite number that float32 can hold");
  }
  problem.softmax_scale = static_cast<float>(scale);
  problem.softmax_scale_f64 = scale;
  if (!std::isfinite(options.softcap) || options.softcap < 0) {
    refuse(call.operation, "softcap", std::to_string(options.softcap), "a finite number, 0 (none) or more");
  }
  problem.softcap = options.softcap;
  lower_alibi(call, problem);
  if (const Named bias{"bias", options.bias}; bias.view.given()) {
    if (call.varlen) refuse(call.operation, bias.name, "a tensor", "none: a ragged batch takes no bias");
    check_dtype(call.operation, bias, {problem.dtype, row_dtype(problem)});
    problem.bias = lower_bias(call, problem, bias);
  }
  lower_sinks(call, problem);
  if (!(options.dropout.p >= 0.0 && options.dropout.p < 1.0)) {
    refuse(call.operation, "dropout.p", std::to_string(options.dropout.p), "a probability in [0, 1)");
  }
  problem.dropout_p = options.dropout.p;
  problem.dropout_seed = options.dropout.seed;
  problem.dropout_offset = options.dropout.offset;
  problem.deterministic = options.deterministic;
}

}  // namespace

void lower_options(const Call& call, Problem& problem) {
  lower_mask(call, problem);
  lower_score(call, problem);
}

Operand lower_operand(const Call& call, const Problem& problem, Named tensor, std::int64_t heads, Tokens tokens,
                      std::int64_t dim) {
  const bool query = tokens == Tokens::kQuery;
  check_tensor(call.operation, tensor, call.rank());
  if (tensor.view.dtype != problem.dtype) {
    refuse(call.operation, tensor.name, describe(tensor.view), std::string("the dtype of q, ") + name_of(problem.dtype),
           ErrorCode::kInvalidType);
  }
  check_device(call.operation, tensor, problem.device);
  if (call.varlen) {
    check_shape(call.operation, tensor, {query ? problem.total_q : problem.total_k, heads, dim});
  } else {
    check_shape(call.operation, tensor, {problem.batch, heads, query ? problem.seqlen_q : problem.seqlen_k, dim});
  }
  return operand_of(tensor.view);
}

RowVector lower_rows(const Call& call, const Problem& problem, Named tensor, Tokens tokens) {
  const bool query = tokens == Tokens::kQuery;
  check_tensor(call.operation, tensor, call.rank() - 1, /*any_inner_stride=*/true);
  check_dtype(call.operation, tensor, {row_dtype(problem)});
  check_device(call.operation, tensor, problem.device);
  if (call.varlen) {
    check_shape(call.operation, tensor, {problem.num_heads, query ? problem.total_q : problem.total_k});
  } else {
    check_shape(call.operation, tensor,
                {problem.batch, problem.num_heads, query ? problem.seqlen_q : problem.seqlen_k});
  }
  return row_vector_of(tensor.view);
}

Problem lower(const Call& call) {
  Problem problem;
  lower_inputs(call, problem);
  lower_options(call, problem);
  return problem;
}

void check_outputs(const Call& call, std::initializer_list<Named> outputs, std::initializer_list<Named> more) {
  const AttentionOptions& options = call.options;
  for (const Named& output : outputs) {
    if (!output.view.given()) continue;
    check_output(call.operation, output, more);
    check_output(call.operation, output,
                 {call.q,
                  call.k,
                  call.v,
                  {"bias", options.bias},
                  {"sinks", options.sinks},
                  {"alibi_slopes", options.alibi.slopes},
                  {"key_begin", options.key_begin},
                  {"key_end", options.key_end}});
  }
}

void lower_outputs(const Call& call, Problem& problem, const AttentionOutputs& outputs) {
  const Named out{"out", outputs.out}, lse{"lse", outputs.lse}, total{"total_attention", outputs.total_attention};
  problem.out = lower_operand(call, problem, out, problem.num_heads, Tokens::kQuery, problem.head_dim_v);
  if (lse.view.given()) problem.lse = lower_rows(call, problem, lse, Tokens::kQuery);
  if (total.view.given()) problem.total_attention = lower_rows(call, problem, total, Tokens::kKey);
  check_outputs(call, {out, lse, total}, {});
}

void lower_gradients(const Call& call, BackwardProblem& problem, const TensorView& dout, const TensorView& out,
                     const TensorView& lse, const AttentionGradients& gradients) {
  Problem& f = problem.forward;
  const std::string dq_name = std::string("d") + call.q.name, dk_name = std::string("d") + call.k.name;
  const Named dq{dq_name.c_str(), gradients.dq}, dk{dk_name.c_str(), gradients.dk}, dv{"dv", gradients.dv};
  const Named dbias{"dbias", gradients.dbias}, dsinks{"dsinks", gradients.dsinks};
  f.out = lower_operand(call, f, {"out", out}, f.num_heads, Tokens::kQuery, f.head_dim_v);
  f.lse = lower_rows(call, f, {"lse", lse}, Tokens::kQuery);
  problem.dout = lower_operand(call, f, {"dout", dout}, f.num_heads, Tokens::kQuery, f.head_dim_v);
  problem.dq = lower_operand(call, f, dq, f.num_heads, Tokens::kQuery, f.head_dim);
  problem.dk = lower_operand(call, f, dk, f.num_heads_kv, Tokens::kKey, f.head_dim);
  problem.dv = lower_operand(call, f, dv, f.num_heads_kv, Tokens::kKey, f.head_dim_v);
  if (dbias.view.given()) {
    if (!f.bias) refuse(call.operation, dbias.name, "a tensor", "none without a bias");
    check_dtype(call.operation, dbias, {row_dtype(f)});
    problem.dbias = lower_bias(call, f, dbias);
    const auto& shape = call.options.bias.shape;
    check_shape(call.operation, dbias, {shape[0], shape[1], shape[2], shape[3]});
  }
  if (dsinks.view.given()) {
    if (f.sinks == nullptr) refuse(call.operation, dsinks.name, "a tensor", "none without sinks");
    check_tensor(call.operation, dsinks, 1);
    check_dtype(call.operation, dsinks, {row_dtype(f)});
    check_device(call.operation, dsinks, f.device);
    check_shape(call.operation, dsinks, {f.num_heads});
    problem.dsinks = dsinks.view.data;
  }
  check_outputs(call, {dq, dk, dv, dbias, dsinks}, {{"dout", dout}, {"out", out}, {"lse", lse}});
}

}  // namespace onepass::api
