#include "cuda/portable/backward_common.cuh"
#include "cuda/portable/sink_gradient.h"

namespace onepass::cuda {
namespace {

constexpr int kThreads = 128;

// dsink = −Σ exp(sink − lse)·delta over every query of one head, in a fixed order.
__global__ void __launch_bounds__(kThreads) sink_gradient_kernel(const __grid_constant__ BackwardArguments arguments) {
  const Problem& problem = arguments.problem.forward;
  const int head = blockIdx.x;
  const float sink = load_as_float(problem.sinks, problem.sinks_dtype, head);
  float sum = 0.0f;
  for (int batch = 0; batch < problem.batch; ++batch) {
    const DeviceSequence sequence = device_sequence(problem, batch);
    const RowStatistics* const rows =
        arguments.statistics + head * arguments.padded_rows + padded_start(problem, sequence, batch);
    const float* const lse = static_cast<const float*>(problem.lse.data) + batch * problem.lse.batch_stride +
                             head * problem.lse.head_stride + sequence.query_start * problem.lse.token_stride;
    for (int i = threadIdx.x; i < sequence.seqlen_q; i += kThreads) {
      const float of_row = lse[i * problem.lse.token_stride];
      if (of_row != -kInfinity) sum -= exp2_approx((sink - of_row) * kLog2e) * rows[i].delta;
    }
  }
  __shared__ float sums[kThreads];
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) static_cast<float*>(arguments.problem.dsinks)[head] = sums[0];
}

}  // namespace

SinkGradientKernel sink_gradient() { return {sink_gradient_kernel, kThreads}; }

}  // namespace onepass::cuda
