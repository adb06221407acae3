// cuda/portable/forward.cpp: host side of the forward pass.
#include "cuda/portable/forward.h"

#include <numbers>

#include "core/piecewise.h"
#include "core/with_lse.h"
#include "cuda/portable/choose.h"
#include "cuda/portable/operations.h"
#include "cuda/portable/ragged.h"
#include "cuda/portable/total_attention.h"

namespace onepass::cuda {
namespace {

std::int64_t tile_count(const Problem& problem, int queries) {
  return problem.batch * problem.num_heads * ceil_div(problem.seqlen_q, queries);
}

// Below this, LSEs over it could overflow. The kernel with terms scales scores before its softmax.
constexpr float kSmallestFoldedScale = 0x1p-60f;

ForwardKernel kernel_for(const Problem& problem) {
  const bool terms = has_terms(problem) || problem.softmax_scale < kSmallestFoldedScale;
  return with_head_dim(padded_head_dim(problem),
                       [&](auto head_dim) { return forward_kernel_for<head_dim.value>(problem.dtype, terms); });
}

// resume: out and lse hold the attention over other keys, which is continued.
void attend(const Problem& problem, bool resume, const ExecutionContext& context) {
  const ForwardKernel kernel = kernel_for(problem);
  const std::int64_t batch = problem.batch;
  ForwardArguments arguments;
  arguments.problem = problem;
  arguments.group_size = static_cast<int>(problem.group_size());
  arguments.row_tiles = static_cast<int>(ceil_div(problem.seqlen_q, kernel.queries));
  arguments.heads_per_group = planes_per_group(problem, batch * problem.num_heads, arguments.group_size);
  arguments.last_rows_first = problem.window_right != kUnbounded;
  arguments.vectorized = {
      is_vectorizable(problem.q, problem.dtype, batch, problem.num_heads, problem.total_q, problem.head_dim),
      is_vectorizable(problem.k, problem.dtype, batch, problem.num_heads_kv, problem.total_k, problem.head_dim),
      is_vectorizable(problem.v, problem.dtype, batch, problem.num_heads_kv, problem.total_k, problem.head_dim_v),
      is_vectorizable(problem.out, problem.dtype, batch, problem.num_heads, problem.total_q, problem.head_dim_v)};
  arguments.scale_log2 = std::numbers::log2e_v<float> * (kernel.has_terms ? 1.0f : problem.softmax_scale);
  arguments.resume = resume;
  launch(problem.operation, kernel.kernel, {tile_count(problem, kernel.queries), kernel.threads, kernel.shared_bytes},
         problem.device.index, context.stream, arguments);
}

}  // namespace

Unsupported supports_forward(const Problem& problem) {
  if (Unsupported reason =
          common_limits(problem.device, problem.dtype, std::max(problem.head_dim, problem.head_dim_v))) {
    return reason;
  }
  if (const std::int64_t tiles = tile_count(problem, kernel_for(problem).queries); tiles > kMaxBlocks) {
    return std::to_string(tiles) + " tiles of query rows (at most " + std::to_string(kMaxBlocks) + ")";
  }
  return std::nullopt;
}

void forward(const Problem& problem, const ExecutionContext& context) {
  const DeviceGuard guard(problem.device.index);
  const WithLse with_lse(problem, context);
  const Problem& attended = with_lse.problem();
  attend(attended, false, context);
  if (problem.ragged()) clear_unowned_queries(attended, problem.out, problem.head_dim_v, attended.lse, context);
  if (problem.total_attention) sum_columns(attended, context);
}

Unsupported supports_piecewise(const PiecewiseProblem& problem) { return supports_forward(problem.near); }

void piecewise(const PiecewiseProblem& problem, const ExecutionContext& context) {
  const DeviceGuard guard(problem.near.device.index);
  const WithLse with_lse(problem.near, context, true);
  Problem near = near_part(problem), far = far_part(problem);
  near.lse = far.lse = with_lse.problem().lse;
  near.sinks = nullptr;  // it joins the denominator of all keys
  attend(near, false, context);
  attend(far, true, context);
  if (far.ragged()) clear_unowned_queries(far, far.out, far.head_dim_v, far.lse, context);
  if (!far.total_attention) return;
  sum_columns(near, context);
  sum_columns(far, context, true);
}

}  // namespace onepass::cuda
