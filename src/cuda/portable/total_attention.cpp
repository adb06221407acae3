#include "cuda/portable/total_attention.h"

#include "cuda/portable/choose.h"
#include "cuda/portable/operations.h"
#include "cuda/portable/ragged.h"

namespace onepass::cuda {

void sum_columns(const Problem& problem, const ExecutionContext& context, bool add) {
  const TotalAttentionKernel kernel = with_head_dim(padded_head_dim(problem), [&](auto head_dim) {
    return total_attention_kernel_for<head_dim.value>(problem.dtype);
  });
  TotalAttentionArguments arguments;
  arguments.problem = problem;
  arguments.add = add;
  arguments.group_size = static_cast<int>(problem.group_size());
  arguments.key_tiles = static_cast<int>(ceil_div(problem.seqlen_k, kernel.keys));
  arguments.vectorized_q =
      is_vectorizable(problem.q, problem.dtype, problem.batch, problem.num_heads, problem.total_q, problem.head_dim);
  arguments.vectorized_k =
      is_vectorizable(problem.k, problem.dtype, problem.batch, problem.num_heads_kv, problem.total_k, problem.head_dim);
  if (problem.ragged()) clear_unowned_total_attention(problem, context);
  launch(problem.operation, kernel.kernel,
         {problem.batch * problem.num_heads * arguments.key_tiles, kernel.threads, kernel.shared_bytes},
         problem.device.index, context.stream, arguments);
}

Unsupported supports_total_attention(const Problem& problem) {
  return common_limits(problem.device, problem.dtype, problem.head_dim);
}

void total_attention(const Problem& problem, const ExecutionContext& context) {
  const DeviceGuard guard(problem.device.index);
  sum_columns(problem, context);
}

}  // namespace onepass::cuda
