// api/cached_attention.cpp: arguments → CachedProblem and, with new tokens, AppendProblem, or an error.
#include <cmath>
#include <optional>
#include <string>

#include "api/kv_cache.h"
#include "core/backend.h"

namespace onepass {
namespace {

using api::Call;
using api::Named;
using api::refuse;

AttentionOptions attention_options(const CachedOptions& options) {
  return {.causal = options.causal,
          .softmax_scale = options.softmax_scale,
          .window = options.window,
          .softcap = options.softcap,
          .alibi = options.alibi,
          .sinks = options.sinks};
}

// Sizes and the query operand.
void lower_queries(const Call& call, const CachedOptions& options, const KVStorage& cache, Problem& problem) {
  const TensorView& q = call.q.view;
  const int rank = call.rank();
  api::check_tensor(call.operation, call.q, rank);
  api::check_dtype(call.operation, call.q, {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64});
  api::check_device(call.operation, call.k, q.device);
  problem.operation = call.operation;
  problem.device = q.device;
  problem.dtype = q.dtype;
  problem.batch = cache.batch;
  problem.num_heads = q.shape[1];
  problem.num_heads_kv = cache.num_heads_kv;
  problem.head_dim = cache.head_dim;
  problem.head_dim_v = cache.head_dim_v;
  problem.seqlen_k = cache.capacity();
  if (problem.num_heads_kv == 0 ? problem.num_heads != 0 : problem.num_heads % problem.num_heads_kv != 0) {
    refuse(
        call.operation, call.q.name,
        std::to_string(problem.num_heads) + " heads with " + std::to_string(problem.num_heads_kv) + " key/value heads",
        "num_heads divisible by num_heads_kv");
  }
  if (const Named bounds{"cu_seqlens_q", options.cu_seqlens_q}; call.varlen) {
    api::check_int32_vector(call, bounds, cache.batch + 1);
    problem.total_q = q.shape[0];
    problem.seqlen_q = api::longest_sequence(call, bounds, "max_seqlen_q", options.max_seqlen_q, problem.total_q);
    problem.cu_seqlens_q = static_cast<const std::int32_t*>(bounds.view.data);
  } else {
    problem.seqlen_q = q.shape[2];
    problem.total_q = problem.batch * problem.seqlen_q;
  }
  problem.q = api::lower_operand(call, problem, call.q, problem.num_heads, api::Tokens::kQuery, problem.head_dim);
}

void lower_outputs(const Call& call, const AttentionOutputs& outputs, const KVCacheView& view,
                   const CachedOptions& options, Problem& problem) {
  if (outputs.total_attention.given()) refuse(call.operation, "total_attention", "a tensor", "none");
  const Named out{"out", outputs.out}, lse{"lse", outputs.lse};
  problem.out = api::lower_operand(call, problem, out, problem.num_heads, api::Tokens::kQuery, problem.head_dim_v);
  if (lse.view.given()) problem.lse = api::lower_rows(call, problem, lse, api::Tokens::kQuery);
  api::check_outputs(call, {out, lse},
                     {{"cache.page_table", view.page_table},
                      {"cache.seqlens", view.seqlens},
                      {"cache.k_scale", view.k_scale},
                      {"cache.v_scale", view.v_scale},
                      {"cache.first_key", view.first_key},
                      {"cache.batch_index", view.batch_index},
                      {"cu_seqlens_q", options.cu_seqlens_q},
                      {"k_new", options.k_new},
                      {"v_new", options.v_new},
                      {"rotary.cos", options.rotary.cos},
                      {"rotary.sin", options.rotary.sin}});
}

}  // namespace

void cached_attention(const TensorView& q, const KVCacheView& view, const AttentionOutputs& outputs,
                      const CachedOptions& options, const ExecutionContext& context) {
  constexpr const char* kOperation = "cached_attention";
  const AttentionOptions scores = attention_options(options);
  const VarlenShape packed;
  const Call call{kOperation,          {"q", q}, {"cache.k", view.k},
                  {"cache.v", view.v}, scores,   options.cu_seqlens_q.given() ? &packed : nullptr};
  CachedProblem problem;
  problem.cache = api::lower_cache(kOperation, view);
  Problem& attention = problem.attention;
  lower_queries(call, options, problem.cache, attention);
  api::lower_options(call, attention);
  problem.rotary = api::lower_rotary(kOperation, options.rotary, q.device, q.dtype, attention.head_dim);
  if (options.num_splits < 0) {
    refuse(kOperation, "num_splits", std::to_string(options.num_splits), "0 (chosen for speed) or more");
  }
  problem.num_splits = options.num_splits;
  if (!(options.prob_threshold >= 0.0 && options.prob_threshold < 1.0)) {
    refuse(kOperation, "prob_threshold", std::to_string(options.prob_threshold), "a number in [0, 1)");
  }
  problem.prob_threshold = options.prob_threshold;

  std::optional<AppendProblem> append;
  if (options.k_new.given() || options.v_new.given()) {
    const TensorView none;
    append = api::lower_append(
        kOperation, view, problem.cache,
        {{"k_new", options.k_new}, {"v_new", options.v_new}, {"cu_seqlens_q", options.cu_seqlens_q}, {"seqlens", none}},
        options.rotary, options.advance);
    if (call.varlen && append->total_new != attention.total_q) {
      refuse(kOperation, "k_new", api::describe(options.k_new), "a token for each query of packed q");
    }
  }
  lower_outputs(call, outputs, view, options, attention);  // last: all that it compares with has been checked
  const NewTokens added = append ? append->tokens : NewTokens{};
  if (q.device.type == DeviceType::kCpu) {
    attention.seqlen_k = api::check_sequences(kOperation, problem.cache, added, problem.rotary);
  }
  if (append && !options.advance) problem.pending = added;
  run_cached(append ? &*append : nullptr, problem, context);
}

}  // namespace onepass
