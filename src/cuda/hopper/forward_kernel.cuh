// cuda/hopper/forward_kernel.cuh: the forward kernel: roles and registers. Grid: at most one CTA an SM, each working
// through tiles until none is left.
#pragma once

#include "cuda/hopper/consumer.cuh"
#include "cuda/hopper/producer.cuh"

namespace onepass::cuda::hopper {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    forward_kernel(const __grid_constant__ TensorMaps maps, const __grid_constant__ Problem problem,
                   const __grid_constant__ Plan plan) {
  extern __shared__ std::uint8_t shared_memory[];
  const SharedLayout<Config> shared(shared_address(shared_memory));
  if (threadIdx.x == 0) {
    shared.init_barriers();
    tma_prefetch(&maps.q);
    tma_prefetch(&maps.k);
    tma_prefetch(&maps.v);
  }
  __syncthreads();
  allow_next_grid();

  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup == 0) {
    give_registers<Config::kProducerRegisters>();
    const Producer<Config> producer(problem, plan, maps, shared);
    if (threadIdx.x == 0) {
      producer.load_queries();
    } else if (threadIdx.x == 32) {
      producer.load_blocks();
    } else if (threadIdx.x >= 64 && threadIdx.x < 96) {
      producer.draw_tiles();
    }
  } else {
    take_registers<Config::kConsumerRegisters>();
    Consumer<Config>(problem, plan, maps.out, shared, warpgroup - 1).run();
  }
}

}  // namespace onepass::cuda::hopper
