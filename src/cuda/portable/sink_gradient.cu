#include "cuda/portable/backward_common.cuh"
#include "cuda/portable/sink_gradient.h"

namespace onepass::cuda {
namespace {

constexpr int kThreads = 128;

// dsink = −Σ exp(sink − lse)·delta over every query of one head, in a fixed order.
__global__ void __launch_bounds__(kThreads) sink_gradient_kernel(const __grid_constant__ BackwardArguments arguments) {
  const Problem& problem = arguments.problem.forward;
  const int head = blockIdx.x;
  const float sink = load_as_float(problem.sinks, problem.sinks_dtype, head) * kLog2e;
  float sum = 0.0f;
  for (int batch = 0; batch < problem.batch; ++batch) {
    const DeviceSequence sequence = device_sequence(problem, batch);
    const RowStatistics* const rows =
        arguments.statistics + head * arguments.padded_rows + padded_start(problem, sequence, batch);
    for (int i = threadIdx.x; i < sequence.seqlen_q; i += kThreads) {
      sum -= exp2_approx(sink - rows[i].lse_log2) * rows[i].delta;
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
