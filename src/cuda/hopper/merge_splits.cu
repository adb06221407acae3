// cuda/hopper/merge_splits.cu: combines the partial results of split keys and the sink.
// lse = log(Σ e^lseₛ + e^sink), out = Σ e^(lseₛ − lse)·outₛ.
#include "cuda/common/grid_order.cuh"
#include "cuda/common/sequence.cuh"
#include "cuda/graph_launch.h"
#include "cuda/hopper/kernels.h"

namespace onepass::cuda::hopper {
namespace {

constexpr int kRowsPerBlock = 4;  // one warp a row

template <class T>
__global__ void merge_kernel(const __grid_constant__ Problem problem, const __grid_constant__ Plan plan,
                             std::int64_t rows) {
  wait_for_previous_grid();
  const std::int64_t row = std::int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / 32;  // (batch, head, query)
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  const std::int64_t tokens = rows / ((problem.ragged() ? 1 : problem.batch) * problem.num_heads);
  const std::int64_t token = row % tokens, head = row / tokens % problem.num_heads,
                     batch = row / tokens / problem.num_heads;
  if (problem.ragged() && token >= problem.cu_seqlens_q[problem.batch]) return;  // belongs to no sequence
  const float* const lse = plan.partial_lse + row;

  float top = -kInfinity;
  for (int s = 0; s < plan.splits; ++s) {
    const float part = lse[s * rows];
    if (part > top || part != part) top = part;  // a NaN stays
  }
  float sum = 0.0f;
  if (top != -kInfinity) {
    const float sink = problem.sinks != nullptr ? load_as_float(problem.sinks, problem.sinks_dtype, head) : -kInfinity;
    const float highest = fmaxf(top, sink);
    for (int s = 0; s < plan.splits; ++s) sum += exp2_approx((lse[s * rows] - highest) * kLog2e);
    sum += exp2_approx((sink - highest) * kLog2e);
    top = highest;
  }
  T* const out = problem.out.template row<T>(batch, head, token);
  for (int column = 2 * lane; column < problem.head_dim_v; column += 64) {
    float2 merged = {0.0f, 0.0f};
    for (int s = 0; s < plan.splits && sum != 0.0f; ++s) {
      const float weight = exp2_approx((lse[s * rows] - top) * kLog2e) / sum;
      if (weight == 0.0f) continue;  // an empty split's 0 must not meet an infinite partial result
      const float2 part =
          *reinterpret_cast<const float2*>(plan.partial_out + (s * rows + row) * problem.head_dim_v + column);
      merged.x = fmaf(weight, part.x, merged.x);
      merged.y = fmaf(weight, part.y, merged.y);
    }
    *reinterpret_cast<std::uint32_t*>(out + column) = pack<T>(merged.x, merged.y);
  }
  if (lane == 0 && problem.lse) {
    problem.lse.template at<float>(batch, head, token) = sum == 0.0f ? -kInfinity : top + __logf(sum);
  }
}

}  // namespace

void merge_splits(const Problem& problem, const Plan& plan, void* stream) {
  const std::int64_t rows = problem.num_heads * (problem.ragged() ? problem.total_q : problem.batch * problem.seqlen_q);
  const LaunchShape shape{.blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock, .threads = 32 * kRowsPerBlock};
  launch_dependent(problem.operation,
                   problem.dtype == DType::kFloat16 ? merge_kernel<__half> : merge_kernel<__nv_bfloat16>, shape,
                   problem.device.index, stream, problem, plan, rows);
}

}  // namespace onepass::cuda::hopper
