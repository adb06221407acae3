// cuda/portable/merge.cu: lse = log(e^lse_a + e^lse_b), out = (e^lse_a·out_a + e^lse_b·out_b) / (e^lse_a + e^lse_b).
#include "cuda/common/scalar.cuh"
#include "cuda/portable/choose.h"
#include "cuda/portable/operations.h"

namespace onepass::cuda {
namespace {

constexpr int kWarps = 4;  // of a block; a warp merges one row

template <class T>
__device__ T* row_of(const Operand& operand, std::int64_t batch, std::int64_t head, std::int64_t token) {
  return static_cast<T*>(operand.data) + batch * operand.batch_stride + head * operand.head_stride +
         token * operand.token_stride;
}
__device__ float* scalar_of(const RowVector& rows, std::int64_t batch, std::int64_t head, std::int64_t token) {
  return static_cast<float*>(rows.data) + batch * rows.batch_stride + head * rows.head_stride +
         token * rows.token_stride;
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) merge_kernel(const __grid_constant__ MergeProblem p) {
  const std::int64_t index = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (index >= p.batch * p.num_heads * p.seqlen) return;
  const std::int64_t token = index % p.seqlen, plane = index / p.seqlen;
  const std::int64_t batch = plane / p.num_heads, head = plane % p.num_heads;
  const float lse_a = *scalar_of(p.lse_a, batch, head, token), lse_b = *scalar_of(p.lse_b, batch, head, token);
  const bool has_a = lse_a != -kInfinity, has_b = lse_b != -kInfinity;
  float lse = has_a ? lse_a : lse_b;
  float weight_a = 1.0f, weight_b = 1.0f;
  if (has_a && has_b) {
    const float largest = fmaxf(lse_a, lse_b);
    weight_a = expf(lse_a - largest);
    weight_b = expf(lse_b - largest);
    const float sum = weight_a + weight_b;
    lse = largest + logf(sum);
    weight_a /= sum;  // not from lse: where it is large, its rounding is more than log(2)
    weight_b /= sum;
  }
  const T* const a = row_of<const T>(p.out_a, batch, head, token);
  const T* const b = row_of<const T>(p.out_b, batch, head, token);
  T* const out = row_of<T>(p.out, batch, head, token);
  for (std::int64_t d = threadIdx.x % 32; d < p.head_dim; d += 32) {
    float sum = 0.0f;  // an empty part weighs nothing, whatever stands in its rows
    if (has_a) sum += weight_a * to_float(a[d]);
    if (has_b) sum += weight_b * to_float(b[d]);
    out[d] = from_float<T>(sum);
  }
  __syncwarp();  // the outputs may be the inputs
  if (threadIdx.x % 32 == 0) *scalar_of(p.lse, batch, head, token) = lse;
}

}  // namespace

Unsupported supports_merge(const MergeProblem& problem) { return common_limits(problem.device, problem.dtype, 0); }

void merge(const MergeProblem& problem, const ExecutionContext& context) {
  const DeviceGuard guard(problem.device.index);
  const auto kernel = problem.dtype == DType::kFloat16    ? merge_kernel<__half>
                      : problem.dtype == DType::kBFloat16 ? merge_kernel<__nv_bfloat16>
                                                          : merge_kernel<float>;
  const LaunchShape shape{ceil_div(problem.batch * problem.num_heads * problem.seqlen, kWarps), 32 * kWarps};
  launch("merge_states", kernel, shape, problem.device.index, context.stream, problem);
}

}  // namespace onepass::cuda
