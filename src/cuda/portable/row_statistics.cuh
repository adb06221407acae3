// cuda/portable/row_statistics.cuh: delta = rowsum(dO∘O) and the LSE, before the backward kernels.
//
// delta is the diagonal of dO·Oᵀ, computed by the same product as dP = dO·Vᵀ: where a row sees one key, O is that
// key's value, dP − delta is exactly 0, and so are the gradients. A sum in another order would leave rounding noise.
#pragma once

#include "cuda/portable/backward_common.cuh"

namespace onepass::cuda {

// One block: kStatisticsRows rows of one head, 16 a warp; and zeros where their dQ will be summed.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(2 * kStatisticsRows<std::is_same_v<T, float>>)
    row_statistics_kernel(const __grid_constant__ BackwardArguments arguments) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  constexpr int kRows = kStatisticsRows<kFloat>, kThreads = 2 * kRows;
  using Tile = SharedTile<T, kRows, kHeadDim>;
  extern __shared__ __align__(128) unsigned char shared[];
  const std::uint32_t base = shared_address(shared);

  const BackwardProblem& backward = arguments.problem;
  const Problem& problem = backward.forward;
  const int num_heads = static_cast<int>(problem.num_heads);
  const int tile = blockIdx.x % arguments.tiles, plane = blockIdx.x / arguments.tiles;
  const int batch = plane / num_heads, head = plane % num_heads;
  const DeviceSequence sequence = device_sequence(problem, batch);
  const int first_query = tile * kRows;
  if (first_query >= sequence.seqlen_q) return;

  const int columns = static_cast<int>(problem.head_dim_v);
  const auto out =
      global_rows<const T>(problem.out, batch, head, sequence.query_start, columns, arguments.vectorized.out);
  const auto dout =
      global_rows<const T>(backward.dout, batch, head, sequence.query_start, columns, arguments.vectorized.dout);
  load_tile<Tile, kRows, kThreads>(base, dout, first_query, 0, sequence.seqlen_q);
  load_tile<Tile, kRows, kThreads>(base + Tile::kBytes, out, first_query, 0, sequence.seqlen_q);
  cp_async_commit();
  const std::int64_t padded = head * arguments.padded_rows + padded_start(problem, sequence, batch) + first_query;
  if (arguments.dq_sums != nullptr) {
    float4* const sums = reinterpret_cast<float4*>(arguments.dq_sums + padded * kHeadDim);
    for (int i = threadIdx.x; i < kRows * kHeadDim / 4; i += kThreads) sums[i] = {0.0f, 0.0f, 0.0f, 0.0f};
  }
  cp_async_wait<0>();
  __syncthreads();

  const int warp_row = 16 * (threadIdx.x / 32), g = lane_id() / 4, t = lane_id() % 4;
  float products[1][2][4];  // of the warp's rows with each other
  clear(products);
  if constexpr (kFloat) {
    FloatProduct::rows_by_rows<Tile, Tile, kHeadDim>(products, shared, warp_row,
                                                     shared + Tile::kBytes + warp_row * Tile::kRowBytes);
  } else {
    HalfProduct<T>::template rows_by_rows<Tile, Tile, kHeadDim>(products, base, warp_row,
                                                                base + Tile::kBytes + warp_row * Tile::kRowBytes);
  }
  const bool mine = t == g / 2;  // this lane holds (g, g) and (g + 8, g + 8)
  const float* const lse_rows = static_cast<const float*>(problem.lse.data) + batch * problem.lse.batch_stride +
                                head * problem.lse.head_stride + sequence.query_start * problem.lse.token_stride;
  float lse[2];
  bool beyond = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first_query + warp_row + g + 8 * half;
    lse[half] = mine && query < sequence.seqlen_q ? lse_rows[query * problem.lse.token_stride] : -kInfinity;
    beyond |= lse[half] != -kInfinity && fabsf(lse[half] * kLog2e) >= kFusedLimit;
  }
  const bool natural = __syncthreads_or(beyond || kFloat);  // float32: one rounding less
  if (threadIdx.x == 0) arguments.natural[padded / kRows] = natural;
  if (!mine) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    RowStatistics statistics{kInfinity, 0.0f};
    const float delta = g % 2 ? products[0][half][2 * half + 1] : products[0][half][2 * half];
    if (lse[half] != -kInfinity) statistics = {natural ? lse[half] : lse[half] * kLog2e, delta};
    arguments.statistics[padded + warp_row + g + 8 * half] = statistics;
  }
}

}  // namespace onepass::cuda
