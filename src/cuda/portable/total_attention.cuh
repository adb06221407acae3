// cuda/portable/total_attention.cuh: one block sums the weights of its keys over all queries of one head. The keys
// stay, the queries stream past; sums live in registers and no atomics are needed.
#pragma once

#include "cuda/portable/float_product.cuh"
#include "cuda/portable/total_attention.h"

namespace onepass::cuda {

template <class T, int kHeadDim>
__global__ void __launch_bounds__(32 * TotalAttentionTile<std::is_same_v<T, float>, kHeadDim>::kWarps)
    total_attention_kernel(const __grid_constant__ TotalAttentionArguments arguments) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  using Shape = TotalAttentionTile<kFloat, kHeadDim>;
  constexpr int kThreads = 32 * Shape::kWarps, C = Shape::kQueries / 8;
  using KeyTile = SharedTile<T, Shape::kKeys, kHeadDim>;
  using QueryTile = SharedTile<T, Shape::kQueries, kHeadDim>;
  static_assert(KeyTile::kBytes + QueryTile::kBytes + Shape::kQueries * 4 == Shape::shared_bytes());
  extern __shared__ __align__(128) unsigned char shared[];
  unsigned char* const query_tile = shared + KeyTile::kBytes;
  float* const lse_tile = reinterpret_cast<float*>(query_tile + QueryTile::kBytes);

  const Problem& problem = arguments.problem;
  const int key_tile = blockIdx.x % arguments.key_tiles, plane = blockIdx.x / arguments.key_tiles;
  const int head = plane % static_cast<int>(problem.num_heads), batch = plane / static_cast<int>(problem.num_heads);
  const DeviceSequence sequence = device_sequence(problem, batch);
  const int first_key = key_tile * Shape::kKeys;
  if (first_key >= sequence.seqlen_k) return;

  const int head_dim = static_cast<int>(problem.head_dim);
  const auto q = global_rows<const T>(problem.q, batch, head, sequence.query_start, head_dim, arguments.vectorized_q);
  const auto k = global_rows<const T>(problem.k, batch, head / arguments.group_size, sequence.key_start, head_dim,
                                      arguments.vectorized_k);
  const float* const lse =
      static_cast<const float*>(problem.lse.data) + batch * problem.lse.batch_stride + head * problem.lse.head_stride;
  const ScoreTerms terms = score_terms(problem, batch, head);
  const int g = lane_id() / 4, t = lane_id() % 4, warp_row = (threadIdx.x / 32) * 16;
  const int key = first_key + warp_row + g;  // of this thread's first row
  const RowRanges<1> ranges = queries_of_rows<1>(problem, sequence, key);

  const int first_live = max(first_key, sequence.key_begin);
  const int last_live = min(first_key + Shape::kKeys, sequence.key_end) - 1;
  Range queries{0, 0};
  if (first_live <= last_live) {
    queries = {seeing_queries(problem, sequence, first_live).begin, seeing_queries(problem, sequence, last_live).end};
  }
  load_tile<KeyTile, Shape::kKeys, kThreads>(shared_address(shared), k, first_key, sequence.key_begin,
                                             sequence.key_end);
  float sums[2] = {0.0f, 0.0f};
  for (int first_query = queries.begin / Shape::kQueries * Shape::kQueries; first_query < queries.end;
       first_query += Shape::kQueries) {
    __syncthreads();  // nobody reads the last queries any more
    load_tile<QueryTile, Shape::kQueries, kThreads>(shared_address(query_tile), q, first_query, 0, sequence.seqlen_q);
    cp_async_commit();
    for (int i = threadIdx.x; i < Shape::kQueries; i += kThreads) {
      const int query = first_query + i;
      const float value =
          query < sequence.seqlen_q ? lse[(sequence.query_start + query) * problem.lse.token_stride] : kInfinity;
      lse_tile[i] = value == -kInfinity ? kInfinity : value;  // an empty row weighs nothing
    }
    cp_async_wait<0>();
    __syncthreads();

    float s[1][C][4];
    clear(s);
    if constexpr (kFloat) {
      FloatProduct::rows_by_rows<KeyTile, QueryTile, kHeadDim>(s, shared, warp_row, query_tile);
    } else {
      HalfProduct<T>::template rows_by_rows<KeyTile, QueryTile, kHeadDim>(s, shared_address(shared), warp_row,
                                                                          shared_address(query_tile));
    }
    const KeyRows at{first_query + 2 * t, key};
    apply_terms<kFloat>(s, terms, at, sequence);
    mask_scores(s, ranges, at.query0);
    for_each_element(s, [&](float& x, int, int c, int e) {
      const float weight = exp2_approx((x - lse_tile[8 * c + 2 * t + e % 2]) * kLog2e);
      sums[e / 2] += x == -kInfinity ? 0.0f : weight;  // hidden: also where the LSE is NaN
    });
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = quad_sum(sums[i]);
    if (t == 0 && key + 8 * i < sequence.seqlen_k) {
      const RowVector& total = problem.total_attention;
      float& stored = static_cast<float*>(total.data)[batch * total.batch_stride + head * total.head_stride +
                                                      (sequence.key_start + key + 8 * i) * total.token_stride];
      stored = arguments.add ? stored + sum : sum;
    }
  }
}

template <class T, int kHeadDim>
TotalAttentionKernel describe_total_attention() {
  using Shape = TotalAttentionTile<std::is_same_v<T, float>, kHeadDim>;
  return {total_attention_kernel<T, kHeadDim>, Shape::kKeys, 32 * Shape::kWarps, Shape::shared_bytes()};
}

template <int kHeadDim>
TotalAttentionKernel total_attention_kernel_for(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return describe_total_attention<__half, kHeadDim>();
    case DType::kBFloat16: return describe_total_attention<__nv_bfloat16, kHeadDim>();
    default: return describe_total_attention<float, kHeadDim>();
  }
}

}  // namespace onepass::cuda
