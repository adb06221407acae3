// cuda/hopper/backward_kernel.cuh: the backward kernel's roles and registers, and the kernel that converts the sums of
// dQ.
#pragma once

#include "cuda/hopper/backward_consumer.cuh"
#include "cuda/hopper/backward_sums.cuh"

namespace onepass::cuda::hopper {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardMaps maps, const __grid_constant__ BackwardArguments arguments,
                    const __grid_constant__ BackwardPlan plan) {
  extern __shared__ std::uint8_t shared_memory[];
  const BackwardLayout<Config> shared(shared_address(shared_memory));
  if (threadIdx.x == 0) {
    shared.init_barriers();
    tma_prefetch(&maps.q);
    tma_prefetch(&maps.dout);
    tma_prefetch(&maps.k);
    tma_prefetch(&maps.v);
  }
  __syncthreads();
  allow_next_grid();

  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup == 0) {
    give_registers<Config::kProducerRegisters>();
    wait_for_previous_grid();
    BackwardProducer<Config> producer(arguments, plan, maps, shared);
    if (threadIdx.x < 32) {
      producer.load_keys();
    } else if (threadIdx.x < 64) {
      producer.load_blocks();
    }
  } else if (warpgroup == 1) {
    give_registers<Config::kSumRegisters>();
    QuerySums<Config>(arguments.group_size, shared).run();
  } else {
    take_registers<Config::kConsumerRegisters>();
    KeyGradients<Config>(arguments, maps, plan, shared, warpgroup - 2).run();
  }
}

// dQ = softmax_scale · the sums, which lie in fragments of 16 rows × 8 columns. One block converts 64 rows; a thread
// rows g and g + 8 of a warp's 16, 8 columns.
inline constexpr int kConvertThreads = 256;
template <class Config>
__global__ void __launch_bounds__(kConvertThreads)
    convert_sums_kernel(const __grid_constant__ BackwardArguments arguments) {
  using Element = typename Config::Element;
  constexpr int kColumnTiles = Config::kHeadDim / 8;
  wait_for_previous_grid();
  allow_next_grid();
  const Problem& problem = arguments.problem.forward;
  const int num_heads = static_cast<int>(problem.num_heads);
  const int plane = blockIdx.x / arguments.tiles, tile = blockIdx.x - plane * arguments.tiles;
  const int batch = plane / num_heads, head = plane - batch * num_heads;
  const DeviceSequence sequence = device_sequence(problem, batch);
  const int first_query = tile * Config::kQueries;
  if (first_query >= sequence.seqlen_q) return;
  const float* const sums =
      arguments.dq_sums +
      (head * arguments.padded_rows + padded_start(problem, sequence, batch) + first_query) * Config::kHeadDim;
  const int columns = static_cast<int>(problem.head_dim);
  const bool whole = arguments.vectorized.dq;
#pragma unroll
  for (int i = threadIdx.x; i < 32 * kColumnTiles; i += kConvertThreads) {
    // Neighbours have neighbouring columns: four write 64 bytes of a row.
    const int tile_column = i % 4 + i / 128 * 4, g = i / 4 % 8, warp = i / 32 % 4;
    const float4* const fragment =
        reinterpret_cast<const float4*>(sums + ((tile_column / 8 * 4 + warp) * 8 + tile_column % 8) * 128) + 4 * g;
    std::uint32_t words[2][4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float4 x = fragment[t];
      const float scale = problem.softmax_scale;
      words[0][t] = pack<Element>(x.x * scale, x.y * scale);
      words[1][t] = pack<Element>(x.z * scale, x.w * scale);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_query + 16 * warp + g + 8 * r, column = 8 * tile_column;
      if (query >= sequence.seqlen_q || column >= columns) continue;
      Element* const to =
          arguments.problem.dq.row<Element>(problem.ragged() ? 0 : batch, head, sequence.query_start + query) + column;
      if (whole) {
        *reinterpret_cast<uint4*>(to) = {words[r][0], words[r][1], words[r][2], words[r][3]};
      } else {
        const Element* const elements = reinterpret_cast<const Element*>(words[r]);
#pragma unroll
        for (int e = 0; e < 8; ++e) to[e] = elements[e];  // head_dim is a multiple of 8
      }
    }
  }
}

template <class Config>
BackwardKernel describe_backward() {
  return {backward_kernel<Config>, convert_sums_kernel<Config>, Config::kKeys, Config::kQueries, Config::kThreads,
          kConvertThreads,         Config::kSharedMemory};
}

template <int kHeadDim>
BackwardPair describe_backward_pair() {
  return {describe_backward<BackwardConfig<__half, kHeadDim>>(),
          describe_backward<BackwardConfig<__nv_bfloat16, kHeadDim>>()};
}

}  // namespace onepass::cuda::hopper
