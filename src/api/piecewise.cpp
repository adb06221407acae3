// api/piecewise.cpp: piecewise_attention, forward and backward.
#include "onepass/piecewise.h"

#include "api/lower.h"
#include "core/backend.h"

namespace onepass {
namespace {

using api::Call;
using api::Named;
using api::Tokens;

FarPair lower_far(const Call& call, const Problem& near, Named q2, Named k2, std::int64_t dist_threshold) {
  return {api::lower_operand(call, near, q2, near.num_heads, Tokens::kQuery, near.head_dim),
          api::lower_operand(call, near, k2, near.num_heads_kv, Tokens::kKey, near.head_dim), dist_threshold};
}

}  // namespace

void piecewise_attention(const TensorView& q1, const TensorView& k1, const TensorView& q2, const TensorView& k2,
                         const TensorView& v, std::int64_t dist_threshold, const AttentionOutputs& outputs,
                         const AttentionOptions& options, const ExecutionContext& context) {
  const Call call{"piecewise_attention", {"q1", q1}, {"k1", k1}, {"v", v}, options, nullptr};
  const Named far_q{"q2", q2}, far_k{"k2", k2};
  PiecewiseProblem problem;
  problem.near = api::lower(call);
  problem.far = lower_far(call, problem.near, far_q, far_k, dist_threshold);
  api::lower_outputs(call, problem.near, outputs);
  const Named outs[] = {{"out", outputs.out}, {"lse", outputs.lse}, {"total_attention", outputs.total_attention}};
  for (const Named& output : outs) {
    if (output.view.given()) api::check_output(call.operation, output, {far_q, far_k});
  }
  run_piecewise(problem, context);
}

void piecewise_attention_backward(const TensorView& dout, const TensorView& q1, const TensorView& k1,
                                  const TensorView& q2, const TensorView& k2, const TensorView& v,
                                  std::int64_t dist_threshold, const TensorView& out, const TensorView& lse,
                                  const PiecewiseGradients& gradients, const AttentionOptions& options,
                                  const ExecutionContext& context) {
  const Call call{"piecewise_attention_backward", {"q1", q1}, {"k1", k1}, {"v", v}, options, nullptr};
  const Named far_q{"q2", q2}, far_k{"k2", k2}, dq2{"dq2", gradients.dq2}, dk2{"dk2", gradients.dk2};
  PiecewiseBackwardProblem problem;
  Problem& near = problem.near.forward;
  near = api::lower(call);
  problem.far = lower_far(call, near, far_q, far_k, dist_threshold);
  api::lower_gradients(call, problem.near, dout, out, lse, gradients.near);
  problem.dq_far = api::lower_operand(call, near, dq2, near.num_heads, Tokens::kQuery, near.head_dim);
  problem.dk_far = api::lower_operand(call, near, dk2, near.num_heads_kv, Tokens::kKey, near.head_dim);
  api::check_outputs(call, {dq2, dk2}, {{"dout", dout}, {"out", out}, {"lse", lse}, far_q, far_k});
  const Named others[] = {{"dq1", gradients.near.dq}, {"dk1", gradients.near.dk}, {"dv", gradients.near.dv}};
  for (const Named& gradient : others) api::check_output(call.operation, gradient, {far_q, far_k});
  run_piecewise_backward(problem, context);
}

}  // namespace onepass
