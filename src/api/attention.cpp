// api/attention.cpp: attention and varlen_attention, forward and backward.
#include "onepass/attention.h"

#include "api/lower.h"
#include "core/backend.h"

namespace onepass {
namespace {

using api::Call;

void forward(const Call& call, const AttentionOutputs& outputs, const ExecutionContext& context) {
  Problem problem = api::lower(call);
  api::lower_outputs(call, problem, outputs);
  run_forward(problem, context);
}

void backward(const Call& call, const TensorView& dout, const TensorView& out, const TensorView& lse,
              const AttentionGradients& gradients, const ExecutionContext& context) {
  BackwardProblem problem;
  problem.forward = api::lower(call);
  api::lower_gradients(call, problem, dout, out, lse, gradients);
  run_backward(problem, context);
}

}  // namespace

void attention(const TensorView& q, const TensorView& k, const TensorView& v, const AttentionOutputs& outputs,
               const AttentionOptions& options, const ExecutionContext& context) {
  forward({"attention", {"q", q}, {"k", k}, {"v", v}, options, nullptr}, outputs, context);
}

void attention_backward(const TensorView& dout, const TensorView& q, const TensorView& k, const TensorView& v,
                        const TensorView& out, const TensorView& lse, const AttentionGradients& gradients,
                        const AttentionOptions& options, const ExecutionContext& context) {
  backward({"attention_backward", {"q", q}, {"k", k}, {"v", v}, options, nullptr}, dout, out, lse, gradients, context);
}

void total_attention(const TensorView& q, const TensorView& k, const TensorView& lse, const TensorView& total,
                     const AttentionOptions& options, const ExecutionContext& context) {
  const Call call{"total_attention", {"q", q}, {"k", k}, {"k", k}, options, nullptr};  // no values
  const api::Named given{"lse", lse}, wanted{"total", total};
  Problem problem = api::lower(call);
  problem.lse = api::lower_rows(call, problem, given, api::Tokens::kQuery);
  problem.total_attention = api::lower_rows(call, problem, wanted, api::Tokens::kKey);
  api::check_outputs(call, {wanted}, {given});
  run_total_attention(problem, context);
}

void varlen_attention(const TensorView& q, const TensorView& k, const TensorView& v, const VarlenShape& shape,
                      const AttentionOutputs& outputs, const AttentionOptions& options,
                      const ExecutionContext& context) {
  forward({"varlen_attention", {"q", q}, {"k", k}, {"v", v}, options, &shape}, outputs, context);
}

void varlen_attention_backward(const TensorView& dout, const TensorView& q, const TensorView& k, const TensorView& v,
                               const VarlenShape& shape, const TensorView& out, const TensorView& lse,
                               const AttentionGradients& gradients, const AttentionOptions& options,
                               const ExecutionContext& context) {
  backward({"varlen_attention_backward", {"q", q}, {"k", k}, {"v", v}, options, &shape}, dout, out, lse, gradients,
           context);
}

}  // namespace onepass
